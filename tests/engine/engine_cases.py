"""Cases for the engine, and everything that a whole training step gives, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import gcahng
from gcahng.testing import seeded
from gcahng.testing.compare import assert_within

NUM_CLASSES = 23
IMPLEMENTATIONS = ("torch", "cpp")
# Shifts both logits of an edge alike: in exact arithmetic its gradient is zero, in ours rounding noise.
CANCELS = "edge.key.bias"


@dataclass(frozen=True)
class Case:
    """A batch of C classes of K samples and a loss for it; tile_rows None: the engine's own choice."""

    classes: int = 5
    views: int = 3
    dim: int = 16
    layers: int = 2
    heads: int = 4
    symmetric: bool = True
    memory: str = "store"
    p: float = 0.1
    compat: str = "fixed"
    tile_rows: int | None = None
    num_classes: int = NUM_CLASSES

    def __str__(self) -> str:
        ends = "tied" if self.symmetric else "apart"
        tiles = f"-t{self.tile_rows}" if self.tile_rows else ""
        sizes = f"c{self.classes}-k{self.views}-d{self.dim}-l{self.layers}-h{self.heads}"
        return f"{sizes}-{ends}-{self.memory}-p{self.p}-{self.compat}{tiles}"

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    def loss(self, impl: str, dtype: torch.dtype = torch.float64, **options) -> gcahng.GCAHNGLoss:
        """The same weights every time, none at its start (biases and norms included), fp32 values in any dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            gca = gcahng.GCAHNGLoss(
                self.num_classes,
                self.dim,
                layers=self.layers,
                heads=self.heads,
                symmetric=self.symmetric,
                edge_memory=self.memory,
                edge_dropout=self.p,
                compat=self.compat,
                impl=impl,
                alpha=2.0,
                beta=20.0,
                seed=7,
                **options,
            )
            for parameter in gca.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            for norm in (gca.graph_network.edge_batch_norm, gca.graph_network.node_batch_norm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
        gca.mean_metric, gca.mean_generator = 1.25, 40.0
        return gca.to(dtype)

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Embeddings (n, D), fp32 values in any dtype, and labels (n,), in no order."""
        generator = torch.Generator().manual_seed(100 + seed)
        n = self.classes * self.views
        labels = torch.randperm(self.num_classes, generator=generator)[: self.classes].repeat(self.views)
        centers = seeded(self.classes, self.dim, seed=2 * seed + 1)
        z = seeded(n, self.dim, seed=2 * seed) + 0.7 * centers.repeat(self.views, 1)
        order = torch.randperm(n, generator=generator)
        return z[order].to(dtype), labels[order]


def buffers(gca: gcahng.GCAHNGLoss) -> dict[str, Tensor]:
    """Running statistics, and the number of passes."""
    named = dict(gca.graph_network.named_buffers())
    found = {name: t.clone() for name, t in named.items() if "running" in name or "num_batches" in name}
    return found | {"draw": gca.draw.clone()}


def run_step(
    gca: gcahng.GCAHNGLoss,
    z: Tensor,
    labels: Tensor,
    *,
    autocast: torch.dtype | None = None,
    want_z: bool = True,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """A training step in which no graph weight moves: loss, dz, gradients that are not None, logs, buffers."""
    z = z.detach().clone().requires_grad_(want_z)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = gca(z, labels)
    (scale * loss).backward()
    phases: list[dict[str, Tensor]] = []

    def take(_: Tensor | None) -> None:
        phases.append({n: p.grad for n, p in gca.graph_network.named_parameters() if p.grad is not None})
        gca.graph_network.zero_grad(set_to_none=True)

    gca._step_graph_network = take
    logs = gca.generator_step()
    del gca._step_graph_network
    found = {"loss": loss.detach()} | ({"dz": z.grad} if want_z else {})
    for phase, gradients in zip((1, 3), phases, strict=True):
        found |= {f"phase {phase} {name}": gradient for name, gradient in gradients.items()}
    return found | logs | buffers(gca)


def is_gradient(name: str) -> bool:
    return name == "dz" or name.startswith("phase ")


def cancels(name: str) -> bool:
    return name.endswith(CANCELS)


def scale_of(name: str, found: dict[str, Tensor]) -> float:
    """The size against which a tensor's error counts: its own, or its weight's gradient where it cancels."""
    if cancels(name):
        name = name.removesuffix("bias") + "weight"
    return found[name].double().abs().max().item()


def error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth|"""
    return (actual.double() - truth.double()).abs().max().item()


def assert_same_keys(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same tensors are there: a gradient that is None for one is None for the other."""
    extra, missing = sorted(actual.keys() - wanted.keys()), sorted(wanted.keys() - actual.keys())
    assert not extra and not missing, f"has {extra}, lacks {missing}"


def assert_exact(
    actual: dict[str, Tensor], wanted: dict[str, Tensor], outputs: float = 2e-12, gradients: float = 2e-11
) -> None:
    """fp64: errors relative to each tensor's largest value; counts and draws are equal. On CPUs outputs are off by up
    to 9e-14 and gradients by up to 8e-13, over all cases, the widest and the deepest included."""
    assert_same_keys(actual, wanted)
    for name, tensor in wanted.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
        if not tensor.is_floating_point():
            assert torch.equal(actual[name], tensor), name
            continue
        off, scale = error(actual[name], tensor), scale_of(name, wanted)
        assert scale > 0, f"{name} is zero"
        assert_within(off, (gradients if is_gradient(name) else outputs) * scale, name)


WIDE_CASES = [
    Case(classes=5, views=3, dim=512),
    Case(classes=4, views=3, dim=1024, layers=1, memory="recompute", tile_rows=40),
    Case(classes=6, views=2, dim=512, layers=4, symmetric=False, memory="hidden", tile_rows=130),
]
LOW_CASES = [
    Case(tile_rows=40),
    Case(classes=4, symmetric=False, memory="recompute"),
    Case(classes=6, views=4, dim=64, memory="hidden", tile_rows=130),
    Case(classes=7, views=2, dim=24, layers=4, heads=3),
    Case(classes=3, views=8, dim=64, layers=1, tile_rows=130),
]
