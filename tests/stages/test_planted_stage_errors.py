"""The bounds on a stage's rounding errors refuse what is a few roundings worse than plain PyTorch."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from stages.cases import Run, Setup
from stages.checks import STAGES, inputs_of, wanted
from torch import Tensor

from gcahng.testing import assert_close_to_truth

STEMS = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py") if "\n@stage(" in path.read_text())
for _stem in STEMS:
    if _stem != Path(__file__).stem:
        importlib.import_module(f"stages.{_stem}")  # declares its stages

# Results that come from few roundings of a value: four units in the last place are too many. Others are sums of many
# terms, and may be off by three times as much; `dtheta` of the mixing is a difference, of which little is left.
POINTWISE = {
    "edge_start.forward": ("e",),
    "norm_gelu.forward": ("e",),
    "gate.forward": ("e1", "weight_i", "weight_j"),
    "head.forward": ("theta",),
    "mix.forward": ("negatives",),
    "cross_entropy.forward": ("d",),
}
DIFFERENCES = {"mix.backward_theta": ("dtheta",)}


@pytest.fixture(autouse=True)
def unobserved(monkeypatch):
    """Comparisons that are meant to fail say nothing of how near the others come to it."""
    monkeypatch.setattr("gcahng.testing.compare.observers", [])


def off_by(ulp: int, x: Tensor) -> Tensor:
    """Every value is that many units in the last place too large or too small, by turns."""
    signs = 1 - 2 * (torch.arange(x.numel()) % 2).view(x.shape)
    return (x.double() * (1 + ulp * torch.finfo(x.dtype).eps * signs)).to(x.dtype)


COMPARED = [s for name, s in STAGES.items() if name != "head.moments"]
# Products in bf16 within a stage leave more than a few roundings of fp32.
MULTIPLY = {"head.backward", "mlp_out.backward", "edge_update.forward", "edge_update.mlp_backward"}
CASES = [("float32", s) for s in COMPARED] + [("narrow", s) for s in COMPARED if s.edges and s.name not in MULTIPLY]


@pytest.mark.parametrize(("precision", "stage"), CASES, ids=str)
def test_a_few_roundings_are_refused(precision, stage):
    setup = Setup(7, 2, 64, 150)
    truth, plain = wanted(stage, setup, precision)
    actual = stage.results(Run(setup, inputs_of(setup, precision)))
    for name in truth:
        near = [found[name] for found in plain]
        assert_close_to_truth(actual[name], near, truth[name])
        ulp = 4 if name in POINTWISE.get(stage.name, ()) else 24 if name in DIFFERENCES.get(stage.name, ()) else 12
        with pytest.raises(AssertionError, match="off by"):
            assert_close_to_truth(off_by(ulp, actual[name]), near, truth[name])
