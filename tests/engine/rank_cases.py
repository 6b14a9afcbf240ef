"""What each process of a group does in the tests of shared batches: some training steps of a small model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gcahng import GCAHNGLoss, UserError
from gcahng.engine import prepare
from gcahng.engine.plan import MODES
from gcahng.engine.ranks import Adding, Ranks
from gcahng.engine.shared_attention import LEAST_NODES
from gcahng.testing import seeded

DIM, FEATURES, TRAINING_CLASSES, STEPS, SEED = 8, 5, 9, 2, 7


class RankCase(NamedTuple):
    """classes, views: of a batch; impl, memory, symmetric, compat: the loss's options; tile_rows: edges in a tile;
    around: what DistributedDataParallel is around, the model or both, as in Lightning; coefficients, messages: what is
    left out of the graph network; synthetic, anchors: what J_syn is, and whether it moves anchors; rounding: by how
    much gradients differ from one process to the next; attention: whether node attention is shared."""

    impl: str
    memory: str = "store"
    symmetric: bool = True
    compat: str = "fixed"
    classes: int = 4
    views: int = 3
    tile_rows: int = 40
    around: str = "model"
    coefficients: str = "channel"
    messages: bool = True
    synthetic: str = "npair"
    anchors: bool = True
    rounding: float = 1e-14  # as on devices that round otherwise
    attention: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


CASES = [
    *(RankCase(impl, memory) for impl in ("torch", "cpp") for memory in ("store", "hidden", "recompute")),
    RankCase("cpp", "auto", tile_rows=10_000),
    RankCase("torch", symmetric=False),
    RankCase("cpp", compat="official", classes=6, views=2),
    RankCase("cpp", classes=2, views=6),  # fewer classes than processes
    RankCase("reference"),
    RankCase("cpp", around="both"),
    RankCase("cpp", coefficients="pair", messages=False),
    RankCase("torch", "recompute", coefficients="constant"),
    RankCase("cpp", synthetic="cosine"),
    RankCase("torch", "recompute", synthetic="cosine", anchors=False),
    RankCase("cpp", "hidden", symmetric=False, anchors=False),
    RankCase("cpp", classes=2, views=6, synthetic="cosine"),
    RankCase("cpp", rounding=0.0),
    RankCase("cpp", "recompute", rounding=0.0, attention=True),
    RankCase("torch", symmetric=False, attention=True),
]
AT_ONCE = CASES[-1]  # which is run again, with sums that are waited for at once


class ModelAndLoss(nn.Module):
    """Both in one."""

    def __init__(self, model: nn.Module, gca: GCAHNGLoss) -> None:
        super().__init__()
        self.model, self.gca = model, gca

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.gca(self.model(x), labels)


def batch(case: RankCase, step: int) -> tuple[Tensor, Tensor]:
    """Features and labels, the classes' samples in no order."""
    labels = torch.arange(case.classes).add(step).repeat(case.views)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))
    return seeded(len(labels), FEATURES, seed=step).double(), labels[order]


def make(case: RankCase, seed: int, group: str | None, **more: Any) -> tuple[nn.Module, GCAHNGLoss]:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, DIM).double()
    torch.manual_seed(seed)
    options = {"impl": case.impl, "symmetric": case.symmetric, "compat": case.compat, "edge_memory": case.memory}
    options |= {"coefficients": case.coefficients, "message_passing": case.messages}
    options |= {"synthetic": case.synthetic, "anchor_gradient": case.anchors}
    gca = GCAHNGLoss(TRAINING_CLASSES, DIM, layers=2, heads=2, **options, **more, process_group=group).double()
    gca.mean_metric, gca.mean_generator = 2.0, 20.0
    return model, gca


def train(case: RankCase, seed: int, rank: int, count: int) -> dict[str, Any]:
    """Steps on this process's part of each batch → what the loss and the model then are, and what it generates."""
    model, gca = make(case, seed, "world" if count > 1 else None)
    whole = ModelAndLoss(model, gca)
    if count > 1 and case.around == "both":
        whole = nn.parallel.DistributedDataParallel(whole, find_unused_parameters=True)
    elif count > 1:
        whole.model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in gca.parameters():
        if parameter.requires_grad:
            factor = 1 + case.rounding * rank
            parameter.register_hook(lambda gradient, by=factor: None if gradient is None else gradient * by)
    found = {}
    for step in range(STEPS):
        x, labels = (t.tensor_split(count)[rank] for t in batch(case, step))
        loss = whole(x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logs = gca.generator_step()
        found |= {f"{name} of step {step}": value for name, value in {"loss": loss.detach(), **logs}.items()}
    with torch.no_grad():
        found |= gca.generate(model(x), labels)._asdict()
        found["eval"] = gca.eval()(model(x), labels)
    found |= {f"model {name}": value for name, value in model.state_dict().items()}
    # Without the bytes of the optimizers, which are no numbers to compare.
    found |= {name: value for name, value in gca.state_dict().items() if name != "_extra_state"}
    agreed = [] if gca._ranks is None else list(gca._ranks._agreed.values())
    found["alike"] = [gca._agreement.alike]
    return found | {"seed": torch.tensor(gca.seed), "memory": [MODES[number] for number in agreed]}


def refused(rank: int) -> list[str]:
    """What one is told of a label that one process has wrong, and of parts that differ in size or are all the same."""
    found = []
    for check, views, wrong in (
        ("auto", 3, TRAINING_CLASSES if rank == 0 else 0),
        *((check, 3 + rank, 0) for check in ("auto", "deferred", "off")),  # "deferred" is what a GPU has
    ):
        _, gca = make(CASES[0], 0, "world", check=check, num_per_class=3)
        try:
            gca(seeded(2 * views, DIM, seed=rank).double(), torch.arange(2).repeat(views) + 2 * rank + wrong)
        except UserError as error:
            found.append(str(error))
    _, gca = make(CASES[0], 0, "world")
    whole = seeded(6, DIM, seed=1).double(), torch.arange(2).repeat(3)
    try:
        gca(*(t.roll(rank, 0) for t in whole))  # as a wrapper that gathers has them
    except UserError as error:
        found.append(str(error))
    return found


def at_once(ranks: Ranks, *tensors: Tensor) -> SimpleNamespace:
    """Ranks.start_adding, finished before anything else is done."""
    adding = Adding(ranks, tensors)
    adding.finish()
    return SimpleNamespace(finish=lambda: None)


def process(rank: int, count: int, folder: str) -> None:
    """One process: every case, what was found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    prepare.free_memory = lambda device: 10**12 if rank else 0
    found = {}
    for case in CASES:
        prepare.default_tile_rows = lambda *_, rows=case.tile_rows: rows
        LEAST_NODES["cpu"] = 1 if case.attention else 256
        found[case.name] = train(case, SEED + rank, rank, count)
    Ranks.start_adding = at_once
    found["at once"] = train(AT_ONCE, SEED + rank, rank, count)
    torch.save((found, refused(rank)), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
