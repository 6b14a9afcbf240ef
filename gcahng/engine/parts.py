"""Stages, head, mixer and judge of one pass, as an implementation has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine import fused
from gcahng.engine.auto import split
from gcahng.engine.head import TorchHead
from gcahng.engine.judge import FusedJudge, TorchJudge
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.mixing import TorchMixer
from gcahng.engine.schedule import Schedule
from gcahng.engine.stages import TorchStages
from gcahng.engine.workspace import Workspace


class Parts(NamedTuple):
    stages: TorchStages
    head: TorchHead
    mixer: TorchMixer
    judge: TorchJudge


def make_parts(
    impl: str,
    schedule: Schedule,
    compute: torch.dtype,
    z: Tensor,
    pull: Tensor,
    kappa: Tensor,
    dropout: EdgeDropout | None,
    layers: int,
    workspace: Workspace,
) -> Parts:
    """impl: torch, cpp, cuda, triton, or cuda+triton: CUDA C++ for what is row-wise, Triton for the edge MLP, whose
    products carry their neighbours; for OP=IMPL behind it see gcahng.engine.auto. compute: dtype of products; z (n, D),
    pull (0-dim) and kappa (K, K): what is mixed."""
    if impl == "torch":
        stages = TorchStages(schedule, z.shape[1], compute, z, dropout, layers)
        return Parts(stages, TorchHead(schedule, compute), TorchMixer(schedule, z, pull, kappa), TorchJudge())
    kind = fused.FusedStages
    if split(impl)[0] in ("triton", "cuda+triton"):
        from gcahng.engine.triton import TritonStages

        kind = TritonStages
    return fused_parts(kind, fused.stage_ops(impl), schedule, compute, z, pull, kappa, dropout, layers, workspace)


def fused_parts(
    kind: type[fused.FusedStages],
    ops: Any,
    schedule: Schedule,
    compute: torch.dtype,
    z: Tensor,
    pull: Tensor,
    kappa: Tensor,
    dropout: EdgeDropout | None,
    layers: int,
    workspace: Workspace,
) -> Parts:
    """Stages of this kind, and all else, on these ops."""
    return Parts(
        kind(schedule, z.shape[1], compute, z, dropout, layers, workspace, ops),
        fused.FusedHead(schedule, compute, z, workspace, ops),
        fused.FusedMixer(schedule, z, pull, kappa, workspace, ops),
        FusedJudge(workspace, ops),
    )
