"""The script that makes tables of results, with a stand-in for training; one test trains for a few steps."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "table.py"
spec = importlib.util.spec_from_file_location("table", SCRIPT)
table = importlib.util.module_from_spec(spec)
sys.modules["table"] = table
spec.loader.exec_module(table)


class Trainer:
    """Takes the place of `gcahng train`: writes the summary that follows from the options, and remembers them.

    Args:
        stop_at: the number of a run during which the script is killed.
        fail_at: the number of a run that ends with status 1.
    """

    def __init__(self, stop_at=None, fail_at=None):
        self.runs = []
        self.stop_at, self.fail_at = stop_at, fail_at

    def __call__(self, command, log, lock):
        assert command[:2] == ["gcahng", "train"]
        assert command.count("--out") == command.count("--seed") == 1
        options = dict(zip(command[2::2], command[3::2], strict=True))
        run_dir = Path(options.pop("--out"))
        run_dir.mkdir()  # fails where a run is there already, as training does
        number = len(self.runs)
        self.runs.append(options)
        (run_dir / "metrics.jsonl").write_text("half")
        if number == self.stop_at:
            (run_dir / "summary.json").write_text('{"test": {"rec')
            raise KeyboardInterrupt
        if number == self.fail_at:
            return 1
        seed, under = int(options["--seed"]), options["--loss"] == "gca_hng"
        steps = int(options.get("--steps", 2000))
        test = {"recall@1": 0.5 + seed / 10, "recall@2": 0.9, "map@r": 0.25 + under / 2, "r_precision": 0.5}
        seconds = steps * (0.3 if under else 0.1)
        summary = {"test": test, "seconds": 7 + seconds, "step_cpu_seconds": seconds, "steps": steps, "device": "cpu"}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return 0


def test_readme(tmp_path, capsys):
    trainer = Trainer()
    assert table.main(["readme", "--out", str(tmp_path)], trainer) == 0
    assert trainer.runs == [{"--loss": loss, "--seed": s} for loss in ("npair", "gca_hng") for s in ("0", "1", "2")]
    text = (tmp_path / "table.md").read_text()
    assert "| npair | 60.00 ± 10.00 | 25.00 ± 0.00 | 50.00 ± 0.00 | 2000 | 200 ± 0 | 3 |" in text
    assert "| gca_hng | 60.00 ± 10.00 | 75.00 ± 0.00 | 50.00 ± 0.00 | 2000 | 600 ± 0 | 3 |" in text
    assert f"gcahng train --loss npair --seed 2 --out {tmp_path}/runs/npair-seed2\n" in text
    npair, gca_hng = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert npair["setting"] == "npair" and [run["seed"] for run in npair["runs"]] == [0, 1, 2]
    assert npair["mean"]["recall@1"] == pytest.approx(0.6) and npair["std"]["recall@1"] == pytest.approx(0.1)
    assert gca_hng["mean"]["map@r"] == 0.75 and gca_hng["mean"]["seconds"] == pytest.approx(600)
    assert "npair seed 1: R@1 60.00" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", range(6))
def test_goes_on_where_it_was_killed(tmp_path, stop_at):
    arguments = ["readme", "--out", str(tmp_path)]
    first, second, third = Trainer(stop_at=stop_at), Trainer(), Trainer()
    assert table.main(arguments, first) == 130
    assert table.main(arguments, second) == 0
    # The run that was cut short is done again, the finished ones are not.
    assert first.runs[:stop_at] + second.runs == [
        {"--loss": loss, "--seed": s} for loss in ("npair", "gca_hng") for s in ("0", "1", "2")
    ]
    before = (tmp_path / "table.json").read_text()
    assert table.main(arguments, third) == 0
    assert third.runs == [] and (tmp_path / "table.json").read_text() == before


def test_table_of_what_is_there(tmp_path):
    assert table.main(["readme", "--out", str(tmp_path)], Trainer(stop_at=1)) == 130
    text = (tmp_path / "table.md").read_text()
    assert "| npair | 50.00 | 25.00 | 50.00 | 2000 | 200 | 1 |" in text
    assert "| gca_hng | – | – | – | – | – | 0 |" in text


def test_a_failed_run_does_not_stop_the_others(tmp_path, capsys):
    trainer = Trainer(fail_at=1)
    assert table.main(["readme", "--out", str(tmp_path)], trainer) == 1
    assert len(trainer.runs) == 6
    out = capsys.readouterr().out
    assert "npair seed 1: failed (exit status 1), see" in out and "1 failed" in out
    assert "| 25.00 ± 0.00 | 50.00 ± 0.00 | 2000 | 200 ± 0 | 2 |" in (tmp_path / "table.md").read_text()
    again = Trainer()
    assert table.main(["readme", "--out", str(tmp_path)], again) == 0
    assert again.runs == [{"--loss": "npair", "--seed": "1"}]


def test_a_run_without_summary_failed(tmp_path, capsys):
    assert table.main(["readme", "--out", str(tmp_path), "--seeds", "0"], lambda *_: 0) == 1
    assert "npair seed 0: failed (no summary.json)" in capsys.readouterr().out


def test_only_seeds_and_options_for_all(tmp_path):
    trainer = Trainer()
    arguments = ["readme", "--only", "gca*", "--seeds", "5", "--out", str(tmp_path), "--", "--steps", "7"]
    assert table.main(arguments, trainer) == 0
    assert trainer.runs == [{"--loss": "gca_hng", "--steps": "7", "--seed": "5"}]


def test_wide_has_equal_steps_and_equal_time(tmp_path):
    trainer = Trainer()
    assert table.main(["wide", "--out", str(tmp_path), "--seeds", "0", "1"], trainer) == 0
    assert len(trainer.runs) == 2 * (16 + 8)
    by_steps, by_time = trainer.runs[:32], trainer.runs[32:]
    assert {"--loss": "gca_hng", "--gca.base": "supcon", "--data.classes_per_batch": "64", "--seed": "1"} in by_steps
    assert {"--loss": "supcon", "--data.classes_per_batch": "64", "--seed": "1"} in by_steps
    assert not any("--steps" in run for run in by_steps)
    # On top of a loss a step takes three times as long here: alone it trains for three times as many.
    assert all(run["--steps"] == "6000" and run["--loss"] != "gca_hng" for run in by_time)
    rows = {row["setting"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    for base in ("npair", "proxy_anchor", "supcon", "arcface"):
        for classes in (16, 64):
            alone = rows[f"{base}-c{classes}-equal_time"]["mean"]["seconds"]
            assert alone == pytest.approx(rows[f"gca_hng-{base}-c{classes}"]["mean"]["seconds"])


def test_equal_time_waits_for_equal_steps(tmp_path, capsys):
    arguments = ["wide", "--out", str(tmp_path), "--seeds", "0", "--only", "npair-c16*", "gca_hng-npair-c16"]
    trainer = Trainer()
    assert table.main([*arguments, "--mode", "time"], trainer) == 1
    assert trainer.runs == []
    assert "needs npair-c16 and gca_hng-npair-c16 first" in capsys.readouterr().out
    assert table.main([*arguments, "--mode", "steps"], trainer) == 0
    assert len(trainer.runs) == 2
    assert table.main([*arguments, "--mode", "time"], trainer) == 0
    assert trainer.runs[2:] == [{"--loss": "npair", "--data.classes_per_batch": "16", "--steps": "6000", "--seed": "0"}]


def test_dry_run(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["wide", "--out", str(out), "--seeds", "0", "--only", "npair-c16*", "gca_hng-npair-c16"]
    assert table.main([*arguments, "--dry-run"], Trainer()) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    first = f"gcahng train --loss npair --data.classes_per_batch 16 --seed 0 --out {out}/runs/npair-c16-seed0"
    assert lines[0] == f"to do       {first}"
    assert lines[2] == "waits       for npair-c16 and gca_hng-npair-c16, seed 0"
    assert lines[3] == "3 of 3 runs left"
    assert table.main(arguments, Trainer(stop_at=1)) == 130
    capsys.readouterr()
    assert table.main([*arguments, "--dry-run"], Trainer()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["done", "unfinished", "waits", "2"]


def test_results_of_other_options_are_not_taken(tmp_path, capsys):
    arguments = ["readme", "--out", str(tmp_path), "--seeds", "0"]
    assert table.main([*arguments, "--", "--steps", "7"], Trainer()) == 0
    trainer = Trainer()
    assert table.main(arguments, trainer) == 2
    assert trainer.runs == []
    error = capsys.readouterr().err
    assert "was made with `--loss npair --steps 7 --seed 0`, not `--loss npair --seed 0`" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("finished", [True, False])
def test_folders_of_others_are_left_alone(tmp_path, capsys, finished):
    run_dir = tmp_path / "runs" / "npair-seed0"
    run_dir.mkdir(parents=True)
    (run_dir / "precious").write_text("")
    if finished:
        (run_dir / "summary.json").write_text(
            '{"test": {}, "step_cpu_seconds": 1, "seconds": 1, "steps": 1, "device": "cpu"}'
        )
    assert table.main(["readme", "--out", str(tmp_path)], Trainer()) == 2
    assert "was not made by this script; choose another --out" in capsys.readouterr().err
    assert (run_dir / "precious").exists()


def test_nothing_selected(capsys):
    assert table.main(["readme", "--only", "triplet", "--dry-run"], Trainer()) == 2
    assert "selects nothing out of: npair, gca_hng" in capsys.readouterr().err


@pytest.mark.skipif(table.fcntl is None, reason="no file locks on this system")
def test_two_at_once(tmp_path, capsys):
    with table.locked(tmp_path):
        assert table.main(["readme", "--out", str(tmp_path)], Trainer()) == 2
    assert "is in use by another run of this script" in capsys.readouterr().err
    assert table.main(["readme", "--out", str(tmp_path)], Trainer()) == 0


# A package of the same name that never finishes training, to be found first.
ENDLESS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).mkdir()
print("training", flush=True)
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(300)
"""


