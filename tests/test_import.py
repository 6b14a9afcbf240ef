"""`import gcahng` needs torch and numpy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "triton",
    "faiss",
    "matplotlib",
    "jsonargparse",
    "yaml",
    "tqdm",
    "rich",
    "tensorboard",
    "sklearn",
    "pytorch_metric_learning",
    "safetensors",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "umap",
    "pyarrow",
    "pytest",
)

# Importing a blocked module is an error; so is loading a native library.
PRELUDE = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
import torch
def no_library(path):
    raise OSError(f"{{path}} is blocked")
torch.ops.load_library = no_library
"""


def run(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_with_everything_optional_blocked() -> None:
    loaded = run(
        "import gcahng, gcahng.ops, gcahng.env\n"
        "from gcahng import *\n"
        "print(gcahng.__version__)\n"
        "print(*sorted(m for m in sys.modules if m.startswith('gcahng.kernels')))"
    ).splitlines()
    assert loaded[0].count(".") == 2
    assert loaded[1:] == [""], "a Triton kernel was imported"


@pytest.mark.processes
def test_op_and_report_work_without_anything_optional() -> None:
    printed = run(
        "import torch, gcahng, gcahng.env\n"
        "gca = gcahng.GCAHNGLoss(5, 8, layers=1, heads=2)\n"
        "x = torch.randn(6, 8, requires_grad=True)\n"
        "gca(x, torch.arange(3).repeat(2)).backward()\n"
        "assert gca.generator_step()['J_gen'] > 0 and x.grad.any()\n"
        "print(gcahng.env.report())"
    )
    assert "cpp        not available: " in printed
    assert 'triton is not installed; pip install "gcahng[triton]"' in printed


@pytest.mark.processes
def test_the_block_blocks() -> None:
    printed = run(
        f"for name in {OPTIONAL!r}:\n"
        "    try:\n"
        "        __import__(name)\n"
        "    except ModuleNotFoundError:\n"
        "        print(name)"
    )
    assert tuple(printed.split()) == OPTIONAL
