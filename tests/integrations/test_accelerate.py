"""The loss in loops with accelerate, and beside a network that FSDP shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from integrations.examples import ROOT, check_example, documented
from torch import nn

import gcahng

CLASSES, DIM, VIEWS = 6, 16, 3


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its state in the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Loop:
    """A loop with accelerate, and everything that it changes."""

    def __init__(self, prepared: bool, **options: Any) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, **options)
        model, self.gca = nn.Linear(8, DIM), gcahng.GCAHNGLoss(CLASSES, DIM, layers=1, seed=0)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        if prepared:
            self.gca = self.accelerator.prepare(self.gca)
        else:
            self.accelerator.register_for_checkpointing(self.gca)
        self.step_number = 0

    def steps(self, count: int) -> list[float]:
        """Trains, and returns the losses."""
        losses = []
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.step_number)
            labels = torch.randperm(CLASSES, generator=generator)[:4].repeat_interleave(VIEWS)
            with self.accelerator.autocast():
                loss = self.gca(self.model(torch.randn(12, 8, generator=generator)), labels)
            self.optimizer.zero_grad()
            self.accelerator.backward(loss)
            self.gca.generator_step(self.accelerator.scaler)
            self.optimizer.step()
            losses.append(loss.item())
            self.step_number += 1
        return losses


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_continues_bit_for_bit(prepared: bool, precision: str, tmp_path: Path) -> None:
    whole = Loop(prepared, mixed_precision=precision).steps(6)
    first = Loop(prepared, mixed_precision=precision)
    losses = first.steps(3)
    first.accelerator.save_state(str(tmp_path))
    second = Loop(prepared, mixed_precision=precision)
    second.steps(1)  # so that nothing is as it began
    second.accelerator.load_state(str(tmp_path))
    second.step_number = 3
    assert losses + second.steps(3) == whole


@pytest.mark.processes
def test_the_example_prints_what_the_page_says() -> None:
    check_example("with_accelerate.py", "accelerate.md")


@pytest.mark.processes
def test_two_processes_are_as_one() -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command.append(str(ROOT / "examples" / "with_accelerate.py"))
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("MAP@R")]
    after, said = (float(text.split()[-2]) for text in (line, documented("accelerate.md").strip()))
    assert abs(after - said) < 3


SHARDED = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gcahng

dist.init_process_group("gloo")
rank = dist.get_rank()
generator = torch.Generator().manual_seed(0)
labels = torch.arange(4).repeat_interleave(3)
samples = torch.randn(12, 8, generator=generator)

def train(network, gca, part):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = gca(network(samples[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        gca.generator_step()
        optimizer.step()
        losses.append(loss.item())
    return losses

def make(**options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    return network, gcahng.GCAHNGLoss(6, 16, layers=1, seed=0, **options)

half = slice(6 * rank, 6 * rank + 6)
one = train(*make(process_group="alone"), slice(None))
network, gca = make(process_group="world")
fully_shard(network)
assert all(abs(a - b) < 1e-4 for a, b in zip(train(network, gca, half), one)), "sharded network"

dcp.save({"gca": gca.state_dict()}, checkpoint_id=sys.argv[1])
_, other = make(process_group="world")
state = other.state_dict()
dcp.load({"gca": state}, checkpoint_id=sys.argv[1])
other.load_state_dict(state)
assert all(torch.equal(value, other.state_dict()[name]) for name, value in gca.state_dict().items()), "checkpoint"

def refused(module, gca):
    try:
        gca(torch.randn(6, 16), labels[half])
    except gcahng.UserError as error:
        assert "shards the loss's parameters" in str(error) and "shard the network alone" in str(error), error
        return
    raise AssertionError("a sharded loss was taken")

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.gca = make(process_group="world")

_, gca = make(process_group="world")
refused(fully_shard(gca), gca)
both = Both()
refused(fully_shard(both), both.gca)
_, gca = make(process_group="world")
fully_shard(gca.graph_network)
refused(gca, gca)
dist.barrier()
dist.destroy_process_group()
print("held")
"""


@pytest.mark.processes
def test_beside_a_sharded_network(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(tmp_path / "state")], env=environment, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0 and run.stdout.count("held") == 2, run.stderr[-3000:]
