"""The "flat" index in torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.progress import Progress
from gcahng.retrieval.candidates import float32_products_are_float32, smallest, square_distances
from gcahng.retrieval.copies import Copies
from gcahng.retrieval.index_base import ROWS, Index, write_rows

# Gallery rows that are compared at once.
_BLOCK = 1 << 16


class TorchIndex(Index):
    """Compares every query with every row, on the device of the rows."""

    kind, backend = "flat", "torch"

    def __init__(self, dim: int, metric: str, device: torch.device):
        self.dim, self.metric = dim, metric
        self.copies = Copies()
        self._device = device
        self._blocks: list[Tensor] = []

    @classmethod
    def of_rows(cls, rows: Tensor, metric: str, device: torch.device) -> TorchIndex:
        """An index of rows (n, D), which are float32, on the CPU and scaled. Without copies, they are not copied."""
        index = cls(rows.shape[1], metric, device)
        index.copies, stored = Copies.among(rows)
        index._blocks = [(rows[stored] if index.copies.any else rows).to(device)]
        return index

    def write(self, file: BinaryIO) -> None:
        pieces = self._stored()
        if self.copies.any:
            pieces = (self._rows(places) for places in torch.from_numpy(self.copies.stored_rows).split(ROWS))
        write_rows(file, len(self), self.dim, pieces)

    def _stored(self) -> Iterable[np.ndarray]:
        return (rows.cpu().numpy() for block in self._blocks for rows in block.split(ROWS))

    def _rows(self, places: Tensor) -> np.ndarray:
        """The stored rows (b, D) at `places` (b,)."""
        rows, start = torch.empty(len(places), self.dim), 0
        for block in self._blocks:
            inside = (places >= start) & (places < start + len(block))
            rows[inside] = block[(places[inside] - start).to(block.device)].cpu()
            start += len(block)
        return rows.numpy()

    def add(self, embeddings: Tensor, *, progress: Progress | None = None) -> None:
        """The same as `Index.add`, into a single block.

        Many small blocks between the temporaries of scaling would take several times as much memory.
        """
        block: Tensor | None = None
        done = stored = 0
        for rows in self._prepared("embeddings", embeddings):
            if block is None:
                block = torch.empty(len(embeddings), self.dim, device=self._device)
            fresh = self.copies.place(rows, self._stored())
            block[stored : stored + len(fresh)] = rows[fresh.to(rows.device)]
            stored += len(fresh)
            done += len(rows)
            if progress is not None:
                progress(done, len(embeddings))
        if block is not None and stored:
            self._blocks.append(block if stored == len(block) else block[:stored].clone())
        self._warn_of_copies()

    @torch.no_grad()
    def _search(self, rows: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        if effort is not None:
            raise UserError(f'effort is {effort}; it must be None for kind "flat", which compares all rows')
        rows = rows.to(self._device)
        # Reduced precision (TF32, bfloat16) is for training, not for comparing neighbors.
        dtype = torch.float32 if float32_products_are_float32(rows.device) else torch.float64
        best: list[tuple[Tensor, Tensor]] = []
        start = 0
        with torch.autocast(rows.device.type, enabled=False):
            for gallery in (piece for block in self._blocks for piece in block.split(_BLOCK)):
                if self.metric == "cosine":
                    values = (rows.to(dtype) @ gallery.to(dtype).mT).neg_()
                else:
                    values = square_distances(rows.to(dtype), gallery.to(dtype))
                values, indices = smallest(values, min(k, len(gallery)))
                best.append((values, indices + start))
                start += len(gallery)
        values, indices = (torch.cat(blocks, dim=1) for blocks in zip(*best, strict=True))
        values, order = values.sort(dim=1, stable=True)
        values, indices = values[:, :k], indices.gather(1, order[:, :k])
        return indices, (values.neg() if self.metric == "cosine" else values.clamp_min(0).sqrt()).float()
