"""The CUDA kernels that judge negatives, run in the emulator (tests/emulator): against plain torch, between fences, in
memory full of NaN; and a whole training step on every CUDA kernel."""

from __future__ import annotations

import pytest
import torch
from emulator.loss_ops import STEMS, EmulatedLosses
from emulator.row_ops import EmulatedRows
from emulator.row_ops import compile_all as compile_rows
from emulator.tile_ops import EmulatedTiles, each_unaligned
from emulator.tile_ops import compile_all as compile_tiles
from stage_cases import Setup
from stage_checks import (
    check_coefficients_near_zero,
    check_entropy_far_from_zero,
    check_gradient_of_sure_rows,
    check_outputs_on_their_own,
    check_similarity_of_short_vectors,
    check_stage,
    run_of,
)

from gcahng import GCAHNGLoss
from gcahng.engine.engine import Engine
from gcahng.reference import training_step as reference
from gcahng.testing import seeded

# Logits fewer than a block's threads and more, of which wide accesses fit or not; four classes a channel.
SETUPS = [Setup(6, 3, 19, 60), Setup(4, 2, 136, 20), Setup(3, 2, 260, 20)]
PRECISIONS = ("float64", "float32", "bfloat16", "float16")


@pytest.fixture
def emulated(monkeypatch):
    """Makes the implementation "cuda" run in the emulator."""

    def use(ops) -> None:
        monkeypatch.setattr("gcahng.engine.fused.stage_ops", lambda impl: ops)

    return use


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_judging(setup, precision, emulated):
    emulated(EmulatedLosses())
    check_stage(setup, "judging", precision, "cuda")


def test_entropy_far_from_zero(emulated):
    emulated(EmulatedLosses())
    check_entropy_far_from_zero("cuda")


def test_similarity_of_short_vectors(emulated):
    emulated(EmulatedLosses())
    check_similarity_of_short_vectors("cuda")


def test_gradient_of_sure_rows(emulated):
    emulated(EmulatedLosses())
    check_gradient_of_sure_rows("cuda", torch.bfloat16)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_addresses_that_wide_accesses_do_not_fit(precision, emulated):
    emulated(EmulatedLosses(-1, 1))
    check_stage(SETUPS[1], "judging", precision, "cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_unaligned(precision, emulated):
    """Wide accesses ask of each tensor whether it is where they may be."""
    for ops in each_unaligned(EmulatedLosses):
        emulated(ops)
        check_stage(Setup(2, 2, 16, 20), "judging", precision, "cuda")


def test_a_gradient_apart_from_the_logits():
    """Each tensor misses its alignment once."""
    logits, bias, labels = seeded(7, 16, seed=1), seeded(16, seed=2), torch.arange(7)
    exact = (logits + bias).requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    for ops in each_unaligned(EmulatedLosses):
        loss, d = torch.full((7,), torch.nan), torch.full_like(logits, torch.nan)
        ops.cross_entropy_(logits, bias, labels, 1.0, loss, d)
        torch.testing.assert_close((loss, d), (wanted.detach(), exact.grad))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_warp_order(precision, emulated):
    found = []
    for seed in (-1, 0, 1, 2):
        emulated(EmulatedLosses(seed))
        found.append(run_of(SETUPS[2], precision, "cuda").judging())
    assert all(torch.equal(tensor, other[name]) for other in found[1:] for name, tensor in found[0].items())


def test_a_missing_barrier_is_caught():
    logits, bias, labels = seeded(7, 300, seed=0), seeded(300, seed=1), torch.arange(7)
    right, broken = torch.empty(2, 7).unbind()
    EmulatedLosses(0).cross_entropy_(logits, bias, labels, 1.0, right, None)
    EmulatedLosses(0, 0, "CUDA_EMULATOR_DROP_BARRIERS").cross_entropy_(logits, bias, labels, 1.0, broken, None)
    torch.testing.assert_close(right, torch.nn.functional.cross_entropy(logits + bias, labels, reduction="none"))
    assert not torch.equal(broken, right)


class EveryOp(EmulatedRows, EmulatedLosses, EmulatedTiles):
    """All stages, and only they: an op that is missing here is an AttributeError."""


def test_outputs_on_their_own():
    check_outputs_on_their_own(EveryOp(), torch.bfloat16)


def test_coefficients_near_zero(emulated):
    emulated(EveryOp())
    check_coefficients_near_zero("cuda")


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_whole_step_on_the_kernels(memory, emulated, monkeypatch):
    """Losses, the embeddings' gradient and the trained weights of three steps, in fp64, are the reference's."""
    compile_rows(), compile_tiles()
    emulated(EveryOp(seed=0))
    labels = torch.arange(4).repeat(2)

    def train(implementation) -> list[torch.Tensor]:
        monkeypatch.setattr("gcahng.losses.gca_hng.passes_for", lambda *_: implementation)
        torch.manual_seed(0)
        gca, found = GCAHNGLoss(5, 12, layers=2, heads=2, seed=1).double(), []
        for step in range(3):
            z = seeded(8, 12, seed=step, dtype=torch.float64).requires_grad_()
            loss = gca(z, labels)
            loss.backward()
            found += [loss.detach(), z.grad, *gca.generator_step().values()]
        return found + [value for value in gca.state_dict().values() if isinstance(value, torch.Tensor)]

    for mine, wanted in zip(train(Engine("cuda", memory, None)), train(reference), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


def test_stems_are_those_of_the_ops() -> None:
    assert all(hasattr(EmulatedLosses, f"{stem}_") for stem in STEMS)
