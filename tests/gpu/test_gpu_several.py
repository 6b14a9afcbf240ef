"""Commands that several GPUs share with NCCL: evaluation and embedding, a process that is killed, and other numbers.

None of this has been run yet: it needs two GPUs, and no machine with two was at hand.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COUNT = 2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < COUNT, reason="needs two GPUs"),
]


def work(folder: Path, out: str, device: str) -> None:
    """Evaluate the network of a run and embed its test images, in one process or in several."""
    from gcahng import cli
    from gcahng.evaluation import embed

    embed.EVAL_BATCH = 4  # so that all processes have a part
    os.chdir(folder)
    Path(out).mkdir(exist_ok=True)
    common = ["--device", device, "--data.workers", "0"]
    assert cli.main(["eval", "run", "--json", f"{out}/eval.json", *common]) == 0
    assert cli.main(["embed", "run", "--out", f"{out}/e.safetensors", "--batch_size", "4", *common]) == 0


def process(rank: int, folder: str, port: int, device: str) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the test has the store, as torchrun has it
    work(Path(folder), "several", device)


def trained(folder: Path, device: str) -> None:
    """A run on a few image files."""
    from gcahng.train import BackboneConfig, DataConfig, TrainConfig, fit

    for c in range(6):
        where = folder / "tree" / ("train" if c < 2 else "test") / f"class_{c}"
        where.mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 40), (40 * c, 50 * i, 9 * c * i % 256)).save(where / f"{i}.png")
    batch = {"classes_per_batch": 2, "samples_per_class": 2, "image_size": 32, "resize": 32}
    data = DataConfig(name="folder", root=str(folder / "tree"), val_classes=0, workers=0, **batch)
    backbone = BackboneConfig(embedding_dim=16, width=4)
    fit(TrainConfig(loss="npair", steps=2, out=str(folder / "run"), device=device, data=data, backbone=backbone))


def check_shared(folder: Path, device: str) -> None:
    """Evaluation and embedding in several processes give the bits of one."""
    trained(folder, device)
    before = os.getcwd()
    try:
        work(folder, "one", device)
    finally:
        os.chdir(before)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    mp.spawn(process, (str(folder), store.port, device), nprocs=COUNT)
    one, several = (json.loads((folder / out / "eval.json").read_text()) for out in ("one", "several"))
    assert one == several and one["test"]["queries"] == 20
    assert (folder / "one" / "e.safetensors").read_bytes() == (folder / "several" / "e.safetensors").read_bytes()


def test_evaluation_and_embedding_are_those_of_one_gpu(tmp_path: Path) -> None:
    check_shared(tmp_path, "cuda")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_job(rank: int, tmp_path: Path) -> None:
    """The others wait inside NCCL, which says nothing before its own timeout."""
    from test_broken import HOST, WAY_BACK, start, told

    line = told(start(tmp_path, "collective", str(rank), "KILL", "all:--device", "all:cuda"))
    assert f"process {rank} of 2 on {HOST} was killed" in line and WAY_BACK in line


def check_elastic(folder: Path, visible: str) -> None:
    """examples/with_several_devices.py in 1, 2 and 1 processes trains as in one."""
    script = ROOT / "examples" / "with_several_devices.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible}

    def run(count: int, epochs: int, checkpoint: str) -> float:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words = [str(script), "--epochs", str(epochs), "--checkpoint", str(folder / checkpoint)]
        done = subprocess.run(
            [sys.executable, *(torchrun if count > 1 else []), *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and f"{count} process(es)" in done.stdout, done.stderr
        return float(re.findall(r"before, ([\d.]+) after", done.stdout)[0])

    wanted = run(1, 3, "whole.pt")
    found = [run(count, 1, "elastic.pt") for count in (1, 2, 1)]
    assert abs(found[-1] - wanted) <= 1.0 and found[0] < found[-1]


def test_a_run_in_1_2_and_1_gpus_is_that_of_one(tmp_path: Path) -> None:
    check_elastic(tmp_path, "0,1")
