"""Every option that takes a path, with paths that can be nothing: one line, before any work."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from gcahng.cli import main
from gcahng.data.csv_file import SPEC as CSV
from gcahng.data.listing import collect
from gcahng.data.load import find_files
from gcahng.errors import UserError
from gcahng.paths import check_source, check_target, check_utf8, shown_path
from gcahng.runs.run_folder import check_run_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other names and links")

# A command with one path, PATH, and the suffix that the path needs.
SOURCES = {
    "eval PATH": "",
    "eval --onnx PATH": ".onnx",
    "eval --embeddings PATH": ".npy",
    "eval --embeddings good.npy --gallery PATH": ".npy",
    "eval good --data.name folder --data.root PATH": "",
    "eval good --data.name csv --data.csv PATH": ".csv",
    "embed PATH image.png --out new.npy": "",
    "embed good PATH --out new.npy": ".png",
    "embed good image.png PATH --out new.npy": ".txt",
    "embed good --data.name folder --data.root PATH --out new.npy": "",
    "index build PATH --out new.index": ".npy",
    "index build image.png --model PATH --out new.index": "",
    "index add PATH good.npy": ".index",
    "index add good.index PATH": ".npy",
    "index info PATH": ".index",
    "index export PATH new.faiss": ".index",
    "search PATH good.npy": ".index",
    "search good.index PATH": ".npy",
    "search good.index image.png --model PATH": "",
    "export PATH new.onnx": "",
    "report PATH": "",
    "report good --baseline PATH": "",
    "report good --data.root PATH": "",
    "data verify folder --root PATH": "",
    "data verify csv --csv PATH": ".csv",
    "import-official PATH new.safetensors --backbone resnet50": ".pth",
    "train --config PATH": ".yaml",
    "train --resume PATH": "",
    "train --resume good --data.root PATH": "",
    "train --data.name folder --data.root PATH": "",
    "train --data.name csv --data.csv PATH": ".csv",
    "train --backbone.weights PATH --backbone.name glyph_conv": ".pth",
    "train --gca.weights PATH": ".pth",
}
TARGETS = {
    "eval good --json PATH": ".json",
    "eval good --per_class PATH": ".csv",
    "embed good image.png --out PATH": ".npy",
    "embed good image.png --out PATH ": ".safetensors",
    "index build good.npy --out PATH": ".index",
    "index export good.index PATH": ".faiss",
    "search good.index good.npy --picture PATH": ".png",
    "export good PATH": ".onnx",
    "report good --out PATH": ".html",
    "import-official good PATH --backbone resnet50": ".safetensors",
    "bench step --json PATH": ".json",
    "bench memory --json PATH": ".json",
    "train --out PATH": "",
}
# What keeps a path from being one: a path by its suffix, and what the line says.
IMPOSSIBLE = {
    "too long a name": (lambda suffix: "n" * 300 + suffix, "File name too long"),
    "too many bytes in a name": (lambda suffix: "é" * 130 + suffix, "File name too long"),
    "too long a path": (lambda suffix: "d/" * 2500 + "x" + suffix, "File name too long"),
    "a loop of links": (lambda suffix: "loop" + suffix, "Too many levels of symbolic links"),
    "below a loop of links": (lambda suffix: "loop/x" + suffix, "Too many levels of symbolic links"),
    "a link to nothing": (lambda suffix: "dangling" + suffix, "a link to nothing"),
    "a zero byte": (lambda suffix: "a\0b" + suffix, "a zero byte"),
    "nothing": (lambda suffix: "", " is empty"),
}
NO_TARGET = {
    "below a file": (lambda suffix: "file/x" + suffix, "file is a file, not a folder"),
    "below a link to nothing": (lambda suffix: "dangling/x" + suffix, "dangling is a link to nothing, which does not"),
}
NO_FILE = {
    "a folder": (lambda suffix: "folder" + suffix, "a folder; it must be a file"),
    "a device": (lambda suffix: "null" + suffix, "is no regular file"),
    "no room for a temporary name": (lambda suffix: "n" * (250 - len(suffix)) + suffix, "File name too long"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("paths")
    (place / "file").write_text("x")
    np.save(place / "good.npy", np.eye(4, dtype=np.float32))
    for suffix in {*SOURCES.values(), *TARGETS.values()}:
        (place / f"loop{suffix}").symlink_to(f"loop{suffix}")
        (place / f"dangling{suffix}").symlink_to("nothing")
        (place / f"null{suffix}").symlink_to("/dev/null")
        (place / f"folder{suffix}").mkdir()
    return place


def refused(command: str, path: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([path if word == "PATH" else word for word in command.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gcahng: error: ") and err.count("\n") == 1 and len(err) < 700
    return err


@pytest.mark.parametrize("command", [*SOURCES, *TARGETS])
def test_impossible_paths(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same eight for every option; what is good is not even read, and so need not be there."""
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    suffix = (SOURCES | TARGETS)[command]
    for path, reason in IMPOSSIBLE.values():
        said = refused(command, path(suffix), capsys)
        # Options of a run that are text must not be empty, whether they are paths or not.
        assert reason in said or (not path(suffix) and command.startswith("train") and " is ''; it must" in said)
    if command in TARGETS:
        for path, reason in (NO_TARGET if command == "train --out PATH" else NO_TARGET | NO_FILE).values():
            assert reason in refused(command, path(suffix), capsys)
    assert sorted(os.listdir(place)) == before


