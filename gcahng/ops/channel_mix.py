"""channel_mix: pulls real negatives towards each anchor, channel by channel, and mixes them. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from gcahng import dispatch
from gcahng.engine.channel_mix import MixSettings, MixTensors, run_channel_mix
from gcahng.engine.engine import refuse_transforms
from gcahng.engine.precision import name_of
from gcahng.errors import UserError
from gcahng.reference.mix import mix as reference


def channel_mix(
    embeddings: Tensor,
    coefficients: Tensor,
    *,
    num_per_class: int,
    pull: float | Tensor,
    draws: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Generates hard negatives from real ones (paper section 3.3).

    For anchor view k of class a and every class c, each of the K samples b of class c is pulled towards the anchor a,
    by its own share in every channel, and the K results are mixed by random weights:

        r = (d⁺ + (d⁻ − d⁺) θ_ab · pull) / d⁻  where d⁺ < d⁻, else 1;   ñ = a + (b − a) ∘ r

    d⁺ is the anchor's distance to its positive (view k + 1 of its class), d⁻ that to b.

    Args:
        embeddings: (n, D), n = C·K, class by class: row a·K + k is view k of class a. float32 or float64.
        coefficients: θ (n, n, D), θ_ij of anchor i and negative j, in (0, 1); need not be symmetric.
        num_per_class: K, at least 2.
        pull: how far negatives are pulled, as a number or 0-dim tensor; θ is multiplied with it.
        draws: (K, K − 1) mixing draws in [0, 1]; None draws them from torch's generator. draws[k, v − 1] is the share
            of views 0 … v − 1 against view v, for anchors that are view k.
        impl: auto, reference, torch, cpp, cuda or triton (see gcahng.dispatch).

    Returns:
        Negatives (K, C, C, D): [k, a, c] for anchor view k of class a against class c. The entries a = c are no
        negatives, but are computed. They are differentiable once, in embeddings and coefficients; impl="reference" is
        differentiable any number of times.

    Raises:
        UserError: a shape, dtype or device is wrong, or the implementation is not available.
    """
    _check(embeddings, coefficients, num_per_class, pull, draws)
    views, dtype, device = num_per_class, embeddings.dtype, embeddings.device
    if draws is None:
        draws = torch.rand(views, views - 1, dtype=dtype, device=device)
    if not isinstance(pull, Tensor):
        pull = torch.full((), pull, dtype=dtype, device=device)
    implementation = dispatch.chosen("channel_mix", impl, device, views, embeddings.shape[1], dtype)
    tensors = MixTensors(embeddings.contiguous(), coefficients.contiguous(), draws, pull)
    if implementation == "reference":
        return _reference(tensors, views)
    if not torch.compiler.is_compiling():
        refuse_transforms("channel_mix", embeddings, coefficients)
    return run_channel_mix(tensors, MixSettings(views, implementation))


def _reference(tensors: MixTensors, views: int) -> Tensor:
    """The op as gcahng.reference has it."""
    z, theta, draws, pull = tensors
    n, dim = z.shape
    by_view = z.view(-1, views, dim).transpose(0, 1)
    pairs = theta.view(n // views, views, n // views, views, dim).permute(1, 0, 3, 2, 4)  # (K, C, K, C, D)
    return reference(by_view, pairs, draws, pull)


def _check(embeddings: Tensor, coefficients: Tensor, views: int, pull: float | Tensor, draws: Tensor | None) -> None:
    """Checks the arguments of channel_mix."""
    if not isinstance(views, int) or isinstance(views, bool) or views < 2:
        raise UserError(f"num_per_class is {views!r}; it must be a whole number of at least 2")
    for name, x in (("embeddings", embeddings), ("coefficients", coefficients)):
        if not isinstance(x, Tensor):
            raise UserError(f"{name} is a {type(x).__name__}; it must be a tensor")
        if x.layout is not torch.strided:
            raise UserError(f"{name} is a {name_of(x.layout)} tensor; it must be dense")
    if embeddings.dtype not in (torch.float32, torch.float64):
        raise UserError(f"embeddings is {name_of(embeddings.dtype)}; it must be float32 or float64")
    if embeddings.dim() != 2 or embeddings.shape[0] % views or not embeddings.numel():
        raise UserError(
            f"embeddings has shape {tuple(embeddings.shape)}; it must be (n, channels), at least one of each, n a "
            f"multiple of num_per_class, {views}"
        )
    n, dim = embeddings.shape
    wanted = {"coefficients": (coefficients, (n, n, dim))}
    if draws is not None:
        wanted["draws"] = (draws, (views, views - 1))
    if isinstance(pull, Tensor):
        wanted["pull"] = (pull, ())
    elif not isinstance(pull, (int, float)):
        raise UserError(f"pull is a {type(pull).__name__}; it must be a number or a 0-dim tensor")
    elif not abs(pull) <= torch.finfo(embeddings.dtype).max:
        raise UserError(f"pull is {pull}; it must be finite in {name_of(embeddings.dtype)}")
    for name, (x, shape) in wanted.items():
        if not isinstance(x, Tensor) or tuple(x.shape) != shape:
            actual = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
            raise UserError(f"{name} {actual}; with embeddings of shape ({n}, {dim}) it must be {shape}")
        if x.dtype != embeddings.dtype or x.device != embeddings.device:
            raise UserError(
                f"{name} is {name_of(x.dtype)} on {x.device}; it must be as embeddings, {name_of(embeddings.dtype)} on "
                f"{embeddings.device}"
            )
        if name != "coefficients" and x.requires_grad:
            raise UserError(f"{name} requires a gradient, which channel_mix does not compute; it must be detached")
