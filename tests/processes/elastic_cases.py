"""What each process does in test_elastic.py: a few steps of a run from a checkpoint that another number wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from gcahng import GCAHNGLoss
from gcahng.engine.ranks import Ranks
from gcahng.processes import ALONE, Processes
from gcahng.runs.checkpoint import load_checkpoint, save_checkpoint
from gcahng.testing import seeded
from gcahng.train.trainer import Trainer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "train")]
COUNTS, STEPS = (1, 2, 3, 1), 2  # processes of each part of a run, and its steps
RUNS = ("gca_hng", "gca_hng on proxy_anchor", "npair")
LOOPS = ("DDP", "FSDP2")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def run_part(name: str, processes: Processes, before: Path | None, after: Path, steps: int = STEPS) -> None:
    """Steps of `gcahng train` in float64, from one checkpoint to the next."""
    from killed_runs import small_data
    from process_cases import LOSSES as OPTIONS
    from process_cases import base_config

    trainer = Trainer(base_config(**OPTIONS[name]), small_data(), processes=processes)
    for module in (trainer.model, trainer.objective):
        module.double()
    trainer.start_together()
    if before is not None:
        trainer.load_state_dict(load_checkpoint(before))
    for _ in range(steps):
        trainer.train_step()
    state = trainer.state_dict()
    if processes.first:
        save_checkpoint(after, state)


def loop_part(kind: str, rank: int, count: int, before: Path | None, after: Path, steps: int = STEPS) -> None:
    """Steps of a user's own loop in float64, whose network is wrapped."""
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    gca = GCAHNGLoss(9, 8, layers=1, heads=2, seed=3, process_group="world" if count > 1 else None).double()
    if count > 1:
        network = nn.parallel.DistributedDataParallel(network) if kind == "DDP" else fully_shard(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    start = 0
    if before is not None:
        state = torch.load(before, weights_only=True)
        set_model_state_dict(network, state["network"], options=WHOLE)
        set_optimizer_state_dict(network, optimizer, state["optimizer"], options=WHOLE)
        gca.load_state_dict(state["loss"])
        start = state["step"]
    for step in range(start, start + steps):
        labels = torch.arange(4).add(step % 5).repeat_interleave(3)
        x = seeded(12, 5, seed=step).double()
        part = slice(rank * 12 // count, (rank + 1) * 12 // count)
        loss = gca(network(x[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gca.generator_step()
    state = {
        "network": get_model_state_dict(network, options=WHOLE),
        "optimizer": get_optimizer_state_dict(network, optimizer, options=WHOLE),
        "loss": gca.state_dict(),
        "step": start + steps,
    }
    if rank == 0:
        torch.save(state, after)


def names(folder: Path, what: str, part: int) -> tuple[Path | None, Path]:
    """The checkpoints before and after a part of a run."""
    stem = what.replace(" ", "_")
    return folder / f"{stem}-{part - 1}.pt" if part else None, folder / f"{stem}-{part}.pt"


def process(rank: int, folder: str, part: int) -> None:
    """One process of one part of all runs."""
    torch.set_num_threads(1)
    count = COUNTS[part]
    if count == 1:
        parts(Path(folder), part, ALONE, 0)
        return
    where = f"file://{folder}/meet-{part}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    parts(Path(folder), part, Processes(Ranks(dist.group.WORLD), rank), rank)
    dist.destroy_process_group()


def parts(folder: Path, part: int, processes: Processes, rank: int) -> None:
    for name in RUNS:
        run_part(name, processes, *names(folder, name, part))
    for kind in LOOPS:
        loop_part(kind, rank, processes.count, *names(folder, kind, part))
