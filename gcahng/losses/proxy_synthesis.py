"""Proxy Synthesis: softmax over class vectors, with synthetic classes between those of the batch and no graph.

Gu, Ko and Kim, Proxy Synthesis: Learning with Synthetic Classes for Deep Metric Learning (AAAI 2021).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 23.0
ALPHA = 0.4


class ProxySynthesisLoss(nn.Module):
    """Normalized softmax, in which each sample also makes a synthetic class with a sample of another class.

    The embedding and the class vector of the synthetic class lie between those of the two samples, at one share λ for
    both and for the whole batch, drawn from Beta(0.4, 0.4).

    Args:
        num_classes: M, the classes that train.
        embedding_size: D, the embedding channels.
        seed: of partners and of λ; the same seed and step draw the same in every process.
        synthesis: whether there are synthetic classes; False is the normalized softmax alone.
    """

    step: Tensor

    def __init__(self, num_classes: int, embedding_size: int, *, seed: int = 0, synthesis: bool = True) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.seed, self.synthesis = seed, synthesis
        # A checkpoint holds it, so that a run that continues draws what it would have drawn.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-dim.

        Args:
            embeddings: (n, D), which are normalized here.
            labels: (n,), in 0 … M - 1.
        """
        samples, classes = F.normalize(embeddings), F.normalize(self.proxies)
        if self.synthesis:
            partner, share = self._draw(len(labels))
            partner = partner.to(labels.device)
            made = (labels != labels[partner]).nonzero().squeeze(1)
            partner = partner[made]
            own = labels[made]
            between = share * samples[made] + (1 - share) * samples[partner]
            class_between = share * classes[own] + (1 - share) * classes[labels[partner]]
            numbers = len(classes) + torch.arange(len(made), device=labels.device)
            samples = torch.cat([samples, F.normalize(between)])
            classes = torch.cat([classes, F.normalize(class_between)])
            labels = torch.cat([labels, numbers])
        return F.cross_entropy(SCALE * samples @ classes.T, labels)

    def _draw(self, count: int) -> tuple[Tensor, float]:
        """A partner for each sample, and λ."""
        draws = np.random.default_rng([self.seed, int(self.step)])
        if self.training:
            self.step += 1
        return torch.from_numpy(draws.permutation(count)), float(draws.beta(ALPHA, ALPHA))
