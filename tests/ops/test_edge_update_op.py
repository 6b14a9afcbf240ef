"""gcahng.ops.edge_update and gcahng.nn.EdgeUpdate: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from tiers import few
from torch import Tensor

from gcahng import UserError
from gcahng.engine.edge_update import choose_edge_memory
from gcahng.nn import EdgeUpdate
from gcahng.ops import EdgeDropout, EdgeUpdateWeights, edge_update, from_half_band, half_band_pairs, to_half_band
from gcahng.testing import nan_poisoned, seeded

IMPLEMENTATIONS = ["torch", "cpp", pytest.param("triton", marks=pytest.mark.simulated)]
MEMORIES = ("store", "hidden", "recompute", "auto")
# n, D, symmetric, p. Triton's interpreter is slow; tests/stages tries its kernels on more sizes.
SIZES = ((1, 3, True, 0.0), (2, 5, True, 0.4), (6, 7, True, 0.3), (5, 19, False, 0.3), (7, 4, True, 0))
TRITON_SIZES = ((2, 5, True, 0.4), (4, 19, False, 0.3))


def inputs(n: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list]:
    """edges (n, n, D), nodes (n, D) and the 14 weights, all of a size and requiring gradients."""
    shapes = [(dim, dim), (dim,)] * 3 + [(dim,), (dim,), (4 * dim, dim)] + [(4 * dim,)] * 3 + [(dim, 4 * dim), (dim,)]
    tensors = [
        seeded(*shape, seed=100 * seed + k, dtype=dtype) for k, shape in enumerate([(n, n, dim), (n, dim), *shapes])
    ]
    for k, shape in enumerate(shapes):
        tensors[2 + k] *= 0.5 if len(shape) == 1 else shape[1] ** -0.5
    edges, nodes, *weights = (x.requires_grad_() for x in tensors)
    return edges, nodes, weights


def value_and_gradients(given: tuple, half: bool = False, **options) -> list[Tensor]:
    """The updated edges (n, n, D), and the gradients of all inputs under a random upstream gradient."""
    edges, nodes, weights = given
    x = to_half_band(edges) if half else edges
    new = edge_update(x, nodes, EdgeUpdateWeights(*weights), **options)
    new = from_half_band(new) if half else new
    upstream = seeded(*new.shape, seed=99, dtype=new.dtype)
    return [new.detach(), *torch.autograd.grad(new, [edges, nodes, *weights], upstream)]


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        # The key's bias cancels: its gradient is rounding.
        scale = max(b.abs().max().item(), 1e-3)
        assert (a.double() - b.double()).abs().max().item() <= tolerance * scale, f"tensor {number}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_matches_the_reference(impl: str) -> None:
    """Value and every gradient in float64, at odd sizes, in every mode of memory and both forms of storage."""
    triton = impl == "triton"
    for n, dim, symmetric, p in TRITON_SIZES if triton else SIZES:
        given = inputs(n, dim, seed=n)
        dropout = EdgeDropout(p, 3, torch.tensor(5)) if p else None
        options = {"symmetric": symmetric, "dropout": dropout}
        wanted = value_and_gradients(given, impl="reference", **options)
        for memory in MEMORIES[:3] if triton else MEMORIES:  # "auto" is one of the others
            for half in (False, True) if symmetric else (False,):
                with nan_poisoned():
                    found = value_and_gradients(given, half, impl=impl, edge_memory=memory, **options)
                assert_near(found, wanted, 1e-11)


@pytest.mark.parametrize("impl", ["torch", "cpp", pytest.param("triton", marks=pytest.mark.slow)])
def test_many_tiles(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few edges: offsets in several parts, and the half band of an even n."""
    monkeypatch.setattr("gcahng.engine.edge_update.default_tile_rows", lambda *_: 4)
    for n, symmetric in ((10, True), (9, False)):
        given = inputs(n, 6)
        wanted = value_and_gradients(given, impl="reference", symmetric=symmetric)
        for half in (False, True) if symmetric else (False,):
            assert_near(value_and_gradients(given, half, impl=impl, symmetric=symmetric), wanted, 1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float32_is_as_near_as_the_reference(impl: str) -> None:
    given = inputs(13, 37, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (given[0], given[1], *given[2])]
    truth = value_and_gradients((exact[0], exact[1], exact[2:]), impl="reference")
    plain = value_and_gradients(given, impl="reference")
    for a, b, t in zip(value_and_gradients(given, impl=impl), plain, truth, strict=True):
        error, allowed = ((x.double() - t).square().mean().sqrt().item() for x in (a, b))
        assert error <= 2 * allowed + 4e-7 * t.abs().max().item()


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_bfloat16_autocast(impl: str) -> None:
    """Products are in bfloat16, edges and sums are not."""
    edges, nodes, weights = inputs(9, 32, dtype=torch.float32)
    given = [x.detach() for x in (edges, nodes, *weights)]
    exact = edge_update(*given[:2], EdgeUpdateWeights(*given[2:]), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = edge_update(*given[:2], EdgeUpdateWeights(*given[2:]), impl=impl)
    assert low.dtype is torch.float32 and not torch.equal(low, exact)
    assert (low - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_float16_autocast_leaves_products_in_float32(impl: str) -> None:
    edges, nodes, weights = inputs(5, 8, dtype=torch.float32)
    exact = edge_update(edges, nodes, weights, impl=impl)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(edge_update(edges, nodes, weights, impl=impl), exact)


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
def test_gradcheck(impl: str) -> None:
    edges, nodes, weights = inputs(3, 2)

    def run(edges: Tensor, nodes: Tensor, *weights: Tensor) -> Tensor:
        return edge_update(edges, nodes, EdgeUpdateWeights(*weights), impl=impl)

    assert torch.autograd.gradcheck(run, (edges, nodes, *weights))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_inputs_need_not_be_contiguous(impl: str) -> None:
    edges, nodes, weights = inputs(4, 6)
    wanted = value_and_gradients((edges, nodes, weights), impl=impl)
    apart = [x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for x in (edges, nodes, *weights)]
    assert not any(x.is_contiguous() for x in apart)
    assert_near(value_and_gradients((apart[0], apart[1], apart[2:]), impl=impl), wanted, 1e-12)


def test_frozen_inputs_and_no_grad() -> None:
    edges, nodes, weights = inputs(4, 6)
    fixed = EdgeUpdateWeights(*(w.detach() for w in weights))
    (d,) = torch.autograd.grad(edge_update(edges, nodes.detach(), fixed, impl="cpp").sum(), edges)
    assert d.isfinite().all()
    with torch.no_grad():
        new = edge_update(edges, nodes, fixed, impl="cpp")
    assert not new.requires_grad


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_second_derivative_is_an_error(impl: str) -> None:
    edges, nodes, weights = inputs(3, 4)
    new = edge_update(edges, nodes, EdgeUpdateWeights(*weights), impl=impl)
    (d,) = torch.autograd.grad(new.sum(), edges, create_graph=True)
    with pytest.raises(UserError, match="edge_update is differentiable once, not twice; impl='reference'"):
        d.square().sum().backward()


def test_torch_func_is_an_error() -> None:
    edges, nodes, weights = (x for x in inputs(3, 4))
    w = EdgeUpdateWeights(*(x.detach() for x in weights))
    with pytest.raises(UserError, match="edge_update supports backward-mode derivatives only"):
        torch.func.grad(lambda e: edge_update(e, nodes.detach(), w, impl="torch").sum())(edges.detach())


@pytest.mark.parametrize(
    "impl", few(["cpp", "torch", *(pytest.param(impl, marks=pytest.mark.slow) for impl in ("auto", "reference"))])
)
def test_compiles_whole(impl: str) -> None:
    given = inputs(5, 6, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda e, s, w: edge_update(e, s, EdgeUpdateWeights(*w), impl=impl) * 2, fullgraph=True)
    new = compiled(given[0], given[1], given[2])
    found = [new.detach(), *torch.autograd.grad(new.square().sum(), [given[0], given[1], *given[2]])]
    plain = edge_update(given[0], given[1], EdgeUpdateWeights(*given[2]), impl=impl) * 2
    wanted = [plain.detach(), *torch.autograd.grad(plain.square().sum(), [given[0], given[1], *given[2]])]
    assert_near(found, wanted, 1e-4)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
def test_opcheck(impl: str, memory: str) -> None:
    edges, nodes, weights = inputs(4, 6, dtype=torch.float32)
    u, c, v = nodes, nodes.sum(dim=1, keepdim=True).detach().requires_grad_(), nodes.detach().clone().requires_grad_()
    rest = (torch.zeros((), dtype=torch.int64), weights[6:], 0.2, 3, True, "float32", impl, memory, True)
    torch.library.opcheck(torch.ops.gcahng.edge_update.default, (edges, u, c, v, *rest))


def test_same_bits_twice() -> None:
    """Whatever lay in the memory that is used again."""
    given = inputs(40, 24, dtype=torch.float32)
    first = value_and_gradients(given, impl="cpp", edge_memory="recompute")
    value_and_gradients(inputs(23, 24, seed=1, dtype=torch.float32), impl="cpp")
    second = value_and_gradients(given, impl="cpp", edge_memory="recompute")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_band_storage_is_every_pair_once() -> None:
    for n in range(1, 9):
        i, j = half_band_pairs(n)
        pairs = {frozenset((a, b)) for a, b in zip(i.tolist(), j.tolist(), strict=True)}
        assert len(i) == n * (n + 1) // 2 == len(pairs)
        full = seeded(n, n, 2, seed=n)
        full = full + full.transpose(0, 1)
        torch.testing.assert_close(from_half_band(to_half_band(full)), full)


def test_auto_takes_the_mode_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = torch.zeros(1)
    for free, mode in ((None, "store"), (1 << 40, "hidden"), (6_000_000, "store"), (1_000_000, "recompute")):
        monkeypatch.setattr("gcahng.engine.edge_update.free_memory", lambda _, free=free: free)
        assert choose_edge_memory(200, 50, True, edges, torch.float32) == mode


def test_module_owns_the_weights_and_draws_anew() -> None:
    torch.manual_seed(0)
    module = EdgeUpdate(8, dropout=0.5, seed=1)
    edges, nodes = seeded(5, 5, 8, seed=1), seeded(5, 8, seed=2)
    edges = edges + edges.transpose(0, 1)
    first, second = module(edges, nodes), module(edges, nodes)
    assert module.draw == 2 and not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    assert torch.equal(module(edges, nodes), module(edges, nodes)) and module.draw == 2
    twin = EdgeUpdate(8, seed=1)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(edges, nodes), module(edges, nodes))
    with pytest.raises(UserError, match="dim is 0; it must be a whole number of at least 1"):
        EdgeUpdate(0)
    with pytest.raises(UserError, match="dropout is 1; it must be a number of at least 0 and under 1"):
        EdgeUpdate(4, dropout=1)


E, S = torch.ones(3, 3, 4), torch.ones(3, 4)
W = EdgeUpdateWeights(*(x.detach() for x in inputs(1, 4, dtype=torch.float32)[2]))
DRAW = torch.tensor(3)


def dropped(**changes) -> dict[str, EdgeDropout]:
    """The option dropout, with something wrong in it."""
    return {"dropout": EdgeDropout(0.1, 1, DRAW)._replace(**changes)}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], S, W), {}, "edges is a list; it must be a tensor"),
        ((E.half(), S, W), {}, "edges is float16; it must be float32 or float64"),
        ((E, S.double(), W), {}, "nodes is float64 on cpu; it must be as edges, float32 on cpu"),
        ((E, torch.ones(3, 4, 1), W), {}, r"nodes has shape \(3, 4, 1\); it must be \(nodes, channels\)"),
        ((E[:0, :0], S[:0], W), {}, r"nodes has shape \(0, 4\); it must be \(nodes, channels\), at least one of each"),
        ((torch.ones(3, 2, 4), S, W), {}, r"edges has shape \(3, 2, 4\); .* it must be \(3, 3, 4\)"),
        ((torch.ones(5, 4), S, W), {}, "edges has 5 rows; in half-band storage it must have"),
        ((torch.ones(10, 4), S, W), {}, r"edges has shape \(10, 4\); .* it must be \(6, 4\)"),
        ((torch.ones(6, 4), S, W), {"symmetric": False}, "symmetric is False and edges are in half-band storage"),
        ((E, S, W._replace(mlp_in_bias=S[0])), {}, r"weights.mlp_in_bias has shape \(4,\); .* it must be \(16,\)"),
        ((E, S, tuple(W)[:3]), {}, "weights has 3 tensors; it must have 14, as EdgeUpdateWeights lists them"),
        ((E, S, None), {}, "weights is a NoneType; it must be an EdgeUpdateWeights"),
        ((E, S, W), dropped(p=1.0), "dropout.p is 1.0; it must be at least 0 and under 1"),
        ((E, S, W), dropped(seed=2**63), "dropout.seed is 9223372036854775808; it must be a whole number"),
        ((E, S, W), dropped(draw=3), "dropout.draw is a int; it must be a 0-dim int64 tensor"),
        (
            (E, S, W),
            dropped(draw=torch.tensor([1])),
            r"dropout.draw is int64 of shape \(1,\) on cpu; it must be a 0-dim",
        ),
        ((E, S, W), dropped(draw=DRAW.to("meta")), r"dropout.draw is int64 of shape \(\) on meta; .* on cpu, as the"),
        ((E, S, W), {"dropout": 0.1}, "dropout is a float; it must be None or an EdgeDropout"),
        ((E, S, W), dropped(p="x"), "dropout.p is 'x'; it must be at least 0 and under 1"),
        ((E, S, W), {"symmetric": "true"}, "symmetric is 'true'; it must be True or False"),
        ((E.to_sparse(), S, W), {}, "edges is a sparse_coo tensor; it must be float32 or float64 .*, dense"),
        ((E, S, W), {"impl": "numpy"}, "impl is 'numpy'; it must be one of auto, reference, torch"),
        ((E, S, W), {"impl": "cuda"}, "impl is 'cuda', which is not available for edge_update on cpu: .*CUDA"),
        ((E, S, W), {"edge_memory": "disk"}, "edge_memory is 'disk'; it must be one of auto, hidden, store, recompute"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        edge_update(*arguments, **options)
