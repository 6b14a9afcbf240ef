"""Captured passes: the memory that they read and write, with a stand-in for the CUDA graph; and that nothing in a pass
waits for the device or depends on data, which a capture would not survive."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from tiers import few
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gcahng import GCAHNGLoss, UserError
from gcahng.engine import cuda_graph, operators
from gcahng.engine.cuda_graph import GraphCache
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.generator_pass import GeneratorTargets
from gcahng.engine.operators import PassInputs, Wanted, _run_generator, _run_metric
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.engine.workspace import Workspace
from gcahng.nn import GraphNetwork
from gcahng.reference.edge_update import Dropout
from gcahng.reference.training_step import Batch, GeneratorWeights
from gcahng.testing import seeded

LABELS = torch.tensor([4, 1, 1, 7, 4, 7, 0, 0])


def recorded(run, device):
    """A stand-in for cuda_graph.record: what it returns reads the gradients that lay there, whatever lies there now."""
    (parameters,) = (cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, list))
    mine = [p.grad for p in parameters]

    def replay() -> None:
        given = [p.grad for p in parameters]
        cuda_graph._set_gradients(parameters, mine)
        run()
        cuda_graph._set_gradients(parameters, given)

    return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in on the CPU: a replay runs the pass again, on the memory of its capture. Counts the captures."""
    counted = []

    def capture(run, device):
        outputs = run()
        counted.append(len(outputs))
        for output in outputs:
            output.detach().fill_(torch.nan if output.is_floating_point() else -1)

        def replay() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return replay, outputs

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph, "record", recorded)
    monkeypatch.setattr(GCAHNGLoss, "_passes", engine_of)
    return counted


def engine_of(gca: GCAHNGLoss, batch: Batch) -> Engine:
    """The loss's engine, on devices too that have no CUDA graphs."""
    return Engine(gca.impl, PassOptions(gca.edge_memory, gca.edge_dtype, gca._graphs))


def train(gca: GCAHNGLoss, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    found = []
    for z, labels in batches:
        z = z.clone().requires_grad_()
        loss = gca(z, labels)
        loss.backward()
        found += [loss.detach(), z.grad, *gca.generator_step().values()]
    return found + [value for value in gca.state_dict().values() if isinstance(value, Tensor)]


def make(captured: bool, **options) -> GCAHNGLoss:
    torch.manual_seed(0)
    gca = GCAHNGLoss(8, 16, layers=2, heads=2, seed=3, impl="torch", **options)
    gca._graphs = GraphCache() if captured else None
    return gca


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_replayed_steps_are_the_same_bits(captures: list[int], compat: str) -> None:
    batches = [(seeded(len(LABELS), 16, seed=seed), LABELS.roll(seed)) for seed in range(4)]
    wanted = train(make(False, compat=compat), batches)
    assert captures == []
    found = train(make(True, compat=compat), batches)
    assert len(captures) == 2, "one of each phase, for all steps"
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_batches_are_captured_anew_and_few_are_kept(captures: list[int]) -> None:
    gca = make(True)
    batches = [(seeded(2 * classes, 16, seed=1), torch.arange(classes).repeat(2)) for classes in (2, 3, 4, 5, 6, 2)]
    wanted = train(make(False), batches)
    assert all(torch.equal(a, b) for a, b in zip(train(gca, batches), wanted, strict=True))
    assert len(captures) == 2 * len(batches)  # the first kind was dropped when it came again
    assert len(gca._graphs._captured) == cuda_graph.MOST


def test_a_pass_captured_in_inference_mode_is_replayed_outside(captures: list[int]) -> None:
    gca, batch = make(True).eval(), (seeded(len(LABELS), 16, seed=1), LABELS)
    with torch.inference_mode():
        wanted = gca(*batch)
    with torch.no_grad():
        assert torch.equal(gca(*batch), wanted)
    assert len(captures) == 1


def test_other_settings_are_captured_anew(captures: list[int]) -> None:
    """The seed, dropout and the mode are constants of a pass, not inputs."""
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True), make(False)
    recompute = replace(gca.engine, edge_memory="recompute")
    for change in ({}, {"seed": 4}, {"edge_dropout": 0.5}, {"edge_dropout": 0.0}, {"engine": recompute}):
        for one in (gca, other):
            for name, value in change.items():
                setattr(one, name, value)
        assert same(train(gca, batch), train(other, batch)), change
    assert len(captures) == 10
    found, wanted = (one.eval()(*batch[0]) for one in (gca, other))
    assert torch.equal(found, wanted) and len(captures) == 11


