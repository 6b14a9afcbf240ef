"""A loss in a loop of the user's own says what differs between its processes, and which of them has gone."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from lost_in_loop import DIFFERENT, process

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]
HOST = platform.node()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The error of each loop in each process."""
    folder = tmp_path_factory.mktemp("loops")
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        _spawn(folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _spawn(folder: Path) -> None:
    jobs = mp.start_processes(process, (str(folder),), nprocs=2, join=False)
    for job in jobs.processes:
        job.join(240)  # the first ends by itself once the second has gone
    jobs.join()


@pytest.mark.parametrize("name", DIFFERENT)
def test_options_that_differ_are_named_in_all(name: str, found: list[dict[str, Any]]) -> None:
    for errors in found:
        assert errors[name].startswith(f"UserError: {name} is "), errors[name]
        assert f"in process 0 of 2 on {HOST} and " in errors[name]
        assert f"in process 1 of 2 on {HOST}; it must be the same in all processes" in errors[name]


@pytest.mark.skipif(sys.platform != "linux", reason="a process is known to have ended by way of /proc")
def test_a_process_that_has_gone_is_named(found: list[dict[str, Any]]) -> None:
    assert found[0]["killed"] == f"LostProcess: process 1 of 2 on {HOST} was killed, or ended without a word"


def test_groups_are_given_back(found: list[dict[str, Any]]) -> None:
    assert [errors["groups"] for errors in found] == [[0, 0]] * 2