@pytest.mark.processes
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_script_takes_its_run_along(tmp_path):
    (tmp_path / "gcahng").mkdir()
    (tmp_path / "gcahng" / "__main__.py").write_text(ENDLESS)
    script = subprocess.Popen([sys.executable, SCRIPT, "readme", "--out", "out"], cwd=tmp_path, stderr=subprocess.PIPE)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert b"table: stopped" in script.communicate(timeout=20)[1]
    assert script.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert (tmp_path / "out" / "logs" / "npair-seed0.log").read_text() == "training\n"


@pytest.mark.parametrize("preset", table.PRESETS)
def test_training_knows_the_options(tmp_path, preset):
    from gcahng.commands.train import parse

    whole = table.Table(tmp_path, table.PRESETS[preset](), [3])
    for setting in whole.settings.values():
        if setting.as_long_as is None:
            config = parse(whole.command(setting, 3)[2:])
            config.check()
            assert config.seed == 3 and config.out == str(whole.run_dir(setting, 3))
            under = setting.name.startswith("gca_hng")
            assert config.loss == ("gca_hng" if under else setting.name.split("-c")[0])
            if "-c" in setting.name:
                name, classes = setting.name.removeprefix("gca_hng-").rsplit("-c", 1)
                assert config.data.classes_per_batch == int(classes)
                assert not under or config.gca.base == name


@pytest.mark.slow
def test_trains(tmp_path):
    options = ["--steps", "3", "--eval_every", "3", "--backbone.width", "4", "--data.train_classes", "20"]
    options += ["--data.val_classes", "4", "--data.classes_per_batch", "4", "--device", "cpu", "--threads", "1"]
    arguments = ["readme", "--out", str(tmp_path / "out"), "--seeds", "0", "--", *options]
    subprocess.run([sys.executable, SCRIPT, *arguments], cwd=SCRIPT.parents[1], check=True, timeout=120)
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["mean"]["steps"] for row in rows] == [3, 3]
    assert all(0 < row["mean"][metric] < 1 for row in rows for metric in table.METRICS)
