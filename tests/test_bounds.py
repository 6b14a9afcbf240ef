"""Numbers out of range, devices, sizes beyond memory: one line each, the same for commands, YAML and Python."""

from __future__ import annotations

import inspect
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import gcahng
from gcahng.bounds import BOUNDS, check_number, format_bytes, shown_value
from gcahng.cli import main
from gcahng.commands.train import parse
from gcahng.config import config_from_dict
from gcahng.devices import resolve_device
from gcahng.engine.step_size import StepSize
from gcahng.errors import UserError
from gcahng.evaluation.embed import EmbedOptions
from gcahng.evaluation.image_inputs import with_data
from gcahng.nn import EdgeUpdate, GraphNetwork
from gcahng.report.options import ReportOptions
from gcahng.retrieval.index import IndexSettings
from gcahng.train import DataConfig, TrainConfig

DOCS = Path(gcahng.__file__).parents[1] / "docs" / "commands.md"
HUGE = 10**30
NO_DEVICE = "it must be auto, cpu, cuda or cuda:N"

# The commands that take the options of data, and with them --device; neither model nor file needs to exist.
DATA_COMMANDS = ("eval m", "embed m x --out e.npy", "index build x --model m --out i", "search i x")
DEVICE_COMMANDS = (*DATA_COMMANDS, "index add i x --model m", "report m", "train --resume m")
DATA_MISTAKES = (
    ("data.image_size", "0"),
    ("data.image_size", "-5"),
    ("data.image_size", "1000000000"),
    ("data.resize", "1000000000"),
    ("data.workers", "-1"),
    ("data.workers", "1000000000000"),
    ("data.train_classes", "1"),
    ("data.val_classes", "-1"),
)
# Of one command each.
OTHERS = (
    ("train", "epochs", 10**18),
    ("train", "steps", 10**13),
    ("train", "gca.layers", HUGE),
    ("train", "backbone.embedding_dim", 10**9),
    ("train", "threads", 10**12),
    ("train", "seed", -1),
    ("train", "seed", 2**63),
    ("train", "optimizer.lr", ".nan"),
    ("train", "optimizer.lr", ".inf"),
    ("train", "optimizer.lr", "1e30"),
    ("train", "data.samples_per_class", 10**9),
    ("train", "data.max_shift", 10**9),
    ("train --resume m", "threads", 0),
    ("train --resume m", "skip_nonfinite", -1),
    ("train --resume m", "data.workers", -1),
    ("embed m x --out e.npy", "batch_size", 0),
    ("embed m x --out e.npy", "batch_size", HUGE),
    ("eval m", "recall_at", 0),
    ("eval m", "precision_at", HUGE),
    ("eval m", "map_at", -3),
    ("eval m", "seed", 2**31),
    ("report m", "queries", 0),
    ("report m", "seed", 2**32),
    ("search i x", "k", 0),
    ("search i x", "k", HUGE),
    ("search i x", "rows", -1),
    ("search i x", "effort", HUGE),
    *(("index build e.npy --out i", name, HUGE) for name in ("lists", "probes", "code_bytes", "links", "seed")),
    *(("index build e.npy --out i", name, -1) for name in ("build_breadth", "search_breadth")),
    ("export m x.onnx", "opset", 10**20),
    ("plan --batch 12", "dim", HUGE),
    ("plan --batch 12", "layers", 10**4),
    ("plan --batch 12", "ranks", HUGE),
    ("plan --batch 12", "link", 0),
    ("plan --batch 12", "latency", -1),
    ("plan --batch 12", "rate", "inf"),
    ("plan", "batch", HUGE),
    ("plan", "batch", 10**4299),
    ("bench step", "batch", HUGE),
    ("bench step", "reps", -1),
    ("bench memory", "classes", 10**12),
    ("bench memory", "steps", HUGE),
)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that ends with a user's mistake."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gcahng: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert len(err) < 400
    return err.removeprefix("gcahng: error: ").rstrip()


