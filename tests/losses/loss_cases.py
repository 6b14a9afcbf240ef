"""A small loss, batches for it, and exact comparison of everything that a loss remembers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import gcahng

NUM_CLASSES, DIM, CLASSES, VIEWS = 7, 8, 4, 3
# Means for which negatives are pulled and J_syn counts.
MEAN_METRIC, MEAN_GENERATOR = 2.0, 20.0
# Every implementation keeps the same contract; the `implementation` fixture goes through them.
IMPLEMENTATIONS = ("reference", "torch", "cpp")
implementation = "auto"


def make_loss(*, dtype: torch.dtype = torch.float64, means: bool = True, **options) -> gcahng.GCAHNGLoss:
    """The same weights every time; means=False leaves the running means of a first epoch in force."""
    defaults = {"layers": 2, "heads": 2, "seed": 11, "impl": implementation}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gca = gcahng.GCAHNGLoss(NUM_CLASSES, DIM, **(defaults | options)).to(dtype)
    if means:
        gca.mean_metric, gca.mean_generator = MEAN_METRIC, MEAN_GENERATOR
    return gca


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Embeddings (12, 8) and labels (12,): three samples of each of four classes, in no order."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randperm(NUM_CLASSES, generator=generator)[:CLASSES]
    labels = classes.repeat(VIEWS)[torch.randperm(CLASSES * VIEWS, generator=generator)]
    return torch.randn(CLASSES * VIEWS, DIM, generator=generator, dtype=torch.float64).to(dtype), labels


def train_step(gca, z: Tensor, labels: Tensor, u=(None, None), scaler=None):
    """One whole step: loss, gradient of the embeddings, logs."""
    z = z.detach().clone().requires_grad_()
    loss = gca(z, labels, u=u[0])
    (loss if scaler is None else scaler.scale(loss)).backward()
    logs = gca.generator_step(scaler=scaler, u=u[1])
    return loss.detach(), z.grad, logs


def snapshot(gca) -> dict:
    """A copy of all that the loss remembers."""
    return copy.deepcopy(gca.state_dict())


def same(a, b) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    (group,) = optimizer.param_groups
    return group["lr"]


def one_layer(**options) -> gcahng.GCAHNGLoss:
    return make_loss(**({"layers": 1} | options))


def model_and_loss(**options) -> tuple[nn.Linear, gcahng.GCAHNGLoss]:
    """A user's network, and a loss of one layer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(8, 8, dtype=torch.float64), one_layer(**options)
