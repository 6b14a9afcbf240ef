"""What the plan says that processes send is what they do send."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sent_cases import CASES, LEAST, process, wanted

from gcahng.engine.plan import work
from gcahng.engine.schedule import make_schedule
from gcahng.engine.shared_attention import LEAST_NODES
from gcahng.engine.step_size import StepSize
from gcahng.engine.traffic import Sent, collectives, link_seconds, repeated, shares


@pytest.mark.processes
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("count", [1, 3, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4))])
def test_the_bytes_sent_are_those_of_the_plan(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAST_NODES, "cpu", LEAST)
    mp.spawn(process, (count, str(tmp_path)), nprocs=count)
    for rank in range(count):
        for case, found in zip(CASES, torch.load(tmp_path / f"{rank}.pt", weights_only=True), strict=True):
            sent, corrected, alike = found
            assert alike == (True, count == 1), f"{case} in process {rank}"
            for bytes_sent, are_alike in zip((sent, corrected), alike, strict=True):
                assert bytes_sent == wanted(case, count, are_alike), f"{case} in process {rank}"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("classes", "count"), [(2, 3), (7, 2), (8, 3), (12, 5)])
def test_shares_are_those_of_the_schedules(classes: int, count: int, symmetric: bool) -> None:
    size = StepSize(2 * classes, 8, 1, 2, classes, symmetric=symmetric, ranks=count)
    made = [
        make_schedule(classes, 2, symmetric=symmetric, tile_rows=24, ranks=SimpleNamespace(rank=rank, count=count))
        for rank in range(count)
    ]
    assert shares(size) == [schedule.rows for schedule in made] and max(shares(size)) == size.rows


def test_a_ring_sends_what_is_known_of_rings() -> None:
    assert Sent("all_reduce", "x", (10, 2), 4).link_bytes(4) == 80 * 2 * 3 / 4
    assert Sent("all_gather", "x", (10, 2), 4).link_bytes(4) == 80 * 3
    assert Sent("broadcast", "x", (10, 2), 4).link_bytes(4) == 80
    alone = StepSize(24, 16, 2, 2, 20)
    assert link_seconds(alone, 1e9, 1e-5) == 0 == sum(one.link_bytes(1) for one in collectives(alone))


def test_what_every_process_repeats_is_what_the_work_does_not_share() -> None:
    """Sharing it would pay for none of it on a GPU at the rates in the documentation, and for all of it on a CPU."""
    for nodes, device, rate, bandwidth, pays in ((1024, "cuda", 200e12, 25e9, False), (128, "cpu", 20e9, 25e9, True)):
        size = StepSize(nodes, 512, 2, 4, 1000, device=device, ranks=64)
        parts = repeated(size)
        assert sum(part.products for part in parts) == work(size, "store").nodes
        for part in parts:
            saved = 2 * part.products * 63 / 64 / rate
            assert (saved > part.link_bytes / bandwidth) == pays, part
    shared, alone = (work(StepSize(1024, 512, 2, 4, 1000, ranks=ranks), "store").nodes for ranks in (64, 1))
    assert alone - shared == 14 * 2 * 1024**2 * 512 * 63 // 64
