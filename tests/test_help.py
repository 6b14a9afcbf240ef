"""--help shows the options that matter first, and --help-all shows all."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from gcahng.cli import COMMANDS, main
from gcahng.commands.train import parse
from gcahng.commands.train_help import FIRST, GROUPS
from gcahng.config import TrainConfig

LONG = 60  # lines: what a screen shows
# Every option of a run, by its group.
OPTIONS = {
    group: [f"{group}.{name}" for name in values] for group, values in asdict(TrainConfig()).items() if group in GROUPS
}
OPTIONS["run"] = [name for name in asdict(TrainConfig()) if name not in GROUPS]


def options_of(text: str) -> list[str]:
    """The options that a help lists, without their dashes."""
    return re.findall(r"^  (?:-h, )?--([\w.-]+)", text, re.MULTILINE)


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_training_shows_ten_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "train", "--help")
    assert sorted(options_of(text)) == sorted(FIRST) and len(FIRST) == 10
    assert len(text.splitlines()) <= LONG and "--help-all" in text
    assert text == help_of(capsys, "train", "-h") == help_of(capsys, "train", "--steps", "3", "--help", "--loss", "x")


@pytest.mark.parametrize("group", GROUPS)
def test_training_shows_a_group(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "train", "--help", group)
    assert options_of(text) == OPTIONS[group]
    assert text == help_of(capsys, "train", f"--help={group}")


def test_training_shows_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    listed = options_of(help_of(capsys, "train", "--help-all"))
    assert {name for names in OPTIONS.values() for name in names} | set(FIRST) <= set(listed)
    assert len(listed) == len(set(listed))


def test_a_group_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "steps"]) == 2
    message = "--help is 'steps'; it must be run, data, backbone, gca, optimizer, or stand alone"
    assert capsys.readouterr() == ("", f"gcahng: error: {message}\n")


def test_the_first_options_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": "npair", "gca.base": "supcon", "steps": "7", "data.name": "csv", "data.root": "x"}
    values |= {"backbone.name": "timm:x", "device": "cpu", "out": "y"}
    assert {*values, "config", "resume"} == set(FIRST)
    config = asdict(parse([f"--{name}={value}" for name, value in values.items()]))
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        assert str((config[group] if group else config)[key]) == value


PARTS = [["index", "build"], ["index", "add"], ["bench", "step"], ["data", "verify"]]


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS if name != "train"), *PARTS], ids=" ".join)
def test_every_help_fits_on_a_screen(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    short, long = help_of(capsys, *command, "--help"), help_of(capsys, *command, "--help-all")
    assert len(short.splitlines()) <= LONG
    left = set(options_of(long)) - set(options_of(short))
    assert set(options_of(short)) - set(options_of(long)) <= {"help-all"}
    assert ("--help-all" in short) == bool(left)


def test_what_help_all_adds(capsys: pytest.CaptureFixture[str]) -> None:
    short = help_of(capsys, "index", "build", "--help")
    added = set(options_of(help_of(capsys, "index", "build", "--help-all"))) - set(options_of(short))
    assert {name for name in added if not name.startswith("data.")} == {
        "lists",
        "probes",
        "code_bytes",
        "links",
        "build_breadth",
        "search_breadth",
        "seed",
    }
    assert len(added) == 17
    assert "these groups too: settings of --kind, data" in " ".join(short.split())
