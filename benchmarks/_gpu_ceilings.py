"""What the card can do: matrix products at the engine's shapes, and a copy."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from _gpu_errors import Doing, kept, release
from _gpu_timing import back_to_back

DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def measure(item: dict[str, Any], doing: Doing) -> list[dict[str, Any]]:
    """Measure the rate of products for each precision, number of rows and shape, and of a copy.

    Returns:
        Rows of kind "product" (FLOP/s) and "copy" (bytes read and written in a second).
    """
    rows = []
    failed: dict[str, str] = {}
    for precision in item["precisions"]:
        for count in item["rows"]:
            name = f"{precision}, {count} rows"
            if name in item["without"]:
                continue
            with kept(failed, name, doing):
                rows += _products(item, precision, count)
            if name in failed:
                rows.append({"kind": "product", "name": name, "precision": precision, "failed": failed[name]})
    with kept(failed, "copy", doing):
        rows.append(_copy(item))
    if "copy" in failed:
        rows.append({"kind": "copy", "failed": failed["copy"]})
    release()
    return rows


def _products(item: dict[str, Any], precision: str, count: int) -> list[dict[str, Any]]:
    """Measure the engine's products: R × D × 4D, R × 4D × D, R × D × D, and the weights' gradient 4D × R × D."""
    dim, device = item["dim"], item["device"]
    before = torch.get_float32_matmul_precision()
    if device == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        make = {"dtype": DTYPES[precision], "device": device}
        x, h = torch.randn(count, dim, **make), torch.randn(count, 4 * dim, **make)
        w, square = torch.randn(4 * dim, dim, **make), torch.randn(dim, dim, **make)
        pairs = {"D → 4D": (x, w.T), "4D → D": (h, w), "D → D": (x, square), "weights": (h.T, x)}
        outs = {name: torch.mm(a, b) for name, (a, b) in pairs.items()}
        calls = {name: (lambda a=a, b=b, out=outs[name]: torch.mm(a, b, out=out)) for name, (a, b) in pairs.items()}
        times = back_to_back(calls, device, item["seconds"])
    finally:
        torch.set_float32_matmul_precision(before)
    rows = []
    for name, (a, b) in pairs.items():
        seconds, flops = statistics.median(times[name]), 2 * a.shape[0] * a.shape[1] * b.shape[1]
        row = {"kind": "product", "name": name, "precision": precision, "rows": count, "D": dim, "failed": None}
        rows.append(row | {"seconds": seconds, "rate": flops / seconds})
    return rows


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    source = torch.ones(item["copy_bytes"] // 4, device=item["device"])
    target = torch.empty_like(source)
    target.copy_(source)
    times = back_to_back({"copy": lambda: target.copy_(source)}, item["device"], item["seconds"])["copy"]
    seconds = statistics.median(times)
    return {"kind": "copy", "failed": None, "bytes": 8 * source.numel(), "rate": 8 * source.numel() / seconds}


def best(rows: list[dict[str, Any]]) -> tuple[dict[str, float], float | None]:
    """The best rate of products for each precision, and the rate of a copy; None if it was not measured."""
    rates: dict[str, float] = {}
    copy = None
    for row in rows:
        if row.get("rate") and row["kind"] == "product":
            rates[row["precision"]] = max(row["rate"], rates.get(row["precision"], 0.0))
        elif row.get("rate"):
            copy = row["rate"]
    return rates, copy