def test_a_user_who_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody stops the root user, so the system's answer stands in."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    with pytest.raises(UserError, match=f"^out is {tmp_path}/x/y; {tmp_path} cannot be written to: Permission denied$"):
        check_target("out", tmp_path / "x" / "y")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.R_OK)
    with pytest.raises(UserError, match=f"^root is {tmp_path}, which cannot be read: Permission denied$"):
        check_source("root", tmp_path)


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user() -> None:
    """As nobody: a name in a folder that may not be searched, and a command that only the system refuses."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        closed = Path(place) / "closed"
        closed.mkdir(mode=0o700)
        (closed / "x.npy").touch()
        Path(place).chmod(0o755)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setuid(65534)
                found = []
                for check in (check_source, check_target):
                    try:
                        check("out", closed / "x.npy")
                    except UserError as error:
                        found.append(str(error).endswith("which cannot be used: Permission denied"))
                status = 0 if found == [True, True] else 3
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_the_system_refuses_elsewhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(arguments: list[str]) -> int:
        return os.stat("/nowhere/\x1b[2J\udce4").st_size

    monkeypatch.setattr("gcahng.commands.env.run", refuses)
    assert main(["env"]) == 2
    err = capsys.readouterr().err
    assert err == "gcahng: error: '/nowhere/\\x1b[2J\\udce4' cannot be used: No such file or directory\n"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """They are names like others, but for libraries that take text alone."""
    path = tmp_path / "n\udce4"
    path.mkdir()
    check_source("root", path)
    check_target("out", path / "x.npy")
    with pytest.raises(UserError, match="^out is .*which is not UTF-8; it must be, because TensorBoard takes no other"):
        check_run_folder(str(path))
    with pytest.raises(UserError, match="because safetensors takes no other name"):
        check_utf8("out", path / "x.safetensors", "safetensors")


def test_names_with_spaces_and_line_breaks(tmp_path: Path) -> None:
    for name in ("end ", " start", "line\nbreak", "end\n"):
        check_target("out", tmp_path / name)
        (tmp_path / name).mkdir()
        check_source("root", tmp_path / name)
        assert shown_path(name) == repr(name)
    assert shown_path("a b") == "a b" and shown_path("n" * 300) == f"{'n' * 100}…{'n' * 50}"


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^data.root is ~no-such-user/x, which is not a folder"):
        find_files(CSV, "~no-such-user/x", str(tmp_path / "x.csv"))


@pytest.mark.parametrize("path", ["loop.png", "loop/x.png", "x\0/y.png", "x\0.png"])
def test_an_image_that_can_be_no_file_is_missing(path: str, tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "x.csv").write_text(f"path,label,split\n{path},a,train\n")
    differences: list[str] = []
    collect(find_files(CSV, None, str(tmp_path / "x.csv")), lambda difference: differences.append(str(difference)))
    assert "missing" in differences[0]
    shutil.rmtree(tmp_path)
