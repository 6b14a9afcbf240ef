"""Batches whose pairs several processes share: the same training as one process, exactly, whatever is shared how."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_cases import AT_ONCE, CASES, SEED, RankCase, process, train
from torch import Tensor

from gcahng import GCAHNGLoss, UserError
from gcahng.engine.schedule import make_schedule
from gcahng.engine.stages.common import StageContext
from gcahng.engine.stages.mix_index import batch_mixes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, list[str]]]:
    """What each process of a group found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_processes_that_share_a_batch_train_as_one(
    group: list[tuple[dict, list[str]]], case: RankCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcahng.engine.prepare.default_tile_rows", lambda *_: case.tile_rows)
    wanted = train(case, SEED, 0, 1)
    for rank, (found, _) in enumerate(group):
        mine = found[case.name]
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, Tensor):
                where = f"{name} in process {rank}"
                torch.testing.assert_close(
                    mine[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, where=where: f"{where}: {text}"
                )
        trained = [name for name in mine if name.startswith(("graph_network.", "classifier.", "model "))]
        assert len(trained) > 40
        assert all(torch.equal(mine[name], group[0][0][case.name][name]) for name in trained), "weights drift apart"
        assert mine["alike"] == [case.rounding == 0], "the checksum of the weights shows what differs, and no more"


@pytest.mark.processes
def test_sums_under_way_have_the_bits_of_those_that_are_waited_for(
    group: list[tuple[dict, list[str]]],
) -> None:
    for found, _ in group:
        later, at_once = found[AT_ONCE.name], found["at once"]
        assert all(torch.equal(value, at_once[name]) for name, value in later.items() if isinstance(value, Tensor))


@pytest.mark.processes
def test_all_keep_as_little_as_the_one_with_the_least_memory(group: list[tuple[dict, list[str]]]) -> None:
    """The sums that they exchange, and when, depend on the mode. Process 0 has no memory left, the others plenty."""
    (case,) = (case for case in CASES if case.memory == "auto")
    assert all(set(found[case.name]["memory"]) == {"recompute"} for found, _ in group)


@pytest.mark.processes
def test_what_is_wrong_in_one_process_is_refused_by_all(group: list[tuple[dict, list[str]]]) -> None:
    for rank, (_, (of_label, *of_sizes, of_rows)) in enumerate(group):
        assert "labels is out of range" in of_label
        assert len(of_sizes) == 3, "whenever values are checked"
        for of_size in of_sizes:
            assert f"embeddings has {6 + 2 * rank} rows here" in of_size and "6, 8" in of_size
        assert "embeddings has the same rows in every process" in of_rows


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("classes", "count"), [(2, 3), (7, 2), (8, 3), (12, 5)])
def test_every_tile_is_one_processs(classes: int, count: int, symmetric: bool) -> None:
    def pairs(ranks: Any) -> list[tuple[int, int]]:
        schedule = make_schedule(classes, 2, symmetric=symmetric, tile_rows=24, ranks=ranks)
        assert schedule.rows == sum(tile.rows for tile in schedule.tiles)
        return [
            (anchor, offset)
            for tile in schedule.tiles
            for anchor in range(tile.first_class, tile.first_class + tile.classes)
            for offset in range(tile.first_offset, tile.first_offset + tile.offsets)
        ]

    shares = [pairs(SimpleNamespace(rank=rank, count=count)) for rank in range(count)]
    assert sorted(pair for share in shares for pair in share) == sorted(pairs(None))
    assert max(map(len, shares)) - min(map(len, shares)) <= classes + 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("classes", "count"), [(2, 3), (8, 3)])
def test_every_mix_is_one_processs(classes: int, count: int, symmetric: bool) -> None:
    """Some of these processes have no part of the batch."""
    found = []
    for rank in range(count):
        ranks = SimpleNamespace(rank=rank, count=count)
        schedule = make_schedule(classes, 2, symmetric=symmetric, tile_rows=24, ranks=ranks)
        context = StageContext(schedule, 4, torch.float32, torch.zeros(1))
        found.append(batch_mixes(context).place)
    assert torch.cat(found).sort().values.tolist() == list(range(2 * classes**2))


# -- what is refused, and what a loss of a group may be used for


def test_a_group_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"process_group is 'world' .*init_process_group first"):
        GCAHNGLoss(4, 8, process_group="world")


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_groups_that_are_none(alone: dist.ProcessGroup) -> None:
    with pytest.raises(UserError, match="process_group is 'all'; it must be None, 'alone', 'world' or a torch"):
        GCAHNGLoss(4, 8, process_group="all")
    with pytest.raises(UserError, match="cuda_graph is True and process_group is given"):
        GCAHNGLoss(4, 8, process_group=alone, cuda_graph=True)


def test_a_loss_of_a_group_can_be_copied_and_says_why_it_cannot_be_pickled(alone: dist.ProcessGroup) -> None:
    gca = GCAHNGLoss(4, 8, layers=1, heads=2, process_group=alone)
    twin = copy.deepcopy(gca)
    with pytest.raises(UserError, match="embeddings is float64 and the loss's parameters are float32"):
        gca(torch.randn(8, 8, dtype=torch.float64), torch.arange(4).repeat(2))
    z, labels = torch.randn(8, 8), torch.arange(4).repeat(2)
    assert torch.equal(gca(z, labels), twin(z, labels))
    with pytest.raises(UserError, match="save its state_dict"):
        pickle.dumps(gca)
