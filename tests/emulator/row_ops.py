"""The row-wise stage ops (gcahng/ops/_stages.py), by their CUDA kernels in the emulator."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch
from emulator.build import compiled
from emulator.tile_ops import EmulatedTiles, Numbers
from torch import Tensor

STEMS = ("norm_gelu", "mlp_in", "mlp_out", "head")


def compile_all() -> None:
    """Each stem's library, as many at once as there are processors."""
    with ThreadPoolExecutor(torch.multiprocessing.cpu_count()) as pool:
        list(pool.map(compiled, STEMS))


class EmulatedRows(EmulatedTiles):
    """As EmulatedTiles, for ops that take rows one by one."""

    def norm_gelu_(self, t: Tensor, gamma: Tensor, beta: Tensor, y: Tensor | None, low: Tensor | None) -> None:
        types = t.dtype, t.dtype if low is None else low.dtype
        self._run("norm_gelu", "forward", types, (len(t), t, gamma, beta), (y, low), t.shape[-1])

    def mlp_in_fwd_(self, h: Tensor, b: Tensor, *outputs: Tensor) -> None:
        self._run("mlp_in", "forward", (b.dtype, h.dtype), (len(h), h, b), outputs, h.shape[-1])

    def mlp_in_bwd_(self, h: Tensor, b: Tensor, *arguments: Tensor | None) -> None:
        inputs, (g, dh, db) = (len(h), h, b, *arguments[:5]), arguments[5:]
        scratch = None if db is None else self._sums("mlp_in", h, b.dtype)
        self._run("mlp_in", "backward", (b.dtype, h.dtype), inputs, (g, dh, db, scratch), h.shape[-1])

    def mlp_out_fwd_(self, out: Tensor, e1: Tensor, *arguments: Tensor | None) -> None:
        inputs = len(e1), out, e1, *arguments[:-3]
        self._run("mlp_out", "forward", (e1.dtype, out.dtype), inputs, arguments[-3:], e1.shape[-1])

    def mlp_out_bwd_(self, s: Tensor, e1: Tensor, *arguments: Tensor | None) -> None:
        inputs, (ds, low, scaled, m1, m2, sums) = (len(s), s, e1, *arguments[:-6]), arguments[-6:]
        assert low is not None
        scratch = None if sums is None else self._sums("mlp_out", s, e1.dtype)
        outputs = (ds, low, scaled, m1, m2, sums, scratch)
        self._run("mlp_out", "backward", (e1.dtype, low.dtype), inputs, outputs, e1.shape[-1])

    def head_moments_(self, tile: Numbers, e: Tensor, sums: Tensor) -> None:
        scratch = self._sums("head", e, torch.float64)
        self._run("head", "moments", (e.dtype,), (tile, e), (sums, scratch), e.shape[-1])

    def head_fwd_(self, p: Tensor, b: Tensor, theta: Tensor) -> None:
        self._run("head", "forward", (b.dtype, p.dtype), (len(p), p, b), (theta,), p.shape[-1])

    def head_bwd_(self, theta: Tensor, dtheta: Tensor, dpre: Tensor, sum: Tensor | None) -> None:
        scratch = None if sum is None else self._sums("head", theta, theta.dtype)
        inputs = len(theta), theta, dtheta
        self._run("head", "backward", (theta.dtype, dpre.dtype), inputs, (dpre, sum, scratch), theta.shape[-1])

    def head_sums_(self, dy: Tensor, e: Tensor, wide: Tensor, sums: Tensor) -> None:
        scratch = self._sums("head", e, e.dtype)
        self._run("head", "sums", (e.dtype, dy.dtype), (len(e), dy, e), (wide, sums, scratch), e.shape[-1])

    def head_norm_(self, tile: Numbers, dy: Tensor, *arguments: Tensor) -> None:
        self._run("head", "norm", (dy.dtype,), (tile, dy, *arguments[:-1]), arguments[-1:], dy.shape[-1])

    def _sums(self, stem: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Scratch for the partial sums over these rows."""
        size = getattr(compiled(stem, *self._defines), f"{stem}_sum_scratch")
        size.restype = ctypes.c_int64
        return torch.full((size(*map(ctypes.c_int64, rows.shape)),), torch.nan, dtype=dtype)
