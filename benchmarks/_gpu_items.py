"""What is measured, the most important first. An item is one piece of work of one section, as plain values."""

from __future__ import annotations

from typing import Any

from _stage_tile import STAGES

from gcahng.engine.plan import edge_products

BATCHES = (81, 256, 512, 1024, 2048, 4096)
VIEWS, DIM = 3, 512
STAGE_CLASSES = 119  # 64,260 edges, about what the engine takes for a tile on a GPU
# FLOP/s and seconds to guess by what an item takes; they decide nothing but what is left out for want of time.
GUESSED_RATES = {"bf16": 1.5e14, "tf32": 1e14, "fp32": 2.5e13}
START, CASE = 8.0, 4.0

Item = dict[str, Any]


def items(impls: list[str], ops: list[str], dry: str | None, graphs: bool) -> list[Item]:
    """The items of a run, the most important first.

    Args:
        impls: implementations of the loss.
        ops: implementations of the row-wise ops.
        dry: the device to try everything on with tiny sizes; None: measure on the GPU.
        graphs: whether captured CUDA graphs are measured too.
    """
    if dry:
        return _dry_items(impls, ops, dry)
    made = [
        {"section": "ceilings", "dim": DIM, "rows": [4096, 16384, 65536], "precisions": ["bf16", "tf32", "fp32"]}
        | {"copy_bytes": 2**30, "device": "cuda", "seconds": 0.3, "guess": 12},
        {"section": "plan", "dim": DIM, "views": VIEWS, "layers": [1, 2], "precisions": ["bf16", "fp32"]}
        | {"impls": [name for name in impls if name != "auto"], "device": "cuda", "guess": 2},
    ]

    def steps(batches: tuple[int, ...], layers: int, precision: str, **more: Any) -> list[Item]:
        shared = {"impls": impls, "graphs": graphs and layers == 2 and precision == "bf16"}
        return [step(nearest(n, VIEWS), layers, precision, **shared, **more) for n in batches]

    return [
        *made,
        *steps((512,), 2, "bf16"),
        *(stages(stage, "bf16", impls, ops) for stage in STAGES),
        *steps((1024, 2048, 256, 81), 2, "bf16"),
        *steps((512,), 2, "fp32"),
        *(stages(stage, "fp32", impls, ops) for stage in STAGES),
        *steps((4096,), 2, "bf16"),
        *steps((256, 81, 1024), 2, "fp32"),
        *steps(BATCHES, 1, "bf16"),
        *steps((2048,), 2, "fp32"),
        *steps((512,), 2, "bf16", compiled=["bf16", "tf32"]),
        *steps(BATCHES[:-1], 1, "fp32"),
        *steps((4096,), 2, "fp32"),
        *steps((4096,), 1, "fp32"),
    ]


def nearest(n: int, views: int) -> int:
    """The multiple of views that is nearest to n."""
    return views * max(2, round(n / views))


def step(
    n: int,
    layers: int,
    precision: str,
    impls: list[str],
    graphs: bool = False,
    compiled: list[str] | None = None,
    dim: int = DIM,
    device: str = "cuda",
) -> Item:
    baselines = ["bf16", "tf32", "fp32"] if precision == "bf16" else ["tf32", "fp32"]
    if device == "cpu":
        baselines = [name for name in baselines if name != "tf32"]
    flops = 2 * edge_products(layers, "store") * dim**2 * n**2 / 2
    count = len(impls) * (2 if graphs else 1) + len(compiled or [])
    guess = START + CASE * count + 6 * count * flops / GUESSED_RATES[precision] + 40 * len(compiled or [])
    return {
        "section": "step", "n": n, "views": VIEWS, "dim": dim, "layers": layers, "classes": max(100, n // VIEWS),
        "precision": precision, "impls": impls, "baselines": baselines, "compiled": compiled or [], "graphs": graphs,
        "device": device, "seconds": 6.0, "largest_check": 513, "guess": guess,
    }  # fmt: skip


def stages(
    stage: str,
    precision: str,
    impls: list[str],
    ops: list[str],
    dim: int = DIM,
    classes: int = STAGE_CLASSES,
    device: str = "cuda",
) -> Item:
    chosen = ["cuda+triton" if name == "auto" else name for name in impls]
    return {
        "section": "stages", "stage": stage, "precision": precision, "impls": chosen, "ops": ops, "dim": dim,
        "classes": classes, "views": VIEWS, "device": device, "seconds": 0.4, "guess": 4.0,
    }  # fmt: skip


def _dry_items(impls: list[str], ops: list[str], device: str) -> list[Item]:
    def usable(names: list[str], precision: str) -> list[str]:
        # Triton's interpreter computes bf16 wrongly.
        return [name for name in names if precision != "bf16" or name != "triton"]

    made = [
        {"section": "ceilings", "dim": 8, "rows": [64], "precisions": ["bf16", "fp32"], "copy_bytes": 2**16}
        | {"device": device, "seconds": 0.01},
        {"section": "plan", "dim": 8, "views": VIEWS, "layers": [1, 2], "precisions": ["bf16", "fp32"]}
        | {"impls": impls, "device": device},
    ]
    for precision in ("bf16", "fp32"):
        n, layers = (6, 1) if precision == "bf16" else (12, 2)
        made.append(step(n, layers, precision, usable(impls, precision), dim=8, device=device))
        for stage in STAGES if precision == "fp32" else ("mlp_in",):
            names = usable(impls, precision), usable(ops, precision)
            made.append(stages(stage, precision, *names, dim=8, classes=3, device=device))
    return [item | {"seconds": 0.01, "guess": 0.5} for item in made]


def describe(item: Item) -> str:
    """An item in a few words."""
    if item["section"] == "step":
        compiled = ", reference compiled" if item["compiled"] else ""
        return f"step n = {item['n']}, L = {item['layers']}, {item['precision']}{compiled}"
    if item["section"] == "stages":
        return f"stage {item['stage']}, {item['precision']}"
    return item["section"]
