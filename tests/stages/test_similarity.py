"""similarity: of negatives to their anchors, with its gradient."""

from __future__ import annotations

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import check_same_bits, check_stage, check_unaligned, run_of, stage
from stages.test_mix import parts

from gcahng.engine.stages.mix_index import mix_index
from gcahng.engine.stages.similarity import SimilarityInputs
from gcahng.testing import seeded


@stage("negatives", products=False, edges=False)
def forward(run: Run) -> Results:
    found = Collected()
    for number, tile, _ in run.tiles():
        index = mix_index(run.schedule, tile, run.like.device)
        negatives = parts(run, tile, run.inputs.mix_upstream)
        counted, dn = index.anchor != index.negative, negatives.flip(0)
        inputs = SimilarityInputs(run.inputs.nodes, index.node, negatives, counted, 0.25)
        loss = run.nan(len(negatives))
        run.stages.similarity.forward(inputs, loss, dn if number != 1 else None)
        found.add(loss=loss, dn=dn)
    return found.results()


def test_stage(backend):
    check_stage(backend, forward)


def test_same_bits_twice(backend):
    check_same_bits(backend, forward)


@pytest.mark.simulated
def test_unaligned(emulator):
    check_unaligned(emulator, forward)


def test_short_vectors(backend):
    """Norms are at least 1e-8, so that a vector of zeros has a finite likeness and gradient."""
    setup, device = Setup(2, 2, 16, 20), backend.device
    sizes = torch.tensor([0.0, 1e-9, 3e-8, 1e-6, 1.0]).view(-1, 1)
    anchors, negatives = ((sizes * seeded(5, 16, seed=seed)).to(device) for seed in (1, 2))
    node, counted = torch.arange(5).repeat_interleave(5).to(device), torch.ones(25, dtype=torch.bool, device=device)
    inputs = SimilarityInputs(anchors, node, negatives.repeat(5, 1), counted, 0.5)
    exact = inputs._replace(anchors=anchors.double(), negatives=inputs.negatives.double())
    dn, wanted = (torch.zeros(25, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64))
    stages = run_of(backend, setup, "float32").stages
    loss, plain = (torch.full((25,), torch.nan, dtype=x.dtype, device=device) for x in (dn, wanted))
    stages.similarity.forward(inputs, loss, dn)
    super(type(stages.similarity), stages.similarity).forward(exact, plain, wanted)
    torch.testing.assert_close(loss.double(), plain, rtol=0, atol=1e-5)
    size = wanted.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(dn.double() / size, wanted / size, rtol=0, atol=1e-5)
