"""What each of the processes that train a run together does in test_processes.py."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from killed_runs import config, no_pictures, outcome, small_data
from stopped_runs import full_disk_after, signal_at
from torch import Tensor, nn

from gcahng.data import load_data
from gcahng.engine.ranks import Ranks
from gcahng.errors import UserError
from gcahng.evaluation import embed
from gcahng.processes import Processes, run_processes
from gcahng.train import (
    BackboneConfig,
    DataConfig,
    GcaConfig,
    TrainConfig,
    TrainingInterrupted,
    fit,
    loop,
    resume,
    session,
    split_metrics,
)
from gcahng.train.batch_norm import share_batch_norm
from gcahng.train.terminal import Mute, Terminal, terminal_for
from gcahng.train.trainer import Trainer

COUNT, STEPS = 2, 4
LOSSES = {
    "gca_hng": {},
    "gca_hng on proxy_anchor": {"gca": GcaConfig(base="proxy_anchor", heads=2), "skip_nonfinite": 1},
    "npair": {"loss": "npair"},
    "npair in micro batches": {
        "loss": "npair",
        "backbone": BackboneConfig(embedding_dim=16, width=4, freeze_bn=True, micro_batch=5),
    },
    "proxy_anchor": {"loss": "proxy_anchor"},
}


def base_config(**fields: Any) -> TrainConfig:
    data = DataConfig(classes_per_batch=4, train_classes=12, val_classes=6)
    return replace(config(Path("unused")), out=None, data=data, **fields)


def steps_in_double(name: str, processes: Processes, device: str = "cpu") -> dict[str, Tensor]:
    """Make training steps in float64; returns their losses, the weights and the statistics, on the CPU."""
    trainer = Trainer(base_config(**LOSSES[name], device=device), small_data(), processes=processes)
    for module in (trainer.model, trainer.objective):
        module.double()
    if processes.rank:
        with torch.no_grad():
            for parameter in (*trainer.model.parameters(), *trainer.objective.parameters()):
                parameter.add_(1)  # the first process's count
    trainer.start_together()
    found = {}
    for step in range(STEPS):
        found |= {f"{term} of step {step}": value for term, value in trainer.train_step().items()}
    tensors = {"model": trainer.model.state_dict(), "loss": trainer.objective.state_dict()}
    for part, state in tensors.items():
        found |= {f"{part} {key}": value for key, value in state.items() if not key.endswith("_extra_state")}
    return {key: value.cpu() for key, value in found.items()}


def measured(processes: Processes) -> tuple[dict[str, float], Tensor]:
    """Retrieval metrics of images that the processes embed together, and the embeddings in the first process."""
    made, data = base_config(), small_data()
    trainer = Trainer(made, data, processes=processes)
    trainer.start_together()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "EVAL_BATCH", 16)
        return split_metrics.measure(trainer.model, data, "test", made, trainer.device, processes)


def norm_case(processes: Processes, momentum: float | None, affine: bool) -> dict[str, Tensor]:
    """Outputs and gradients of BatchNorm over a batch of feature maps that the processes share."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(12, 5, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    x[:, 0] += 1e4
    model = nn.Sequential(nn.BatchNorm2d(5, momentum=momentum, affine=affine)).double()
    if processes.ranks is not None:
        share_batch_norm(model, processes.ranks, "this")
    part = processes.part(12)
    mine = x[part].requires_grad_()
    for _ in range(2):
        out = model(mine)
    (out * weights[part]).sum().backward()
    found = {"out": out.detach(), "gradient": mine.grad, **model.state_dict()}
    summed = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in summed.values():
        if processes.ranks is not None:
            processes.ranks.add_up(gradient)
    with torch.no_grad():
        evaluated = model.eval()(mine)
    return found | {f"gradient of {name}": gradient for name, gradient in summed.items()} | {"evaluated": evaluated}


