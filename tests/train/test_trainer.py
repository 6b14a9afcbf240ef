"""The training step: every loss trains, the seed decides the bits, and a saved state continues with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiers import few

from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.runs.checkpoint import load_checkpoint, save_checkpoint
from gcahng.train import GcaConfig, OptimizerConfig, TrainConfig
from gcahng.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
GCA_LOGS = {"loss", "J_m", "J_syn", "J_gce", "J_cls", "J_soft", "J_sim", "J_div", "J_gen"}
# Adds the same to every logit of an edge, so that its gradient is zero, and it starts at zero.
UNMOVED = "edge.key.bias"


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    for name, value in trainer.objective.state_dict().items():
        if isinstance(value, torch.Tensor):
            state[f"loss.{name}"] = value.clone()
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.train_step()["loss"].item() for _ in range(count)]


@pytest.mark.parametrize("on_top", [False, True], ids=["alone", "with_gca_hng"])
@pytest.mark.parametrize("base", ["npair", "proxy_anchor", "supcon", "arcface", "multi_similarity", "soft_triple"])
def test_every_loss_trains(base: str, on_top: bool, small_config: MakeConfig, small_data: DataSplits) -> None:
    config = small_config(loss="gca_hng", gca=GcaConfig(base=base)) if on_top else small_config(loss=base)
    trainer = Trainer(config, small_data)
    before = weights(trainer)
    for _ in range(4):
        logs = trainer.train_step()
        assert set(logs) == (GCA_LOGS if on_top else {"loss", "J_m"})
        assert all(value.ndim == 0 and not value.requires_grad and value.isfinite() for value in logs.values())
    after = weights(trainer)
    for name, _ in trainer.model.named_parameters():
        assert not torch.equal(before[f"model.{name}"], after[f"model.{name}"]), name
    for name, value in trainer.objective.named_parameters():
        if value.requires_grad:
            moved = not torch.equal(before[f"loss.{name}"], after[f"loss.{name}"])
            assert moved or name.endswith(UNMOVED), name


def test_same_seed_same_weights(small_config: MakeConfig, small_data: DataSplits) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(1000 + len(runs))  # what the caller's generator holds must not matter
        trainer = Trainer(small_config(seed=seed), small_data)
        steps(trainer, 5)
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss": "npair", "optimizer": OptimizerConfig(schedule="cosine")},
        {"gca": GcaConfig(base="proxy_anchor")},
    ],
    ids=["gca_hng", "npair-cosine", "gca_hng-proxy_anchor"],
)
def test_a_checkpoint_goes_on_with_the_same_bits(
    fields: dict[str, object], small_config: MakeConfig, small_data: DataSplits, tmp_path: Path
) -> None:
    config = small_config(**fields)
    trainer = Trainer(config, small_data)
    steps(trainer, 4)  # past the end of an epoch, and into the next
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", trainer.state_dict())
    expected = steps(trainer, 4)

    torch.manual_seed(77)
    resumed = Trainer(config, small_data)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoints" / "last.pt"))
    assert resumed.step == 4
    assert steps(resumed, 4) == expected
    assert same(weights(resumed), weights(trainer))


def test_what_is_drawn_from_torchs_generator_goes_on_too(small_config: MakeConfig, small_data: DataSplits) -> None:
    """As with a network that has dropout."""

    def noisy() -> Trainer:
        trainer = Trainer(small_config(loss="npair"), small_data)
        trainer.model.register_forward_hook(lambda module, images, z: z + torch.rand_like(z))
        return trainer

    trainer = noisy()
    steps(trainer, 2)
    state = copy.deepcopy(trainer.state_dict())
    expected = steps(trainer, 2)
    resumed = noisy()
    resumed.load_state_dict(state)
    assert steps(resumed, 2) == expected


def test_a_checkpoint_of_other_data_is_refused(small_config: MakeConfig, small_data: DataSplits) -> None:
    state = Trainer(small_config(), small_data).state_dict()
    with pytest.raises(UserError, match="the options of data, or the version of matplotlib"):
        Trainer(small_config(), replace(small_data, digest="0" * 16)).load_state_dict(state)


def test_a_checkpoint_of_the_same_files_is_taken(small_config: MakeConfig, small_data: DataSplits) -> None:
    data = replace(small_data, listing="names")
    trainer = Trainer(small_config(), data)
    trainer.train_step()
    resumed = Trainer(small_config(), replace(data, digest="0" * 16))
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.step == 1
    with pytest.raises(UserError, match="files were added, removed or renamed"):
        Trainer(small_config(), replace(data, digest="0" * 16, listing="others")).load_state_dict(trainer.state_dict())


def test_running_means_roll_every_epoch(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(steps_per_epoch=3), small_data)
    seen = [trainer.train_step()["J_m"] for _ in range(3)]
    torch.testing.assert_close(trainer.objective.gca.mean_metric, torch.stack(seen).mean(), rtol=1e-6, atol=0)
    rolled = trainer.objective.gca.mean_metric.clone()
    trainer.train_step()
    assert torch.equal(trainer.objective.gca.mean_metric, rolled)


def test_learning_rates(small_config: MakeConfig, small_data: DataSplits) -> None:
    def rates(**fields: object) -> list[list[float]]:
        trainer = Trainer(small_config(**fields), small_data)
        found = []
        for _ in range(6):
            trainer.train_step()
            found.append([group["lr"] for group in trainer.optimizer.param_groups])
        return found

    assert rates(loss="npair", optimizer=OptimizerConfig(lr=1e-3)) == [[1e-3]] * 6
    cosine = [rate for (rate,) in rates(loss="supcon", optimizer=OptimizerConfig(lr=1.0, schedule="cosine"))]
    assert cosine == pytest.approx([1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873], abs=1e-7)
    assert rates(loss="proxy_anchor")[0] == pytest.approx([1e-3, 0.1])
    assert rates(loss="arcface")[0] == pytest.approx([1e-3, 0.01])
    assert rates(loss="soft_triple")[0] == pytest.approx([1e-3, 0.1])
    assert rates(loss="multi_similarity")[0] == [1e-3]
    assert rates(gca=GcaConfig(base="arcface"), optimizer=OptimizerConfig(proxy_lr=0.5))[0] == [1e-3, 0.5]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_by_value(precision: str, small_config: MakeConfig, small_data: DataSplits) -> None:
    """Before the optimizer sees them, and after a scaler has divided them by its scale."""
    seen = {}
    for clip in (1e-3, 10.0):
        options = OptimizerConfig(clip_value=clip)
        trainer = Trainer(small_config(loss="npair", precision=precision, optimizer=options), small_data)
        if precision == "fp16":  # its first scale overflows
            trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 16.0})
        seen[clip] = []

        def record(optimizer: torch.optim.Optimizer, *_: object, into: list[torch.Tensor] = seen[clip]) -> None:
            into += [p.grad.clone() for p in optimizer.param_groups[0]["params"]]

        trainer.optimizer.register_step_pre_hook(record)
        trainer.train_step()
    assert max(gradient.abs().max() for gradient in seen[10.0]) > 1e-2
    for clipped, gradient in zip(seen[1e-3], seen[10.0], strict=True):
        assert torch.equal(clipped, gradient.clamp(-1e-3, 1e-3))


@pytest.mark.parametrize(("precision", "network", "loss"), [("fp32", 0, 0), ("bf16", 1, 1), ("fp16", 1, 0)])
def test_what_runs_under_autocast(
    precision: str, network: bool, loss: bool, small_config: MakeConfig, small_data: DataSplits
) -> None:
    """fp16 is for the network alone: the generator's gradients do not fit into its range."""
    trainer = Trainer(small_config(precision=precision), small_data)
    seen = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.append((enabled, enabled and dtype, inputs[0].dtype))

    trainer.model.register_forward_pre_hook(look)
    trainer.objective.register_forward_pre_hook(look)
    trainer.train_step()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    assert seen == [(network, network and dtype, torch.uint8), (loss, loss and dtype, torch.float32)]