@pytest.mark.parametrize(("option", "value"), DATA_MISTAKES)
def test_every_command_refuses_data_options_with_the_same_line(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = {fails([*command.split(), f"--{option}", value], capsys) for command in ("train", *DATA_COMMANDS)}
    name = option.removeprefix("data.")
    assert lines == {f"{option} is {value}; it must be {BOUNDS[name]}"}
    with pytest.raises(UserError, match=f"{option} is {value}; it must be"):
        with_data(DataConfig(), {name: int(value)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "device", ["", "mps", "meta", "cuda:-1", "cuda:1000", "cuda:x", "CPU", "cpu:0", "cuda:01", " "]
)
def test_every_command_refuses_a_device_with_the_same_line(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("train", *DEVICE_COMMANDS):
        assert fails([*command.split(), f"--device={device}"], capsys) == f"device is {device!r}; {NO_DEVICE}"
    with pytest.raises(UserError, match="device is "):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="another device is missing")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert "device is 'cuda:99'; PyTorch finds 0 CUDA devices here" in fails(["train", "--device", "cuda:99"], capsys)


@pytest.mark.parametrize(("command", "option", "value"), OTHERS)
def test_numbers_out_of_range(
    command: str, option: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails([*command.split(), f"--{option}", str(value)], capsys)
    assert line.startswith(f"{option} is {str(value).lstrip('.')[:12]}") or line.startswith(f"{option} is 1e")
    assert "; it must be " in line and "number" in line and (" at most " in line or " under " in line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": 2.0}, r"steps is 2\.0; it must be a whole number"),
        ({"steps": "5"}, "steps is '5'; it must be a whole number"),
        ({"steps": None}, "steps is None; it must be a whole number"),
        ({"steps": HUGE}, "steps is 1000"),
        ({"epochs": [1]}, r"epochs is \[1\]; it must be a whole number"),
        ({"compile": 1}, "compile is 1; it must be true or false"),
        ({"device": 5}, "device is 5; it must be"),
        ({"device": ""}, "device is ''; it must be"),
        ({"out": ""}, "out is ''; it must be text, and not empty"),
        ({"data": {"root": ""}}, "data.root is ''; it must be text"),
        ({"data": {"name": ["glyphs"]}}, r"data.name is \['glyphs'\]; it must be one of"),
        ({"data": {"crop_scale_min": 0}}, "data.crop_scale_min is 0; it must be a number above 0 and at most 1"),
        ({"gca": {"alpha": True}}, "gca.alpha is True; it must be a number above 0"),
        ({"gca": {"alpha": HUGE}}, "gca.alpha is 1000"),
        ({"gca": {"alpha": float("inf")}}, "gca.alpha is inf"),
        ({"gca": {"edge_dropout": 1}}, "gca.edge_dropout is 1; it must be a number of at least 0 and under 1"),
        ({"gca": {"layers": 10**5000}}, "gca.layers is a number of more than "),
        ({"optimizer": {"proxy_lr": "x" * 10_000}}, "optimizer.proxy_lr is 'xxx"),
        (
            {"data": {"classes_per_batch": 2**11, "samples_per_class": 2**10}},
            "data.classes_per_batch is 2048 and data.samples_per_class 1024; their product, the batch, must be",
        ),
    ],
)
def test_values_of_a_configuration(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        config_from_dict(values).check()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 10**12}, "num_classes is 1000000000000; it must be a whole number of at least 1 and at most"),
        ({"embedding_dim": 10**9}, "embedding_dim is 1000000000; it must be"),
        ({"layers": HUGE}, "layers is 1000"),
        ({"heads": True}, "heads is True; it must be a whole number"),
        ({"num_classes": 4.0}, r"num_classes is 4\.0; it must be a whole number"),
        ({"num_classes": ""}, "num_classes is ''; it must be"),
        ({"alpha": float("inf")}, "alpha is inf; it must be a number above 0"),
        ({"graph_lr": 10**400}, "graph_lr is 1000"),
        ({"epochs": 10**18}, "epochs is 1000000000000000000; it must be None or a whole number"),
    ],
)
def test_arguments_of_the_loss(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gcahng.GCAHNGLoss(**{"num_classes": 4, "embedding_dim": 8, **options})
    if options.keys() <= {"num_classes", "layers", "heads"}:
        with pytest.raises(UserError, match=message):
            GraphNetwork(8, **{"num_classes": 4, **options})


def test_an_infinite_clip_value_clips_nothing() -> None:
    assert gcahng.GCAHNGLoss(4, 8, clip_value=float("inf")).clip_value == float("inf")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gcahng.GCAHNGLoss(10**9, 1024), "num_classes 1,000,000,000 (its state in training has 32.8 TB)"),
        (lambda: GraphNetwork(2**20, 2, layers=1000), "embedding_dim 1,048,576, layers 1,000"),
        (lambda: EdgeUpdate(2**20), "an edge update with 1,048,576 channels"),
        (lambda: main_raises("backbone.width=4096", "backbone.embedding_dim=1048576"), "glyph_conv with"),
        (lambda: main_raises("data.classes_per_batch=100000", "data.samples_per_class=10"), "a step with a batch of 1"),
    ],
)
def test_sizes_beyond_memory(monkeypatch: pytest.MonkeyPatch, make: Any, words: str) -> None:
    monkeypatch.setattr("gcahng.engine.fits.free_memory", lambda device: 2**33)
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)
    assert "of memory, and 8.59 GB are free on cpu; it must be smaller" in str(error.value)


