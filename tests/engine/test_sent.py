"""What the plan says that processes send is what they do send."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sent_cases import CASES, process, size_of

from gcahng.engine.schedule import make_schedule
from gcahng.engine.step_size import StepSize
from gcahng.engine.traffic import KINDS, Sent, collectives, link_seconds, shares


@pytest.mark.processes
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_bytes_sent_are_those_of_the_plan(count: int, tmp_path: Path) -> None:
    mp.spawn(process, (count, str(tmp_path)), nprocs=count)
    for rank in range(count):
        for case, found in zip(CASES, torch.load(tmp_path / f"{rank}.pt", weights_only=True), strict=True):
            sent = collectives(size_of(case, count))
            if "cosine" in case:
                sent = [one for one in sent if one.name != "norms of synthetic negatives"]
            wanted = {kind: sum(one.payload for one in sent if one.kind == kind) for kind in KINDS}
            assert found == wanted, f"{case} in process {rank}"


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
