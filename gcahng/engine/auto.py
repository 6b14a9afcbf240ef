"""What "auto" takes on CUDA where a measurement says otherwise than expectation: the environment variable GCAHNG_AUTO.

    GCAHNG_AUTO=triton                              # in the place of cuda+triton
    GCAHNG_AUTO=cuda+triton,mix_fwd_=triton         # but for these ops (gcahng/ops/_stages.py)

`python benchmarks/gpu.py` prints the line that its figures speak for.
"""

from __future__ import annotations

import os

from gcahng.errors import UserError
from gcahng.ops._implementations import available
from gcahng.ops._stages import STAGES

VARIABLE = "GCAHNG_AUTO"
BASES = ("cuda+triton", "cuda", "triton", "torch")
_OF_OPS = ("cuda", "triton")


def wished() -> str | None:
    """What the variable asks for, in the form that `stages` has everywhere: a base, then OP=IMPL by commas.

    Raises:
        UserError: what it says cannot be, or is not available here.
    """
    text = os.environ.get(VARIABLE, "").replace(" ", "")
    if not text:
        return None
    base, routes = parse(text)
    for impl in dict.fromkeys([*base.split("+"), *routes.values()]):
        if reason := available(impl, "cuda", "loss"):
            raise UserError(f"{VARIABLE} is {text} and {impl} is not available on cuda: {reason}")
    return text


def split(stages: str) -> tuple[str, dict[str, str]]:
    """BASE[,OP=IMPL…] → the base, and the ops that another implementation has."""
    base, *others = stages.split(",")
    return base, dict(other.partition("=")[::2] for other in others)


def parse(text: str) -> tuple[str, dict[str, str]]:
    """`split`; UserError for a base, an op or an implementation that is none."""
    base, routes = split(text)
    if base not in BASES:
        raise UserError(f"{VARIABLE} is {text}; it must begin with one of {', '.join(BASES)}")
    for op, impl in routes.items():
        if op not in STAGES or impl not in _OF_OPS or base == "torch":
            raise UserError(
                f"{VARIABLE} is {text}; after cuda+triton, cuda or triton each part must be OP=cuda or OP=triton, with "
                f"OP one of {', '.join(STAGES)}"
            )
    return base, routes