def test_the_kind_that_was_used_last_is_kept_longest(captures: list[int]) -> None:
    batches = [(seeded(2 * classes, 16, seed=1), torch.arange(classes).repeat(2)) for classes in (2, 3, 4, 5, 2, 6, 2)]
    train(make(True), batches)
    assert len(captures) == 2 * 5, "6 took the place of 3"


def test_what_auto_stands_for_is_captured_anew(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True, edge_memory="auto"), make(False)
    for count, memory in ((2, "store"), (4, "recompute"), (4, "store")):
        monkeypatch.setattr("gcahng.engine.operators.choose_memory", lambda size, free, memory=memory: memory)
        found, wanted = train(gca, batch), train(other, batch)
        torch.testing.assert_close(found, wanted)
        assert len(captures) == count


def test_few_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "record", lambda run, device: lambda: None)
    graphs, parameters = GraphCache(), [torch.nn.Parameter(torch.zeros(2)) for _ in range(cuda_graph.MOST + 2)]
    for parameter in (*parameters[:3], parameters[0], *parameters[3:]):
        parameter.grad = torch.ones(2)
        graphs.step(lambda: None, [parameter], [])
        assert torch.equal(parameter.grad, torch.ones(2))
    kept = [places[0] for places, _ in graphs._steps]
    assert kept == [parameter.data_ptr() for parameter in (parameters[0], *parameters[3:])]


def test_moved_weights_are_captured_anew(captures: list[int]) -> None:
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True), make(False)
    train(gca, batch)
    train(other, batch)
    for parameter in gca.graph_network.parameters():
        parameter.data = parameter.data.clone()
    found, wanted = train(gca, batch), train(other, batch)
    assert len(captures) == 4 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_switches_of_torch_are_captured_anew(captures: list[int]) -> None:
    batch, gca = [(seeded(len(LABELS), 16, seed=1), LABELS)], make(True)
    before = torch.backends.cuda.matmul.fp32_precision
    train(gca, batch)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        train(gca, batch)
        assert len(captures) == 4
        torch.use_deterministic_algorithms(True)
        train(gca, batch)
        assert len(captures) == 6
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_cache_is_not_copied_and_goes_with_its_loss(captures: list[int]) -> None:
    gca = make(True)
    train(gca, [(seeded(len(LABELS), 16, seed=1), LABELS)])
    twin, again = copy.deepcopy(gca), pickle.loads(pickle.dumps(gca._graphs))
    assert twin._graphs.number != gca._graphs.number != again.number
    assert not twin._graphs._captured and not again._captured
    number = gca._graphs.number
    assert cuda_graph.cache(number) is gca._graphs
    del gca
    gc.collect()
    with pytest.raises(KeyError):
        cuda_graph.cache(number)


