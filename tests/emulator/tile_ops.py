"""The stage ops that know the tile (gcahng/ops/_stages.py), by their CUDA kernels in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from emulator.build import Guarded, compiled, launch
from torch import Tensor

STEMS = ("gate", "edge_to_node", "edge_start", "mix", "diversity")
Numbers = Sequence[int]


def compile_all() -> None:
    """Each stem's library, as many at once as there are processors."""
    with ThreadPoolExecutor(torch.multiprocessing.cpu_count()) as pool:
        list(pool.map(compiled, STEMS))


def each_unaligned(ops: type[EmulatedTiles]) -> Iterator[EmulatedTiles]:
    """Once for each tensor of the op that has most, which then misses its alignment."""
    for only in range(15):
        yield ops(-1, 1, only=only)


class EmulatedTiles:
    """Stands for torch.ops.gcahng. Every call works on copies between fences of NaN; what is not an output must come
    back as it was, and scratch is full of NaN.

    seed: the order of warps (tests/emulator/cuda_emulator.h). offset: values by which tensors miss their alignment:
    all of them, or the `only`-th of each call.
    """

    def __init__(self, seed: int = -1, offset: int = 0, *defines: str, only: int | None = None) -> None:
        self._seed, self._offset, self._defines, self._only = seed, offset, defines, only

    def edge_start_fwd_(self, tile: Numbers, x: Tensor, e: Tensor | None, low: Tensor | None) -> None:
        types = x.dtype, x.dtype if low is None else low.dtype
        self._run("edge_start", "forward", types, (tile, x), (e, low), x.shape[-1])

    def edge_start_bwd_(self, tile: Numbers, x: Tensor, de: Tensor, dx: Tensor) -> None:
        scratch = self._scratch("edge_start", "backward", tile, de.shape[-1], de.dtype)
        self._run("edge_start", "backward", (de.dtype,), (tile, x, de), (dx, scratch), de.shape[-1])

    def edge_to_node_fwd_(self, tile: Numbers, p: Tensor, b: Tensor, sum: Tensor) -> None:
        scratch = self._scratch("edge_to_node", "forward", tile, p.shape[-1], b.dtype)
        self._run("edge_to_node", "forward", (b.dtype, p.dtype), (tile, p, b), (sum, scratch), p.shape[-1])

    def edge_to_node_bwd_(self, tile: Numbers, p: Tensor, b: Tensor, ds: Tensor, dp: Tensor, db: Tensor | None) -> None:
        scratch = None if db is None else self._scratch("edge_to_node", "backward", tile, p.shape[-1], b.dtype)
        types = b.dtype, p.dtype
        self._run("edge_to_node", "backward", types, (tile, p, b, ds), (dp, db, scratch), p.shape[-1])

    def gate_fwd_(self, *arguments: Any) -> None:
        *inputs, e1, low, p, q = arguments
        types = e1.dtype, e1.dtype if low is None else low.dtype
        self._run("gate", "forward", types, inputs, (e1, low, p, q), e1.shape[-1])

    def gate_bwd_(self, *arguments: Any) -> None:
        inputs, (de, du, dc, dv, dgamma, dbeta) = arguments[:-6], arguments[-6:]
        de1 = inputs[-3]
        scratch = None if du is None else self._scratch("gate", "backward", inputs[0], de1.shape[-1], de1.dtype)
        outputs = (de, du, dc, dv, dgamma, dbeta, scratch)
        self._run("gate", "backward", (de1.dtype,), inputs, outputs, de1.shape[-1])

    def mix_fwd_(self, *arguments: Any) -> None:
        inputs, outputs = arguments[:-3], arguments[-3:]
        self._run("mix", "forward", (inputs[1].dtype,), inputs, outputs, inputs[1].shape[-1])

    def mix_bwd_theta_(self, *arguments: Any) -> None:
        *inputs, dtheta = arguments
        self._run("mix", "backward_theta", (dtheta.dtype,), inputs, (dtheta,), dtheta.shape[-1])

    def mix_bwd_z_(self, *arguments: Any) -> None:
        *inputs, dz, d_d_plus = arguments
        scratch = self._scratch("mix", "backward_z", inputs[0], dz.shape[-1], dz.dtype)
        self._run("mix", "backward_z", (dz.dtype,), inputs, (dz, d_d_plus, scratch), dz.shape[-1])

    def diversity_fwd_(self, tile: Numbers, theta: Tensor, *sums: Tensor) -> None:
        scratch = self._scratch("diversity", "forward", tile, theta.shape[-1], theta.dtype)
        self._run("diversity", "forward", (theta.dtype,), (tile, theta), (*sums, scratch), theta.shape[-1])

    def diversity_bwd_(self, tile: Numbers, theta: Tensor, mean: Tensor, scale: Tensor, dtheta: Tensor) -> None:
        self._run("diversity", "backward", (theta.dtype,), (tile, theta, mean, scale), (dtheta,), theta.shape[-1])

    def _scratch(self, stem: str, function: str, tile: Numbers, dim: int, dtype: torch.dtype) -> Tensor:
        size = getattr(compiled(stem, *self._defines), f"{stem}_{function}_scratch")
        size.restype = ctypes.c_int64
        numbers = torch.tensor(tile)
        count = size(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_int64(dim))
        return torch.full((count,), torch.nan, dtype=dtype)

    def _run(
        self,
        stem: str,
        function: str,
        types: tuple[torch.dtype, ...],
        inputs: Sequence[Any],
        outputs: Sequence[Tensor | None],
        dim: int,
    ) -> None:
        copies: dict[int, tuple[Tensor, Guarded]] = {}  # one of what is given twice, as input and output

        def passed(argument: Any) -> Any:
            if isinstance(argument, Sequence):
                return torch.tensor(argument)
            if not isinstance(argument, Tensor) or not argument.is_floating_point():
                return argument
            if argument.data_ptr() not in copies:
                offset = self._offset if self._only in (None, len(copies)) else 0
                guarded = Guarded(*argument.shape, dtype=argument.dtype, offset=offset)
                guarded.tensor.copy_(argument)
                copies[argument.data_ptr()] = argument, guarded
            return copies[argument.data_ptr()][1].tensor

        arguments = [passed(argument) for argument in (*inputs, *outputs)]
        library = compiled(stem, *self._defines)
        launch(library, f"emulate_{stem}_{function}", self._seed, *types, *arguments, dim)
        written = {output.data_ptr() for output in outputs if output is not None}
        for place, (argument, guarded) in copies.items():
            if place in written:
                argument.copy_(guarded.check())
            else:
                assert torch.equal(argument, guarded.check()), f"{stem} {function} wrote to an input"
