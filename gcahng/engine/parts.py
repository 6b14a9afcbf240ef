"""Stages, head, mixer and judge of one pass, as an implementation has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    products carry their neighbours. compute: dtype of products; z (n, D), pull (0-dim) and kappa (K, K): what is
    mixed."""
    dim = z.shape[1]
    if impl == "torch":
        stages = TorchStages(schedule, dim, compute, z, dropout, layers)
        return Parts(stages, TorchHead(schedule, compute), TorchMixer(schedule, z, pull, kappa), TorchJudge())
    from gcahng.engine.fused import FusedHead, FusedMixer, FusedStages, stage_ops

    kind = FusedStages
    if impl in ("triton", "cuda+triton"):
        from gcahng.engine.triton import TritonStages

        kind = TritonStages
    ops = stage_ops(impl)
    return Parts(
        kind(schedule, dim, compute, z, dropout, layers, workspace, ops),
        FusedHead(schedule, compute, z, workspace, ops),
        FusedMixer(schedule, z, pull, kappa, workspace, ops),
        FusedJudge(workspace, ops),
    )
