"""Proxy Synthesis against a loop over samples and classes in float64, its draws, and a run that continues."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gcahng.data import DataSplits
from gcahng.losses.proxy_synthesis import ALPHA, SCALE, ProxySynthesisLoss
from gcahng.train import TrainConfig
from gcahng.train.trainer import Trainer

LABELS = torch.tensor([0, 0, 3, 3, 1, 1])


def by_hand(loss: ProxySynthesisLoss, embeddings: torch.Tensor, step: int) -> float:
    """The mean of -log softmax, sample by sample."""

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / np.sqrt((vector**2).sum())

    x = [unit(row) for row in embeddings.detach().numpy()]
    p = [unit(row) for row in loss.proxies.detach().numpy()]
    labels = LABELS.tolist()
    if loss.synthesis:
        draws = np.random.default_rng([loss.seed, step])
        partner, share = draws.permutation(len(x)), draws.beta(ALPHA, ALPHA)
        for i in range(len(LABELS)):
            j = int(partner[i])
            if LABELS[i] != LABELS[j]:
                labels.append(len(p))
                x.append(unit(share * x[i] + (1 - share) * x[j]))
                p.append(unit(share * p[LABELS[i]] + (1 - share) * p[LABELS[j]]))
        assert len(x) > 8
    terms = []
    for row, label in zip(x, labels, strict=True):
        scores = [SCALE * float(row @ one) for one in p]
        terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    return sum(terms) / len(terms)


@pytest.mark.parametrize("synthesis", [False, True])
def test_against_a_loop(synthesis: bool) -> None:
    torch.manual_seed(0)
    loss = ProxySynthesisLoss(4, 8, seed=3, synthesis=synthesis).double()
    embeddings = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    for step in range(3):
        assert loss(embeddings, LABELS).item() == pytest.approx(by_hand(loss, embeddings, step), rel=1e-12)
    loss.eval()
    assert torch.autograd.gradcheck(lambda z: loss(z, LABELS), embeddings)


def test_draws_follow_from_seed_and_step() -> None:
    torch.manual_seed(0)
    first = ProxySynthesisLoss(4, 8, seed=1)
    embeddings = torch.randn(6, 8)
    values = [first(embeddings, LABELS).item() for _ in range(3)]
    assert len(set(values)) == 3
    again = ProxySynthesisLoss(4, 8, seed=1)
    again.load_state_dict({**first.state_dict(), "step": torch.tensor(1)})
    assert [again(embeddings, LABELS).item() for _ in range(2)] == values[1:]


def test_a_run_that_continues(small_config: Callable[..., TrainConfig], small_data: DataSplits, tmp_path: Path) -> None:
    config = small_config(loss="proxy_synthesis")
    whole, half, rest = (Trainer(config, small_data) for _ in range(3))
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        half.train_step()
    rest.load_state_dict(half.state_dict())
    for _ in range(2):
        rest.train_step()
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, rest.objective.state_dict()[name]), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
