"""cross_entropy: of a classifier on negatives, with its gradient."""

from __future__ import annotations

import pytest
import torch
from stages.backends import Backend
from stages.cases import Collected, Results, Run
from stages.checks import case, check_same_bits, check_stage, check_unaligned, stage
from stages.test_mix import parts
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.stages.cross_entropy import CrossEntropyInputs, CrossEntropyOutputs
from gcahng.engine.stages.mix_index import mix_index
from gcahng.testing import seeded


@stage("negatives", edges=False)
def forward(run: Run) -> Results:
    """Under a classifier of 4D classes."""
    found, w, entropy = Collected(), run.inputs.weights, run.stages.cross_entropy
    for _, tile, _ in run.tiles():
        labels = mix_index(run.schedule, tile, run.like.device).negative
        negatives = parts(run, tile, run.inputs.mix_upstream).to(run.low)
        loss, again = (run.nan(len(negatives)) for _ in range(2))
        d = entropy.forward(CrossEntropyInputs(entropy.logits(negatives, w.w1), w.b1, labels, 0.125), loss, True)
        inputs = CrossEntropyInputs(entropy.logits(negatives, w.w1), w.b1, labels, 0.125)
        assert entropy.forward(inputs, again, False) is None and torch.equal(again, loss)
        found.add(loss=loss, d=d)
    return found.results()


def test_stage(backend):
    check_stage(backend, forward)


def test_same_bits_twice(backend):
    check_same_bits(backend, forward)


@pytest.mark.simulated
def test_unaligned(emulator):
    check_unaligned(emulator, forward)


def entropy_of(backend: Backend, logits: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and half of its gradient, on the CPU."""
    logits, bias, labels = (x.to(backend.device) for x in (logits, bias, labels))
    loss = bias.new_full((len(logits),), torch.nan)
    backend.ops.cross_entropy_(CrossEntropyInputs(logits, bias, labels, 0.5), CrossEntropyOutputs(loss, logits))
    return loss.cpu(), logits.cpu()


def test_logits_far_from_zero(backend):
    """The largest logit, bias and all, is taken off before anything is raised to a power, wherever a row or one of its
    columns lies."""
    labels = torch.arange(9) % 37
    logits, bias = seeded(9, 37, seed=2), seeded(37, seed=1)
    first, last = (200 * F.one_hot(torch.tensor(column), 37) for column in (0, 36))
    rows = [(logits + at, bias) for at in (-1000.0, 1000.0)]
    for x, shift in (*rows, *((logits, bias + at) for at in (-1000.0, 1000.0, first, last))):
        exact = (x.double() + shift.double()).requires_grad_()
        wanted = F.cross_entropy(exact, labels, reduction="none")
        wanted.sum().backward()
        loss, d = entropy_of(backend, x.clone(), shift, labels)
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=0, atol=3e-4)  # an fp32 near 1000: 6e-5
        torch.testing.assert_close(d.double(), 0.5 * exact.grad, rtol=0, atol=3e-4)


def test_gradient_of_sure_rows(backend):
    """Where a row is all but sure of its label, p - 1 has as many digits as any: p itself is not rounded to the dtype
    of products."""
    labels, bias = torch.arange(9), torch.zeros(37)
    logits = (seeded(9, 37, seed=2) + 9 * F.one_hot(labels, 37)).to(backend.low)
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, labels, reduction="sum").backward()
    _, d = entropy_of(backend, logits.clone(), bias, labels)
    own = d.double().diagonal(), 0.5 * exact.grad.diagonal()
    torch.testing.assert_close(*own, rtol=0.6 * torch.finfo(backend.low).eps, atol=0)


@pytest.mark.simulated
def test_a_gradient_apart_from_the_logits(emulator):
    """Each tensor misses its alignment once."""
    logits, bias, labels = seeded(7, 16, seed=1), seeded(16, seed=2), torch.arange(7)
    exact = (logits + bias).requires_grad_()
    wanted = F.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    for one, _, precision in emulator.unaligned(forward):
        if precision == "float32":
            loss, d = torch.full((7,), torch.nan), torch.full_like(logits, torch.nan)
            one.cross_entropy_(CrossEntropyInputs(logits, bias, labels, 1.0), CrossEntropyOutputs(loss, d))
            with case(one):
                torch.testing.assert_close((loss, d), (wanted.detach(), exact.grad))


@pytest.mark.simulated
def test_a_missing_barrier_is_caught(emulator):
    inputs = CrossEntropyInputs(seeded(7, 300, seed=0), seeded(300, seed=1), torch.arange(7), 1.0)
    right, broken = torch.empty(2, 7).unbind()
    emulator.ordered(0).cross_entropy_(inputs, CrossEntropyOutputs(right, None))
    emulator.without_barriers(0).cross_entropy_(inputs, CrossEntropyOutputs(broken, None))
    wanted = F.cross_entropy(inputs.logits + inputs.bias, inputs.labels, reduction="none")
    torch.testing.assert_close(right, wanted)
    assert not torch.equal(broken, right)
