"""Processes of one run that were started with different options or data end in one line that names both."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from differing import OWN, process
from PIL import Image

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]

NEW = "the run is a new one in process 0 of 2 on HOST and that of elsewhere in process 1 of 2 on HOST"
MESSAGES = {
    "lr": "optimizer.lr is 0.001 in process 0 of 2 on HOST and 0.5 in process 1 of 2 on HOST; it must be the same",
    "steps": "steps is 9 in process 0 of 2 on HOST and 7 in process 1",
    "loss": "loss is gca_hng in process 0 of 2 on HOST and npair in process 1",
    "eval_every": "eval_every is 200 in process 0 of 2 on HOST and 2 in process 1",
    "threads": "threads is 1 in process 0 of 2 on HOST and 2 in process 1",
    "dim": "backbone.embedding_dim is 64 in process 0 of 2 on HOST and 32 in process 1",
    "layers": "gca.layers is 1 in process 0 of 2 on HOST and 2 in process 1",
    "resume": NEW,
    "unknown": "process 1 of 2 on HOST: --stepz is not an option; did you mean --steps",
    "file": "process 1 of 2 on HOST: config is none.yaml, which does not exist",
    "data": "the digest of the data is",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[int, str]]]:
    """The exit status and the messages of each command in each process."""
    folder = tmp_path_factory.mktemp("differing")
    for root, classes in (("one", 4), ("other", 5)):
        for c in range(classes):
            where = folder / root / ("train" if c < classes - 2 else "test") / f"class_{c}"
            where.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (60 * c, 60 * i, 9)).save(where / f"{i}.png")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "config.yaml").write_text("steps: 9\n")
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    mp.spawn(process, (str(folder), store.port), nprocs=2)
    assert not (folder / "run").exists() and os.listdir(folder / "elsewhere") == ["config.yaml"]
    return [json.loads(Path(folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", OWN)
def test_a_process_that_differs_is_named_once(name: str, found: list[dict[str, tuple[int, str]]]) -> None:
    (status, first), (other, second) = (process[name] for process in found)
    assert status == other == 2
    (line,) = (first + second).splitlines()
    assert line.startswith("gcahng: error: ") and MESSAGES[name].replace("HOST", platform.node()) in line
