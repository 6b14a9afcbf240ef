"""The "flat" index in torch."""

from __future__ import annotations

from typing import BinaryIO

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.progress import Progress
from gcahng.retrieval.candidates import float32_products_are_float32, smallest, square_distances
from gcahng.retrieval.index_base import ROWS, Index, write_rows

# Gallery rows that are compared at once.
_BLOCK = 1 << 16


class TorchIndex(Index):
    """Compares every query with every row, on the device of the rows."""

    kind, backend = "flat", "torch"

    def __init__(self, dim: int, metric: str, device: torch.device, blocks: list[Tensor] | None = None):
        self.dim, self.metric = dim, metric
        self._device = device
        self._blocks = blocks or []

    def __len__(self) -> int:
        return sum(len(block) for block in self._blocks)

    def write(self, file: BinaryIO) -> None:
        pieces = (rows.cpu().numpy() for block in self._blocks for rows in block.split(ROWS))
        write_rows(file, len(self), self.dim, pieces)

    def add(self, embeddings: Tensor, *, progress: Progress | None = None) -> None:
        """The same as `Index.add`, into a single block.

        Many small blocks between the temporaries of scaling would take several times as much memory.
        """
        block: Tensor | None = None
        done = 0
        for rows in self._prepared("embeddings", embeddings):
            if block is None:
                block = torch.empty(len(embeddings), self.dim, device=self._device)
            block[done : done + len(rows)] = rows
            done += len(rows)
            if progress is not None:
                progress(done, len(embeddings))
        if block is not None:
            self._blocks.append(block)

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
