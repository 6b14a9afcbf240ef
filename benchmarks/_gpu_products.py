"""Triton's products with epilogues in the configuration that kernels/configs.py has and in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from _gpu_errors import Doing, kept, release
from _gpu_stages import PRECISIONS, Allowed
from _gpu_timing import back_to_back
from _stage_tile import Size, Tile, rows_of

from gcahng.bench.step import spread

# By stage and bytes of an operand: the table in kernels/configs.py, and (block_m, block_n, block_k, warps, stages,
# parts, joined) of what is tried beside its entry.
Tried = tuple[str, dict[int, list[tuple[int, ...]]]]
OTHERS: dict[str, Tried] = {
    "mlp_in": (
        "MLP_IN_PRODUCT",
        {2: [(128, 256, 64, 8, 3, 8, 2), (128, 128, 64, 4, 3, 4, 4)], 4: [(64, 128, 32, 4, 3, 4, 2)]},
    ),
    "mlp_out": ("MLP_OUT_PRODUCT", {2: [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3, 4)], 4: [(64, 128, 16, 4, 3)]}),
    "mlp_backward": (
        "MLP_IN_PRODUCT_BACKWARD",
        {2: [(128, 256, 64, 8, 3, 8), (128, 128, 64, 4, 3, 4)], 4: [(64, 128, 32, 4, 3, 4)]},
    ),
}


def measure(item: dict[str, Any], doing: Doing) -> list[dict[str, Any]]:
    """Measure a stage in each configuration of its product.

    Args:
        item: see _gpu_items.products.
        doing: called with what is measured next.

    Returns:
        A row for each configuration; the first is the one that kernels/configs.py has.
    """
    from gcahng.kernels import configs

    stage, failed = item["stage"], {}
    size = Size(item["classes"], item["views"], item["dim"], *PRECISIONS[item["precision"]], item["device"])
    name, others = OTHERS[stage]
    table = getattr(configs, name)
    bytes_ = size.compute.itemsize
    chosen = table[bytes_]
    tried = [chosen, *(type(chosen)(*numbers) for numbers in others[bytes_])]
    allowed = Allowed(size, stage)
    rows, calls = [], {}
    for config in dict.fromkeys(tried):
        label = text(config)
        if label in item["without"]:
            continue
        call, disagrees = None, None
        with kept(failed, label, doing), using(table, bytes_, config):
            disagrees = allowed.problem(Tile(size, "triton").prepare(stage)())
            tile = Tile(size, "triton")
            tile.fresh = False
            call = _in_config(tile.prepare(stage), table, bytes_, config)
            call()
        if label not in failed:
            calls[label] = call
        rows.append(
            {
                "stage": stage,
                "precision": item["precision"],
                "D": item["dim"],
                "config": label,
                "rows": rows_of(item["classes"], item["views"]),
                "chosen": config == chosen,
                "disagrees": disagrees,
                "failed": failed.get(label),
                "time_s": None,
            }  # fmt: skip
        )
    times = {}
    with kept(failed, ", ".join(calls), doing):
        times = back_to_back(calls, item["device"], item["seconds"]) if calls else {}
    for row in rows:
        if row["config"] in times:
            row["time_s"] = spread(times[row["config"]])
    calls.clear()
    release()
    return rows


def text(config: Any) -> str:
    """A configuration in a few characters: 128x256x64, 8 warps, 3 stages, 8 parts."""
    blocks = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{blocks}, {config.num_warps} warps, {config.num_stages} stages, {config.parts} parts"


def _in_config(call: Callable[[], object], table: dict[int, Any], bytes_: int, config: Any) -> Callable[[], object]:
    def run() -> object:
        with using(table, bytes_, config):
            return call()

    return run


@contextmanager
def using(table: dict[int, Any], bytes_: int, config: Any) -> Iterator[None]:
    """Within it, launches take this configuration."""
    before, table[bytes_] = table[bytes_], config
    try:
        yield
    finally:
        table[bytes_] = before
