"""Checkpoints are never half written, and one that cannot be read is an error of one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gcahng.errors import UserError
from gcahng.files import atomic_write, write_json
from gcahng.runs.checkpoint import SCHEMA, find_checkpoint, load_checkpoint, save_checkpoint


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda file: file.write(b"old"))

    def fails(file: Any) -> None:
        file.write(b"half")
        file.flush()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fails)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    write_json(tmp_path / "x.json", {"a": 1})
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, and the folder that the name is in
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'


def test_reading_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, {"step": 3, "model": {"w": torch.ones(2)}})
    state = load_checkpoint(path)
    assert state["schema"] == SCHEMA and state["step"] == 3
    assert find_checkpoint(tmp_path) == path and find_checkpoint(path) == path


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, {"step": 3, "model": {"w": torch.ones(1000)}})
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint\n",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"step": 3}, tmp_path / "no-schema")
    torch.save({"schema": SCHEMA + 1}, tmp_path / "newer")
    torch.save({"schema": SCHEMA, "code": Path}, tmp_path / "code")
    for name, message in {
        **dict.fromkeys([*damaged, "code"], "is no checkpoint or is damaged"),
        "no-schema": "no schema number",
        "newer": f"schema {SCHEMA + 1}; this version of gcahng reads schema {SCHEMA}",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; name a run folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no checkpoints/best\.pt"):
        find_checkpoint(tmp_path, "best")
