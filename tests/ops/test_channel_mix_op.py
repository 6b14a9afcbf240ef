"""gcahng.ops.channel_mix: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from tiers import few
from torch import Tensor

from gcahng import UserError
from gcahng.ops import channel_mix
from gcahng.testing import nan_poisoned, seeded

IMPLEMENTATIONS = ["torch", "cpp", pytest.param("triton", marks=pytest.mark.simulated)]
SIZES = [(2, 2, 1), (3, 3, 19), (5, 2, 8), (4, 5, 33)]  # classes, samples a class, channels


def inputs(classes: int, views: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and coefficients, which require gradients, and draws."""
    n = classes * views
    theta = torch.sigmoid(seeded(n, n, dim, seed=2, dtype=dtype))
    draws = torch.sigmoid(seeded(views, views - 1, seed=3, dtype=dtype))
    return seeded(n, dim, seed=1, dtype=dtype).requires_grad_(), theta.requires_grad_(), draws


def value_and_gradients(z: Tensor, theta: Tensor, draws: Tensor, impl: str) -> list[Tensor]:
    negatives = channel_mix(z, theta, num_per_class=draws.shape[0], pull=0.6, draws=draws, impl=impl)
    upstream = seeded(*negatives.shape, seed=9, dtype=z.dtype)
    return [negatives.detach(), *torch.autograd.grad(negatives, (z, theta), upstream)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_matches_the_reference(impl: str) -> None:
    """The entries a = c among them, and coefficients that are not symmetric."""
    for size in SIZES:
        given = inputs(*size)
        with nan_poisoned():
            found = value_and_gradients(*given, impl)
        for a, b in zip(found, value_and_gradients(*given, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_many_tiles(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.engine.channel_mix.default_tile_rows", lambda *_: 12)
    given = inputs(6, 2, 5)
    for a, b in zip(value_and_gradients(*given, impl), value_and_gradients(*given, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float32_is_as_near_as_the_reference(impl: str) -> None:
    given = inputs(5, 3, 37, torch.float32)
    exact = [x.detach().double() for x in given]
    truth = value_and_gradients(exact[0].requires_grad_(), exact[1].requires_grad_(), exact[2], "reference")
    plain = value_and_gradients(*given, "reference")
    for a, b, t in zip(value_and_gradients(*given, impl), plain, truth, strict=True):
        error, allowed = ((x.double() - t).square().mean().sqrt().item() for x in (a, b))
        assert error <= 2 * allowed + 4e-7 * t.abs().max().item()


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
def test_gradcheck(impl: str) -> None:
    z, theta, draws = inputs(2, 2, 3)

    def run(z: Tensor, theta: Tensor) -> Tensor:
        return channel_mix(z, theta, num_per_class=2, pull=torch.tensor(0.7, dtype=z.dtype), draws=draws, impl=impl)

    assert torch.autograd.gradcheck(run, (z, theta))


def test_draws_come_from_torchs_generator() -> None:
    z, theta, _ = inputs(3, 3, 4)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(channel_mix(z, theta, num_per_class=3, pull=1.0))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_second_derivative_is_an_error(impl: str) -> None:
    z, theta, draws = inputs(2, 2, 3)
    negatives = channel_mix(z, theta, num_per_class=2, pull=0.5, draws=draws, impl=impl)
    (d,) = torch.autograd.grad(negatives.sum(), z, create_graph=True)
    with pytest.raises(UserError, match="channel_mix is differentiable once, not twice; impl='reference'"):
        d.square().sum().backward()


@pytest.mark.parametrize(
    "impl", few(["cpp", "torch", *(pytest.param(impl, marks=pytest.mark.slow) for impl in ("auto", "reference"))])
)
def test_compiles_whole(impl: str) -> None:
    z, theta, draws = inputs(3, 2, 5, torch.float32)
    torch._dynamo.reset()

    def run(z: Tensor, theta: Tensor) -> Tensor:
        return channel_mix(z, theta, num_per_class=2, pull=0.5, draws=draws, impl=impl) * 2

    found, wanted = (
        torch.autograd.grad(f(z, theta).square().sum(), (z, theta)) for f in (torch.compile(run, fullgraph=True), run)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_opcheck(impl: str) -> None:
    z, theta, draws = inputs(3, 2, 5, torch.float32)
    torch.library.opcheck(torch.ops.gcahng.channel_mix.default, (z, theta, draws, torch.tensor(0.5), 2, impl))


def test_bits_do_not_depend_on_threads() -> None:
    z, theta, draws = inputs(20, 3, 24, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(value_and_gradients(z, theta, draws, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


Z, T, U = torch.ones(4, 3), torch.ones(4, 4, 3), torch.ones(2, 1)
GIVEN = {"num_per_class": 2, "pull": 0.5, "draws": U}


@pytest.mark.parametrize(
    ("embeddings", "coefficients", "options", "message"),
    [
        ([1.0], T, {}, "embeddings is a list; it must be a tensor"),
        (Z.half(), T, {}, "embeddings is float16; it must be float32 or float64"),
        (Z[:3], T, {}, r"embeddings has shape \(3, 3\); it must be \(n, channels\), .*, n a multiple of num_per"),
        (Z[:, :0], T[..., :0], {}, r"embeddings has shape \(4, 0\); it must be \(n, channels\), at least one of each"),
        (Z, T[:3], {}, r"coefficients has shape \(3, 4, 3\); .* it must be \(4, 4, 3\)"),
        (Z, T.double(), {}, "coefficients is float64 on cpu; it must be as embeddings, float32 on cpu"),
        (Z, T, {"draws": U.T}, r"draws has shape \(1, 2\); .* it must be \(2, 1\)"),
        (Z, T, {"pull": U}, r"pull has shape \(2, 1\); .* it must be \(\)"),
        (Z, T, {"pull": "far"}, "pull is a str; it must be a number or a 0-dim tensor"),
        (Z, T, {"pull": 1e39}, r"pull is 1e\+39; it must be finite in float32"),
        (Z, T, {"pull": float("nan")}, "pull is nan; it must be finite"),
        (Z.to_sparse(), T, {}, "embeddings is a sparse_coo tensor; it must be dense"),
        (Z, T.to_sparse(), {}, "coefficients is a sparse_coo tensor; it must be dense"),
        (Z, T, {"pull": torch.tensor(0.5, requires_grad=True)}, "pull requires a gradient, which channel_mix does not"),
        (Z, T, {"num_per_class": 1}, "num_per_class is 1; it must be a whole number of at least 2"),
        (Z, T, {"impl": "cuda"}, "impl is 'cuda', which is not available for channel_mix on cpu: .*CUDA"),
    ],
)
def test_errors_name_the_argument(embeddings, coefficients, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        channel_mix(embeddings, coefficients, **(GIVEN | options))


def test_more_samples_a_class_than_fused_stages_take() -> None:
    z, theta, draws = inputs(1, 65, 1)
    with pytest.raises(UserError, match="impl is 'cpp', .*: it takes up to 64 samples a class, not 65; impl='torch'"):
        channel_mix(z, theta, num_per_class=65, pull=0.5, draws=draws, impl="cpp")
    assert channel_mix(z, theta, num_per_class=65, pull=0.5, draws=draws).shape == (65, 1, 1, 1)
