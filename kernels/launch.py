"""What every launcher needs, and the launch of kernels whose programs take whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import RowWise


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's; on the CPU its interpreter runs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """The type of sums and products: fp64 for fp64, fp32 for all else."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def as_tensor(number: float, like: Tensor) -> Tensor:
    """The number as a 0-dim tensor of that dtype: Triton would round a float argument to fp32."""
    return torch.full((), number, dtype=like.dtype, device=like.device)


def row_block(width: int, config: RowWise) -> tuple[int, int]:
    """(rows, columns) of a block that holds whole rows, both powers of two."""
    columns = triton.next_power_of_2(width)
    return max(1, config.values // columns), columns


def launch_rows(
    kernel: Any,
    config: RowWise,
    shape: Sequence[int],
    pointers: Sequence[Tensor | None],
    numbers: Sequence[int] = (),
    **constants: Any,
) -> None:
    """Launches a kernel whose programs take BLOCK_R whole rows each.

    Args:
        kernel: its arguments are the pointers, the rows' number and width, the numbers, and the constants, BLOCK_R and
            BLOCK_D among them.
        config: the block and the warps.
        shape: the number of rows and their width; nothing is launched where one of them is 0.
        pointers: the tensors, of which the first is not None.
        numbers: further numbers that the kernel takes.
        constants: further constants that the kernel takes.
    """
    rows, width = shape
    if not rows * width:
        return
    block_r, block_d = row_block(width, config)
    constants |= {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": config.warps(block_d)}
    with on_device_of(pointers[0]):
        kernel[(triton.cdiv(rows, block_r),)](*pointers, rows, width, *numbers, **constants)


@triton.jit
def rows_at(first_row, o_d, T, D, BLOCK_R: tl.constexpr):
    """A block of a (T, D) tensor: BLOCK_R rows from first_row (int64) on, their channels o_d (BLOCK_D,).

    Returns:
        o_r, m_r: the rows (BLOCK_R,), and which of them there are.
        o, m_rd: the places of the block's values (BLOCK_R, BLOCK_D), and which of them there are.
    """
    o_r = first_row + tl.arange(0, BLOCK_R)
    m_r = o_r < T
    m_rd = m_r[:, None] & (o_d < D)[None, :]
    return o_r, m_r, o_r[:, None] * D + o_d[None, :], m_rd
