"""Indices of every kind in faiss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.retrieval.candidates import GPU_NEIGHBORS, faiss_sees_gpus, to_gpu
from gcahng.retrieval.copies import Copies
from gcahng.retrieval.index_base import ROWS, Index, IndexSettings, prepared, write_rows

# faiss warns below 39 training rows per k-means cell. Its default of 256 takes four times as long to train as 64.
_ROWS_PER_LIST = 39
_TRAINING_ROWS_PER_LIST = 64
# A one-byte code of a product quantizer has this many centroids, each of which needs a training row.
_PQ_CENTROIDS = 256

_log = logging.getLogger("gcahng")


class FaissIndex(Index):
    """An index of any kind in faiss. `raw` is the faiss index."""

    backend = "faiss"

    def __init__(self, raw: Any, dim: int, kind: str, metric: str):
        self.raw, self.dim, self.kind, self.metric = raw, dim, kind, metric
        self.copies = Copies()

    @classmethod
    def empty(cls, dim: int, kind: str, metric: str, description: str) -> FaissIndex:
        """An empty, untrained index from a description for the factory of faiss."""
        import faiss

        product = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        return cls(faiss.index_factory(dim, description, product), dim, kind, metric)

    @classmethod
    def train(cls, embeddings: Tensor, kind: str, metric: str, settings: IndexSettings) -> FaissIndex:
        """An empty index that is trained on a sample of the rows (n, D).

        Raises:
            UserError: a setting does not fit the rows, or there are too few rows.
        """
        n, dim = embeddings.shape
        lists = settings.lists or max(1, min(round(4 * math.sqrt(n)), n // _ROWS_PER_LIST))
        index = cls.empty(dim, kind, metric, _description(kind, n, dim, lists, settings))
        if kind == "hnsw":
            index.raw.hnsw.efConstruction = settings.build_breadth
            index.raw.hnsw.efSearch = settings.search_breadth
        if kind in ("ivf_flat", "ivf_pq"):
            index._train_lists(embeddings, lists, settings)
        index._to(embeddings.device)
        return index

    @classmethod
    def read(cls, file: BinaryIO, kind: str, metric: str, device: torch.device) -> FaissIndex:
        """Read the index in `file`, to be searched on `device`.

        Raises:
            UserError: it is not an index of this kind and metric.
        """
        import faiss

        try:
            raw = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the file is not an index ({reason}); it must be one that faiss wrote") from None
        expected = {"ivf_flat": "IndexIVFFlat", "ivf_pq": "IndexIVFPQ", "hnsw": "IndexHNSWFlat"}[kind]
        actual = type(raw).__name__
        actual_metric = {faiss.METRIC_INNER_PRODUCT: "cosine", faiss.METRIC_L2: "euclidean"}.get(raw.metric_type)
        if (actual, actual_metric) != (expected, metric):
            raise UserError(f"the index is a {actual} for {actual_metric}; it must be a {expected} for {metric}")
        index = cls(raw, raw.d, kind, metric)
        try:
            index.copies = Copies.read(file, raw.ntotal)
        except ValueError as error:
            raise UserError(f"the file is not an index ({error}); it must be one that gcahng wrote") from None
        index._to(device)
        return index

    @classmethod
    def of_rows(cls, rows: Tensor, metric: str, device: torch.device) -> FaissIndex:
        """A "flat" index of rows (n, D), which are float32, on the CPU and scaled, to be searched on `device`."""
        index = cls.empty(rows.shape[1], "flat", metric, "Flat")
        index._to(device)
        index.copies, stored = Copies.among(rows)
        index.raw.add((rows[stored] if index.copies.any else rows).numpy())
        return index

    def write(self, file: BinaryIO) -> None:
        import faiss

        raw = _on_cpu(self.raw)
        if self.kind == "flat":
            write_rows(file, len(self), self.dim, self.every_row())
        else:
            faiss.write_index(raw, faiss.PyCallbackIOWriter(file.write))
            self.copies.write(file)

    def every_row(self) -> Iterator[np.ndarray]:
        """Pieces (b, D) of all rows of a "flat" index, scaled, copies among them."""
        raw = _on_cpu(self.raw)
        for start in range(0, len(self), ROWS):
            # A tensor once anyone has imported faiss.contrib.torch_utils.
            yield np.asarray(raw.reconstruct_batch(self.copies.stored_rows[start : start + ROWS]))

    def _add(self, rows: Tensor) -> None:
        self.raw.add(rows.cpu().numpy())

    def _stored(self) -> Iterator[np.ndarray]:
        if self.kind == "flat":
            for start in range(0, self.raw.ntotal, ROWS):
                # A tensor once anyone has imported faiss.contrib.torch_utils.
                yield np.asarray(self.raw.reconstruct_n(start, min(ROWS, self.raw.ntotal - start)))

    def _breadth(self, k: int, effort: int | None) -> tuple[int, int]:
        if _on_gpu(self.raw):
            if k > GPU_NEIGHBORS:
                raise UserError(
                    f"k is {k}; it must be at most {GPU_NEIGHBORS} for faiss on a GPU, while the CPU has no such limit"
                )
            return tuple(min(breadth, GPU_NEIGHBORS) for breadth in super()._breadth(k, effort))  # type: ignore[return-value]
        if self.kind == "hnsw":
            # All that are in view anyway. More would be another view, with other neighbors.
            breadth = min(max(effort or self.raw.hnsw.efSearch, k), self.raw.ntotal)
            return breadth, breadth
        return super()._breadth(k, effort)

    def _search(self, rows: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        # Once imported by anyone, faiss.contrib.torch_utils replaces faiss's search with one that has no `params`.
        search = getattr(self.raw, "search_numpy", self.raw.search)
        values, indices = search(rows.cpu().numpy(), k, params=self._parameters(k, effort))
        indices, values = torch.from_numpy(indices), torch.from_numpy(values)
        if self.metric == "euclidean":
            values = values.clamp_min_(0).sqrt_()
        nothing = -math.inf if self.metric == "cosine" else math.inf
        return indices, values.masked_fill_(indices < 0, nothing)

    def _parameters(self, k: int, effort: int | None) -> Any:
        """The `params` of a single search in faiss, so that two searches at a time do not disturb each other."""
        import faiss

        if self.kind == "flat":
            if effort is not None:
                raise UserError(f'effort is {effort}; it must be None for kind "flat", which compares all rows')
            return None
        if self.kind == "hnsw":
            # More breadth than rows finds no more, and faiss allocates memory for all of it.
            breadth = max(min(effort or self.raw.hnsw.efSearch, self.raw.ntotal), k)
            return faiss.SearchParametersHNSW(efSearch=breadth)
        most = min(self.raw.nlist, GPU_NEIGHBORS) if _on_gpu(self.raw) else self.raw.nlist
        return faiss.SearchParametersIVF(nprobe=min(effort or self.raw.nprobe, most))

    def _to(self, device: torch.device) -> None:
        """Move the index to `device` if that is a GPU and faiss supports this kind on it."""
        if device.type != "cuda" or self.kind == "hnsw" or not faiss_sees_gpus():
            return
        try:
            self.raw = to_gpu(self.raw, device)
        except RuntimeError as error:  # for example a value of code_bytes that its kernels do not support
            reason = str(error).strip().splitlines()[-1]
            _log.warning(
                "%s is searched on the CPU, because faiss does not support it on the GPU: %s", self.kind, reason
            )

    def _train_lists(self, embeddings: Tensor, lists: int, settings: IndexSettings) -> None:
        """Train the cells by k-means, and the codes of "ivf_pq", on a sample of the rows that the seed draws."""
        sample_size = max(_TRAINING_ROWS_PER_LIST * lists, _ROWS_PER_LIST * _PQ_CENTROIDS)
        sample = embeddings
        if sample_size < len(embeddings):
            generator = torch.Generator().manual_seed(settings.seed)
            chosen = torch.randperm(len(embeddings), generator=generator)[:sample_size].sort().values
            sample = embeddings[chosen.to(embeddings.device)]
        quantizers = [self.raw.cp] + ([self.raw.pq.cp] if self.kind == "ivf_pq" else [])
        for parameters in quantizers:
            parameters.seed = settings.seed
            parameters.min_points_per_centroid = 1
        if self.kind == "ivf_pq":
            # The factory turns on codes for Hamming distances, which take long to train and are not used here.
            self.raw.do_polysemous_training = False
        self.raw.train(torch.cat(list(prepared("embeddings", sample, self.metric))).cpu().numpy())
        self.raw.nprobe = min(settings.probes or max(1, lists // 32), lists)


def _description(kind: str, n: int, dim: int, lists: int, settings: IndexSettings) -> str:
    """The description of the index for the factory of faiss.

    Raises:
        UserError: the settings do not fit n rows of `dim` channels.
    """
    if kind == "flat":
        return "Flat"
    if kind == "hnsw":
        return f"HNSW{settings.links},Flat"
    if n < lists:
        raise UserError(f"lists is {lists}; it must be at most {n}, the number of embeddings")
    if kind == "ivf_flat":
        return f"IVF{lists},Flat"
    code_bytes = settings.code_bytes or _default_code_bytes(dim)
    if dim % code_bytes:
        raise UserError(f"code_bytes is {code_bytes}; it must divide {dim}, the number of channels")
    if n < _PQ_CENTROIDS:
        raise UserError(f'embeddings has {n} rows; it must have at least {_PQ_CENTROIDS} for kind "ivf_pq"')
    return f"IVF{lists},PQ{code_bytes}x8"


def _default_code_bytes(dim: int) -> int:
    """The largest divisor of `dim` up to a quarter of it; 1 for a prime."""
    return next(size for size in range(max(1, dim // 4), 0, -1) if dim % size == 0)


def _on_cpu(raw: Any) -> Any:
    """A faiss index, or a copy of it on the CPU where it is on a GPU."""
    import faiss

    return faiss.index_gpu_to_cpu(raw) if _on_gpu(raw) else raw


def _on_gpu(raw: Any) -> bool:
    return type(raw).__name__.startswith("Gpu")
