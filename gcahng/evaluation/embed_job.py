"""What is embedded into a file, and how: the options, the network's identity, and the rows as they come."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from gcahng.data import ImageFiles, LabeledImages, Preprocessing, evaluation_batches, usual_workers
from gcahng.data.reading import UnreadableImage, read_image
from gcahng.devices import resolve_device
from gcahng.errors import UserError
from gcahng.evaluation.partial_embeddings import ImagesKey, PartialRows
from gcahng.models.model_file import Model
from gcahng.processes import TIMEOUT
from gcahng.progress import Progress
from gcahng.retrieval.embeddings import EmbeddingSet, read_embeddings, write_embeddings
from gcahng.retrieval.items import EmbeddingModel, Items
from gcahng.retrieval.rows import check_norms

# Fixed, so that an evaluation repeats bit for bit: products of other batch sizes may round differently.
EVAL_BATCH = 256


@dataclass
class EmbedOptions:
    """How images are embedded.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        batch_size: how many images are embedded at once.
        workers: processes that read image files; None: one less than there are cores, but at most 8.
        skip_unreadable: True: files that cannot be read are left out and listed; False: the first one is an error.
        normalize: whether embeddings are scaled to norm 1.
        timeout: seconds that several processes wait for one of them.
    """

    device: str = "auto"
    batch_size: int = EVAL_BATCH
    workers: int | None = None
    skip_unreadable: bool = False
    normalize: bool = False
    timeout: float = TIMEOUT


@dataclass
class EmbedResult:
    """What `embed_to_file` did.

    Attributes:
        embeddings: what is in the file.
        skipped: the names of the images that were left out because they cannot be read.
        resumed: how many rows an earlier call had made; all of them where the file was there already.
    """

    embeddings: EmbeddingSet
    skipped: list[str] = field(default_factory=list)
    resumed: int = 0


def embedding_model(
    model: Model, preprocessing: Preprocessing, images: LabeledImages, normalized: bool = False
) -> EmbeddingModel:
    """What identifies embeddings.

    Args:
        model: the network that makes them.
        preprocessing: of image files.
        images: what is embedded.
        normalized: whether they are scaled to norm 1.
    """
    return EmbeddingModel(
        fingerprint=fingerprint(model),
        backbone=model.config.backbone.name,
        path=str(model.path.absolute()),
        resize=preprocessing.resize,
        crop=preprocessing.crop,
        normalized=normalized,
        exif_rotate=images.exif_rotate if isinstance(images, ImageFiles) else None,
    )


def normalized(embeddings: Tensor) -> Tensor:
    """Rows (n, D) fp32 scaled to norm 1, in float64 between.

    Raises:
        UserError: a row is zero.
    """
    rows = embeddings.double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    check_norms("embeddings", norms, True, option="--normalize")
    return (rows / norms.unsqueeze(1)).float()


def fingerprint(model: Model) -> str:
    """SHA-256 of a network's weights and buffers (name, type, shape, bytes) and of what else decides its output."""
    config = model.config.backbone
    digest = hashlib.sha256(json.dumps([config.name, config.embedding_dim, config.pool]).encode())
    tensors = model.network.state_dict()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if not tensors:  # a network that another program runs: what is in it is in its file
        digest.update(model.path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class EmbedJob:
    """What is embedded into which file, and how; the attributes are the arguments of `embed_to_file`."""

    model: Model
    images: LabeledImages
    items: Items
    out: Path
    preprocessing: Preprocessing
    options: EmbedOptions

    @cached_property
    def identity(self) -> EmbeddingModel:
        """What identifies the embeddings."""
        return embedding_model(self.model, self.preprocessing, self.images, self.options.normalize)

    def key(self) -> ImagesKey:
        """The key of the images and the options."""
        identity, options = self.identity, self.options
        about = [identity.fingerprint, identity.resize, identity.crop, options.batch_size]
        about += ["normalized"] if options.normalize else []  # without, the key is that of earlier versions
        about += ["exif_rotate"] if identity.exif_rotate else []
        return ImagesKey(json.dumps(about), self.images)

    def already(self) -> EmbedResult | None:
        """What is in the file, where an earlier call has made it; None: there is no file.

        Raises:
            UserError: the file was made from other images, another network or other options.
        """
        if not self.out.exists():
            return None
        there, key = read_embeddings(self.out), self.key()
        if there.key != key.of_first(len(self.images)):
            raise UserError(
                f"{self.out} exists and was made from other images, another network or other options; remove it first"
            )
        embedded = set(there.items.names)
        left_out = [name for name in self.items.names if name not in embedded]
        if left_out and not self.options.skip_unreadable:
            raise UserError(
                f"{self.out} exists, without {len(left_out)} images that could not be read, such as "
                f"{left_out[0]}; remove it first, or leave them out with --skip_unreadable"
            )
        PartialRows(self.out, key).remove()
        return EmbedResult(there, left_out, resumed=len(there))

    def collect(self, part: PartialRows, progress: Progress | None) -> None:
        """Embed the images that `part` does not have yet."""
        with torch.no_grad(), _Embedder(self.model.network, self.options) as embedder:
            for rows, left_out, done in embedder.run(self.images, self.preprocessing, part.images_done):
                part.append(rows, left_out, done)
                if progress is not None:
                    progress(done, len(self.images))

    def write(self, part: PartialRows) -> list[int]:
        """Write the file, all of whose rows `part` has, and remove `part`; returns the places that were left out."""
        whole, skipped = part.note(), part.skipped
        if len(skipped) == len(self.images):
            raise UserError(f"none of the {len(self.images)} images can be read; the first is {self.images.name(0)}")
        left_out = set(skipped)
        rows = [i for i in range(len(self.items)) if i not in left_out] if skipped else []
        embedded = self.items.subset(rows) if skipped else self.items
        write_embeddings(self.out, EmbeddingSet(part.rows(), embedded, self.identity, whole))
        part.remove()
        return skipped


class _Embedder:
    """A context in which a network is in evaluation mode, on its device."""

    def __init__(self, network: nn.Module, options: EmbedOptions) -> None:
        self._network, self._options = network, options
        self._device = resolve_device(options.device)

    def __enter__(self) -> _Embedder:
        self._training = self._network.training
        self._network.to(self._device).eval()
        return self

    def __exit__(self, *_: object) -> None:
        self._network.train(self._training)

    def run(self, images: LabeledImages, preprocessing: Preprocessing, start: int):
        """Embed the images from `start` on.

        Batches are cut at multiples of the batch size whatever is left out, so that a later call cuts the same batches.

        Yields:
            (b, D) fp32 rows on the CPU, the places of images that are left out, and how many images are done.
        """
        size = self._options.batch_size
        while start < len(images):
            try:
                for batch in self._batches(images, range(start, len(images)), preprocessing):
                    start += len(batch)
                    yield self._embed(batch), [], start
            except UnreadableImage:
                if not self._options.skip_unreadable or not isinstance(images, ImageFiles):
                    raise
                window = range(start, min(start + size, len(images)))
                good = [i for i in window if _readable(images, i)]
                if len(good) == len(window):  # now it can be read: the file changes meanwhile
                    raise
                rows = [self._embed(batch) for batch in self._batches(images, good, preprocessing)] if good else []
                start = window.stop
                left_out = sorted(set(window) - set(good))
                yield torch.cat(rows) if rows else torch.empty(0, 0), left_out, start

    def _batches(self, images: LabeledImages, places: range | list[int], preprocessing: Preprocessing):
        chosen = images.subset(torch.tensor(list(places)))
        return evaluation_batches(chosen, preprocessing, self._options.batch_size, usual_workers(self._options.workers))

    def _embed(self, batch: Tensor) -> Tensor:
        rows = self._network(batch.to(self._device)).float().cpu()
        if not rows.isfinite().all():
            raise UserError("the network gives embeddings that are not finite; its weights are damaged")
        return normalized(rows) if self._options.normalize else rows


def _readable(images: ImageFiles, index: int) -> bool:
    try:
        read_image(images, index)
    except UnreadableImage:
        return False
    return True
