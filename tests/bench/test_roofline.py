"""benchmarks/results/roofline.md is what its script writes, and the script counts what the engine does."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import _roofline_kernels
import pytest
from tiers import few
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.engine import generator_pass
from gcahng.engine.plan import edge_products
from gcahng.testing import budget
from gcahng.testing import launches as meta
from gcahng.testing.launches import Sizes, meta_step

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "roofline.py"
# Ops that launch nothing, and kernels of the fused ones that launch more than one.
FREE = {
    "_unsafe_view",
    "alias",
    "broadcast_tensors",
    "detach",
    "empty",
    "empty_like",
    "matmul",
    "new_empty",
    "transpose_",
}
KERNELS = {"edge_to_node_fwd_": 2, "edge_to_node_bwd_": 2, "gate_bwd_": 6, "mlp_out_bwd_": 2, "mlp_in_bwd_": 2}
KERNELS |= {"head_bwd_": 2, "head_moments_": 2, "head_sums_": 2, "mix_bwd_z_": 4, "diversity_fwd_": 2}
KERNELS |= {"edge_start_bwd_": 2, "mlp_out_bwd_ of nodes": 2}
STAGES = {
    "edge_start": "edge_start_fwd_",
    "N of stored sums": "norm_gelu_",
    "edge_to_node: GELU, sums": "edge_to_node_fwd_",
    "gate": "gate_fwd_",
    "mlp_in: GELU, moments": "mlp_in_fwd_",
    "mlp_out: fold, residual, N": "mlp_out_fwd_",
    "head: BatchNorm's moments": "head_moments_",
    "head: sigmoid": "head_fwd_",
    "mix: backward to z": "mix_bwd_z_",
    "mix: backward to θ": "mix_bwd_theta_",
    "J_div: sums": "diversity_fwd_",
    "J_div: gradient": "diversity_bwd_",
    "head: BatchNorm backward": "head_norm_",
    "mlp_out: backward": "mlp_out_bwd_",
    "mlp_in: backward, row-wise": "mlp_in_bwd_",
    "gate: backward": "gate_bwd_",
    "edge_to_node: backward, row-wise": "edge_to_node_bwd_",
    "edge_start: backward": "edge_start_bwd_",
}


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    module = sys.modules["roofline"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


roofline = loaded()


class Count(TorchDispatchMode):
    """Ops that launch kernels, those of them that take a tile's edges, and multiply-adds of products with a dimension
    of the given length."""

    def __init__(self, rows: set[int]) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.on_edges: Counter[str] = Counter()
        self.rows, self.products = rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # x[part] += y copies x[part] to where it lies: torch sees that and launches nothing.
        in_place = name == "copy_" and args[0].untyped_storage()._cdata == args[1].untyped_storage()._cdata
        if name in ("norm_gelu_", "mlp_out_bwd_") and len(args[0]) not in self.rows:
            name += " of nodes"
        if not (function.is_view or name in FREE or in_place):
            self.calls[name] += 1
            tensors = (x for x in args if isinstance(x, Tensor))
            self.on_edges[name] += any(x.numel() >= min(self.rows) * roofline.DIM for x in tensors)
        if name in ("mm", "addmm", "addmm_"):
            (m, k), (_, n) = (x.shape for x in [x for x in args if isinstance(x, Tensor)][-2:])
            self.products += m * k * n if self.rows & {m, k, n} else 0
        return function(*args, **(kwargs or {}))


def test_the_tables_are_what_the_script_writes() -> None:
    assert roofline.RESULTS.read_text(encoding="utf-8") == roofline.tables(), "run python benchmarks/roofline.py"


def test_the_page_has_the_whole_steps() -> None:
    text = roofline.PAGE.read_text(encoding="utf-8")
    assert roofline.page(text) == text, "run python benchmarks/roofline.py"
    assert sum(line.startswith("|") for line in text.splitlines()) == 2 + 2 * len(roofline.VERSIONS) * 3


def test_the_page_states_the_assumptions() -> None:
    text = " ".join(roofline.PAGE.read_text(encoding="utf-8").split())
    rates = [f"{roofline.RATE[dtype] / 1e12:.0f} TFLOP/s in {dtype}" for dtype in ("bf16", "fp32")]
    rates += [f"{roofline.BANDWIDTH / 1e12:.0f} TB/s", f"{1e6 * roofline.LAUNCH:.0f} µs"]
    rates += [f"{roofline.MULTIPROCESSORS} multiprocessors", f"up to {roofline.SCHEDULERS} of a warp in a cycle"]
    rates += [f"a clock of {roofline.CLOCK / 1e9:g} GHz", f"{roofline.SHARE} of all slots"]
    for stated in (*rates, f"sm_{_roofline_kernels.ARCH}"):
        assert stated in text


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32-edges", "bf16-edges"])
@pytest.mark.parametrize("rows", ["cuda", "triton"])
def test_every_kernel_is_in_the_budget(rows: str, narrow: bool, tmp_path: Path) -> None:
    steps = [roofline.Step(255, 2, "bf16", epilogues) for epilogues in (False, True)]
    stages = {k.stage for step in steps for k in roofline.kernels(step)}
    named = {*_roofline_kernels.ROW_WISE, *_roofline_kernels.EPILOGUES}
    assert named == {stage for stage in stages if roofline.issued(stage, rows, narrow).instructions}
    (empty := tmp_path / "budget.txt").write_text("# none\n")
    with pytest.raises(LookupError, match="has no kernel gate_forward_kernel.*, which the stage gate needs"):
        roofline.issued("gate", rows, narrow, empty)


def test_kernels_for_edges_in_bf16_are_lines_of_their_own(tmp_path: Path) -> None:
    lines = [limit for limit in budget.load() if limit.kernel.startswith("mlp_out_backward_kernel")]
    numbered = [limit._replace(each=number) for number, limit in enumerate(lines)]
    (file := tmp_path / "budget.txt").write_text("\n".join(limit.line() for limit in numbered))
    of_arch = {limit.each for limit in numbered if (limit.dim, limit.arch) == (512, _roofline_kernels.ARCH)}
    cases = [(rows, narrow) for rows in ("cuda", "triton") for narrow in (False, True)]
    found = [roofline.issued("mlp_out: backward", *case, file).instructions for case in cases]
    assert set(found) == of_arch and len(of_arch) == len(cases)


def test_a_stage_takes_the_longest_of_its_times_and_adds_those_that_do_not_overlap(monkeypatch) -> None:
    step = roofline.Step(255, 1, "bf16", True)
    channels = step.size.rows * roofline.DIM

    def seconds(products: float, moved: float, instructions: float, overlaps: bool) -> float:
        monkeypatch.setattr(roofline, "issued", lambda *_: _roofline_kernels.Issued(instructions, overlaps))
        return roofline.cost(step, roofline.Kernel("some", 1, products, moved)).seconds / channels

    flop, byte, issue = 2 * 512 / 790e12, 1 / 3e12, 1 / 32 / roofline.ISSUE
    assert seconds(4, 10, 40, True) == pytest.approx(max(4 * flop, 10 * byte, 40 * issue))
    assert seconds(4, 10, 40, False) == pytest.approx(max(4 * flop + 40 * issue, 10 * byte))
    assert seconds(4, 100, 40, False) == pytest.approx(100 * byte)


# Stages whose ops tests/emulator/traffic.py counts by the edge, beside STAGES; and arguments that stay in a cache.
COUNTED = {stage: (op,) for stage, op in STAGES.items() if not stage.startswith("mix")}
COUNTED |= {"head: backward, row-wise": ("head_bwd_", "head_sums_")}
CACHED = {"x", "dx", "u", "v", "c", "du", "dv", "dc", "ds", "sum", "square", "mean", "scratch"}
CACHED |= {"gamma", "beta", "bias", "w", "d", "scale", "a", "b"}


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32-edges", "bf16-edges"])
@pytest.mark.parametrize("stage", COUNTED)
def test_bytes_are_those_that_the_emulator_counts(stage: str, narrow: bool) -> None:
    """What the same threads read again is in their cache."""
    files = ("traffic.json", "traffic_narrow.json")
    wide, of_narrow = (json.loads(roofline.RESULTS.with_name(file).read_text(encoding="utf-8")) for file in files)
    usual = 8 if stage.startswith("mlp_in") else 4  # of an edge's channel in fp32, or of four hidden ones in bf16
    moved = 0.0
    for op in COUNTED[stage]:
        traffic, most = (of_narrow[op], 2) if narrow and op in of_narrow else (wide[op], usual)
        moved += sum(min(number, most) for name, numbers in traffic.items() if name not in CACHED for number in numbers)
    (kernel,) = [k for k in roofline.kernels(roofline.Step(1023, 2, "bf16", False, narrow=narrow)) if k.stage == stage]
    assert kernel.bytes == moved


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("memory", ["store", "hidden"])
@pytest.mark.parametrize("epilogues", [False, True])
def test_products_are_the_plans(layers: int, memory: str, epilogues: bool) -> None:
    kernels = roofline.kernels(roofline.Step(255, layers, "bf16", epilogues, memory))
    on_edges = sum(k.times * k.products for k in kernels if k.stage != "J_soft: products")
    assert on_edges == edge_products(layers, memory)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("memory", ["store", "hidden"])
@pytest.mark.parametrize(("batch", "layers"), few([pytest.param(*c) for c in ((255, 3), (255, 1), (1023, 2))]))
def test_it_counts_what_the_engine_does(batch: int, layers: int, memory: str, dtype: str) -> None:
    step = roofline.Step(batch, layers, dtype, False, memory)
    tiles = step.schedule.tiles
    count = Count({tile.rows for tile in tiles})

    def counted(run):
        def call(*arguments):
            with count:
                return run(*arguments)

        return call

    sizes = Sizes(batch // roofline.VIEWS, roofline.VIEWS, layers, roofline.CLASSES)
    meta_step("cpp", roofline.DIM, roofline.DTYPES[dtype], memory, sizes)  # makes what is kept from step to step
    with (
        patch.object(meta, "METRIC_PASS", counted(meta.METRIC_PASS)),
        patch.object(generator_pass, "generator_pass", counted(generator_pass.generator_pass)),
    ):
        meta_step("cpp", roofline.DIM, roofline.DTYPES[dtype], memory, sizes)
    found = {k.stage: k.times for k in roofline.kernels(step)}
    assert {stage: found[stage] for stage in STAGES} == {s: count.on_edges[op] / len(tiles) for s, op in STAGES.items()}
    assert count.products == edge_products(layers, memory) * step.size.rows * roofline.DIM**2
    launches = sum(calls * KERNELS.get(name, 1) for name, calls in count.calls.items())
    assert launches == pytest.approx(roofline.total(step).launches, rel=0.05)
