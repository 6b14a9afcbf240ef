"""How hard the generated negatives are during training, and how θ is distributed.

At each evaluation the loop measures them on the same few training images:

    probe = NegativesProbe(config, data.train, device)
    log.write(step, "negatives", probe.measure(model, objective))

This is a line {"step": …, "kind": "negatives", …} of metrics.jsonl, which `gcahng report` draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gcahng.config import TrainConfig
from gcahng.data import ImageFiles, LabeledImages, Preprocessing, UnreadableImage, evaluation_batches
from gcahng.data.sampler import UNLABELED
from gcahng.losses import GCAHNGLoss

MAX_IMAGES = 64
THETA_BINS = 25


class NegativesProbe:
    """Measures a loss's generated negatives on a fixed batch of training images, without changing any state.

    Args:
        config: of the run. The batch has the run's samples of each class and its classes, but at most `MAX_IMAGES`
            images and at least two classes.
        train: the training images; config.seed draws the batch from them.
        device: of the network and the loss.
    """

    def __init__(self, config: TrainConfig, train: LabeledImages, device: torch.device) -> None:
        self._device, self._needed = device, config.loss == "gca_hng"
        self._data, self._seed, self._train = config.data, config.seed, train
        self._preprocessing = Preprocessing(config.data.resize, config.data.image_size)
        self._usable = train.labels.cpu() != UNLABELED
        self._draw()
        self._batch: tuple[Tensor, Tensor] | None = None

    def measure(self, model: nn.Module, objective: nn.Module) -> dict[str, Any]:
        """Measure in evaluation mode; the modes of network and loss are restored.

        Args:
            model: images → embeddings.
            objective: the loop's loss; its GCAHNGLoss is `objective.gca`.

        Returns:
            The `negatives_record`; {} for a loss that generates no negatives.
        """
        if not self._needed:
            return {}
        gca: GCAHNGLoss = objective.gca  # type: ignore[assignment]
        images, labels = self._read()
        modes = [(module, module.training) for part in (model, gca) for module in part.modules()]
        model.eval()
        gca.eval()
        try:
            with torch.no_grad():
                embeddings = model(images).float()
            with gca.alone():
                return negatives_record(gca, embeddings, labels, self._mixing)
        finally:
            for module, training in modes:
                module.training = training

    def _draw(self) -> None:
        """Choose the batch and its mixing draws among the usable images. They stay the same, so that only the networks
        change between two measurements."""
        generator = torch.Generator().manual_seed(self._seed)
        views = self._data.samples_per_class
        classes = max(2, min(self._data.classes_per_batch, MAX_IMAGES // views))
        usable = self._usable.nonzero().squeeze(1)
        self._rows = usable[_fixed_rows(self._train.labels.cpu()[usable], classes, views, generator)]
        self._mixing = torch.rand(views, views - 1, generator=generator)

    def _read(self) -> tuple[Tensor, Tensor]:
        """The batch on the device; it is read when it is first needed.

        Raises:
            UnreadableImage: a file cannot be read; with data.skip_unreadable, less than two classes can be read.
        """
        while self._batch is None:
            chosen = self._train.subset(self._rows)
            try:
                images = torch.cat(list(evaluation_batches(chosen, self._preprocessing, len(self._rows))))
            except UnreadableImage as error:
                self._leave_out(error)
                continue
            self._batch = images.to(self._device), chosen.labels.to(self._device)
        return self._batch

    def _leave_out(self, error: UnreadableImage) -> None:
        """Choose another batch without the file that cannot be read, where the run skips such files."""
        assert isinstance(self._train, ImageFiles)
        for row in self._rows.tolist():
            if self._train.file(row) == error.path:
                self._usable[row] = False
        if not self._data.skip_unreadable or len(self._train.labels[self._usable].unique()) < 2:
            raise error
        self._draw()


def negatives_record(
    gca: GCAHNGLoss, embeddings: Tensor, labels: Tensor, mixing: Tensor | None = None
) -> dict[str, Any]:
    """Distances of synthetic and real negatives to their anchors, and the distribution of θ.

    Distances are Euclidean, between embeddings as the loss sees them, which are not normalized. Every sample is an
    anchor.

    Args:
        gca: the loss, in the mode in which it is to generate.
        embeddings: (n, D).
        labels: (n,), as many of each class.
        mixing: (K, K-1) mixing draws, see `GCAHNGLoss.generate`.

    Returns:
        "synthetic", "real": mean distance of anchors to synthetic and to real negatives, each with "_p10" and "_p90",
        the distances that a tenth and nine tenths are below; "hardest_synthetic", "hardest_real": to the nearest one
        of an anchor, mean over anchors; "positive": to the other samples of the anchor's class; "nearer": share of the
        synthetic negatives that are nearer to their anchor than every real sample of their class; "apart": mean
        distance between the synthetic negatives of one anchor, left out where there are only two classes; "theta_mean",
        "theta_std" and "theta_histogram": of the channels of θ between samples of different classes, the latter as the
        shares in `THETA_BINS` equal parts of [0, 1].
    """
    generated = gca.generate(embeddings, labels, u=mixing)
    views, classes = generated.index.shape
    rows = embeddings.detach().double()[generated.index]  # (K, C, D)
    other = ~torch.eye(classes, dtype=torch.bool, device=rows.device)
    made = generated.negatives.double()
    synthetic = (made - rows[:, :, None]).norm(dim=-1)  # (anchor view k, anchor a, class c)
    flat = rows.flatten(0, 1)
    real = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").view(views, classes, views, classes)
    real_negatives = real.transpose(2, 3)[:, other]  # (k, pairs of classes, views of the other)
    nearest_of_class = real.amin(dim=2)
    apart = ~torch.eye(views, dtype=torch.bool, device=rows.device)
    positive = real.diagonal(dim1=1, dim2=3)[apart]  # (pairs of views, classes)
    theta = generated.coefficients[labels[:, None] != labels].double()
    far = torch.where(other, 0.0, torch.inf)
    bins = (theta * THETA_BINS).long().clamp_(0, THETA_BINS - 1).flatten()
    return {
        **_spread("synthetic", synthetic[:, other]),
        **_spread("real", real_negatives),
        "hardest_synthetic": (synthetic + far).amin(dim=2).mean().item(),
        "hardest_real": (nearest_of_class + far).amin(dim=2).mean().item(),
        "positive": positive.mean().item(),
        "nearer": (synthetic < nearest_of_class)[:, other].double().mean().item(),
        **_apart(made, other),
        "theta_mean": theta.mean().item(),
        "theta_std": theta.std().item(),
        "theta_histogram": (torch.bincount(bins, minlength=THETA_BINS) / len(bins)).tolist(),
    }


def _apart(made: Tensor, other: Tensor) -> dict[str, float]:
    """The mean distance between the negatives (K, C, C, D) of one anchor; other (C, C) is false for its own class."""
    if len(other) < 3:
        return {}
    between = torch.cdist(made, made, compute_mode="donot_use_mm_for_euclid_dist")  # (K, C, C, C)
    pairs = other[:, :, None] & other[:, None] & other
    return {"apart": between[:, pairs].mean().item()}


def _spread(name: str, distances: Tensor) -> dict[str, float]:
    # quantile does not take any number of values, and kthvalue does not repeat on CUDA; sort does both.
    values = distances.flatten()
    ordered = values.sort().values
    low, high = (ordered[round(q * (len(values) - 1))].item() for q in (0.1, 0.9))
    return {name: values.mean().item(), f"{name}_p10": low, f"{name}_p90": high}


def _fixed_rows(labels: Tensor, classes: int, views: int, generator: torch.Generator) -> Tensor:
    """(classes · views,) rows of a random batch. Classes with fewer than `views` images are taken only where there are
    not enough others, and then their images repeat."""
    present, sizes = labels.unique(return_counts=True)
    order = torch.randperm(len(present), generator=generator)
    order = order[(sizes[order] < views).long().sort(stable=True).indices]
    rows = []
    for label in present[order[:classes]].tolist():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        rows.append(members[torch.arange(views) % len(members)])
    return torch.cat(rows)
