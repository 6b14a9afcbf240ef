"""What each of two processes does in test_lost_in_loop.py: training loops of a user's own that share a loss."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gcahng import GCAHNGLoss, UserError
from gcahng.processes import run_processes
from gcahng.testing import seeded

DIFFERENT: dict[str, dict[str, Any]] = {
    "layers": {"layers": 2},
    "graph_lr": {"graph_lr": 0.5},
    "embedding_dim": {"embedding_dim": 12},
    "alpha": {"alpha": 9.0},
    "base": {"base": torch.nn.Identity()},
}


def loss(**options: Any) -> GCAHNGLoss:
    return GCAHNGLoss(
        **{"num_classes": 9, "embedding_dim": 8, "layers": 1, "heads": 2, "process_group": "world"} | options
    )


def step(gca: GCAHNGLoss, rank: int) -> None:
    z = seeded(6, gca.embedding_dim, seed=rank).requires_grad_()
    gca(z, torch.arange(2).add(2 * rank).repeat_interleave(3)).backward()
    gca.generator_step()


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def made_groups() -> int:
    """How many groups there are more once gcahng's own work is done in a group that was there."""
    before = len(dist.distributed_c10d._world.pg_map)
    with run_processes(timeout=50.0) as processes:
        processes.set_timeout(40.0)
        assert processes.largest(processes.rank) == 1
        assert len(dist.distributed_c10d._world.pg_map) == before + 3
    return len(dist.distributed_c10d._world.pg_map) - before


def process(rank: int, folder: str) -> None:
    """Write down what each loop ended with; the second process is killed in the last one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    found |= {
        name: error_of(lambda own=own: step(loss(**own if rank else {}), rank)) for name, own in DIFFERENT.items()
    }
    found["groups"] = [made_groups() for _ in range(2)]
    gca = loss()
    step(gca, rank)
    if rank == 1:
        Path(folder, "1.json").write_text(json.dumps(found))
        os.kill(os.getpid(), signal.SIGKILL)
    found["killed"] = error_of(lambda: [step(gca, rank) for _ in range(3)])
    Path(folder, "0.json").write_text(json.dumps(found))