class Cuda:
    """A stand-in for torch.cuda: which device is the current one, whose stream, and what captures ask for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.asked = torch.device("cuda", 0), []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: MagicMock(device=self.at))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: MagicMock(device=self.at))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
        monkeypatch.setattr(cuda_graph, "_streams", {})

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.at = self.at, device
        yield
        self.at = before

    @contextmanager
    def stream(self, stream: MagicMock) -> Iterator[None]:
        with self.device(stream.device):
            yield

    @contextmanager
    def graph(self, graph: MagicMock, stream: MagicMock | None = None, capture_error_mode: str = "global"):
        self.asked.append((stream, capture_error_mode))
        with self.device(self.at if stream is None else stream.device):
            yield


def test_a_capture_is_on_its_own_device_and_lets_other_threads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, devices = Cuda(monkeypatch), [torch.device("cuda", number) for number in (1, 0, 1)]
    for device in devices:
        ran = []

        def run(ran: list[torch.device] = ran) -> list[Tensor]:
            ran.append(cuda.at)
            return []

        cuda_graph.capture(run, device)
        cuda_graph.record(run, device)
        assert ran == [device] * 4  # two to warm up, and two captures
    assert cuda.at == devices[1]
    assert [stream.device for stream, _ in cuda.asked] == [device for device in devices for _ in range(2)]
    assert len({id(stream) for stream, _ in cuda.asked}) == 2, "one stream a device: the library's memory is by stream"
    assert {mode for _, mode in cuda.asked} == {"thread_local"}


def test_refusals() -> None:
    z = seeded(len(LABELS), 16, seed=0)
    with pytest.raises(UserError, match="cuda_graph is 1; it must be True or False"):
        GCAHNGLoss(8, 16, cuda_graph=1)
    with pytest.raises(UserError, match="cuda_graph is True and the embeddings are on cpu; CUDA graphs need a CUDA"):
        GCAHNGLoss(8, 16, heads=2, cuda_graph=True)(z, LABELS)


@pytest.mark.parametrize("memory", few(["store", "hidden", "recompute"]))
@pytest.mark.parametrize("stages", ["torch", "cuda", "triton", "cuda+triton"])
def test_a_pass_neither_waits_nor_depends_on_data(stages: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: what would need a value raises. Kernels are left out."""
    products = ("mlp_in.product_forward", "mlp_in.product_backward", "mlp_out.product_forward", "edge_update.forward")
    for launcher in products:
        monkeypatch.setattr(f"gcahng.kernels.{launcher}", lambda *_: None)
    with FakeTensorMode():
        network, classifier = GraphNetwork(16, 8, layers=2, heads=2), torch.nn.Linear(16, 8)
        draw = torch.zeros((), dtype=torch.int64)
        batch = Batch(
            torch.randn(12, 16), torch.arange(6), 2, torch.rand(()), torch.rand(2, 1), Dropout(0.1, 3, draw, True), True
        )
        s = Engine(stages, PassOptions(memory))._settings(network, batch)
        parameters, buffers = parameter_list(network), buffer_list(network)
        inputs = PassInputs(batch.z, batch.classes, batch.pull, batch.u, draw, parameters, buffers)
        _run_metric(inputs, s, Wanted(True, True), Workspace())
        head = (classifier.weight.detach(), classifier.bias.detach())
        targets = GeneratorTargets(batch.classes, head, None, GeneratorWeights(1.0, 1.0, 1.0))
        found = _run_generator(inputs, s, targets, True, Workspace())
        with pytest.raises(DataDependentOutputException):
            bool(found.values[0] > 0)


# -- a whole step, for a graph of the caller's


def make_whole(captured: bool, **options) -> GCAHNGLoss:
    """Rates that fp32 holds, in every epoch."""
    torch.manual_seed(0)
    rates = {"graph_lr": 2**-12, "classifier_lr": 2**-10, "epochs": 2}
    return GCAHNGLoss(8, 16, heads=2, seed=3, impl="torch", cuda_graph=captured, **rates, **options)


