"""How the processes of a job were started, as their environment tells."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from typing import NamedTuple

from gcahng.errors import UserError

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What starters of processes set that know nothing of torch.distributed: the number of processes, this one's place, and
# whose they are. A batch script of Slurm has SLURM_NTASKS of its job, and is a single process itself.
_OTHERS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
    ("SLURM_NTASKS", "SLURM_PROCID", "srun"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "mpiexec"),
)


class Launch(NamedTuple):
    """What this process's environment says of it.

    Attributes:
        rank: its place.
        count: how many processes there are.
        local_rank: its place among those of its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """What started this process, and as one of how many.

    Args:
        environment: of this process.

    Raises:
        UserError: it is one of several that were started without torch.distributed knowing of it, so that each would
            do all of the work and write the same files; or the variables of torch.distributed are not complete.
    """
    count = _number(environment, "WORLD_SIZE", 1)
    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        _refuse_others(environment)
    if count == 1:
        return Launch(0, 1, _number(environment, "LOCAL_RANK", 0))
    if missing := [name for name in _RENDEZVOUS if name not in environment]:
        raise UserError(
            f"WORLD_SIZE is {count} and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start the "
            f"processes with torchrun, which sets them: {_command('torchrun --nproc-per-node N')}"
        )
    rank = _number(environment, "RANK", 0)
    if not 0 <= rank < count:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {count}; RANK must be from 0 to {count - 1}")
    return Launch(rank, count, _number(environment, "LOCAL_RANK", 0))


def _refuse_others(environment: Mapping[str, str]) -> None:
    for size, place, starter in _OTHERS:
        of_job = environment.get("ENVIRONMENT") == "BATCH" or "SLURM_STEP_NUM_TASKS" in environment
        if size == "SLURM_NTASKS" and of_job:
            continue
        if place not in environment or (count := _number(environment, size, 1)) < 2:
            continue
        each = "torchrun --nproc-per-node N"
        if starter == "srun":
            each = (
                "srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc-per-node N --rdzv-backend c10d "
                "--rdzv-id $SLURM_JOB_ID --rdzv-endpoint HOST:29500"
            )
        raise UserError(
            f"{starter} started {count} processes ({size}), which know nothing of each other, so that each would do "
            "the whole work and write the same files; let torchrun start the processes of each machine, where N is "
            f"how many those are and HOST is one of the machines: {_command(each)}"
        )


def _command(starter: str) -> str:
    words = sys.argv[1:] if os.path.basename(sys.argv[0]) in ("gcahng", "__main__.py") else ["train", "…"]
    return f"{starter} --no-python gcahng {shlex.join(words)}"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it must be a whole number, as what starts the processes sets it")
    return int(text)
