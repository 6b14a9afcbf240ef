"""What the engine cannot differentiate, it says; no derivative is lost without a word."""

from __future__ import annotations

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case
from torch.autograd import forward_ad

from gcahng import UserError

CASE = Case()
ALONE = "the engine supports backward-mode derivatives only, outside torch.func; impl='reference' supports all"

engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@engines
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_function_transforms(impl, training, frozen):
    z, labels = CASE.batch()
    gca = CASE.loss(impl, check="off").train(training)
    gca.graph_network.requires_grad_(not frozen)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return gca(x, labels)

    for transform in (torch.func.grad, torch.func.vjp, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        arguments = (loss, z) if transform is torch.func.vjp else (loss,)
        with pytest.raises(UserError, match=ALONE):
            made = transform(*arguments)
            made(z)
    with pytest.raises(UserError, match=ALONE):
        torch.func.jvp(loss, (z,), (z,))
    with pytest.raises(UserError, match=ALONE):
        torch.func.vmap(loss)(z[None])


@engines
@pytest.mark.parametrize("of", ["embeddings", "weights"])
def test_forward_mode(impl, of):
    z, labels = CASE.batch()
    gca = CASE.loss(impl, check="off").eval().requires_grad_(False)
    with forward_ad.dual_level():
        plain = gca(z, labels)
        assert forward_ad.unpack_dual(plain).tangent is None, "no derivative is asked for"
        if of == "embeddings":
            z = forward_ad.make_dual(z, torch.ones_like(z))
            call = lambda: gca(z, labels)  # noqa: E731
        else:
            name, weight = "graph_network.class_head.weight", gca.graph_network.class_head.weight
            dual = {name: forward_ad.make_dual(weight.detach(), torch.ones_like(weight))}
            call = lambda: torch.func.functional_call(gca, dual, (z, labels))  # noqa: E731
        with pytest.raises(UserError, match=ALONE):
            call()


@engines
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(impl, training):
    z, labels = CASE.batch()
    gca, leaf = CASE.loss(impl).train(training), z.requires_grad_()
    (dz,) = torch.autograd.grad(gca(leaf, labels), leaf, create_graph=True)
    with pytest.raises(UserError, match="differentiable once, not twice; impl='reference'"):
        dz.sum().backward()
    weight = gca.graph_network.node_input.weight
    (dw,) = torch.autograd.grad(gca(leaf, labels), weight, create_graph=True)
    with pytest.raises(UserError, match="differentiable once, not twice; impl='reference'"):
        dw.sum().backward()
