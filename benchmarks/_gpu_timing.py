"""How long calls take on the device. The calls take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from gcahng.bench.system import seconds

Call = Callable[[], object]
SAMPLE = 2e-3  # seconds that one sample of short calls takes at least
MOST_CALLS, MOST_SAMPLES = 20, 15
CYCLES = 2e9  # of a GPU's clock, a second, and rather too many


def back_to_back(calls: Mapping[str, Call], device: str, limit: float) -> dict[str, list[float]]:
    """Measure the seconds of each call, in samples of several calls; the samples of all calls take turns.

    On CUDA the device first waits until the host has queued a sample. So the time is that of the device, without that
    of launching.

    Args:
        calls: what is timed, by name. Each must have run before.
        device: "cpu" or "cuda".
        limit: seconds for all calls together. At least three samples are taken.
    """
    plans = {name: _plan(call, device) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for sample in range(MOST_SAMPLES):
        for name in rotated(list(calls), sample):
            count, wait = plans[name]
            found[name].append(_sample(calls[name], device, count, wait))
        if sample >= 2 and time.monotonic() - start > limit:
            break
    return found


def rotated(names: list[str], by: int) -> list[str]:
    """The names, beginning with another one each time, so that no call always follows the same one."""
    return [*names[by % len(names) :], *names[: by % len(names)]] if names else []


def _plan(call: Call, device: str) -> tuple[int, int]:
    """How many calls make a sample, and for how many cycles the device waits while they are queued."""
    took = seconds(call, device)
    count = max(1, min(MOST_CALLS, round(SAMPLE / max(took, 1e-9))))
    if device == "cpu":
        return count, 0
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return count, int(min(0.2, 1.3 * host * count) * CYCLES)


def _sample(call: Call, device: str, count: int, wait: int) -> float:
    if device == "cpu":
        return seconds(lambda: [call() for _ in range(count)]) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(wait)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def with_host(call: Call, device: str) -> tuple[float, float]:
    """The seconds of a call on the device, launching included, and the seconds after which the host was free again."""
    if device == "cpu":
        took = seconds(call)
        return took, took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    call()
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, host
