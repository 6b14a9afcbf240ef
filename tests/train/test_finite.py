"""Losses and gradients that are not finite: named with step and images, left out if wanted, never in a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcahng import dispatch
from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.runs.checkpoint import load_checkpoint
from gcahng.train import GcaConfig, NonFinite, TrainConfig, fit, resume
from gcahng.train.finite import FiniteWatch
from gcahng.train.losses import GcaObjective
from gcahng.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
NAN = float("nan")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.train.session.draw_pictures", lambda *_: None)


def everything(trainer: Trainer) -> dict[str, Any]:
    """Everything that a step changes, except the batches and the counts."""
    state = trainer.state_dict()
    return {name: state[name] for name in ("model", "loss", "optimizer")}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return copied(dict(trainer.model.named_parameters()))


def copied(value: Any) -> Any:
    return copy.deepcopy(value)


def spoil_gradient(parameter: nn.Parameter, value: float, when: Callable[[], bool] = lambda: True) -> Any:
    """One entry of the parameter's gradient is `value`."""

    def spoiled(gradient: Tensor) -> Tensor | None:
        if not when():
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    return parameter.register_hook(spoiled)


def spoil_embeddings(trainer: Trainer) -> Any:
    return trainer.model.register_forward_hook(lambda module, images, z: z * NAN)


@pytest.mark.parametrize("on_top", [False, True])
@pytest.mark.parametrize("base", ["npair", "proxy_anchor", "supcon", "arcface", "multi_similarity", "soft_triple"])
def test_embeddings_of_every_loss(base: Any, on_top: bool, small_config: MakeConfig, small_data: DataSplits) -> None:
    config = small_config(gca=GcaConfig(heads=2, base=base)) if on_top else small_config(loss=base)
    trainer = Trainer(config, small_data)
    trainer.train_step()
    before = weights(trainer)
    spoil_embeddings(trainer)
    with pytest.raises(NonFinite, match=r"^the largest embedding is nan at step 2.*; the batch's images are U\+") as e:
        trainer.train_step()
    assert e.value.step == 2 and len(e.value.images) == 12 and "\n" not in str(e.value)
    assert same(weights(trainer), before)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["npair", "gca_hng"])
def test_a_gradient_alone(value: float, loss: str, small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(loss=loss), small_data)
    spoil_gradient(trainer.model.head[1].weight, value)
    with pytest.raises(NonFinite, match=r"^the network's gradient is (nan|inf) at step 1; the batch's images"):
        trainer.train_step()


def test_a_proxys_gradient(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(loss="proxy_anchor"), small_data)
    spoil_gradient(trainer.objective.proxies()[0], NAN)
    with pytest.raises(NonFinite, match="^the network's gradient is nan"):
        trainer.train_step()


def generator_of(trainer: Trainer) -> Any:
    assert isinstance(trainer.objective, GcaObjective)
    return trainer.objective.gca