def batches(first: int, last: int) -> list[tuple[Tensor, Tensor]]:
    return [(seeded(len(LABELS), 16, seed=seed), LABELS.roll(seed)) for seed in range(first, last)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rates_on_the_device_are_written_in_place(captures: list[int]) -> None:
    gca, plain = make_whole(True), make_whole(False)
    (group,) = gca.graph_optimizer.param_groups
    rate = group["lr"]
    assert group["capturable"] and rate.dtype is torch.float32
    for epoch in range(3):
        assert group["lr"] is rate and rate.item() == plain.graph_optimizer.param_groups[0]["lr"]
        assert rate.item() == (2**-12, 2**-13, 0.0)[epoch]
        assert same(train(gca, batches(2 * epoch, 2 * epoch + 2)), train(plain, batches(2 * epoch, 2 * epoch + 2)))
        gca.end_epoch()
        plain.end_epoch()
    assert len(gca._graphs._steps) == 3, "of the graph network's two steps and the classifier's, one graph each"
    twin = copy.deepcopy(gca)
    assert twin.graph_optimizer.param_groups[0]["lr"] is not rate
    assert same(train(twin, batches(6, 7)), train(plain, batches(6, 7)))


@pytest.mark.parametrize("captured", [True, False])
def test_a_state_goes_on_with_capturable_optimisers_and_without(captures: list[int], captured: bool) -> None:
    first, other = make_whole(captured), make_whole(not captured)
    train(first, batches(0, 2))
    first.end_epoch()
    train(first, batches(2, 3))
    state = first.state_dict()
    for name in ("graph_optimizer", "classifier_optimizer"):
        (group,) = state["_extra_state"][name]["param_groups"]
        assert isinstance(group["lr"], float) and not group["capturable"] and "rate" not in group
    train(other, batches(5, 6))
    other.load_state_dict(state)
    (group,) = other.graph_optimizer.param_groups
    assert isinstance(group["lr"], Tensor) is group["capturable"] is not captured
    assert same(train(other, batches(3, 5)), train(first, batches(3, 5)))
    first.end_epoch()
    other.end_epoch()
    assert torch.equal(first.mean_metric, other.mean_metric)
    assert first.state_dict()["_extra_state"]["graph_optimizer"]["param_groups"][0]["lr"] == 0.0


def test_a_rate_moves_with_its_parameters(captures: list[int]) -> None:
    gca = make_whole(True).double()
    (group,) = gca.graph_optimizer.param_groups
    assert group["lr"].dtype is torch.float32
    gca.to("meta")
    assert group["lr"].item() == 2**-12


def test_the_means_count_steps_that_the_host_has_not_seen(captures: list[int]) -> None:
    gca = make_whole(True)
    train(gca, batches(0, 3))
    gca._steps_in_epoch = 1  # captured once, replayed twice
    total = gca._metric_sum.clone()
    assert gca.state_dict()["_extra_state"]["steps_in_epoch"] == 3
    gca.end_epoch()
    assert torch.equal(gca.mean_metric, total / 3)
    gca.end_epoch()
    assert torch.equal(gca.mean_metric, total / 3), "an epoch without steps keeps the old means"


def test_a_step_that_is_not_finite_is_left_out_on_the_device(captures: list[int]) -> None:
    gca, scaler = make_whole(True), torch.amp.GradScaler("cpu", init_scale=2.0)
    train(gca, batches(0, 1))
    optimizer = gca.graph_optimizer
    before = copy.deepcopy((gca.graph_network.state_dict(), optimizer.state_dict()))
    for parameter in gca.graph_network.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    gca._step_graph_network(scaler.scale(torch.ones(())))
    after = (gca.graph_network.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for parameter in gca.graph_network.parameters():
        parameter.grad = torch.ones_like(parameter)
    gca._step_graph_network(scaler.scale(torch.ones(())))
    assert not torch.equal(gca.graph_network.node_input.weight, before[0]["node_input.weight"])


def test_inside_a_capture_passes_are_part_of_it(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured within a capture, nothing is shared with other passes, and no value is asked for."""
    gca, plain = make_whole(True, check="auto"), make_whole(False)
    wanted = train(plain, batches(0, 3))
    for place in ("gcahng.engine.cuda_graph", "gcahng.losses.gca_hng", "gcahng.losses.optimizers"):
        monkeypatch.setattr(f"{place}.capturing", lambda: True)
    prepare = operators._prepare

    def prepared(inputs, settings, workspace: Workspace, **named):
        assert isinstance(workspace, Workspace)
        return prepare(inputs, settings, workspace, **named)

    monkeypatch.setattr(operators, "_prepare", prepared)
    monkeypatch.setattr(operators, "_workspace", None)
    monkeypatch.setattr(gca, "_raise_deferred", None)
    assert same(train(gca, batches(0, 3)), wanted)
    gca.generate(*batches(3, 4)[0])
    assert captures == [] and not gca._graphs._captured and not gca._graphs._steps


def test_a_whole_step_neither_waits_nor_depends_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: loss, backward, the generator's step and the caller's own; checks wait for end_epoch."""
    monkeypatch.setattr(
        GCAHNGLoss, "_passes", lambda gca, batch: Engine(gca.impl, PassOptions(gca.edge_memory, gca.edge_dtype))
    )
    monkeypatch.setattr("gcahng.losses.optimizers.capturing", lambda: True)
    with FakeTensorMode():
        gca = make_whole(True, num_per_class=2, check="deferred", edge_memory="store")
        model = torch.nn.Linear(4, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), fused=True, capturable=True)
        for _ in range(2):
            loss = gca(model(torch.randn(8, 4)), torch.randint(0, 8, (8,)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gca.generator_step()
        with pytest.raises(DataDependentOutputException):
            gca.end_epoch()
