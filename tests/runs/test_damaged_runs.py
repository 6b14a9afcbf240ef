"""A finished run whose files are damaged: one line that names the file and what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gcahng.cli import main
from gcahng.errors import UserError
from gcahng.report import contents
from gcahng.runs.records import metric_names, read_records, series
from gcahng.runs.summary import SUMMARY, read_summary


@pytest.fixture
def run(finished_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    copy = tmp_path / "a run"
    shutil.copytree(finished_run[0], copy)
    return copy


def damaged(content: bytes) -> dict[str, bytes]:
    """Kinds of damage, each with its content."""
    half = len(content) // 2
    return {
        "empty": b"",
        "truncated": content[:half],
        "without its end": content[:-2],
        "a zeroed end": content[:half] + bytes(len(content) - half),
        "one byte that is no UTF-8": content[:half] + b"\xff" + content[half + 1 :],
        "one bracket changed": content.replace(b"{", b"[", 1),
        "one quote changed": content.replace(b'"', b"x", 1),
        "UTF-16": content.decode().encode("utf-16"),
        "a list": b"[1]\n",
        "a number": b"7\n",
        "brackets in brackets": b"[" * 100_000,
        "thousands of digits": b'{"steps": ' + b"9" * 5000 + b"}",
    }


def test_a_damaged_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / SUMMARY
    content = path.read_bytes()
    for kind, bad in damaged(content).items():
        path.write_bytes(bad)
        assert main(["train", "--resume", str(run)]) == 2, kind
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"gcahng: error: {path} cannot be read: "), kind
        assert err.endswith(f"remove it, and gcahng train --resume '{run}' writes it again from the last checkpoint\n")
        assert err.count("\n") == 1 and path.read_bytes() == bad
    path.write_bytes(content[:-1].replace(b"\n", b"\n\xff", 3))
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_summary(run)
    path.write_text('{\n"test": {\n')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        read_summary(run)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory; it must be a readable file"):
        read_summary(run)
    path.rmdir()
    os.mkfifo(path)  # which nobody writes to
    with pytest.raises(UserError, match="cannot be read: it is a named pipe, not a regular file; it must be"):
        read_summary(run)


def test_any_byte_of_a_summary(run: Path) -> None:
    """Every byte in turn, as another letter or none: an error of one line, or a summary that everybody can use."""
    path = run / SUMMARY
    content = path.read_bytes()
    seen = 0
    for place in range(0, len(content), 23):
        for byte in (b"z", b"\x00", b"\x80", b"1", b""):
            path.write_bytes(content[:place] + byte + content[place + 1 :])
            try:
                summary = read_summary(run)
            except UserError as error:
                assert str(error).startswith(f"{path} cannot be read: ") and "\n" not in str(error)
                seen += 1
            else:
                assert summary is not None and summary["steps"] >= 0 and summary["test"]["map@r"] >= 0
    assert seen > 30


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test", None),
        ("test", {}),
        ("test", {"map@r": "0.5"}),
        ("test", {"map@r": float("nan")}),
        ("steps", "6"),
        ("steps", True),
        ("seconds", 10**400),
        ("best", []),
        ("best", {"step": None}),
        ("loss", 3),
        ("data_digest", None),
        ("unreadable", None),
    ],
)
def test_a_summary_with_another_value(field: str, value: Any, run: Path) -> None:
    values = json.loads((run / SUMMARY).read_text())
    for changed in ({**values, field: value}, {name: v for name, v in values.items() if name != field}):
        (run / SUMMARY).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"summary.json cannot be read: it has no valid '{field}'; remove it"):
            read_summary(run)


def test_a_run_without_a_summary_has_not_finished(run: Path) -> None:
    (run / SUMMARY).unlink()
    assert read_summary(run) is None and read_summary(run / "config.yaml") is None


def test_a_report_of_a_damaged_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the run itself the log is read, of a baseline the summary too."""
    whole = (run / "metrics.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b"\xff" + b"".join(lines[1:]))
    assert main(["report", str(run), "--map", "pca"]) == 2
    err = capsys.readouterr().err
    assert f"metrics_jsonl is {run}/metrics.jsonl, whose line 2 is no record" in err and err.count("\n") == 1
    assert "restore the file, or remove that line" in err and not (run / "report.html").exists()
    (run / "metrics.jsonl").write_bytes(whole)
    (run / SUMMARY).write_text("{")
    with pytest.raises(UserError, match=r"summary\.json cannot be read: line 1 is not JSON .*; remove it, and gcahng"):
        contents._baseline("b", run, "last", (1,), None)  # type: ignore[arg-type]  # measures nothing


def test_any_byte_of_a_log(run: Path) -> None:
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    wrong = 0
    for place in range(0, len(content), 53):
        for byte in (b"z", b"\x80", b"\n", b"]", b""):
            path.write_bytes(content[:place] + byte + content[place + 1 :])
            line = content.count(b"\n", 0, place) + 1
            line += byte == b"\n" and content[place - 1 : place] in (b"", b"\n")  # which puts an empty line before it
            try:
                records = read_records(path)
            except UserError as error:
                wrong += 1
                assert f"whose line {line} is no record" in str(error) and "\n" not in str(error)
            else:
                for kind in ("train", "val", "test", "negatives"):
                    for name in metric_names(records, kind) + ["loss", "J_m"]:
                        series(records, kind, name)
    assert wrong > 30


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1e400, "kind": "val"}',
        b'{"step": true, "kind": "val"}',
        b'{"step": 1, "kind": 2}',
        b'{"step": 1, "kind": "val", "map@r": ' + b"9" * 400 + b"}",
        b'{"step": 1, "kind": "negatives", "real": 1.0}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"\x00" * 64,
    ],
)
def test_a_line_that_is_no_record(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "kind": "val", "recall@x": 1, "recall@2": 0.5}\n'
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(UserError, match="whose line 2 is no record"):
        read_records(path)
    path.write_bytes(good + good + line[: len(line) // 2])  # a torn end, as a power failure leaves one
    assert metric_names(read_records(path), "val") == ["recall@2"]


def test_a_folder_in_the_place_of_a_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert main(["report", str(run), "--map", "pca"]) == 2
    err = capsys.readouterr().err
    assert f"{run}/metrics.jsonl, which cannot be read: Is a directory" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "text", [b"", b"steps: [", b"\xff", b"steps: abc\n", b"steps:\n  - 1\n", b"stepz: 1\n", b"- 1\n", b"a: &a [*a]\n"]
)
def test_a_damaged_config_of_a_run_without_a_checkpoint(
    text: bytes, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / SUMMARY).unlink()
    (run / "config.yaml").write_bytes(text)
    assert main(["train", "--resume", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"gcahng: error: {run}/config.yaml")
    assert "the run has no checkpoint yet, so restore the file, or start a new run" in err


def test_a_damaged_config_of_a_finished_run_is_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_bytes(b"\xff")
    assert main(["train", "--resume", str(run)]) == 0
    assert "has finished; there is nothing to resume" in capsys.readouterr().out