@pytest.mark.parametrize("term", ["J_syn", "J_gce", "J_soft", "J_sim", "J_div", "J_cls"])
def test_a_term_is_named(
    term: str, small_config: MakeConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(small_config(), small_data)
    gca = generator_of(trainer)
    field = {"J_syn": "synthetic", "J_gce": "node_entropy"}.get(term)
    field = field or {"J_soft": "negative_entropy", "J_sim": "dissimilarity", "J_div": "diversity"}.get(term)
    if field is None:
        with torch.no_grad():
            gca.classifier.weight.fill_(NAN)
    else:
        passes = dispatch.passes

        class Spoiled:
            def __init__(self, *arguments: Any) -> None:
                self._passes = passes(*arguments)

            def metric_pass(self, *arguments: Any) -> Any:
                found = self._passes.metric_pass(*arguments)
                return found._replace(**{field: found.synthetic * math.inf}) if hasattr(found, field) else found

            def generator_pass(self, *arguments: Any) -> Any:
                found = self._passes.generator_pass(*arguments)
                return found._replace(**{field: found.diversity * math.inf}) if hasattr(found, field) else found

        monkeypatch.setattr(dispatch, "passes", Spoiled)
    with pytest.raises(NonFinite, match=rf"^{term} is -?(inf|nan) at step 1"):
        trainer.train_step()


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize(("pass_number", "name"), [(1, "the loss"), (2, "J_gen")])
def test_the_graph_networks_gradients(
    pass_number: int, name: str, value: float, small_config: MakeConfig, small_data: DataSplits
) -> None:
    trainer = Trainer(small_config(), small_data)
    gca = generator_of(trainer)
    real, count = gca._show_gradients, [0]

    def spoiled(module: str, parameters: list[nn.Parameter]) -> None:
        if module == "graph_network":
            count[0] += 1
            if count[0] == pass_number:
                parameters[0].grad.view(-1)[0] = value  # type: ignore[union-attr]
        real(module, parameters)

    gca._show_gradients = spoiled
    with pytest.raises(NonFinite, match=f"^the graph network's gradient of {name} is {value} at step 1"):
        trainer.train_step()


def test_a_step_left_out_leaves_everything_as_it_was(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(skip_nonfinite=2), small_data)
    trainer.train_step()
    gca, before = generator_of(trainer), copied(everything(trainer))
    batches = trainer.batches.state_dict()
    spoilers: dict[str, Callable[[], Any]] = {
        "the largest embedding": lambda: spoil_embeddings(trainer),
        "the network's gradient": lambda: spoil_gradient(trainer.model.head[1].weight, NAN),
    }
    for number, (name, spoil) in enumerate(spoilers.items(), start=1):
        hook = spoil()
        assert trainer.train_step() == {}
        hook.remove()
        assert str(trainer.last_left_out).startswith(f"{name} is nan at step {number + 1}")
        # Step 3 ends an epoch: the running means roll, on the one step that counted.
        if number == 1:
            assert same(everything(trainer), before)
    assert trainer.step == 3 and trainer.left_out == 2 and gca._epoch == 1
    assert not same(trainer.batches.state_dict(), batches)
    means = (gca.mean_metric.clone(), gca.mean_generator.clone())
    assert all(mean.isfinite() and mean < 1e6 for mean in means)
    assert same(everything(trainer)["model"], before["model"])
    assert set(trainer.train_step()) > {"loss", "J_gen"}  # and training goes on
    assert not same(everything(trainer)["model"], before["model"])


@pytest.mark.parametrize("loss", ["gca_hng", "proxy_anchor"])
def test_a_gradient_alone_leaves_everything_as_it_was(
    loss: str, small_config: MakeConfig, small_data: DataSplits
) -> None:
    """The generator has made its step before this is seen."""
    trainer = Trainer(small_config(loss=loss, skip_nonfinite=1), small_data)
    trainer.train_step()
    before = copied(everything(trainer))
    hook = spoil_gradient(trainer.model.head[1].weight, NAN)
    assert trainer.train_step() == {} and trainer.step == 2
    hook.remove()
    assert same(everything(trainer), before)
    assert all(p.grad is None for p in (*trainer.model.parameters(), *trainer.objective.parameters()))


def test_only_so_many_in_a_row(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(loss="npair", skip_nonfinite=2), small_data)
    bad = {2, 3, 5, 6, 7}
    spoil_gradient(trainer.model.head[1].weight, NAN, when=lambda: trainer.step + 1 in bad)
    assert [bool(trainer.train_step()) for _ in range(6)] == [True, False, False, True, False, False]
    again = Trainer(small_config(loss="npair", skip_nonfinite=2), small_data)
    again.load_state_dict(trainer.state_dict())
    spoil_gradient(again.model.head[1].weight, NAN)
    for one in (trainer, again):  # the count in a row is part of the state
        with pytest.raises(NonFinite, match="the network's gradient is nan at step 7"):
            one.train_step()
        assert one.left_out == 4


def test_the_deferred_watch() -> None:
    good, bad = {"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(NAN), "c": torch.tensor(math.inf)}
    names = ["one.jpg"]
    watch = FiniteWatch(deferred=True)
    watch.look(1, good, lambda: names)
    watch.look(2, bad, lambda: list(names))
    names[0] = "two.jpg"
    with pytest.raises(NonFinite, match=r"^b is nan at step 2 \(so is c\); the batch's images are one.jpg$"):
        watch.look(3, good, lambda: names)
    with pytest.raises(NonFinite, match="at step 2"):
        watch.settle()
    watch = FiniteWatch(deferred=True)
    watch.look(4, good, lambda: names)
    watch.settle()
    watch.settle()
    with pytest.raises(NonFinite, match="at step 5"):
        FiniteWatch(deferred=False).look(5, bad, lambda: names)


def test_a_deferred_step_reaches_no_checkpoint(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(), small_data)
    trainer._watch = FiniteWatch(deferred=True)  # as on CUDA
    trainer.train_step()
    spoil_gradient(trainer.model.head[1].weight, NAN)
    trainer.train_step()
    with pytest.raises(NonFinite, match="the network's gradient is nan at step 2"):
        trainer.state_dict()


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_deferred_step_is_named_before_its_network_is_evaluated(
    step: int, small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are written after steps 2, 4 and 6, and the network is evaluated after 4 and 6."""
    real = Trainer.__init__

    def made(self: Trainer, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self._watch = FiniteWatch(deferred=True)  # as on CUDA
        spoil_gradient(self.model.head[1].weight, NAN, lambda: self.step == step - 1)

    monkeypatch.setattr(Trainer, "__init__", made)
    run = tmp_path / "run"
    with pytest.raises(NonFinite, match=rf"^the network's gradient is nan at step {step}; .*--resume"):
        fit(small_config(loss="npair", out=str(run)))
    assert json.loads((run / "nonfinite.jsonl").read_text())["step"] == step
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["step"] < step for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["npair", "gca_hng"])
def test_on_cuda_a_step_later(loss: str, small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(loss=loss, device="cuda"), small_data)
    trainer.train_step()
    hook = spoil_gradient(trainer.model.head[1].weight, NAN)
    trainer.train_step()
    hook.remove()
    with pytest.raises(NonFinite, match="^the network's gradient is nan at step 2"):
        trainer.train_step()
    with pytest.raises(NonFinite, match="^the network's gradient is nan at step 2"):  # the weights are spoiled for good
        trainer.state_dict()


def spoil_step(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """In every run the network's gradients are NaN at these steps."""
    real = Trainer.__init__

    def init(self: Trainer, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        spoil_gradient(self.model.head[1].weight, NAN, when=lambda: self.step + 1 in steps)

    monkeypatch.setattr(Trainer, "__init__", init)


def test_a_run_stops_and_keeps_its_checkpoint(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_step(monkeypatch, 5)
    run = tmp_path / "run"
    with pytest.raises(NonFinite) as caught:
        fit(small_config(out=str(run)))
    message = str(caught.value)
    assert message.startswith("the network's gradient is nan at step 5; the batch's images are U+")
    assert f"and 9 more; all are in {run}/nonfinite.jsonl; the last good checkpoint is of step 4" in message
    assert "--skip_nonfinite 3" in message and "\n" not in message
    (line,) = (run / "nonfinite.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert noted["step"] == 5 and noted["values"] == {"the network's gradient": "nan"} and len(noted["images"]) == 12
    last = run / "checkpoints" / "last.pt"
    assert load_checkpoint(last)["step"] == 4
    before = last.read_bytes()
    assert main(["train", "--resume", str(run)]) == 2  # the same bits again
    err = capsys.readouterr().err
    assert err.startswith("gcahng: error: the network's gradient is nan at step 5") and err.count("\n") == 1
    assert last.read_bytes() == before and len((run / "nonfinite.jsonl").read_text().splitlines()) == 1
    summary = resume(run, skip_nonfinite=1)
    assert summary["left_out"] == 1 and summary["steps"] == 6


def test_a_run_leaves_steps_out(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_step(monkeypatch, 1, 2, 5)
    run = tmp_path / "run"
    summary = fit(small_config(out=str(run), skip_nonfinite=2), verbose=True)
    assert summary["left_out"] == 3 and summary["steps"] == 6
    assert [json.loads(line)["step"] for line in (run / "nonfinite.jsonl").read_text().splitlines()] == [1, 2, 5]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [4, 6]  # there is no mean of steps 1 and 2
    assert all(math.isfinite(value) for line in train for value in line.values() if not isinstance(value, str))
    assert "left out: the network's gradient is nan at step 1" in capsys.readouterr().out


def test_fp16_scales_the_loss(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(precision="fp16"), small_data)
    plain = Trainer(small_config(), small_data)
    assert trainer.scaler.get_scale() == 65536
    losses = [(trainer.train_step()["loss"].item(), plain.train_step()["loss"].item()) for _ in range(4)]
    assert losses[0][0] != losses[0][1] and losses[0][0] == pytest.approx(losses[0][1], rel=0.05)
    state = copied(trainer.state_dict())
    assert state["scaler"]["scale"] == trainer.scaler.get_scale()
    again = Trainer(small_config(precision="fp16"), small_data)
    again.load_state_dict(state)
    assert again.train_step()["loss"] == trainer.train_step()["loss"]


def test_fp16_gradients_that_overflow_are_the_scalers(small_config: MakeConfig, small_data: DataSplits) -> None:
    trainer = Trainer(small_config(precision="fp16", loss="npair"), small_data)
    hook = spoil_gradient(trainer.model.head[1].weight, math.inf)
    before = weights(trainer)
    assert trainer.train_step() and trainer.scaler.get_scale() == 32768
    assert same(weights(trainer), before)
    with pytest.raises(NonFinite, match="the network's gradient is inf at step 17"):  # 65536 = 2^16
        for _ in range(20):
            trainer.train_step()
    hook.remove()
