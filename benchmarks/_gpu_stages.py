"""The engine's stages on one tile in each implementation, matrix products included, and the row-wise ops alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _gpu_errors import Doing, kept, release
from _gpu_timing import back_to_back
from _stage_tile import Size, Tile, rows_of
from torch import Tensor

from gcahng.bench.step import spread
from gcahng.dispatch import choose
from gcahng.engine.schema import Ops
from gcahng.testing.compare import largest_allowed

PRECISIONS = {"fp32": (torch.float32, torch.float32), "bf16": (torch.float32, torch.bfloat16)}


class RecordedOps(Ops):
    """The ops of an implementation, which save the last arguments of each op while `on`."""

    def __init__(self, implementation: str) -> None:
        super().__init__(implementation)
        self.calls: dict[str, tuple] = {}
        self.on = False

    def overload(self, name: str) -> Callable[..., None]:
        run = super().overload(name)

        def call(*arguments: Any) -> None:
            if self.on:
                self.calls[name] = arguments
            run(*arguments)

        return call


def moved_bytes(arguments: tuple) -> int:
    """The bytes that a call must move. Each tensor argument counts once; one that is read and overwritten is two
    arguments."""
    return sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor))


def measure(item: dict[str, Any], doing: Doing) -> list[dict[str, Any]]:
    """Measure one stage at one precision.

    Args:
        item: see _gpu_items.stages.
        doing: called with what is measured next.

    Returns:
        Rows of kind "stage", one for each implementation, and of kind "op", one for each op and implementation.
    """
    stage, limit, device = item["stage"], item["seconds"], item["device"]
    size = Size(item["classes"], item["views"], item["dim"], *PRECISIONS[item["precision"]], device)
    failed: dict[str, str] = {}
    allowed = Allowed(size, stage)
    calls: dict[str, Callable[[], object]] = {}
    disagrees: dict[str, str | None] = {}
    for impl in item["impls"]:
        if impl in item["without"]:
            continue
        with kept(failed, impl, doing):
            for part in impl.split("+"):
                choose(part, device)  # loads it
            disagrees[impl] = allowed.problem(Tile(size, impl).prepare(stage)())
            calls[impl] = _timed(Tile(size, impl), stage)
    rows = [_row(item, "stage", stage, impl, disagrees.get(impl), failed.get(impl)) for impl in item["impls"]]
    _add_times(rows, calls, failed, device, limit, doing)
    calls.clear()
    release()
    return [row | {"flops": allowed.flops} for row in rows] + _ops(item, size, allowed, doing)


def _timed(tile: Tile, stage: str) -> Callable[[], object]:
    tile.fresh = False
    call = tile.prepare(stage)
    call()
    return call


def _ops(item: dict[str, Any], size: Size, allowed: Allowed, doing: Doing) -> list[dict[str, Any]]:
    stage, failed, rows = item["stage"], {}, []
    recorded: dict[str, dict[str, tuple]] = {}
    for impl in item["ops"]:
        name = f"{impl} ops"
        if name in item["without"]:
            continue
        disagrees, ops = None, RecordedOps(impl)
        with kept(failed, name, doing):
            choose(impl, item["device"])
            disagrees = allowed.problem(Tile(size, ops=ops).prepare(stage)())
            tile = Tile(size, ops=ops)
            tile.fresh = False
            call = tile.prepare(stage)
            ops.on = True
            call()
            recorded[impl] = ops.calls
        if name in failed:
            rows.append(_row(item, "op", f"all of {stage}", impl, None, failed[name]))
        for op, arguments in ops.calls.items() if name not in failed else ():
            row = _row(item, "op", op, impl, disagrees, None)
            rows.append(row | {"bytes": moved_bytes(arguments)})
    for op in dict.fromkeys(row["name"] for row in rows if row["failed"] is None):
        calls = {impl: _op_call(impl, op, found[op]) for impl, found in recorded.items() if op in found}
        _add_times([row for row in rows if row["name"] == op], calls, failed, item["device"], item["seconds"], doing)
    recorded.clear()
    release()
    return rows


def _op_call(impl: str, op: str, arguments: tuple) -> Callable[[], object]:
    function = Ops(impl).overload(op)
    return lambda: function(*arguments)


def _row(
    item: dict[str, Any], kind: str, name: str, impl: str, disagrees: str | None, failed: str | None
) -> dict[str, Any]:
    rows = rows_of(item["classes"], item["views"])
    return {
        "kind": kind, "stage": item["stage"], "name": name, "impl": impl, "precision": item["precision"],
        "D": item["dim"], "rows": rows, "disagrees": disagrees, "failed": failed, "time_s": None, "all_s": [],
    }  # fmt: skip


def _add_times(
    rows: list[dict[str, Any]],
    calls: dict[str, Callable[[], object]],
    failed: dict[str, str],
    device: str,
    limit: float,
    doing: Doing,
) -> None:
    group: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    with kept(errors, ", ".join(calls), doing):
        group = back_to_back(calls, device, limit) if calls else {}
    for row in rows:
        row["failed"] = row["failed"] or failed.get(row["impl"]) or next(iter(errors.values()), None)
        if row["impl"] in group and row["failed"] is None:
            row["time_s"], row["all_s"] = spread(group[row["impl"]]), group[row["impl"]]


class Allowed:
    """Compares results of a stage with plain torch in fp64. At most twice plain torch's error plus one rounding is
    allowed."""

    def __init__(self, size: Size, stage: str) -> None:
        self.rounding = torch.finfo(size.compute).eps / 2
        wide = Size(size.classes, size.views, size.dim, torch.float64, torch.float64, size.device)
        self.truth = [x.double().clone() for x in Tile(wide, "torch").prepare(stage)()]
        tile = Tile(size, "torch")
        self.plain = [x.double().clone() for x in tile.prepare(stage)()]
        self.flops = tile.flops(stage)

    def problem(self, actual: list[Tensor]) -> str | None:
        """What disagrees, in one line; None if the results agree."""
        for place, (have, other, want) in enumerate(zip(actual, self.plain, self.truth, strict=True)):
            allowed = largest_allowed([other - want]) + self.rounding * want.abs().max().item()
            error = (have.double() - want).abs().max().item()
            if not error <= allowed:
                return f"result {place} is off by {error:.3g}, allowed {allowed:.3g}"
        return None


def add_shares(rows: list[dict[str, Any]], rates: dict[str, float], copy: float | None) -> None:
    """Add shares to the rows of all stages, and the ratio of Triton's time to CUDA C++'s.

    The share of an op is the time of its bytes at the rate of a copy, divided by its time. That of a stage adds the
    time of its products at the best rate for the precision. It is None if a number is missing, or if the results
    disagree.
    """
    ops: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        if row["kind"] == "op" and row.get("bytes"):
            ops.setdefault((row["stage"], row["precision"]), {})[row["name"]] = row["bytes"]
    times = {(row["kind"], row["stage"], row["name"], row["precision"], row["impl"]): row for row in rows}
    for row in rows:
        row["share"] = row["triton_over_cuda"] = None
        if row["kind"] == "stage":
            row["bytes"] = sum(ops.get((row["stage"], row["precision"]), {}).values()) or None
        if row["time_s"] is None or row["disagrees"] is not None:
            continue
        moved, flops = row.get("bytes"), row.get("flops", 0)
        if copy and moved and (not flops or row["precision"] in rates):
            floor = moved / copy + (flops / rates[row["precision"]] if flops else 0)
            row["share"] = floor / row["time_s"]["median"]
        other = times.get((row["kind"], row["stage"], row["name"], row["precision"], "cuda"))
        sound = other is not None and other["time_s"] is not None and other["disagrees"] is None
        if row["impl"] == "triton" and sound:
            row["triton_over_cuda"] = row["time_s"]["median"] / other["time_s"]["median"]
