"""The command line as a whole: help, version, mistakes, and a light start."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

import gcahng
from gcahng.cli import COMMANDS, main
from gcahng.errors import UserError

ROOT = Path(gcahng.__file__).parents[1]


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "gcahng"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: gcahng COMMAND")
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name}" in out and summary in out


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"gcahng {gcahng.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian is not a command; did you mean train?"),
        (["frobnicate"], "frobnicate is not a command; the commands are train, eval, "),
        (["--verbose"], "--verbose is not a command"),
        (["env", "--x"], "unrecognized arguments: --x; see gcahng env --help"),
        (["eval"], "the following arguments are required: RUN_OR_CHECKPOINT"),
        (["eval", "nowhere"], "nowhere does not exist; name a run folder or a checkpoint file"),
        (["eval", "nowhere", "--split", "all"], "argument --split: invalid choice: 'all'"),
        (["eval", "nowhere", "--recall_at", "x"], "argument --recall_at: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gcahng: error: {message}")
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.processes
def test_a_mistake_in_a_fresh_process_has_no_traceback() -> None:
    result = run("train", "--stepz", "3")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "gcahng: error: --stepz is not an option; did you mean --steps?; see gcahng train --help\n"


@pytest.mark.processes
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """gcahng … | head, with a reader that is gone before the first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gcahng", "data", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize(
    "command", [["env"], *(pytest.param(c, marks=pytest.mark.processes) for c in ([], ["--help"], ["--version"]))]
)
def test_these_start_without_the_extras(command: list[str]) -> None:
    extras = "jsonargparse matplotlib rich tqdm tensorboard sklearn pytorch_metric_learning yaml PIL faiss safetensors"
    extras += " torchvision timm"
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras.split()!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from gcahng.cli import main
sys.exit(main(sys.argv[1:]))
"""
    result = run(*command, code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_need_no_torch(option: str) -> None:
    """Importing it takes ten times as long as all the rest; and who asks for the version may have none."""
    code = "import sys; sys.modules.update(torch=None, numpy=None)\n"
    result = run(option, code=f"{code}from gcahng.cli import main; sys.exit(main(sys.argv[1:]))")
    assert result.returncode == 0 and "gcahng" in result.stdout, result.stderr


def test_without_torch_one_line_says_so() -> None:
    code = "import sys; sys.modules['torch'] = None; from gcahng.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run("env", code=code)
    assert result.returncode == 2
    assert result.stderr == "gcahng: error: torch is not installed; pip install 'torch>=2.10' brings it\n"


def test_without_jsonargparse_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["train"]) == 2
    assert 'jsonargparse is not installed; pip install "gcahng[train]"' in capsys.readouterr().err


def test_what_an_encoding_cannot_print_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def prints(arguments: list[str]) -> int:
        print("cl\udce4ss θ")
        raise UserError("no cl\udce4ss")

    monkeypatch.setattr("gcahng.commands.env.run", prints)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["env"]) == 2
    for stream in (out, err):
        stream.seek(0)
    assert out.read() == "cl\\udce4ss \\u03b8\n" and err.read() == "gcahng: error: no cl\\udce4ss\n"


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("gcahng.commands.env.run", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "gcahng: interrupted\n"


def test_env_prints_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gcahng.env.report", lambda: "the report")
    assert main(["env"]) == 0
    assert capsys.readouterr().out == "the report\n"
