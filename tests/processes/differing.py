"""What each of two processes does in test_differing.py: the same command lines, of which the second one's differ."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

from gcahng import cli

OWN = {
    "lr": ["--optimizer.lr", "0.5"],
    "steps": ["--steps", "7"],
    "loss": ["--loss", "npair"],
    "eval_every": ["--eval_every", "2"],
    "threads": ["--threads", "2"],
    "dim": ["--backbone.embedding_dim", "32"],
    "layers": ["--gca.layers", "2"],
    "resume": ["--resume", "elsewhere"],
    "unknown": ["--stepz", "2"],
    "file": ["--config", "none.yaml"],
    "data": ["--data.root", "other"],
}
DATA = "--data.name folder --data.root one --data.val_classes 0"
OPTIONS = "--steps 9 --threads 1 --device cpu --out run"


def process(rank: int, folder: str, port: int) -> None:
    """Run all command lines; write what each printed, and its exit status."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the test has the store, as torchrun has it
    cli.WAIT_FOR_MESSAGE = 0.0
    found = {}
    for name, own in OWN.items():
        words = OPTIONS.split() + (DATA.split() if name == "data" else [])
        if rank:
            words = own if name == "resume" else [*words, *own]
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["train", *words])
        found[name] = status, err.getvalue()
    Path(f"{rank}.json").write_text(json.dumps(found))
