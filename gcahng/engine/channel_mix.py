"""The mixing of a whole batch as an operator that autograd and torch.compile know.

gcahng.ops.channel_mix calls it. It runs over tiles of all ordered pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine.differentiable_once import differentiable_once
from gcahng.engine.prepare import workspace_for
from gcahng.engine.schedule import NodeSum, Schedule, Tile, default_tile_rows, make_schedule
from gcahng.engine.schema import define_operator, differentiate_operator
from gcahng.engine.stages import Stages, make_stages, ops_of
from gcahng.engine.stages.common import StageContext
from gcahng.engine.stages.mix import Mixing, MixUpstream, mixing_of
from gcahng.engine.stages.mix_index import MixIndex, mix_index


class MixTensors(NamedTuple):
    """The tensors of a call.

    Attributes:
        z: embeddings (n, D), class by class.
        coefficients: θ (n, n, D).
        draws: mixing draws u (K, K − 1).
        pull: what θ is multiplied with, 0-dim.
    """

    z: Tensor
    coefficients: Tensor
    draws: Tensor
    pull: Tensor


class MixSettings(NamedTuple):
    """What a call needs beside tensors.

    Attributes:
        views: samples of a class, K.
        implementation: that of the stages, as gcahng.dispatch names it.
    """

    views: int
    implementation: str


class _Call:
    """One call of the operator: its schedule, stages and prepared operands."""

    def __init__(self, tensors: MixTensors, s: MixSettings) -> None:
        z = tensors.z.detach()
        self.dim, classes = z.shape[1], z.shape[0] // s.views
        rows = default_tile_rows(self.dim, z.dtype, "store", z.device.type)
        self.schedule: Schedule = make_schedule(classes, s.views, symmetric=False, tile_rows=rows)
        workspace, ops = workspace_for(z.device), ops_of(s.implementation)
        context = StageContext(self.schedule, self.dim, z.dtype, z, None, 1, workspace, ops)
        self.stages: Stages = make_stages(context)
        self.mixing: Mixing = mixing_of(context, z, tensors.draws, tensors.pull)

    def tiles(self) -> Iterator[tuple[Tile, MixIndex]]:
        """Each tile, and which mixes it forms."""
        for tile in self.schedule.tiles:
            yield tile, mix_index(self.schedule, tile, self.mixing.kappa.device)

    def columns(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The anchor classes (A, 1) and column classes (A, O) of a tile."""
        device = self.mixing.kappa.device
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)[:, None]
        return first, self.schedule.column_classes(tile, device)

    def pairs(self, x: Tensor) -> Tensor:
        """x (n, n, D) as (C, K, C, K, D)."""
        classes, views = self.schedule.classes, self.schedule.views
        return x.view(classes, views, classes, views, self.dim)

    def theta(self, coefficients: Tensor, tile: Tile) -> Tensor:
        """A tile's coefficients (T, D)."""
        first, columns = self.columns(tile)
        # Two index tensors apart put their dimensions first: (A, O, K, K, D).
        grid = self.pairs(coefficients)[first, :, columns]
        return grid.permute(0, 2, 1, 3, 4).reshape(tile.rows, self.dim)


def _forward(tensors: MixTensors, s: MixSettings) -> Tensor:
    """The negatives (K, C, C, D)."""
    with torch.autocast(tensors.z.device.type, enabled=False):
        call = _Call(tensors, s)
        out = _forward_fake(tensors, s)
        for tile, index in call.tiles():
            theta = call.theta(tensors.coefficients, tile)
            out[index.place] = call.stages.mix.negatives(call.mixing, tile, theta)
        return out


def _forward_fake(tensors: MixTensors, s: MixSettings) -> Tensor:
    z, views = tensors.z, s.views
    classes = z.shape[0] // views
    return z.new_empty(views, classes, classes, z.shape[1])


class _Upstream(NamedTuple):
    """What the backward takes beside the forward's arguments.

    Attributes:
        upstream: gradient of the negatives (K, C, C, D).
    """

    upstream: Tensor


def _backward(given: _Upstream, tensors: MixTensors, s: MixSettings) -> tuple[Tensor, Tensor]:
    """The gradients of embeddings (n, D) and coefficients (n, n, D)."""
    upstream = given.upstream
    with torch.autocast(upstream.device.type, enabled=False):
        call = _Call(tensors, s)
        d_coefficients = torch.empty_like(tensors.coefficients)
        into, into_positive = (NodeSum(call.schedule, width, like=tensors.z) for width in (call.dim, 1))
        for tile, index in call.tiles():
            dn = upstream[index.place]
            first, columns = call.columns(tile)
            grid = call.stages.mix.backward_theta(call.mixing, tile, dn).view(*call.schedule.shape(tile), call.dim)
            call.pairs(d_coefficients)[first, :, columns] = grid.permute(0, 2, 1, 3, 4)
            upstream_of_tile = MixUpstream(call.theta(tensors.coefficients, tile), None, 0.0, dn)
            call.stages.mix.backward_z(call.mixing, tile, upstream_of_tile, into, into_positive)
        return into.total() + call.mixing.positive_backward(into_positive.total()), d_coefficients


def _backward_fake(_: _Upstream, tensors: MixTensors, s: MixSettings) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tensors.z), torch.empty_like(tensors.coefficients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _grad(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    settings = ctx.settings

    def run(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.gcahng.channel_mix_backward(grad, *saved, *settings)

    dz, d_coefficients = differentiable_once("channel_mix", run, upstream, *ctx.saved_tensors)
    return dz, d_coefficients, *[None] * (len(MixTensors._fields) - 2 + len(MixSettings._fields))


_STRUCTS = (MixTensors, MixSettings)
define_operator("channel_mix", _STRUCTS, "Tensor", _forward, _forward_fake)
MIX_BACKWARD = define_operator(
    "channel_mix_backward", (_Upstream, *_STRUCTS), "(Tensor, Tensor)", _backward, _backward_fake
)
differentiate_operator("channel_mix", _grad, _setup)


def run_channel_mix(tensors: MixTensors, settings: MixSettings) -> Tensor:
    """Calls the operator.

    Returns:
        Negatives (K, C, C, D).
    """
    return torch.ops.gcahng.channel_mix(*tensors, *settings)
