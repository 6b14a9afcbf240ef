"""Every Triton kernel compiles for the GPUs it is meant for, as the engine launches it, and takes no more than they
have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.simulated
ROWS = {
    f"{name}_kernel"
    for name in ("gate_forward", "gate_backward", "mix_forward", "mix_backward_shares", "mix_backward_theta")
    + ("mlp_in_forward", "mlp_out_forward", "mlp_out_backward", "norm_gelu", "similarity")
}
TOOL = Path(__file__).parents[2] / "benchmarks" / "aot.py"


def run(script: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """In a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOL.parents[1]), *sys.path])
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def compiled(folder: Path, *arguments: str, timeout: float = 600) -> tuple[list[dict], str]:
    """What benchmarks/aot.py finds, and what it prints."""
    found = folder / "builds.json"
    done = run(TOOL, "--json", str(found), *arguments, timeout=timeout)
    assert done.returncode in (0, 1) and found.exists(), done.stderr
    builds = json.loads(found.read_text())
    assert done.returncode == int(any(b["failures"] for b in builds))
    return builds, done.stdout


def failures(builds: list[dict]) -> list[str]:
    return [f"{b['kernel']} {b['case']}: {failure}" for b in builds for failure in b["failures"]]


@pytest.mark.slow
def test_kernels_pass_for_hopper(tmp_path: Path) -> None:
    """test_budget.py compiles them too, and finds spills; products are below."""
    builds, text = compiled(tmp_path, "--once", "--dim", "512", "--dtype", "bf16", "--arch", "90")
    assert not failures(builds)
    assert len(builds) == len({b["kernel"] for b in builds}) > 20
    assert all(b["reading"]["registers"] > 0 for b in builds)
    products = [b for b in builds if b["narrow"]]
    assert products and all(b["products"] for b in products)
    rows = re.findall(r"^\| (\w+) \| 512 \| bf16 \|", text, flags=re.MULTILINE)
    assert rows == [kernel.removesuffix("_kernel") for kernel in sorted(b["kernel"] for b in builds)]
    assert "Beyond the gate: 0 of" in text


def test_rows_of_many_channels_pass_for_hopper(tmp_path: Path) -> None:
    """Their values are in the registers of one program; with edges in bf16 too: the slow tests."""
    builds, _ = compiled(tmp_path, "--once", "--dim", "2048", "--dtype", "bf16", "--arch", "90")
    assert not failures(builds)
    assert {b["kernel"] for b in builds} == ROWS


@pytest.mark.parametrize(
    ("arch", "product"),
    [pytest.param(80, "HMMA 16816", marks=pytest.mark.slow), (90, "HGMMA 64x128x16"), (100, "UTCHMMA")],
)
def test_a_product_passes_everywhere(arch: int, product: str, tmp_path: Path) -> None:
    chosen = ("--once", "--dim", "512", "--dtype", "bf16", "--arch", str(arch))
    (build,), _ = compiled(tmp_path, *chosen, "--kernel", "mlp_in_product_forward_kernel")
    assert not failures([build]) and build["products"] == [product]


@pytest.mark.slow
def test_a_whole_edge_update_passes_for_hopper(tmp_path: Path) -> None:
    """Where a block holds whole rows. test_budget.py compiles it too, and counts its instructions."""
    chosen = ("--once", "--dim", "128", "--dtype", "bf16", "--arch", "90")
    (build,), _ = compiled(tmp_path, *chosen, "--kernel", "edge_update_forward_kernel")
    assert not failures([build])
    assert build["products"] == ["HGMMA 64x128x16"]


def test_the_gate_holds_back_what_it_should() -> None:
    done = run(Path(__file__).with_name("aot_planted.py"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    good, product, *bad = report["failures"]
    assert good == ["sum_kernel", []] and product == ["product_kernel", []]
    expected = [
        ("sum_kernel", r"[1-9]\d* B of stack, .* [1-9]\d* accesses to local memory"),
        ("product_kernel", r"HGMMA 64x32x16.*not HGMMA of at least 64 x 128"),
        ("product_kernel", r"B of shared memory, of 232448"),
        ("atomic_kernel", r"atomics on floats: \w*(ATOM|RED)"),
        ("wrong_kernel", r"does not compile: .*undefined is not defined"),
    ]
    assert len(bad) == len(expected)
    for (kernel, found), (name, pattern) in zip(bad, expected, strict=True):
        assert kernel == name and any(re.search(pattern, failure) for failure in found), found
    # Of the package's kernels that script launches none.
    assert report["error"].startswith("nothing launches gcahng.kernels.")
    assert "gcahng.kernels.edge_start.edge_start_forward_kernel" in report["error"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("dim", ["64", "128", "384", "512"])
def test_every_launch_passes(tmp_path: Path, dim: str, arch: str) -> None:
    builds, _ = compiled(tmp_path, "--dim", dim, "--arch", arch, timeout=3600)
    assert not failures(builds)
    assert {b["case"]["dtype"] for b in builds} == {"bf16", "fp16", "fp32", "tf32"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("dim", ["1024", "2048"])
def test_every_launch_with_rows_of_many_channels_passes(tmp_path: Path, dim: str, arch: str) -> None:
    builds, _ = compiled(tmp_path, "--dim", dim, "--dtype", "bf16", "fp32", "--arch", arch, timeout=3600)
    assert not failures(builds)
    assert {b["kernel"] for b in builds} == ROWS


@pytest.mark.slow
def test_double_precision_compiles(tmp_path: Path) -> None:
    builds, _ = compiled(tmp_path, "--once", "--dim", "512", "--dtype", "fp64", "--arch", "90", timeout=3600)
    assert builds and not [b for b in builds if b["error"]]
