"""The same bits again: from step to step with one number of threads, and from our own stages with any."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case, run_step
from torch import Tensor

import gcahng
from gcahng import native
from gcahng.engine.prepare import _workspace
from gcahng.engine.workspace import _MOST_VIEWS, Workspace, _Slot
from gcahng.testing import seeded

# Enough edges in a tile to be shared out among threads; few calls, for two threads may have to share a core.
CASE = Case(classes=10, views=3, dim=48, layers=1)
TILED = CASE.but(layers=2, tile_rows=240)


@pytest.fixture
def threads(one_thread):
    """Sets the number of threads until the test ends."""
    return torch.set_num_threads


@pytest.mark.parametrize(
    ("count", "case", "autocast"),
    [
        (1, TILED, None),
        (1, TILED.but(memory="recompute"), torch.bfloat16),
        (2, CASE, None),
        pytest.param(2, CASE.but(memory="hidden"), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(2, TILED, None, marks=pytest.mark.slow),
        pytest.param(2, TILED.but(memory="recompute"), None, marks=pytest.mark.slow),
        pytest.param(2, TILED.but(memory="recompute"), torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_same_bits_again(impl, case, autocast, count, threads, tiles):
    """Whatever earlier steps left in the memory that is used again, and wherever new memory lies."""
    tiles(case)
    threads(count)
    z, labels = case.batch(dtype=torch.float32)
    first = run_step(case.loss(impl, torch.float32), z, labels, autocast=autocast)
    other = case.but(classes=9, views=4)
    run_step(other.loss(impl, torch.float32), *other.batch(1, torch.float32), autocast=autocast)
    moved = [torch.empty(1000 * k + 16) for k in range(1, 6)]
    again = run_step(case.loss(impl, torch.float32), z, labels, autocast=autocast)
    del moved
    assert first.keys() == again.keys()
    different = [name for name in first if not torch.equal(first[name], again[name])]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_training_runs_are_one(impl, threads):
    """Weights after whole steps."""
    threads(2)
    states = []
    for _ in range(2):
        gca = CASE.loss(impl, torch.float32)
        for seed in range(2):
            z, labels = CASE.batch(seed, torch.float32)
            gca(z.requires_grad_(), labels).backward()
            gca.generator_step()
        states.append({name: tensor for name, tensor in gca.state_dict().items() if isinstance(tensor, Tensor)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def outputs(op: Callable[..., None], arguments: tuple) -> list[Tensor]:
    """Every tensor as the call leaves it."""
    arguments = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
    op(*arguments)
    return [a for a in arguments if isinstance(a, Tensor)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stages_do_not_depend_on_threads(autocast, symmetric, threads, recorded):
    """Sums are formed unit by unit and added in order, whoever computed what."""
    calls = recorded(TILED.but(symmetric=symmetric), 2, autocast)
    for name, every in calls.items():
        op = getattr(torch.ops.gcahng, name)
        for arguments in every:
            threads(1)
            alone = outputs(op, arguments)
            before = [a for a in arguments if isinstance(a, Tensor)]
            changed = [not torch.equal(a, b) for a, b in zip(alone, before, strict=True)]
            assert any(changed), f"{name} writes nothing"
            for count in (2, 3):
                threads(count)
                together = outputs(op, arguments)
                assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)), f"{name}, {count} threads"


def test_wide_sums_do_not_depend_on_threads(threads):
    """Where each thread adds up channels of its own."""
    assert native.load("_C_cpu").path
    dim, ops = 2000, torch.ops.gcahng
    x, de, theta, dtheta = (seeded(rows, dim, seed=rows, dtype=torch.float32) for rows in (8, 16, 70, 71))

    def sums(count: int) -> tuple[Tensor, Tensor]:
        threads(count)
        dx, total = torch.zeros_like(x), torch.zeros(dim)
        ops.edge_start_bwd_([2, 2, 2, 0, 1, 1, 4], x, de, dx)
        ops.head_bwd_(theta, dtheta[:70], torch.empty_like(theta), total)
        return dx, total

    for count in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(sums(count), sums(1), strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_losses_in_threads_of_their_own(impl, threads):
    """Steps that run at once are the steps that run one after the other."""
    threads(1)

    def train(gca: gcahng.GCAHNGLoss, z: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
        return [run_step(gca, z, labels) for _ in range(5)]

    cases = (CASE, CASE.but(classes=9, views=4))
    batches = [case.batch(dtype=torch.float32) for case in cases]
    # Made here: torch's generator, which starts their weights, belongs to all threads.
    first, second = ([case.loss(impl, torch.float32) for case in cases] for _ in range(2))
    wanted = [train(gca, *batch) for gca, batch in zip(first, batches, strict=True)]
    with ThreadPoolExecutor(len(cases), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(train, second, *zip(*batches, strict=True)))
    for steps, expected in zip(found, wanted, strict=True):
        for step, other in zip(steps, expected, strict=True):
            assert not [name for name in other if not torch.equal(step[name], other[name])]


def test_passes_on_two_streams_wait_for_one_another(monkeypatch):
    """With stand-ins for streams and a device's buffers."""
    happened = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

    class Buffer:
        device = torch.device("cuda", 0)

        def record_stream(self, stream):
            happened.append(f"kept for {stream.name}")

    workspace, first, second = Workspace(), Stream("first"), Stream("second")
    workspace._slots = {name: _Slot(b, {}, {}) for name, b in (("name", Buffer()), ("elsewhere", torch.zeros(1)))}
    for stream in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        workspace.follow(Buffer.device)
    waited = ["second waits for first", "kept for second", "first waits for second", "kept for first"]
    assert happened == waited


def test_threads_have_buffers_of_their_own():
    like = torch.zeros(1)
    mine = _workspace.get("name", 2, 3, like)
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(lambda: _workspace.get("name", 2, 3, like)).result()
    assert others.data_ptr() != mine.data_ptr()
    assert _workspace.get("name", 2, 3, like).data_ptr() == mine.data_ptr()


def test_a_buffer_is_used_again_until_more_is_asked_for():
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.get("name", 2, 3, like)
    assert workspace.get("name", 3, 2, like).data_ptr() == first.data_ptr()
    assert workspace.get("name", 2, 3, like) is first
    others = [workspace.get("other", 2, 3, like), workspace.get("name", 2, 3, like, torch.float64)]
    assert len({x.data_ptr() for x in (first, *others)}) == 3
    grown = workspace.get("name", 3, 3, like)
    again = workspace.get("name", 2, 3, like)
    assert again.data_ptr() == grown.data_ptr() and again.shape == (2, 3)
    for rows in range(1, 100):
        assert workspace.get("name", rows, 1, like).shape == (rows, 1)
    assert all(len(slot.views) <= _MOST_VIEWS for slot in workspace._slots.values())
