"""Batches that are shared by the GPUs there are, with NCCL: one is enough to make the calls, two share the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sent_cases import CASES, LEAST, size_of, wanted
from sent_cases import process as count_bytes
from torch import nn

from gcahng import GCAHNGLoss
from gcahng.engine.shared_attention import LEAST_NODES
from gcahng.testing import seeded

pytestmark = pytest.mark.gpu
CLASSES, VIEWS, DIM = 8, 3, 32


def train(device: torch.device, rank: int, count: int) -> dict[str, torch.Tensor]:
    """Two steps in float64 → losses and weights, on the CPU."""
    torch.manual_seed(rank)
    group = "world" if dist.is_initialized() else None
    options = {"layers": 2, "num_per_class": VIEWS, "seed": 1, "check": "raise", "process_group": group}
    gca = GCAHNGLoss(CLASSES, DIM, **options).to(device, torch.float64)
    torch.manual_seed(0)
    model = nn.Linear(16, DIM).to(device, torch.float64)
    wrapped = model if group is None else nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for step in range(2):
        x = seeded(CLASSES * VIEWS, 16, seed=step).to(device, torch.float64)
        labels = torch.arange(CLASSES, device=device).repeat(VIEWS)
        loss = gca(wrapped(x.tensor_split(count)[rank]), labels.tensor_split(count)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found |= {f"{name} {step}": value for name, value in {"loss": loss.detach(), **gca.generator_step()}.items()}
    return {name: value.cpu() for name, value in {**found, **dict(gca.named_parameters())}.items()}


def process(rank: int, count: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save(train(torch.device("cuda", rank), rank, count), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_gpus_that_share_a_batch_train_as_one(tmp_path: Path) -> None:
    count = max(c for c in (1, 2, 4, 8) if c <= torch.cuda.device_count())  # parts must be as large as each other
    mp.spawn(process, (count, str(tmp_path)), nprocs=count)
    torch.manual_seed(0)
    wanted = train(torch.device("cuda", 0), 0, 1)
    for rank in range(count):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_is_handed_the_bytes_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all round alike is not known before: torch's attention may have a backward that is not deterministic."""
    monkeypatch.setitem(LEAST_NODES, "cuda", LEAST)
    count = min(4, torch.cuda.device_count())
    mp.spawn(count_bytes, (count, str(tmp_path), "nccl"), nprocs=count)
    for rank in range(count):
        for case, found in zip(CASES, torch.load(tmp_path / f"{rank}.pt", weights_only=True), strict=True):
            sent, corrected, (alike, still_alike) = found
            size = size_of(case, count, "cuda")
            assert not still_alike and corrected == wanted(size, still_alike), case
            assert sent == wanted(size, alike), case
