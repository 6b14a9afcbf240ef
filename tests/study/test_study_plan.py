"""YAML files of studies: what they mean, and one line that names the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcahng.cli import main
from gcahng.config import TrainConfig
from gcahng.errors import UserError
from gcahng.study import read_study

ROOT = Path(__file__).parents[2]
GOOD = """
base: {steps: 9, optimizer: {lr: 1e-4}}
data:
  glyphs:
  few: {data.train_classes: 20}
methods:
  npair: {loss: npair}
  under: {baseline: npair, gca.base: supcon, optimizer.lr: 2e-4, gca: {layers: 2}}
seeds: [3, 5]
metrics: [recall@2]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_study_is_a_grid(tmp_path: Path) -> None:
    study = read_study(write(tmp_path / "one.yaml", GOOD))
    assert (study.name, study.evaluate, study.checkpoint) == ("one", "validation", "best")
    assert [run.name for run in study.runs] == [
        f"{data}-{method}-seed{seed}" for seed in (3, 5) for data in ("glyphs", "few") for method in ("npair", "under")
    ]
    first, last = study.runs[0].config, study.runs[-1].config
    assert first == TrainConfig(loss="npair", steps=9, seed=3, threads=1, optimizer=first.optimizer)
    assert (first.optimizer.lr, last.optimizer.lr) == (1e-4, 2e-4)
    assert (last.gca.base, last.gca.layers, last.data.train_classes, last.seed) == ("supcon", 2, 20, 5)
    assert study.methods["under"].baseline == "npair" and study.methods["npair"].baseline is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [3, 5]", "", "seeds is None; it must be a list of whole numbers"),
        ("[3, 5]", "[3, x]", "seeds[1] is 'x'; it must be a whole number"),
        ("[3, 5]", "[3, 3]", "seeds[1] is 3, which is there twice"),
        ("[recall@2]", "[recall@3]", "metrics[0] is recall@3; on data.glyphs it must be one of recall@1, recall@2"),
        ("[recall@2]", "[accuracy]", "metrics[0] is 'accuracy'; it must be map@r"),
        ("[recall@2]", "map@r", "metrics is 'map@r'; it must be a list"),
        ("base: {steps: 9", "bass: {steps: 9", "has 'bass'; its keys must be of base, methods"),
        ("steps: 9", "step: 9", "base: step is not an option"),
        ("steps: 9", "steps: 0", "methods.npair on data.glyphs: steps is 0; it must be a whole number"),
        ("steps: 9", "seed: 9", "base.seed cannot be given; the study decides it"),
        ("steps: 9", "out: x", "base.out cannot be given"),
        ("lr: 1e-4", "lr: fast", "methods.npair on data.glyphs: optimizer.lr is 'fast'"),
        ("loss: npair", "loss: triplet", "methods.npair on data.glyphs: loss is 'triplet'"),
        ("loss: npair", "select: test", "methods.npair on data.glyphs: select is 'test'"),
        ("loss: npair", "select: last", "methods.npair on data.glyphs: select is 'last' and checkpoint is best"),
        ("baseline: npair", "baseline: nair", "methods.under.baseline is 'nair'; it must be one of npair"),
        ("baseline: npair", "baseline: under", "methods.under.baseline is 'under'"),
        ("gca: {layers: 2}", "gca: {base: npair}", "methods.under.gca.base is given twice"),
        ("  npair:", "  a/b:", "methods has the name 'a/b'"),
        ("  npair: {loss: npair}", "  npair: [loss]", "methods.npair is ['loss']; it must hold options"),
        ("  glyphs:", "  glyphs: {data.val_classes: 0}", "methods.npair on data.glyphs: data.val_classes is 0"),
        ("metrics:", "evaluate: val\nmetrics:", "evaluate is 'val'; it must be validation or test"),
        ("metrics:", "checkpoint: first\nmetrics:", "checkpoint is 'first'; it must be best or last"),
        (GOOD, "- 1", "it must hold names with their values"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in GOOD
    file = write(tmp_path / "one.yaml", GOOD.replace(old, new, 1))
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_along(file: Path) -> None:
    study = read_study(file)
    assert len({run.name for run in study.runs}) == len(study.runs)
    assert any(method.baseline for method in study.methods.values())


def test_two_same_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has npair twice"):
        read_study(write(tmp_path / "one.yaml", GOOD.replace("  under:", "  npair:")))
