"""What is measured, the most important first. An item is one piece of work of one section, as plain values.

Items belong to parts. Each part has a share of the time; what one leaves over goes to those after it, and what did not
fit into its part is tried again in the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from _stage_tile import STAGES

from gcahng.engine.plan import edge_products

BATCHES = (81, 256, 512, 1024, 2048, 4096)
VIEWS, DIM = 3, 512
STAGE_CLASSES = 119  # 64,260 edges, about what the engine takes for a tile on a GPU
# FLOP/s and seconds to guess by what an item takes; they decide nothing but what is left out for want of time.
GUESSED_RATES = {"bf16": 1.5e14, "tf32": 1e14, "fp32": 2.5e13}
START, CASE = 8.0, 4.0

# The parts in their order, and the share of the time by which each must be done.
PARTS = {"ceilings": 0.06, "choices": 0.3, "stages": 0.5, "sizes": 0.75, "reference": 0.88, "rest": 1.0}
# What benchmarks/_gpu_products.py tries in several configurations.
PRODUCTS = ("mlp_in", "mlp_out", "mlp_backward")

Item = dict[str, Any]


class Sides(NamedTuple):
    """What is measured beside each other at one size of whole steps.

    Attributes:
        impls: implementations of the loss.
        graphs: captured, too.
        narrow: with bf16 edges, too.
        compiled: precisions in which the reference is compiled, too.
    """

    impls: list[str]
    graphs: bool = False
    narrow: bool = False
    compiled: tuple[str, ...] = ()


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
    ceilings = [
        {"section": "ceilings", "dim": DIM, "rows": [4096, 16384, 65536], "precisions": ["bf16", "tf32", "fp32"]}
        | {"copy_bytes": 2**30, "device": "cuda", "seconds": 0.3, "guess": 12},
        {"section": "plan", "dim": DIM, "views": VIEWS, "layers": [1, 2], "precisions": ["bf16", "fp32"]}
        | {"impls": [name for name in impls if name != "auto"], "device": "cuda", "guess": 2},
    ]

    def steps(batches: tuple[int, ...], layers: int, precision: str, **more: Any) -> list[Item]:
        first = layers == 2 and precision == "bf16"
        sides = Sides(impls, graphs and first, narrow=first)._replace(**more)
        return [step(nearest(n, VIEWS), layers, precision, sides) for n in batches]

    def all_stages(precision: str) -> list[Item]:
        return [stages(stage, precision, impls, ops) for stage in STAGES]

    parts = {
        "ceilings": ceilings,
        "choices": [
            *steps((1024,), 2, "bf16"),
            *(products(stage, "bf16") for stage in PRODUCTS if "triton" in impls),
            *steps((256,), 2, "bf16"),
        ],
        "stages": all_stages("bf16"),
        "sizes": [*steps((4096, 2048, 512, 81), 2, "bf16"), *steps((1024,), 1, "bf16")],
        "reference": [*steps((512,), 2, "bf16", compiled=("bf16", "tf32"), impls=["auto"]), *steps((512,), 2, "fp32")],
        "rest": [
            *all_stages("fp32"),
            *steps((256, 81, 1024), 2, "fp32"),
            *steps((81, 256, 512, 2048, 4096), 1, "bf16"),
            *steps((2048,), 2, "fp32"),
            *steps(BATCHES[:-1], 1, "fp32"),
            *steps((4096,), 2, "fp32"),
            *steps((4096,), 1, "fp32"),
        ],
    }
    return [item | {"part": part} for part in PARTS for item in parts[part]]


def nearest(n: int, views: int) -> int:
    """The multiple of views that is nearest to n."""
    return views * max(2, round(n / views))


def step(n: int, layers: int, precision: str, sides: Sides, dim: int = DIM, device: str = "cuda") -> Item:
    """One size of whole steps."""
    baselines = ["bf16", "tf32", "fp32"] if precision == "bf16" else ["tf32", "fp32"]
    if device == "cpu":
        baselines = [name for name in baselines if name != "tf32"]
    flops = 2 * edge_products(layers, "store") * dim**2 * n**2 / 2
    count = len(sides.impls) * (2 if sides.graphs else 1) + sides.narrow + len(sides.compiled)
    guess = START + CASE * count + 6 * count * flops / GUESSED_RATES[precision] + 40 * len(sides.compiled)
    return {
        "section": "step", "n": n, "views": VIEWS, "dim": dim, "layers": layers, "classes": max(100, n // VIEWS),
        "precision": precision, "impls": sides.impls, "baselines": baselines, "compiled": list(sides.compiled),
        "graphs": sides.graphs, "narrow": sides.narrow,
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


def products(stage: str, precision: str, dim: int = DIM, classes: int = STAGE_CLASSES, device: str = "cuda") -> Item:
    """One stage with its products in Triton, in several configurations."""
    return {
        "section": "products", "stage": stage, "precision": precision, "dim": dim, "classes": classes, "views": VIEWS,
        "device": device, "seconds": 0.4, "guess": 6.0,
    }  # fmt: skip


def _dry_items(impls: list[str], ops: list[str], device: str) -> list[Item]:
    def usable(names: list[str], precision: str) -> list[str]:
        # Triton's interpreter computes bf16 wrongly as it comes; nothing here mends it (gcahng.testing.interpreter).
        return [name for name in names if precision != "bf16" or name != "triton"]

    made = [
        {"section": "ceilings", "dim": 8, "rows": [64], "precisions": ["bf16", "fp32"], "copy_bytes": 2**16}
        | {"device": device, "seconds": 0.01},
        {"section": "plan", "dim": 8, "views": VIEWS, "layers": [1, 2], "precisions": ["bf16", "fp32"]}
        | {"impls": impls, "device": device},
    ]
    for precision in ("bf16", "fp32"):
        n, layers = (6, 1) if precision == "bf16" else (12, 2)
        narrow = precision == "bf16"
        made.append(step(n, layers, precision, Sides(usable(impls, precision), narrow=narrow), dim=8, device=device))
        for stage in STAGES if precision == "fp32" else ("mlp_in",):
            names = usable(impls, precision), usable(ops, precision)
            made.append(stages(stage, precision, *names, dim=8, classes=3, device=device))
    if "triton" in impls:
        made += [products(stage, "fp32", dim=16, classes=3, device=device) for stage in PRODUCTS]
    return [item | {"seconds": 0.01, "guess": 0.5} for item in made]


def describe(item: Item) -> str:
    """An item in a few words."""
    if item["section"] == "step":
        compiled = ", reference compiled" if item["compiled"] else ""
        return f"step n = {item['n']}, L = {item['layers']}, {item['precision']}{compiled}"
    if item["section"] == "stages":
        return f"stage {item['stage']}, {item['precision']}"
    if item["section"] == "products":
        return f"configurations of {item['stage']}, {item['precision']}"
    return item["section"]
