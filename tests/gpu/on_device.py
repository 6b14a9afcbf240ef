"""What the tests here check, for any device: tests/bench/test_gpu_checks.py runs the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import golden
import torch
from engine_cases import Case, assert_exact, run_step
from test_golden import OUTPUT, STEPS, row_order
from torch import Tensor

import gcahng
from gcahng.bench.agreement import Agreement, outputs
from gcahng.bench.cases import Case as BenchCase
from gcahng.testing import seeded

# -- whole steps


def check_against_reference(device: str, case: Case, impl: str) -> None:
    """A training step in fp64: loss, gradients, logs and statistics. What is allowed is wider than on CPUs, for want of
    a measurement."""
    z, labels = (x.to(device) for x in case.batch())
    wanted = run_step(case.loss("reference").to(device), z, labels)
    assert_exact(run_step(case.loss(impl).to(device), z, labels), wanted, outputs=1e-11, gradients=1e-9)


def check_precisions(device: str, impl: str, precisions: tuple[str, ...], n: int = 30, dim: int = 64) -> None:
    """As near to fp64 as the reference at the same precision."""
    agreement = Agreement(BenchCase(n, 3, dim, 2, device=device))
    for precision in precisions:
        for memory in ("store", "hidden", "recompute"):
            case = BenchCase(n, 3, dim, 2, impl=impl, precision=precision, memory=memory, device=device)
            assert agreement.problem(case) is None, f"{case.name}: {agreement.problem(case)}"


def check_step_twice(device: str, impl: str, precision: str, n: int = 30, dim: int = 64) -> None:
    """The same bits from two steps, whatever lies in memory that is used again."""
    case = BenchCase(n, 3, dim, 2, impl=impl, precision=precision, device=device)
    first = outputs(case)
    outputs(BenchCase(n + 6, 3, dim, 1, impl=impl, precision=precision, device=device))
    second = outputs(case)
    assert first.keys() == second.keys() and first
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def train(device: str, steps: int, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Losses, gradients of the embeddings, logs, and the weights after so many steps on batches of one size."""
    torch.manual_seed(0)
    gca = gcahng.GCAHNGLoss(12, 32, layers=2, seed=3, num_per_class=3, **options).to(device, dtype)
    gca.mean_metric, gca.mean_generator = 1.25, 40.0
    found: dict[str, Tensor] = {}
    for step in range(steps):
        z = seeded(24, 32, seed=step, dtype=dtype, device=device).requires_grad_()
        labels = torch.arange(8).roll(step).repeat(3).to(device)
        loss = gca(z, labels)
        loss.backward()
        found |= {f"loss {step}": loss.detach().clone(), f"dz {step}": z.grad.clone()}
        found |= {f"{name} {step}": value.clone() for name, value in gca.generator_step().items()}
    # Without the bytes of the optimizers, which are no numbers to compare.
    return found | {name: x.clone() for name, x in gca.state_dict().items() if name != "_extra_state"}


def check_replay(device: str, impl: str, **captured: bool) -> None:
    """Four steps on four batches with captured passes are those without, in fp64, where rounding hides no mistake."""
    wanted = train(device, 4, torch.float64, impl=impl, edge_memory="store")
    found = train(device, 4, torch.float64, impl=impl, edge_memory="store", **captured)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = tensor.double().abs().max().item()
        error = (found[name].double() - tensor.double()).abs().max().item()
        assert error <= 1e-9 * scale + 1e-15, f"{name}: off by {error:.3g} of {scale:.3g}"


def check_whole_step(device: str, impl: str, steps: int = 4) -> None:
    """Forward, backward, the model's step and the generator's, in one graph and replayed, are the steps run plainly."""

    def start() -> tuple[gcahng.GCAHNGLoss, torch.nn.Linear, Callable[[], Tensor], Tensor]:
        torch.manual_seed(0)
        options = {"num_per_class": 3, "check": "deferred", "edge_memory": "store", "cuda_graph": True, "seed": 1}
        gca = gcahng.GCAHNGLoss(8, 32, impl=impl, **options).to(device).double()
        gca.mean_metric, gca.mean_generator = 2.0, 20.0
        model = torch.nn.Linear(5, 32).to(device).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device=device), capturable=True)
        x, labels = torch.empty(24, 5, dtype=torch.float64, device=device), torch.arange(8).repeat(3).to(device)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = gca(model(x), labels)
            loss.backward()
            optimizer.step()
            gca.generator_step()
            return loss.detach()

        return gca, model, step, x

    batches = [seeded(24, 5, seed=k, dtype=torch.float64).to(device) for k in range(2 + steps)]
    gca, model, step, x = start()
    wanted = []
    for batch in batches:
        x.copy_(batch)
        wanted.append(step())
    other, twin, step, x = start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:2]:
            x.copy_(batch)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for batch, value in zip(batches[2:], wanted[2:], strict=True):
        x.copy_(batch)
        graph.replay()
        torch.testing.assert_close(loss, value, rtol=1e-9, atol=0)
    gca.end_epoch()
    other.end_epoch()
    pairs = [(gca.state_dict(), other.state_dict()), (model.state_dict(), twin.state_dict())]
    for one, two in pairs:
        for name, tensor in one.items():
            if name != "_extra_state":
                torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


# -- the authors' numbers


def to_device(case: golden.Golden, device: str) -> golden.Golden:
    return golden.Golden(case.config, {name: tensor.to(device) for name, tensor in case.tensors.items()})


def check_golden_generate(device: str, name: str, impl: str) -> None:
    case = golden.load(name)
    order = row_order(case, True, torch.Generator().manual_seed(1)).to(device)
    gca, case = case.loss(impl=impl).to(device), to_device(case, device)
    made = gca.generate(case["z"][order], case["labels"][order], u=case["mix.u"])
    golden.close(made.coefficients, case["edge_para"][order][:, order], OUTPUT, "coefficients")
    place = torch.searchsorted(made.classes, case["labels"][: case.config["num_classes_in_batch"]])
    golden.close(made.negatives[:, place][:, :, place], case["mix.negatives"], OUTPUT, "negatives")


def check_golden_training(device: str, name: str, impl: str) -> None:
    """Three of the authors' training steps: losses, and every weight and statistic after them."""
    cpu = golden.load(name)
    gca, model, case = cpu.loss(impl=impl).to(device), cpu.feature_extractor().to(device), to_device(cpu, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    for step, wanted in enumerate(case.config["train_metrics"]):
        order = row_order(cpu, True, generator).to(device)
        x, labels, u = case["train.x"][step][order], case["train.labels"][step][order], case["train.u"][step]
        optimizer.zero_grad()
        loss = gca(model(x), labels, u=u[0])
        golden.close(loss.cpu(), torch.tensor(wanted["J_metric"], dtype=torch.float64), STEPS, "loss")
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 10.0)
        optimizer.step()
        logs = gca.generator_step(u=u[1])
        golden.close(logs["J_gen"].cpu(), torch.tensor(wanted["J_gen"], dtype=torch.float64), STEPS, f"J_gen {step}")
    official = gcahng.official_state_dict(gca)
    official |= {f"feature_extractor.{key}": tensor for key, tensor in model.state_dict().items()}
    wanted = case.under("final.")
    assert official.keys() == wanted.keys()
    for key, tensor in wanted.items():
        golden.close(official[key], tensor, STEPS, key)
