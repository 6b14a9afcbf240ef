"""Runs that continue with another number of processes, from checkpoints that do not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from elastic_cases import COUNTS, LOOPS, RUNS, STEPS, loop_part, names, process, run_part
from torch import Tensor

from gcahng.processes import ALONE
from gcahng.runs.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of all parts of all runs, with 1, 2, 3 and 1 processes."""
    folder = tmp_path_factory.mktemp("elastic")
    for part, count in enumerate(COUNTS):
        if count == 1:
            process(0, str(folder), part)
        else:
            mp.spawn(process, (str(folder), part), nprocs=count)
    return folder


def shape_of(value: Any) -> Any:
    """The nested names, types and shapes of a state."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape_of(inner) for inner in value]
    return type(value)


def same_numbers(found: Any, wanted: Any, path: str = "") -> None:
    if isinstance(wanted, Tensor) and wanted.is_floating_point():
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10, msg=lambda text: f"{path}: {text}")
    elif isinstance(wanted, Tensor):
        assert path.endswith("_extra_state") or torch.equal(found, wanted), path
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            same_numbers(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, (list, tuple)):
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same_numbers(one, other, f"{path}/{i}")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_1_2_3_and_1_processes_is_that_of_one(name: str, folder: Path, tmp_path: Path) -> None:
    run_part(name, ALONE, None, tmp_path / "whole.pt", steps=STEPS * len(COUNTS))
    wanted = load_checkpoint(tmp_path / "whole.pt")
    assert wanted["step"] == STEPS * len(COUNTS)
    same_numbers(load_checkpoint(names(folder, name, len(COUNTS) - 1)[1]), wanted)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_do_not_depend_on_the_number(name: str, folder: Path) -> None:
    first, *others = (shape_of(load_checkpoint(names(folder, name, part)[1])) for part in range(len(COUNTS)))
    assert all(other == first for other in others)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_with_a_wrapped_network_continues_in_any_number(kind: str, folder: Path, tmp_path: Path) -> None:
    loop_part(kind, 0, 1, None, tmp_path / "whole.pt", steps=STEPS * len(COUNTS))
    wanted = torch.load(tmp_path / "whole.pt", weights_only=True)
    found = torch.load(names(folder, kind, len(COUNTS) - 1)[1], weights_only=True)
    assert found["step"] == wanted["step"] == STEPS * len(COUNTS)
    same_numbers(found, wanted)
