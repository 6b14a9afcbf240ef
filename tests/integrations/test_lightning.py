"""The loss in Lightning: automatic and manual optimization, precision, resuming within an epoch, two processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.clouds import CLASSES, DIM, VIEWS, clouds
from integrations.examples import check_example
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_metric_learning.losses import ProxyAnchorLoss
from tiers import few
from torch import Tensor, nn

import gcahng
from gcahng.data import BalancedBatchSampler
from gcahng.integrations.lightning import GeneratorCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*`IterableDataset`")


class Points:
    """A loader of balanced batches that can be continued: clouds of points, one for each class."""

    def __init__(self) -> None:
        self.points, self.labels = clouds()
        self.batches = BalancedBatchSampler(self.labels, 4, VIEWS, seed=0)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.batches:
            yield self.points[rows], self.labels[rows]

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


class Model(LightningModule):
    """A small network and the loss."""

    def __init__(self, manual: bool = False, all_parameters: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.gca = gcahng.GCAHNGLoss(CLASSES, DIM, layers=1, num_per_class=VIEWS, seed=0, **options)
        self.automatic_optimization, self.all_parameters = not manual, all_parameters
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = self.gca(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        own = self.parameters() if self.all_parameters else [*self.network.parameters(), *self.gca.base_parameters()]
        return torch.optim.AdamW(own, lr=1e-3)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    known = {"callbacks": [GeneratorCallback()], "max_epochs": 2, "precision": "32-true"} | options
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **known},
    )


def by_hand(steps: int, autocast: bool = False) -> Model:
    """The same training in a plain loop."""
    model, loader, step = Model(), Points(), 0
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-3)
    while step < steps:
        for samples, labels in loader:
            optimizer.zero_grad()
            # Lightning does not cache casted weights, whose gradients are then rounded otherwise.
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                loss = model.gca(model.network(samples), labels)
            loss.backward()
            model.gca.generator_step()
            optimizer.step()
            model.losses.append(loss.item())
            step += 1
        model.gca.end_epoch()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("manual", [False, True])
def test_it_trains_as_a_loop_does(manual: bool, tmp_path: Path) -> None:
    model = Model(manual=manual)
    trainer = make_trainer(tmp_path)
    trainer.fit(model, Points())
    assert same(model, by_hand(8))
    assert {"gca/J_m", "gca/J_gen"} <= set(trainer.callback_metrics)


def test_bf16(tmp_path: Path) -> None:
    model = Model()
    make_trainer(tmp_path, precision="bf16-mixed").fit(model, Points())
    assert same(model, by_hand(8, autocast=True))


def test_a_run_continues_bit_for_bit_within_an_epoch(tmp_path: Path) -> None:
    whole, part = Model(), Model()
    make_trainer(tmp_path).fit(whole, Points())
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first = make_trainer(tmp_path, callbacks=[GeneratorCallback(), saved], enable_checkpointing=True, max_steps=3)
    first.fit(part, Points())
    rest = Model()
    make_trainer(tmp_path).fit(rest, Points(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert part.losses + rest.losses == whole.losses
    assert same(rest, whole)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gcahng.UserError, match="accumulate_grad_batches is 2; it must be 1"):
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(Model(), Points())
    with pytest.raises(gcahng.UserError, match="would be stepped twice; configure_optimizers must give it"):
        make_trainer(tmp_path).fit(Model(all_parameters=True), Points())
    two = Model()
    two.other = gcahng.GCAHNGLoss(CLASSES, DIM, layers=1)
    with pytest.raises(gcahng.UserError, match="Model has 2 submodules that are a GCAHNGLoss; it must have one"):
        make_trainer(tmp_path).fit(two, Points())
    with pytest.raises(gcahng.UserError, match="is no submodule of Model; it must be one"):
        elsewhere = gcahng.GCAHNGLoss(CLASSES, DIM, layers=1)
        make_trainer(tmp_path, callbacks=[GeneratorCallback(elsewhere)]).fit(Model(), Points())
    make_trainer(tmp_path, callbacks=[GeneratorCallback(two.gca)]).fit(two, Points())


def test_proxies_are_stepped(tmp_path: Path) -> None:
    model = Model(base=ProxyAnchorLoss(CLASSES, DIM))
    before = model.gca.base.proxies.clone()
    make_trainer(tmp_path).fit(model, Points())
    assert not torch.equal(before, model.gca.base.proxies)


def test_validation_leaves_the_loss_alone(tmp_path: Path) -> None:
    class Validated(Model):
        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            self.log("val_loss", self.gca(self.network(batch[0]), batch[1]))

    model = Validated()
    make_trainer(tmp_path).fit(model, Points(), Points())
    plain = by_hand(8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class TwoLosses(Model):
    """Manual optimization with a backward for each of two losses."""

    def training_step(self, batch: tuple[Tensor, Tensor], step: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(1e-3 * self.network(batch[0]).square().mean())
        if step % 2 == 0:
            self.manual_backward(self.gca(self.network(batch[0]), batch[1]))
        optimizer.step()


def test_a_backward_of_another_loss_steps_no_generator(tmp_path: Path) -> None:
    model = TwoLosses(manual=True)
    make_trainer(tmp_path).fit(model, Points())
    assert model.gca.draw == 8  # two for each of four steps


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2),
}


@pytest.mark.parametrize("kind", few(list(AVERAGES)))
def test_averaged_weights_with_the_loss_among_them(kind: str, tmp_path: Path) -> None:
    model, plain = Model(), by_hand(12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*generator_step")
        make_trainer(tmp_path, max_epochs=3, callbacks=[GeneratorCallback(), AVERAGES[kind]()]).fit(model, Points())
    for name in ("mean_metric", "mean_generator"):
        torch.testing.assert_close(getattr(model.gca, name), getattr(plain.gca, name), rtol=0.2, atol=0)
    samples, labels = next(iter(Points()))
    model.train()
    model.gca(model.network(samples), labels).backward()  # and it can go on
    assert all(value.isfinite() for value in model.gca.generator_step().values())


def test_a_run_with_averaged_weights_continues_bit_for_bit(tmp_path: Path) -> None:
    def fit(model: Model, *more: Callback, start: Path | None = None, **options: Any) -> Model:
        callbacks = [GeneratorCallback(), AVERAGES["ema"](), *more]
        trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
        trainer.fit(model, Points(), ckpt_path=start, weights_only=True if start else None)
        return model

    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(Model(), saved, enable_checkpointing=True, max_steps=3)
    assert same(fit(Model(), start=tmp_path / "step=3.ckpt"), fit(Model()))


TWO_PROCESSES = """
import sys
import torch
from integrations.clouds import CLASSES, DIM, VIEWS, clouds
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from gcahng.integrations.lightning import GeneratorCallback
from integrations.test_lightning import Model, Points

class Part(Points):
    # this process's half of each batch
    def __iter__(self):
        rank = torch.distributed.get_rank()
        for samples, labels in super().__iter__():
            yield samples.chunk(2)[rank], labels.chunk(2)[rank]

class Shared(Model):
    def setup(self, stage):
        self.gca = type(self.gca)(6, 16, layers=1, num_per_class=3, seed=0, process_group="world")
        self.gca.load_state_dict(START)

model = Shared()
START = model.gca.state_dict()
trainer = Trainer(
    accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    use_distributed_sampler=False, callbacks=[GeneratorCallback()],
)
trainer.fit(model, Part())
torch.save(model.state_dict(), f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


@pytest.mark.processes
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    root = Path(gcahng.__file__).parents[1]

    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    one = by_hand(8).state_dict()
    for name, value in first.items():
        if value.is_floating_point():  # the optimizers lie in bytes
            torch.testing.assert_close(value, one[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.processes
def test_the_example_prints_what_the_page_says() -> None:
    check_example("with_lightning.py", "lightning.md")
