"""What every launcher needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


def row_block(width: int, config: RowWise) -> tuple[int, int]:
    """(rows, columns) of a block that holds whole rows, both powers of two."""
    columns = triton.next_power_of_2(width)
    return max(1, config.values // columns), columns
