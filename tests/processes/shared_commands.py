"""What each of several processes does in test_shared_commands.py: commands that share their work."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

from gcahng import cli
from gcahng.evaluation import embed

COUNT = 3
COMMANDS = {
    "eval": "eval run --json {out}/eval.json --per_class",
    "embed": "embed run --out {out}/e.safetensors --batch_size 3 --data.workers 0",
    "again": "embed run --out {out}/e.safetensors --batch_size 3 --data.workers 0",
    "refused": "embed run damaged --out {out}/d.safetensors --batch_size 3 --data.workers 0",
    "skipped": "embed run damaged --out {out}/s.safetensors --batch_size 3 --data.workers 0 --skip_unreadable "
    "--timeout 50",
    "index": "index build --model run --out {out}/i.index --batch_size 3 --data.workers 0",
    "info": "index info {out}/i.index",
    "export": "index export {out}/i.index {out}/i.faiss",
    "report": "report run",
}


def run_all(out: str) -> dict[str, tuple[int, str, str]]:
    """The status of each command, and what it printed."""
    embed.EVAL_BATCH = 4  # so that all processes have a part
    found = {}
    for name, words in COMMANDS.items():
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as printed:
            status = cli.main(words.format(out=out).split()) if out == "several" or name != "report" else 0
        found[name] = status, printed.getvalue(), err.getvalue()
    return found


def process(rank: int, folder: str, port: int) -> None:
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the test has the store, as torchrun has it
    cli.WAIT_FOR_MESSAGE = 0.0
    Path(f"{rank}.json").write_text(json.dumps(run_all("several")))
