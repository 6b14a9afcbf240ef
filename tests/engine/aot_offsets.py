"""How far a training step at n = 2,049 reaches into its tensors, and how wide the kernels' offsets are, as JSON.

A script of its own: in a process with TRITON_INTERPRET=1 kernels are not compiled."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from gcahng.testing import aot, launches

CASE = aot.Case(512, "bf16", 90)
SIZES = launches.Sizes(683, 3, 1, 100)  # n = 2,049
RUN = JITFunction.run


class Reached:
    """Of each kernel and argument: the largest offset into a tensor, the largest place in the memory that it is a part
    of, and the largest number."""

    def __init__(self) -> None:
        self.offsets: dict[str, dict[str, int]] = {}
        self.places: dict[str, int] = {}
        self.numbers: dict[str, dict[str, int]] = {}

    def take(self, kernel: JITFunction, *arguments: Any, **keywords: Any) -> Any:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        offsets, numbers = (found.setdefault(kernel.__name__, {}) for found in (self.offsets, self.numbers))
        for parameter in kernel.params:
            value = given.get(parameter.name)
            if isinstance(value, Tensor):
                assert value.is_contiguous(), (kernel.__name__, parameter.name)
                last = value.numel() - 1
                offsets[parameter.name] = max(offsets.get(parameter.name, 0), last)
                place = value.storage_offset() + last
                self.places[kernel.__name__] = max(self.places.get(kernel.__name__, 0), place)
            elif isinstance(value, int) and not parameter.is_constexpr:
                numbers[parameter.name] = max(numbers.get(parameter.name, 0), value)
        return RUN(kernel, *arguments, **keywords)


def narrow_pointers(ttir: str) -> set[str]:
    """The arguments that offsets of 32 bits are added to."""
    origins: dict[str, set[str]] = {}
    narrow: set[str] = set()
    for line in ttir.splitlines():
        if "tt.func" in line:
            for name in re.findall(r"%(\w+): !tt\.ptr", line):
                origins["%" + name] = {name}
            continue
        code, _, types = line.partition(" : ")
        values = re.findall(r"%\w+", code)
        of = set().union(*(origins.get(value, set()) for value in values))
        _, _, carried = code.partition("iter_args")
        for inside, start in re.findall(r"(%\w+) = (%\w+)", carried):
            origins[inside] = origins.get(start, set())
        if "tt.addptr" in line and re.search(r"i32>?( loc.*)?$", types.strip()):
            narrow |= of
        if values and "!tt.ptr" in line and re.match(r"\s*%\w+(:\d+)? = ", line) and "tt.load" not in line:
            origins[values[0]] = of
    return narrow


def main() -> None:
    reached = Reached()
    taking = patch.object(JITFunction, "run", lambda kernel, *a, **k: reached.take(kernel, *a, **k))
    with aot.recording(CASE) as found, launches.launching(), taking:
        launches.meta_step("triton", CASE.dim, aot.DTYPES[CASE.dtype], "hidden", SIZES)
    narrow: dict[str, list[str]] = {}
    wide: dict[str, list[str]] = {}
    for launch in found.values():
        ttir = aot.compile_launch(launch).asm["ttir"]
        narrow[launch.name] = sorted({*narrow.get(launch.name, []), *narrow_pointers(ttir)})
        wide[launch.name] = [name for name, kind in launch.signature.items() if kind == "i64"]
    json.dump(
        {
            "offsets": reached.offsets,
            "places": reached.places,
            "numbers": reached.numbers,
            "narrow": narrow,
            "wide": wide,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
