"""The pictures of the documentation are what their scripts draw, and what they show is so."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from doc_pages import PAGES, ROOT, prose

from gcahng.ops import channel_mix

IMAGES = ROOT / "docs" / "images"
SCRIPTS = sorted(IMAGES.glob("make_*.py"))


@pytest.fixture
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of docs/images, imported."""
    monkeypatch.syspath_prepend(IMAGES)
    return importlib.import_module(request.param)


@pytest.mark.parametrize("drawn", [script.stem for script in SCRIPTS], indirect=True)
def test_a_picture_is_what_its_script_draws(drawn: ModuleType) -> None:
    again = f"run python docs/images/{drawn.__name__}.py"
    assert drawn.PICTURE.read_text(encoding="utf-8") == drawn.picture(), again
    assert IMAGES / f"{drawn.__name__.removeprefix('make_')}.svg" == drawn.PICTURE


@pytest.mark.parametrize("drawn", ["make_mixing"], indirect=True)
def test_the_mixed_negative_is_that_of_channel_mix(drawn: ModuleType) -> None:
    """Class 0 is the picture's anchor, its positive and one more sample; class 1 are the negatives."""
    embeddings = torch.tensor([drawn.ANCHOR, drawn.POSITIVE, (1.0, -2.0), *drawn.NEGATIVES], dtype=torch.float64)
    coefficients = torch.full((6, 6, 2), 0.5, dtype=torch.float64)
    coefficients[0, 3:] = torch.tensor(drawn.THETA, dtype=torch.float64)
    draws = torch.tensor([drawn.DRAWS] * 3, dtype=torch.float64)
    negatives = channel_mix(embeddings, coefficients, num_per_class=3, pull=drawn.PULL, draws=draws)
    torch.testing.assert_close(negatives[0, 0, 1], torch.tensor(drawn.chain()[-1], dtype=torch.float64))
    share = drawn.distance(drawn.ANCHOR, drawn.POSITIVE)
    for b, theta in zip(drawn.NEGATIVES, drawn.THETA, strict=True):
        assert drawn.distance(drawn.ANCHOR, drawn.pulled(b, theta)) > share


def test_means_follow_from_the_losses() -> None:
    numbers = json.loads((IMAGES / "means.json").read_text(encoding="utf-8"))
    steps = numbers["lines_per_epoch"]
    assert len(numbers["J_m"]) == len(numbers["J_gen"]) == 6 * steps
    second_pull = math.exp(-numbers["alpha"] / (sum(numbers["J_m"][:steps]) / steps))
    second_weight = 1 - math.exp(-numbers["beta"] / (sum(numbers["J_gen"][:steps]) / steps))
    shown = re.findall(r">(\d\.\d\d)</text>", (IMAGES / "means.svg").read_text(encoding="utf-8"))
    pulls, weights = shown[-12:-6], shown[-6:]
    assert pulls[:2] == ["1.00", f"{second_pull:.2f}"] and weights[:2] == ["0.00", f"{second_weight:.2f}"]


def test_every_picture_is_shown_and_described() -> None:
    shown = {}
    for page in PAGES:
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
            shown[(page.parent / target).resolve()] = words
    assert set(shown) == {path for path in IMAGES.iterdir() if path.suffix in (".svg", ".png")}
    assert all(len(words) >= 15 for words in shown.values())


def test_no_picture_without_a_script() -> None:
    drawn: set[Path] = {script.with_name(f"{script.stem.removeprefix('make_')}.svg") for script in SCRIPTS}
    assert drawn == set(IMAGES.glob("*.svg"))
