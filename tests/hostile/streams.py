"""Standard streams that are closed, full, or read by nobody, and surroundings that lack what programs take for granted.

Here commands run as users run them, in a process that Python starts and ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gcahng
from hostile.case import FINE, REFUSED, Case, Fault, no_temporaries

_OUT = ("", "", ">&-", ">/dev/full", "| true", "</dev/null >&0", "| head -c 1")
_ERR = ("", "", "", "2>&-", "2>/dev/full", "2>/dev/null")
_IN = ("", "<&-", "</dev/zero", "</dev/full")
_ENVIRONMENT: tuple[dict[str, str | None], ...] = (
    {},
    {},
    {"LC_ALL": "C", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"TERM": "dumb", "COLUMNS": "1"},
    {"COLUMNS": "0"},
    {"COLUMNS": "x"},
    {"HOME": "/nonexistent", "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None},
    {"HOME": None},
    {"TMPDIR": "/nonexistent"},
    {"PYTHONUNBUFFERED": "1"},
    {"PYTHONWARNINGS": "error"},
    {"PYTHONOPTIMIZE": "2"},
)


def case(case: Case) -> str:
    """One command with one kind of streams."""
    chance = case.chance
    vectors = case.copy("vectors")
    words, written = chance.choice(
        (
            (["--version"], None),
            (["recipes"], None),
            (["data", "list"], None),
            (["index", "info", vectors / "flat.index"], None),
            (["search", vectors / "flat.index", vectors / "q.safetensors"], None),
            (["search", vectors / "flat.index", vectors / "q.safetensors", "--json"], None),
            (["eval", "--embeddings", vectors / "x.npy"], vectors / "x.eval.json"),
            (["index", "build", vectors / "x.npy", "--out", "new.index"], case.folder / "new.index"),
            (["plan", "--batch", "12", "--rate", "1", "--memory-limit", "1GB"], None),
            (["index", "info", vectors / "gone.index"], "refused"),
            (["train", "--no_such_option", "1"], "refused"),
            (["train", "--resume", case.copy("half")], case.folder / "half" / "summary.json"),
            (["embed", case.copy("run"), "--out", "e.npy"], case.folder / "e.npy"),
        )
    )
    out, err, inn = chance.choice(_OUT), chance.choice(_ERR), chance.choice(_IN) if chance.random() < 0.3 else ""
    if "<" in out:
        inn = ""
    changes = chance.choice(_ENVIRONMENT) if chance.random() < 0.6 else {}
    case.tell(f"gcahng {' '.join(map(str, words))} {inn} {err} {out} {changes}")
    said = case.notes / "said"
    line = f'"$@" {inn} {err or f"2>{said}"} {out or f">{case.notes}/printed"}'
    if out.startswith("|"):
        line += '; exit "${PIPESTATUS[0]}"'
    environment = {**os.environ, "PYTHONPATH": str(Path(gcahng.__file__).parents[1])}
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [sys.executable, "-m", "gcahng", *map(str, words)]
    status = subprocess.run(["bash", "-c", line, "bash", *command], env=environment, check=False).returncode
    text = said.read_text(errors="backslashreplace") if said.exists() else ""
    if "Traceback" in text or "Exception ignored" in text:
        raise Fault("traceback", " | ".join(text.strip().splitlines()[-3:])[:700])
    if status < 0 or (status > 128 and status not in (130, 141)):
        raise Fault("crash", f"status {status}: {text[-300:]}")
    no_temporaries(case.folder)
    strict = "PYTHONWARNINGS" in changes  # another library's warning is then an error
    cannot_print = out in (">&-", ">/dev/full", "</dev/null >&0")
    if written == "refused":
        if status != 2:
            raise Fault("manners", f"status {status} for a mistake: {text[-300:]}")
        if err == "" and len(text.strip().splitlines()) != 1:
            raise Fault("manners", f"{len(text.strip().splitlines())} lines for a mistake: {text[-400:]}")
        return REFUSED
    if cannot_print and status == 0 and words[0] != "train":
        raise Fault("manners", "status 0, and what should be printed was lost")
    if cannot_print and status and err == "" and not text.strip():
        raise Fault("manners", f"status {status} without a word")
    if not cannot_print and not out and status and not strict:
        raise Fault("manners", f"status {status}: {text[-400:]}")
    if isinstance(written, Path) and not written.is_file() and (status in (0, 141) or (cannot_print and not strict)):
        raise Fault("half-written", f"{written.name} is not there (status {status}): {text[-300:]}")
    return FINE if status == 0 else REFUSED
