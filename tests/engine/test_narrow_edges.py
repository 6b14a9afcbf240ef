"""edge_dtype=torch.bfloat16 with bf16 products: between stages no edge, no gradient of an edge and no coefficient has
an fp32 form."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case, run_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.engine import generator_pass, metric_pass, prepare
from gcahng.engine.schedule import make_schedule
from gcahng.engine.schema import NAMESPACES
from gcahng.engine.stages import ops_of
from gcahng.engine.stages.common import StageContext

LOW = torch.bfloat16
WITH_EDGES = {"edge_start_fwd_", "edge_start_bwd_", "norm_gelu_", "gate_fwd_", "gate_bwd_", "mlp_out_fwd_"}
WITH_EDGES |= {"mlp_out_bwd_", "head_moments_", "head_fwd_", "head_bwd_", "head_sums_", "head_norm_", "mix_fwd_"}
WITH_EDGES |= {"mix_bwd_theta_", "mix_bwd_z_", "diversity_fwd_", "diversity_bwd_"}
CASE = Case(classes=6, views=3, dim=16, layers=2, tile_rows=100)


class OfTiles(TorchDispatchMode):
    """Collects (op, dtype) of all tensors that the stages' ops take and that have a row for each edge of a tile; and of
    Triton's launchers that are no ops."""

    def __init__(self, tiles: set[int], width: int) -> None:
        super().__init__()
        self.shapes = {(rows, width) for rows in tiles}
        self.found: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in NAMESPACES:
            self.see(function.overloadpacket.__name__, args)
        return function(*args, **(kwargs or {}))

    def see(self, name: str, arguments: tuple) -> None:
        self.found |= {(name, x.dtype) for x in tensors_in(arguments) if tuple(x.shape) in self.shapes}


def tensors_in(x: Any) -> Iterator[Tensor]:
    """All tensors, also inside tuples."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors_in(part)


def watch_launcher(seen: OfTiles, stem: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module(f"gcahng.kernels.{stem}")
    launcher = getattr(kernels, name)

    def watched(*arguments: Any) -> None:
        seen.see(f"{stem}.{name}", arguments)
        launcher(*arguments)

    monkeypatch.setattr(kernels, name, watched)


def dtypes_of_edges(
    case: Case, impl: str, edge_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, set]:
    tiles = make_schedule(case.classes, case.views, symmetric=True, tile_rows=case.tile_rows).tiles
    seen = OfTiles({tile.rows for tile in tiles}, case.dim)
    if impl == "triton":
        watch_launcher(seen, "edge_update", "forward", monkeypatch)

    def watched(pass_of_step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with seen:
                return pass_of_step(*arguments)

        return run

    library = torch.library.Library("gcahng", "IMPL")
    library.impl("metric_pass", watched(metric_pass.METRIC_PASS), "CPU", allow_override=True)
    monkeypatch.setattr(generator_pass, "generator_pass", watched(generator_pass.generator_pass))
    monkeypatch.setattr(prepare, "default_tile_rows", lambda *_: case.tile_rows)
    z, labels = case.batch(dtype=torch.float32)
    try:
        run_step(case.loss(impl, torch.float32, edge_dtype=edge_dtype), z, labels, autocast=LOW)
    finally:
        library._destroy()
    found: dict[str, set] = {}
    for name, dtype in seen.found:
        found.setdefault(name, set()).add(dtype)
    return found


@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
def test_edges_have_no_wide_form(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASE.but(memory=memory)
    with monkeypatch.context() as patched:
        wide = dtypes_of_edges(case, "cpp", None, patched)
    narrow = dtypes_of_edges(case, "cpp", LOW, monkeypatch)
    with_edges = WITH_EDGES - ({"norm_gelu_"} if memory == "recompute" else set())
    assert all(torch.float32 in wide[name] for name in with_edges)
    assert {name: narrow[name] for name in with_edges} == {name: {LOW} for name in with_edges}


@pytest.mark.simulated
def test_edges_have_no_wide_form_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = dtypes_of_edges(CASE.but(classes=3, views=2, dim=8), "triton", LOW, monkeypatch)
    forward = {"norm_gelu_", "mlp_out_fwd_", "head_moments_"}  # and the gate, in one kernel
    assert set(narrow) >= (WITH_EDGES - forward) | {"edge_update.forward"}, WITH_EDGES - set(narrow)
    assert all(dtypes == {LOW} for dtypes in narrow.values())


def test_edges_are_narrow_where_they_are_asked_for_in_the_dtype_of_products() -> None:
    schedule, like = make_schedule(3, 2, symmetric=True, tile_rows=100), torch.zeros(())

    def narrow(compute: torch.dtype, edges: torch.dtype | None, implementation: str) -> bool:
        return StageContext(schedule, 16, compute, like, ops=ops_of(implementation), edge_dtype=edges).narrow

    implementations = ("torch", "cpp", "cuda", "triton", "cuda+triton", "triton,gate_fwd_=cuda")
    assert all(narrow(LOW, LOW, implementation) for implementation in implementations)
    assert not any(narrow(*dtypes, "cpp") for dtypes in ((LOW, None), (LOW, torch.float32), (torch.float32, LOW)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tiles_and_memory_modes_change_rounding_alone(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = CASE.batch(dtype=torch.float32)
    found = []
    for memory in ("store", "recompute"):
        loss = CASE.but(memory=memory).loss(impl, torch.float32, edge_dtype=LOW)
        found.append(run_step(loss, z, labels, autocast=LOW))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0.05, atol=0.05 * value.abs().max().item(), msg=name)
