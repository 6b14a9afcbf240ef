"""The same bits again: from step to step with one number of threads, and from our own stages with any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case, run_step
from torch import Tensor

# Enough edges in a tile to be shared out among threads.
CASE = Case(classes=12, views=3, dim=64, tile_rows=300)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("memory", "autocast"), [("store", None), ("hidden", None), ("recompute", torch.bfloat16)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_same_bits_again(impl, memory, autocast, count, threads, tiles):
    """Whatever earlier steps left in the memory that is used again, and wherever new memory lies."""
    case = CASE.but(memory=memory)
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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_training_runs_are_one(impl, threads, tiles):
    """Weights after several whole steps."""
    tiles(CASE)
    threads(2)
    states = []
    for _ in range(2):
        gca = CASE.loss(impl, torch.float32)
        for seed in range(3):
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
    calls = recorded(CASE.but(symmetric=symmetric), 3, autocast)
    for name, every in calls.items():
        op = getattr(torch.ops.gcahng, name)
        for arguments in every:
            threads(1)
            alone = outputs(op, arguments)
            before = [a for a in arguments if isinstance(a, Tensor)]
            changed = [not torch.equal(a, b) for a, b in zip(alone, before, strict=True)]
            assert any(changed), f"{name} writes nothing"
            for count in (2, 3, 5):
                threads(count)
                together = outputs(op, arguments)
                assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)), f"{name}, {count} threads"