def main_raises(*options: str) -> None:
    """Builds the network and the loss of a run."""
    from gcahng.models.backbones import build_backbone
    from gcahng.train.losses import build_objective

    config = parse([f"--{option}" for option in (*options, "device=cpu")])
    config.check()
    if config.backbone.width != 32:
        build_backbone(config.backbone)
    build_objective(config, 10**6)


def test_tensors_without_memory_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.machine.Path.read_text", lambda self: "MemAvailable: 1 kB")
    with torch.device("meta"):
        assert GraphNetwork(4096, 10).node_input.weight.is_meta


def test_a_step_that_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from gcahng.engine import fits, plan

    size = StepSize(batch=384, dim=512, layers=2, views=3, classes=200)
    needed = plan.state_bytes(size) + plan.expected_bytes(size, "recompute")
    monkeypatch.setattr(fits, "free_memory", lambda device: needed)
    fits.check_step(size, "cpu")
    monkeypatch.setattr(fits, "free_memory", lambda device: needed - 1)
    with pytest.raises(UserError, match="a batch of 384 in classes of 3, embedding_dim 512, layers 2 and 200 classes"):
        fits.check_step(size, "cpu")
    monkeypatch.setattr(fits, "free_memory", lambda device: None)
    fits.check_step(size, "cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000000, 1000000000]"),
    ],
)
def test_memory_that_runs_out_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("gcahng.commands.env.run", run)
    monkeypatch.setattr("gcahng.engine.free_memory.free_memory", lambda device: 5_000_000_000)
    line = fails(["env"], capsys)
    assert line.startswith("memory ran out") and "5 GB are free now" in line
    assert ("(7.28 TiB were asked for" in line) + ("(4 kB were" in line) + ("(2.00 GiB were" in line) == (
        "Storage" not in str(error)
    )


def test_another_error_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("gcahng.commands.env.run", run)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["env"])


@pytest.mark.parametrize("text", ["9" * 400, "1e5", "0", "-3GB", "0.5", "2000000TB", "", "nan"])
def test_memory_limits(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a number of bytes such as 16GB" in fails(
        ["plan", "--batch", "12", f"--memory-limit={text}"], capsys
    )


def numbers(options: type) -> list[str]:
    """The fields of a dataclass of options that are numbers, those of its parts included."""
    found = []
    for name, hint in get_type_hints(options).items():
        if is_dataclass(hint):
            found += numbers(hint)
        elif {int, float} & {hint, *get_args(hint)}:
            found.append(name)
    return found


def test_every_number_has_a_range() -> None:
    for options in (TrainConfig, EmbedOptions, IndexSettings, ReportOptions):
        assert set(numbers(options)) <= BOUNDS.keys()
    signature = inspect.signature(gcahng.GCAHNGLoss.__init__).parameters.values()
    assert {p.name for p in signature if str(p.annotation).split(" ")[0] in ("int", "float")} <= BOUNDS.keys()


def test_the_documentation_has_the_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = {bound.meaning: bound for bound in BOUNDS.values()}
    for meaning, bound in rows.items():
        names = ", ".join(f"`{name}`" for name, other in BOUNDS.items() if other is bound)
        assert f"| {names} | {meaning} | {bound} |" in text


def test_numbers_and_values_in_words() -> None:
    assert str(BOUNDS["seed"]) == "a whole number of at least 0 and at most 2^63 - 1"
    assert str(BOUNDS["dropout"]) == "a number of at least 0 and under 1"
    assert shown_value(json.loads("[" * 90 + "]" * 90)) == "[" * 80 + "…"
    assert [format_bytes(n) for n in (5, 1234, 99_949_000, 2 * 10**12)] == ["5 B", "1.23 kB", "99.9 MB", "2 TB"]
    check_number("k", torch.tensor([3]).numpy()[0])
