"""Files of options and of data that have no end, wait for ever, or stand for more than they hold."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gcahng.cli import main
from gcahng.commands.train import parse
from gcahng.data.listing import read_bytes
from gcahng.data.reading import UnreadableImage, read_rgb
from gcahng.errors import UserError
from gcahng.evaluation.image_inputs import files_images
from gcahng.models.model_file import load_model
from gcahng.models.pretrained import read_tensors
from gcahng.retrieval.embeddings import read_embeddings
from gcahng.retrieval.index_file import load, read_header
from gcahng.runs.checkpoint import load_checkpoint
from gcahng.runs.records import read_records
from gcahng.train.loop import resume
from gcahng.yaml_files import MOST_BYTES, MOST_LEVELS, MOST_VALUES, check_aliases, load_yaml, read_yaml

# Nine levels of nine aliases each stand for 3.5 billion values.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 4)}]}}\n" for i in range(1, 9))
TOO_MANY = f"stands for more than {MOST_VALUES:,} values"
TOO_DEEP = f"is nested more than {MOST_LEVELS} levels deep"
CONFIGS = {
    "bomb": (BOMB, TOO_MANY),
    "bomb in options": (f"steps: 5\ngca: &g\n  base: npair\n{BOMB}", TOO_MANY),
    "merges": (MERGES, TOO_MANY),
    "an alias in itself": ("data: &d [*d]\n", TOO_MANY),
    "a long list": (f"data: [{'1, ' * (MOST_VALUES + 1)}]\n", TOO_MANY),
    "brackets": (f"data: {'[' * 5000}{']' * 5000}\n", TOO_DEEP),
    "levels": (f"data: {'[' * 30}{']' * 30}\n", TOO_DEEP),
    "braces": ("data: " + "{a: " * 3000, TOO_DEEP),
    "open brackets": ("data: " + "[" * 20, "is not YAML: "),
    "long": ("# " + "x" * MOST_BYTES + "\nsteps: 5\n", f"has more than {MOST_BYTES:,} bytes"),
    "no alias": ("data: *d\n", "is not YAML: found undefined alias"),
    "two documents": ("steps: 5\n---\nsteps: 6\n", "is not YAML: expected a single document"),
    "code": ("steps: !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor"),
    "a date": ("out: 2024-13-45\n", "is not YAML: month must be in 1..12"),
    "a long number": (f"steps: {'9' * 5000}\n", "is not YAML: Exceeds the limit"),
    "a zero byte": ("steps: 5\0\n", "is not YAML: "),
    "a list of keys": ("? [a]\n: 5\n", "is not YAML: while constructing a mapping"),
    "an option twice": ("steps: 5\nseed: 1\nsteps: 6\n", "has steps twice, in lines 1 and 3; keep one"),
    "a group twice": (
        "data:\n  name: cub200\nseed: 1\ndata:\n  root: x\n",
        "has data twice, in lines 1 and 4; keep one",
    ),
    "a list": ("[1, 2]", "config must be a YAML file of options; it holds: [1, 2]"),
    "a number": ("5", "config must be a YAML file of options; it holds: 5"),
}


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gcahng: error: ") and err.count("\n") == 1
    assert len(err) < 600
    return err.removeprefix("gcahng: error: ").rstrip()


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_beyond_the_limits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = CONFIGS[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in fails(["train", "--steps", "5", "--config", str(path)], capsys)
    if name == "bomb":
        assert message in fails(["train", f"--config={path}"], capsys)
    folder = tmp_path / "run"
    folder.mkdir()
    path.rename(folder / "config.yaml")
    if not message.startswith("config must"):
        with pytest.raises(UserError, match="config.yaml (stands|is|has)"):
            resume(folder)


def test_values_of_the_command_line_are_yaml_too(capsys: pytest.CaptureFixture[str]) -> None:
    bomb = "{" + ", ".join(BOMB.splitlines()) + "}"
    for option in (["--gca", bomb], [f"--gca={bomb}"], ["--out", bomb]):
        assert TOO_MANY in fails(["train", *option], capsys)
    assert TOO_DEEP in fails(["train", f"--data={'[' * 4000}"], capsys)
    check_aliases("*.jpg [old] {x", "a name")


def test_what_is_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "steps: 5"  # a name that is YAML
    path.write_text("\ufeff# gcahng\nsteps: 7\noptimizer: &o {lr: 1e-4}\nout: ä\ngca: {alpha: 3}\n", encoding="utf-8")
    config = parse(["--config", str(path), "--gca.beta", "9"])
    assert (config.steps, config.optimizer.lr, config.out, config.gca.alpha) == (7, 1e-4, "ä", 3)
    path.write_text("optimizer: {lr: 0.5, weight_decay: &w 0.25}\ngca: {classifier_weight_decay: *w}\n")
    assert parse(["--config", str(path)]).gca.classifier_weight_decay == 0.25
    for empty in ("", "# nothing\n", "{}\n", "null\n"):
        path.write_text(empty)
        assert parse(["--config", str(path), "--steps", "3"]).steps == 3
    assert load_yaml("a: [1, {b: null}]", "text") == {"a": [1, {"b": None}]}
    path.write_bytes(b"#" * MOST_BYTES)
    assert len(read_yaml(path, "file")) == MOST_BYTES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_configuration_that_is_no_regular_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    assert "it is a named pipe, not a regular file" in fails(["train", "--config", f"{tmp_path}/pipe.yaml"], capsys)
    assert "it is a device, not a regular file" in fails(["train", "--config", f"{tmp_path}/link.yaml"], capsys)
    assert "it is a device, not a regular file" in fails(["train", "--config", "/dev/zero"], capsys)
    assert "cannot be read: Is a directory" in fails(["train", "--config", str(tmp_path)], capsys)
    assert fails(["train", "--config", ""], capsys).startswith("config is ''; it must be a YAML file of options")
    assert "cannot be read: " in fails(["train", "--config", "/proc/self/mem"], capsys)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="the system has no /dev/fd")
def test_what_the_shell_opens_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """As --config <(command) passes a pipe; one that has no end is read up to the limit."""
    reader, writer = os.pipe()
    os.write(writer, b"steps: 11\n")
    os.close(writer)
    assert parse(["--config", f"/dev/fd/{reader}"]).steps == 11
    os.close(reader)
    with open("/dev/zero", "rb") as zeros:
        assert f"has more than {MOST_BYTES:,} bytes" in fails(
            ["train", "--config", f"/dev/fd/{zeros.fileno()}"], capsys
        )


READERS = {
    "image": (read_rgb, "x.jpg"),
    "label file": (read_bytes, "x.txt"),
    "list": (lambda path: files_images([path]), "x.lst"),
    "npy": (read_embeddings, "x.npy"),
    "safetensors": (read_embeddings, "x.safetensors"),
    "index": (load, "x.index"),
    "header": (read_header, "x.index"),
    "checkpoint": (load_checkpoint, "x.pt"),
    "model": (load_model, "x.pt"),
    "model file": (load_model, "x.safetensors"),
    "onnx": (load_model, "x.onnx"),
    "weights": (read_tensors, "x.pth"),
    "records": (read_records, "metrics.jsonl"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    read, file = READERS[name]
    path = tmp_path / file
    os.mkfifo(path)
    outcome = SimpleNamespace(error=None)

    def run() -> None:
        try:
            read(path)
        except UserError as error:
            outcome.error = error

    thread = threading.Thread(target=run, daemon=True)  # it would wait for a writer
    thread.start()
    thread.join(60)
    if thread.is_alive():
        with open(path, "wb"):
            pass
        thread.join()
        pytest.fail("the pipe was opened")
    assert file in str(outcome.error) and "\n" not in str(outcome.error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_embed_leaves_out_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(UnreadableImage, match="x.jpg cannot be read as an image: it is a named pipe, not a regular"):
        read_rgb(tmp_path / "x.jpg")
    np.save(tmp_path / "x.npy", np.zeros((2, 3), np.float32))
    os.mkfifo(tmp_path / "x.csv")
    assert len(read_embeddings(tmp_path / "x.npy")) == 2  # what lies beside is no file