def test_bf16_trains_under_autocast(small_config: MakeConfig, small_data: DataSplits) -> None:
    lines = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(small_config(precision=precision), small_data)
        lines[precision] = steps(trainer, 3)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert lines["bf16"] != lines["fp32"]
    assert lines["bf16"] == pytest.approx(lines["fp32"], rel=0.1)


def put(*path: object, value: object) -> Callable[[dict], None]:
    """Replaces an entry of a nested state."""

    def edit(state: dict) -> None:
        for step in path[:-1]:
            state = state[step]
        state[path[-1]] = value

    return edit


MALFORMED = {
    "model-shape": (put("model", "head.1.weight", value=torch.zeros(2, 2)), "size mismatch for head.1.weight"),
    "loss-shape": (put("loss", "gca.classifier.bias", value=torch.zeros(2)), r"classifier\.bias has shape \(2,\)"),
    "moment-shape": (put("optimizer", "state", 0, "exp_avg", value=torch.zeros(1)), r"a weight of shape \(1,\)"),
    "moment-expanded": (
        lambda state: put("optimizer", "state", 0, "exp_avg", value=torch.zeros(1).expand(sized(state)))(state),
        "exp_avg of a weight is an expanded view",
    ),
    "moment-nan": (
        lambda state: put("optimizer", "state", 0, "exp_avg_sq", value=torch.full(sized(state), torch.nan))(state),
        "moments of an optimizer that are not finite",
    ),
    "no-moment": (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "KeyError: 'exp_avg'"),
    "two-groups": (lambda state: state["optimizer"]["param_groups"].append({"params": []}), r"groups of \[\d+, 0\]"),
    "base_lr": (put("optimizer", "param_groups", 0, "base_lr", value=float("inf")), "base_lr inf; it must be a finite"),
    "step": (put("step", value=-3), "its step is -3; it must be a whole number"),
    "left_out": (put("left_out", "all", value="3"), "its left_out all is '3'; it must be a whole number"),
    "sampler": (put("batches", "samples", value=torch.zeros(3)), "as for other labels"),
    "generator": (put("rng", "torch", value=torch.zeros(3)), "TypeError: RNG state must be a torch.ByteTensor"),
    "no-rng": (lambda state: state.pop("rng"), "KeyError: 'rng'"),
}


def sized(state: dict) -> torch.Size:
    return state["optimizer"]["state"][0]["exp_avg"].shape


@pytest.mark.parametrize("case", few([*MALFORMED], 4))
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    case: str, small_config: MakeConfig, small_data: DataSplits
) -> None:
    """All of it is taken over, or nothing: the run goes on as if the checkpoint had not been there."""
    edit, message = MALFORMED[case]
    other = Trainer(small_config(seed=5), small_data)
    steps(other, 2)
    state = copy.deepcopy(other.state_dict())
    edit(state)
    trainer, alike = Trainer(small_config(), small_data), Trainer(small_config(), small_data)
    steps(trainer, 1)
    drawn = torch.get_rng_state()
    with pytest.raises(UserError, match=message) as error:
        trainer.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), drawn)
    found = steps(trainer, 3)
    assert steps(alike, 4)[1:] == found
    assert same(weights(trainer), weights(alike))
