"""The device that a run computes on, its threads and its algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gcahng.bounds import check_device
from gcahng.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device that a name means.

    Args:
        name: cpu, cuda, cuda:N, or auto, which is cuda where there is such a device and cpu elsewhere.

    Raises:
        UserError: the name is another one, or there is no such CUDA device.
    """
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}; PyTorch finds {torch.cuda.device_count()} CUDA devices here; it must be one of "
            "them, or cpu"
        )
    return torch.device(name)


def local_device_index() -> int | None:
    """The CUDA device of this process, one of several on its machine: that of its local rank, or the only one it sees.

    Returns:
        None where LOCAL_RANK is not set, or there are no CUDA devices or too few.
    """
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return None
    local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if devices == 1:  # as CUDA_VISIBLE_DEVICES or a scheduler leaves one to each
        return 0
    return local if local < devices else None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within, PyTorch computes with `count` threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within, whether CUDA uses only algorithms whose results repeat bit for bit.

    Args:
        wanted: True: an operation without such an algorithm is an error; False: any algorithm may be used.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = benchmark and not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