def error_of(action: Callable[[], Any]) -> str:
    """The kind of error and its text."""
    try:
        action()
    except (UserError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def runs(folder: Path, rank: int) -> dict[str, Any]:
    """Whole runs: one to its end, one that a signal to the last process stops and that is resumed."""
    made = replace(config(folder / "whole"), backbone=BackboneConfig(embedding_dim=16, width=4))
    found = {"whole": fit(made)}
    stopped = replace(made, out=str(folder / "stopped"))
    with signal_at(4, signal.SIGTERM if rank == COUNT - 1 else 0):
        try:
            fit(stopped)
        except TrainingInterrupted as interrupt:
            found["exit code"] = interrupt.exit_code
    assert not (folder / "stopped" / "summary.json").exists()
    dist.barrier()
    found["resumed"] = resume(folder / "stopped")
    found["resumed again"] = resume(folder / "stopped")
    dist.barrier()
    if rank == 0:
        found["outcomes"] = [outcome(folder / name) for name in ("whole", "stopped")]
    return found


def failures(folder: Path, rank: int) -> dict[str, str]:
    """The errors that each process reports when something fails in one process, or in all."""
    made = config(folder / "full")
    odd = replace(made, data=replace(made.data, classes_per_batch=3, samples_per_class=3))
    found = {"odd": error_of(lambda: fit(odd))}
    found["gpu"] = error_of(lambda: fit(replace(made, device="cuda:1")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full_disk_after(os.fsync, lambda _: rank == 0, errno.ENOSPC))
        found["full disk"] = error_of(lambda: fit(made))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_learn", spoiled_in(Trainer._learn, rank == COUNT - 1))
        found["not finite"] = error_of(lambda: fit(replace(made, out=str(folder / "spoiled"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "terminal_for", deaf_reader)
        try:
            found["broken pipe"] = error_of(lambda: fit(replace(made, out=str(folder / "unread"))))
        except BrokenPipeError:
            found["broken pipe"] = "BrokenPipeError"
    dist.barrier()
    spoiled = (folder / "spoiled" / "nonfinite.jsonl").read_text()
    return found | {"written": spoiled}


def deaf_reader(verbose: bool, speaks: bool) -> Terminal:
    """The error of a run whose output nobody reads, which the first process notices at its first line."""
    return Unread() if speaks else terminal_for(verbose, speaks)


class Unread(Mute):
    def start(self, title: str, steps: int) -> None:
        raise BrokenPipeError


def spoiled_in(real: Callable[..., Any], here: bool) -> Callable[..., Any]:
    def learn(self: Trainer, images: Tensor, labels: Tensor) -> Any:
        if here and self.step == 2:
            self.model.head[1].register_forward_hook(lambda *arguments: arguments[-1] * float("inf"))
        return real(self, images, labels)

    return learn


def unreadable(tree: Path, folder: Path) -> dict[str, Any]:
    """Runs on a folder of images one of which cannot be read."""
    batch = {"classes_per_batch": 2, "samples_per_class": 4, "image_size": 32, "resize": 32}
    data = DataConfig(name="folder", root=str(tree), val_classes=0, workers=0, **batch)
    made = replace(config(folder / "strict"), data=data)
    found: dict[str, Any] = {"strict": error_of(lambda: fit(made))}
    made = replace(made, out=str(folder / "lenient"), data=replace(data, skip_unreadable=True))
    with signal_at(4):
        error_of(lambda: fit(made))
    return found | {"lenient": resume(folder / "lenient")["unreadable"]}


@contextmanager
def small_runs() -> Any:
    data = small_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_data", lambda of: data if of.name == "glyphs" else load_data(of))
        patch.setattr(session, "draw_pictures", no_pictures)
        yield


def process(rank: int, folder: str, tree: str) -> None:
    """Run one process, and write its results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=COUNT)
    found: dict[str, Any] = {}
    with run_processes() as processes:
        assert processes.count == COUNT
        found["double"] = {name: steps_in_double(name, processes) for name in LOSSES}
        found["seed"] = torch.initial_seed()
        found["norm"] = [norm_case(processes, *case) for case in NORMS]
        found["measured"] = measured(processes)
        found["turns"] = turns(processes, Path(folder))
    with small_runs():
        found["runs"] = runs(Path(folder), rank)
        found["failures"] = failures(Path(folder), rank)
        found["unreadable"] = unreadable(Path(tree), Path(folder))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


NORMS: list[tuple[float | None, bool]] = [(0.1, True), (None, True), (0.3, False)]


def gpu_process(rank: int, count: int, folder: str) -> None:
    """Run one process with a GPU of its own, and write the results of its training steps to a file."""
    torch.cuda.set_device(rank)
    where = f"file://{folder}/meet"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=where, rank=rank, world_size=count)
    processes = Processes(Ranks(dist.group.WORLD), rank)
    torch.save({name: steps_in_double(name, processes, "cuda") for name in LOSSES}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def turns(processes: Processes, folder: Path) -> Any:
    """Whether the file that a machine's first process makes is there in the turn of the others."""
    made = folder / "made"
    here = Processes(processes.ranks, local_rank=processes.rank)
    with here.in_turn():
        there = made.exists()
        made.touch()
    return there, here.largest(here.rank), here.all_of(here.rank * 10)
