"""The files of a run: damaged, missing, or something else, when the run goes on, is reported or is used."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from hostile.case import Case, Fault, contents, no_temporaries, unchanged
from hostile.guards import no_armies
from hostile.values import damage_file, hostile_path
from hostile.vectors import lie

_COMMANDS = ("resume", "resume", "resume", "eval", "embed", "report", "search", "onnx")


def case(case: Case) -> str:
    """One damaged run and one command."""
    no_armies()
    chance = case.chance
    name = chance.choice(("run", "half"))
    run = case.copy(name)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"]
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml")]
    touched: list[Path] = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        path = chance.choice(chance.choice((files, texts, texts)))
        touched.append(path)
        case.tell(f"{name}: {_damage(case, run, path)}")
    command = chance.choice(_COMMANDS)
    before = contents(run)
    if command == "resume":
        ran = case.command("train", "--resume", run)
        no_temporaries(case.folder)
        if ran.status == 0:
            _as_undisturbed(case, run, name, touched)
        return ran.verdict
    out = case.folder / "out"
    words: dict[str, list[Any]] = {
        "eval": ["eval", run, "--which", chance.choice(("last", "best")), "--data.workers", "0"],
        "embed": [
            "embed",
            chance.choice((run, run / "checkpoints" / "last.safetensors")),
            "--out",
            f"{out}.npy",
            "--data.workers",
            "0",
        ],
        "report": [
            "report",
            run,
            "--map",
            "pca",
            "--queries",
            "1",
            "--out",
            f"{out}.html",
            "--baseline",
            case.world / "run",
        ],
        "search": [
            "index",
            "build",
            "--model",
            run,
            case.world / "folder" / "test",
            "--out",
            f"{out}.index",
            "--data.workers",
            "0",
        ],
        "onnx": ["eval", "--onnx", hostile_path(chance, case.folder, ".onnx"), "--data.workers", "0"],
    }
    ran = case.command(*words[command])
    no_temporaries(case.folder)
    if ran.status == 2:
        unchanged(before, contents(run))
        if left := [path.name for path in case.folder.glob("out*") if ".part" not in path.name]:
            raise Fault("half-written", f"refused, and {left} is there")
    elif command == "embed" and name == "run" and words["embed"][1] == run:
        _same_rows(case, run)
    return ran.verdict


def _damage(case: Case, run: Path, path: Path) -> str:
    chance = case.chance
    short = path.relative_to(run)
    if not path.is_file() or path.is_symlink():
        return f"{short} as it is"
    kind = chance.choice(("bytes", "bytes", "bytes", "lie", "remove", "other", "line"))
    if kind == "lie" and path.suffix in (".json", ".yaml"):
        import yaml

        with contextlib.suppress(ValueError, TypeError, IndexError, yaml.YAMLError):  # it is damaged already
            values = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
            how = lie(chance, values)
            path.write_text((json.dumps if path.suffix == ".json" else yaml.safe_dump)(values))
            return f"{short} says {how}"
    if kind == "line" and path.suffix == ".jsonl":
        lines = path.read_text(errors="replace").splitlines() or [""]
        at = chance.randrange(len(lines))
        how = chance.choice(
            (
                "not JSON",
                "[]",
                "null",
                "{}",
                '{"step": "x", "kind": "train"}',
                '{"step": 10e999, "kind": 5}',
                '{"step": -1}',
                "NaN",
                "\udcff",
            )
        )
        lines[at] = how
        path.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
        return f"{short} line {at + 1} is {how!r}"
    if kind == "remove":
        path.unlink()
        return f"{short} is gone"
    if kind == "other":
        path.unlink()
        odd = hostile_path(chance, run.parent, ".odd")
        if odd.name.startswith("odd-") and (odd.exists() or odd.is_symlink()):
            os.rename(odd, path)
            return f"{short} is another kind of file"
        return f"{short} is gone"
    return f"{short.parent}/{damage_file(chance, path)}"


def _as_undisturbed(case: Case, run: Path, name: str, touched: list[Path]) -> None:
    """A run that went on ends as one that nobody disturbed, but for what was damaged beyond repair."""
    if name != "half" or any(path.name == "config.yaml" for path in touched):
        return
    from killed_runs import differences

    from gcahng.runs.checkpoint import load_checkpoint

    got, right = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (run, case.world / "run"))
    for state in (got, right):
        for field in (
            "config",
            "seconds",
            "resumed",
            "best",
            "session",
            "step_seconds",
            "step_cpu_seconds",
            "versions",
        ):
            state.pop(field, None)
    found = differences(got, right)
    if found:
        raise Fault("wrong", f"a resumed run has other bits: {found[:4]}")


def _same_rows(case: Case, run: Path) -> None:
    """The last checkpoint has checksums, so that the embeddings are its own or there are none."""
    import numpy as np

    taken = run / "checkpoints" / "last.pt"
    if taken.exists() and not np.array_equal(np.load(case.folder / "out.npy"), np.load(case.world / "right.npy")):
        raise Fault("wrong", "a damaged run gave other embeddings")
