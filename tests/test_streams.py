"""Standard output and error that are closed, full, or read by nobody."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_runs import make_noise

import gcahng
from gcahng.cli import main
from gcahng.errors import UserError
from gcahng.streams import BROKEN_PIPE, Output, nobody_reads

ROOT = Path(gcahng.__file__).parents[1]


class Failing(io.RawIOBase):
    """Takes `room` bytes and then fails."""

    def __init__(self, error: int, room: int = 0) -> None:
        self.error, self.room, self.taken = error, room, b""

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(self.error, os.strerror(self.error))
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.taken += taken
        return len(taken)


def stream(error: int, room: int = 0) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(Failing(error, room)), encoding="utf-8", line_buffering=True)


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """A file of embeddings whose evaluation prints a table, and then writes a JSON."""
    path = tmp_path / "x.npy"
    np.save(path, np.eye(4, dtype=np.float32))
    (tmp_path / "x.csv").write_text("path,label\n" + "".join(f"{i},{i // 2}\n" for i in range(4)))
    return path


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errno.ENOSPC, 2, "gcahng: error: standard output cannot be written: No space left on device\n"),
        (errno.EIO, 2, "gcahng: error: standard output cannot be written: Input/output error\n"),
        (errno.EPIPE, BROKEN_PIPE, ""),
        (None, 2, "gcahng: error: standard output is closed\n"),
    ],
)
@pytest.mark.parametrize("room", [0, 20])
def test_a_command_that_cannot_print_still_writes(
    error: int | None, status: int, line: str, room: int, embeddings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = None if error is None else stream(error, room)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["eval", "--embeddings", str(embeddings), "--metrics", "map@r"]) == status
    assert err.buffer.getvalue().decode() == line  # type: ignore[attr-defined]
    assert json.loads(embeddings.with_suffix(".eval.json").read_text())["embeddings"]["queries"] == 4
    if out is not None:
        assert len(out.buffer.raw.taken) == room  # type: ignore[attr-defined]
        monkeypatch.undo()
        assert sys.stdout is not out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["eval", "--help"], ["recipes"], ["data", "list"]])
def test_output_that_is_lost_is_told(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", err)
    for error, status, lines in ((errno.ENOSPC, 2, 1), (errno.EPIPE, BROKEN_PIPE, 1)):
        monkeypatch.setattr(sys, "stdout", stream(error))
        assert main(arguments) == status
        assert err.buffer.getvalue().count(b"\n") == lines  # type: ignore[attr-defined]


def test_errors_that_cannot_be_printed_keep_their_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def note(arguments: list[str]) -> int:
        print("a note", file=sys.stderr)
        return 0

    def silent(arguments: list[str]) -> int:
        return 0

    def wrong(arguments: list[str]) -> int:
        raise UserError("x is 1; it must be 2")

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    cases: list[tuple[Callable[[list[str]], int], int]] = [(note, 2), (silent, 0), (wrong, 2), (interrupted, 130)]
    for out in (errno.ENOSPC, errno.EPIPE, None):
        for command, status in cases:
            monkeypatch.setattr("gcahng.commands.env.run", command)
            monkeypatch.setattr(sys, "stderr", None if out is None else stream(out))
            assert main(["env"]) == status


def test_a_pipe_that_does_not_block() -> None:
    """As some programs make theirs: what does not fit at once is waited for."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(write, "w", encoding="utf-8") as file:
        output = Output(file, 1)
        pid = os.fork()
        if pid == 0:
            count = 0
            while count < 300_000 and (data := os.read(read, 65536)):
                count += len(data)
            os._exit(0 if count == 300_000 else 1)
        output.write("x" * 300_000)
        output.flush()
        assert output.error is None and not nobody_reads(output)
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


CLOSED = [">&-", "<&- >&- 2>&-", ">/dev/full", "| head -n 0"]
CLOSED += [
    pytest.param(where, marks=pytest.mark.slow) for where in ("2>&-", "<&-", "2>/dev/full", ">/dev/full 2>/dev/full")
]


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("where", CLOSED)
def test_the_streams_of_a_process(where: str, embeddings: Path) -> None:
    """The shell's own: no file of the command takes the place of a closed stream, and nothing is lost on disk."""
    command = f"{sys.executable} -m gcahng eval --embeddings {embeddings} --metrics map@r {where}"
    result = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lost = ">&-" in where.replace("2>&-", "") or ">/dev/full" in where.replace("2>/dev/full", "")
    assert result.returncode == (141 if "head" in where else 2 if lost else 0)
    told = lost and "2>" not in where
    assert result.stderr.count("\n") == told and ("standard output" in result.stderr) == told
    written = embeddings.with_suffix(".eval.json")
    assert json.loads(written.read_text())["embeddings"]["queries"] == 4
    assert (f"written     {written}" in result.stdout) == (not lost and "head" not in where)


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("where", [">&- 2>&- <&-", pytest.param(">/dev/full", marks=pytest.mark.slow)])
def test_training_without_output(where: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--steps 4 --steps_per_epoch 2 --eval_every 2 --device cpu --threads 1 --backbone.width 4 "
    options += f"--backbone.embedding_dim 16 --data.name folder --data.root {tmp_path / 'tree'} --data.workers 0 "
    options += "--data.image_size 32 --data.resize 32 --data.val_classes 3 --data.classes_per_batch 4"
    make_noise(tmp_path / "tree")
    command = f"{sys.executable} -m gcahng train {options} --out {run} {where}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == ("full" in where)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(json.loads(line)["step"] <= 4 for line in (run / "metrics.jsonl").read_text().splitlines())
