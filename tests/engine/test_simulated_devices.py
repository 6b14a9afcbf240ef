"""Whole training steps on devices that are simulated: Triton's interpreter, and the CUDA kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulator.ops import STEMS, EmulatedOps, compile_all
from engine_cases import Case, assert_exact, run_step
from stages.backends import EMULATED

from gcahng import GCAHNGLoss
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.schema import OPS
from gcahng.reference import training_step as reference
from gcahng.testing import seeded


@pytest.fixture
def emulated(monkeypatch) -> None:
    """Makes the implementation "cuda" run in the emulator, with warps in random order."""
    compile_all()
    monkeypatch.setattr("gcahng.engine.prepare.ops_of", lambda implementation: EMULATED.ordered(seed=0))


def train(passes, monkeypatch, steps: int) -> list[torch.Tensor]:
    """Losses, the embeddings' gradient and the trained weights, in fp64."""
    monkeypatch.setattr("gcahng.dispatch.passes", lambda *_: passes)
    torch.manual_seed(0)
    gca, found, labels = GCAHNGLoss(5, 12, layers=2, heads=2, seed=1).double(), [], torch.arange(4).repeat(2)
    for step in range(steps):
        z = seeded(8, 12, seed=step, dtype=torch.float64).requires_grad_()
        loss = gca(z, labels)
        loss.backward()
        found += [loss.detach(), z.grad, *gca.generator_step().values()]
    # Without the bytes of the optimizers, which are no numbers to compare.
    return found + [value for name, value in gca.state_dict().items() if name != "_extra_state"]


@pytest.mark.simulated
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_training_on_cuda_kernels(memory, emulated, monkeypatch):
    mine = train(Engine("cuda", PassOptions(memory)), monkeypatch, steps=2)
    for value, wanted in zip(mine, train(reference, monkeypatch, steps=2), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


def test_a_step_on_triton_kernels():
    pytest.importorskip("triton")
    case = Case(classes=3, views=2, dim=8, layers=1, heads=2)
    z, labels = case.batch()
    assert_exact(run_step(case.loss("triton"), z, labels), run_step(case.loss("reference"), z, labels))


@pytest.mark.simulated
def test_a_step_of_two_implementations(monkeypatch):
    """C++ stages, with two ops by Triton's interpreter."""
    case = Case(classes=3, views=2, dim=8, layers=1, heads=2)
    found = []
    for implementation in ("cpp", "cpp,norm_gelu_=triton,mix_fwd_=triton"):
        monkeypatch.setattr("gcahng.dispatch.chosen", lambda *_, implementation=implementation: implementation)
        z, labels = case.batch(dtype=torch.float32)
        z.requires_grad_()
        gca = case.loss("auto", torch.float32)
        gca(z, labels).backward()
        found.append({"dz": z.grad, **gca.generator_step()})
    assert found[0]["J_syn"] > 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_emulator_has_every_op():
    assert all(hasattr(EmulatedOps, name) for name in OPS)
    assert {op.launcher.split(".")[0] for op in OPS.values()} == set(STEMS)
