"""What the collectives of a training step are handed, counted in processes of a group."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from gcahng import GCAHNGLoss
from gcahng.engine.shared_attention import LEAST_NODES
from gcahng.engine.step_size import StepSize
from gcahng.engine.traffic import KINDS, Sent, collectives, corrections
from gcahng.testing import seeded

# Classes, views, channels, layers, training classes, heads, edge_memory, dtype, synthetic, anchor_gradient. The wide
# one sends large tensors.
CASES = [
    (12, 2, 16, 2, 20, 2, "store", torch.float32, "npair", True),
    (12, 3, 8, 1, 12, 1, "hidden", torch.float32, "npair", False),
    (24, 2, 16, 3, 30, 4, "recompute", torch.float64, "npair", True),
    (12, 2, 96, 2, 1000, 2, "store", torch.float32, "npair", True),
    (12, 2, 16, 1, 20, 2, "store", torch.float32, "cosine", True),
]
LEAST = 36  # nodes whose attention processes share, here


def size_of(case: tuple, count: int, device: str = "cpu") -> StepSize:
    classes, views, dim, layers, training, _, _, dtype, _, _ = case
    return StepSize(classes * views, dim, layers, views, training, dtype, dtype, dtype, device=device, ranks=count)


def by_kind(sent: list[Sent]) -> dict[str, int]:
    """The payload of each kind of collective."""
    return {kind: sum(one.payload for one in sent if one.kind == kind) for kind in KINDS}


def wanted(case: tuple, count: int, alike: bool) -> dict[str, int]:
    """What the plan says that a step sends, where processes round alike or have been found not to."""
    size = size_of(case, count)
    sent = collectives(size)
    if "cosine" in case:
        sent = [one for one in sent if one.name != "norms of synthetic negatives"]
    if not alike:  # nothing is noted, so that no checksum is compared
        sent = [one for one in sent if "checksum" not in one.name] + corrections(size)
    return by_kind(sent)


class Found(NamedTuple):
    """Bytes that this process hands to each kind of collective in a step: where all processes round alike, and where
    they do not and have found out; and whether they were alike before and then."""

    sent: dict[str, int]
    corrected: dict[str, int]
    alike: tuple[bool, bool]


def counted(case: tuple, rank: int, count: int, device: str) -> Found:
    """Counts in the second step, and in the second one of those in which processes round differently."""
    classes, views, dim, layers, training, heads, memory, dtype, synthetic, anchors = case
    options = {"layers": layers, "heads": heads, "edge_memory": memory, "synthetic": synthetic}
    gca = GCAHNGLoss(training, dim, **options, anchor_gradient=anchors, process_group="world", seed=1)
    gca = gca.to(device, dtype)
    labels = torch.arange(classes, device=device).repeat(views).tensor_split(count)[rank]
    found, alike = [], []
    for step in range(5):  # in the first one the processes also meet
        own = seeded(classes * views, dim, seed=step).to(device, dtype).tensor_split(count)[rank]
        if step == 2:  # 10⁻³, so that float32 weights show it after one step
            for parameter in filter(lambda p: p.requires_grad, gca.parameters()):
                parameter.register_hook(lambda gradient: None if gradient is None else gradient * (1 + 1e-3 * rank))
        with Counter() if step in (1, 4) else nullcontext() as counter:
            gca(own.detach().requires_grad_(), labels).backward()
            gca.generator_step()
        if counter is not None:
            found.append(counter.bytes)
            alike.append(gca._agreement.alike)
    return Found(*found, tuple(alike))


class Counter:
    """Counts in a `with` statement what torch.distributed's collectives are handed, any other one included."""

    OTHERS = ("reduce", "gather", "scatter", "reduce_scatter", "all_to_all", "all_to_all_single", "send", "isend")
    FLAT = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce_coalesced", "all_gather_object")

    def __enter__(self) -> Counter:
        self.bytes = dict.fromkeys(KINDS, 0)
        self._were = {name: getattr(dist, name) for name in (*KINDS, *self.OTHERS, *self.FLAT) if hasattr(dist, name)}
        for name, call in self._were.items():
            setattr(dist, name, self._counting(name, call))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self._were.items():
            setattr(dist, name, call)

    def _counting(self, name: str, call: object) -> object:
        def counting(*arguments: object, **named: object) -> object:
            if name not in KINDS:
                raise AssertionError(f"{name} is not counted")
            sent = arguments[1 if name == "all_gather" else 0]
            self.bytes[name] += sent.numel() * sent.element_size()
            return call(*arguments, **named)

        return counting


def process(rank: int, count: int, folder: str, backend: str = "gloo") -> None:
    """One process: every case, what was counted in a file."""
    torch.set_num_threads(1)
    LEAST_NODES.update(cpu=LEAST, cuda=LEAST)
    device = "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save([tuple(counted(case, rank, count, device)) for case in CASES], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
