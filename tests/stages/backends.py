"""What the stages are tested on: implementations of their ops, with the setups and precisions that each is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from stages.cases import NARROW, Setup, Some

from gcahng import UserError, native
from gcahng.dispatch import available
from gcahng.engine.schema import OPS, Ops
from gcahng.engine.stages import ops_of

if TYPE_CHECKING:
    from emulator.ops import Mode
    from stages.checks import Stage

Setups = dict[str, list[Setup]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS = ("rows", "tiles", "negatives", "updates")
SMALL = Setup(2, 2, 16, 20, p=0.3)

# Classes odd and even, tiles of one class and of several, offsets in one unit of work and in many, odd channels, long
# sums over rows and over channels.
CPP_SETUPS = [
    Setup(6, 3, 19, 40, p=0.3),
    Setup(7, 2, 64, 150),
    Setup(5, 3, 130, 130, symmetric=False, p=0.5),
    Setup(4, 8, 33, 1000, p=0.1),
    Setup(40, 2, 48, 500),
    Setup(50, 3, 24, 10_000),
    Setup(2, 5, 67, 9, p=0.2),
    Setup(4, 3, 512, 100),
]

# Tied and apart, tiles of one class and of several, odd channels, more of them than one column block of a product has;
# small, for the interpreter takes milliseconds a program.
TRITON_SETUPS = [
    Setup(3, 3, 19, 40, p=0.3),
    Setup(3, 2, 150, 30, symmetric=False, p=0.5),
    Setup(2, 8, 33, 200, p=0.1),
    Setup(4, 2, 64, 100),
    Setup(3, 2, 24, 40),  # parts of a product's columns that are whole, or not there at all
]

# Rows of which every lane of a warp has as many channels: kernels of their own.
_WHOLE_LANES = [Setup(3, 3, 128, 40, p=0.3), *(Setup(2, 2, dim, 9, p=0.3) for dim in (256, 512, 1024))]
CUDA_SETUPS: Setups = {
    # Rows that wide accesses fit, of every number of channels that a lane holds, and rows that they do not fit; edges
    # that stand for one pair and for two.
    "rows": [
        Setup(6, 3, 19, 60),
        Setup(4, 2, 136, 20),
        Setup(5, 2, 12, 40),
        Setup(5, 2, 72, 30, symmetric=False),
        Setup(3, 2, 260, 20),
        Setup(2, 2, 520, 9),
        *_WHOLE_LANES,
    ],
    # Tied and apart; tiles of one class and of several; rows that wide accesses fit, fit in fp32 alone, and do not fit;
    # anchors with many edges, beside their columns and apart from them, and columns that begin again at class 0; more
    # views than a warp weighs at once.
    "tiles": [
        Setup(6, 3, 19, 60, p=0.3),
        Setup(5, 2, 136, 40, symmetric=False, p=0.5),
        Some(70, 2, 64, 0, p=0.1, tiles=((0, 1, 0, 36, 1), (69, 1, 10, 40, 0), (3, 2, 1, 34, 0))),
        Setup(4, 9, 36, 400),
        *_WHOLE_LANES,
    ],
    # Logits fewer than a block's threads and more, of which wide accesses fit or not; four classes a channel.
    "negatives": [Setup(6, 3, 19, 60), Setup(4, 2, 136, 20), Setup(3, 2, 260, 20)],
    "updates": [Setup(3, 2, 19, 20, p=0.3), Setup(2, 2, 72, 30)],
}
CUDA_BITS: Setups = {
    "rows": [Setup(6, 3, 19, 60), Setup(4, 2, 136, 20)],
    "tiles": [Some(20, 4, 40, 0, p=0.3, tiles=((0, 1, 0, 18, 1), (17, 3, 3, 1, 0)))],
    "negatives": [Setup(3, 2, 260, 20)],
    "updates": [Setup(3, 2, 19, 20, p=0.3)],
}
CUDA_UNALIGNED = {
    "rows": Setup(4, 2, 136, 20),
    "tiles": Setup(3, 2, 16, 12, p=0.3),
    "negatives": Setup(4, 2, 136, 20),
    "updates": Setup(2, 2, 16, 20),
}
MOST_TENSORS = 16  # of an op

# Where the update is one kernel, and with more channels than one block has.
TRITON_UPDATES = [
    Setup(3, 3, 19, 100, p=0.3),
    Setup(5, 2, 64, 100, symmetric=False, p=0.5),  # two blocks of rows in fp32
    Setup(2, 3, 128, 100, p=0.1),
    Setup(3, 2, 128, 100),
]

# More edges between two classes than a unit of work, or a program, has otherwise.
MOST_VIEWS = Some(3, 64, 3, 0, p=0.2, tiles=((0, 1, 1, 2, 1),))
TRITON_MOST_VIEWS = Some(3, 9, 5, 0, p=0.3, tiles=((1, 1, 1, 2, 1),))
CUDA_MOST_VIEWS = Some(2, 64, 5, 0, tiles=((0, 1, 1, 1, 0),))

# Tied and apart, one class a tile and several, odd channels and the paper's; rows past one block of any kernel.
GPU_SETUPS = [
    Setup(6, 3, 19, 40, p=0.3),
    Setup(5, 3, 130, 130, symmetric=False, p=0.5),
    Setup(4, 8, 33, 1000, p=0.1),
    Setup(50, 3, 24, 10_000),
    Setup(4, 3, 512, 100),
    Setup(3, 2, 1024, 100, p=0.2),
]


def _everywhere(setups: list[Setup]) -> Setups:
    return dict.fromkeys(KINDS, setups)


@dataclass(frozen=True)
class Backend:
    """An implementation of the stages' ops.

    Attributes:
        name: of the test's case.
        implementation: its name in gcahng.dispatch.
        setups: the setups of each kind of stage.
        precisions_: the precisions of products.
        low: the narrowest dtype of products.
        on: of a precision, on how many of the setups of a kind it is tried; all, if it is not named.
        device: where tensors are.
        arch: the instruction set that is in force; None on a GPU and for plain torch.
        twice: the setup on which two runs give the same bits.
        most_views: the setup with the most samples in a class, and a precision.
        library_products: whether Triton's stages leave the edge MLP's products to the library.
        quick: whether most cases are left out. This is for a GPU, where each case compiles kernels.
    """

    name: str
    implementation: str
    setups: Setups = field(repr=False)
    precisions_: tuple[str, ...] = ("float64", "float32", "bfloat16")
    low: torch.dtype = torch.bfloat16
    on: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)
    device: torch.device = CPU
    arch: str | None = None
    twice: Setup = SMALL
    most_views: tuple[Setup, str] = (MOST_VIEWS, "float64")
    library_products: bool = False
    quick: bool = False
    emulated = False

    def __str__(self) -> str:
        return self.name

    @property
    def ops(self) -> Any:
        """The ops, which are called with NamedTuples like those of gcahng.engine.schema.Ops."""
        return Ops(self.implementation) if self.library_products else ops_of(self.implementation)

    def precisions(self, stage: Stage, *, of_bits: bool = False) -> tuple[str, ...]:
        """The precisions that make a difference to a stage.

        Args:
            stage: the stage.
            of_bits: whether bits are compared, and not values with fp64.
        """
        found = self.precisions_ if stage.products else self.precisions_[:2]
        if of_bits:
            found = tuple(name for name in found if name != "float64")[:2]
        return (*found, NARROW) if stage.edges else found

    def cases(self, stage: Stage) -> Iterator[tuple[Setup, str]]:
        """Every setup and precision in which a stage is compared with the truth."""
        setups = self.setups[stage.kind]
        for precision in self.precisions(stage):
            for setup in setups[: self.on.get(precision)]:
                if not self.quick or self._quick(setup, precision):
                    yield setup, precision

    def setups_twice(self, stage: Stage) -> list[Setup]:
        """The setups on which the bits of two runs are compared."""
        return [self.twice]

    def _quick(self, setup: Setup, precision: str) -> bool:
        if self.implementation == "triton" and precision == "float64":
            return False
        return setup is GPU_SETUPS[0] or (setup.dim == 512 and precision == "bfloat16")


@dataclass(frozen=True)
class Emulated(Backend):
    """The CUDA kernels on the CPU (tests/emulator).

    Attributes:
        seed: the seed of the order of warps; -1: threads run in order.
        offset: by how many values tensors miss their alignment.
        only: which tensor of each call misses it; None: all of them.
        mode: what differs from a GPU, if not None (tests/emulator/ops.py).
    """

    seed: int = -1
    offset: int = 0
    only: int | None = None
    mode: Mode | None = None
    triton_products = False
    emulated = True

    def __str__(self) -> str:
        tensors = "" if not self.offset else " unaligned" if self.only is None else f" unaligned tensor {self.only}"
        return f"{self.name}{tensors}{f' seed {self.seed}' if self.seed >= 0 else ''}"

    @property
    def ops(self) -> Emulated:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        """An op, which is called with NamedTuples."""
        if name not in OPS:
            raise AttributeError(name)
        from emulator.ops import EmulatedOps, Mode

        run = getattr(EmulatedOps(self.seed, self.offset, self.mode or Mode(), only=self.only), name)
        return lambda *values: run(*OPS[name].flat(*values))

    def ordered(self, seed: int) -> Emulated:
        """The same with warps in another order."""
        return replace(self, seed=seed)

    def without_barriers(self, seed: int) -> Emulated:
        """The same as if __syncthreads did nothing."""
        from emulator.ops import Mode

        return replace(self, seed=seed, mode=Mode(drop_barriers=True))

    def setups_twice(self, stage: Stage) -> list[Setup]:
        return CUDA_BITS[stage.kind]

    def unaligned(self, stage: Stage) -> Iterator[tuple[Emulated, Setup, str]]:
        """Backends whose tensors miss their alignment: all at once, and each alone."""
        for precision in self.precisions(stage):
            yield replace(self, offset=1), CUDA_UNALIGNED[stage.kind], precision
        for precision in self.precisions(stage, of_bits=True):
            for only in range(MOST_TENSORS):
                yield replace(self, offset=1, only=only), SMALL, precision


@contextmanager
def in_force(backend: Backend) -> Iterator[Backend]:
    """A context in which the backend is available, with its instruction set. It skips the test if the processor does
    not have that."""
    if backend.device.type == "cuda":
        reasons = [available(part, "cuda") for part in backend.implementation.split("+")]
        assert not any(reasons), reasons
    if backend.arch is None:
        yield backend
        return
    before = native.cpu_arch()
    assert before is not None, native.load("_C_cpu").reason
    try:
        native.set_cpu_arch(backend.arch)
    except UserError as error:
        pytest.skip(str(error))
    assert native.cpu_arch() == backend.arch
    yield backend
    native.set_cpu_arch(before)


_IN_FORCE = native.cpu_arch()


def _cpp(arch: str, *, every: bool) -> Backend:
    """C++ with one instruction set.

    Args:
        every: whether it runs on all setups, or only on the first one.
    """
    few = _everywhere(CPP_SETUPS if every else CPP_SETUPS[:1])
    name = f"cpp-{arch}{'-everywhere' if every and arch != _IN_FORCE else ''}"
    # Where the processor has no bf16, its products with the last setup's weights take longest.
    return Backend(name, "cpp", few, on={"bfloat16": len(CPP_SETUPS) - 1, NARROW: 2}, arch=arch)


CPP = [_cpp(arch, every=arch == _IN_FORCE) for arch in native.CPU_ARCHES]
CPP_EVERYWHERE = [_cpp(arch, every=True) for arch in native.CPU_ARCHES if arch != _IN_FORCE]
TRITON = Backend(
    "triton",
    "triton",
    _everywhere(TRITON_SETUPS) | {"updates": TRITON_UPDATES},
    ("float64", "float32", "bfloat16", "float16"),
    # In fp64 every formula is seen to be right; other precisions differ in loads, casts and stores.
    on={"float32": 2, "bfloat16": 2, "float16": 1, NARROW: 1},
    twice=Setup(3, 2, 19, 40, p=0.3),
    most_views=(TRITON_MOST_VIEWS, "float64"),
)
TRITON_BETWEEN_PRODUCTS = replace(  # in fp64 they are so anyway
    TRITON,
    name="triton-between-products",
    setups=_everywhere(TRITON_SETUPS[:2]),
    precisions_=("float32", "bfloat16", "float16"),
    library_products=True,
)
EMULATED = Emulated(
    "emulated",
    "cuda",
    CUDA_SETUPS,
    ("float64", "float32", "bfloat16", "float16"),
    # Rows in fp64 have two shapes; in fp32, and with edges in bf16, they have all.
    on={"float64": 4, "bfloat16": 4, "float16": 2},
    most_views=(CUDA_MOST_VIEWS, "float32"),
)


def _gpu(implementation: str, *, quick: bool) -> Backend:
    return Backend(
        f"gpu-{implementation}{'' if quick else '-everywhere'}",
        implementation,
        _everywhere(GPU_SETUPS),
        device=CUDA,
        twice=GPU_SETUPS[3],
        most_views=(MOST_VIEWS, "float32"),
        quick=quick,
    )


GPU = [_gpu(implementation, quick=True) for implementation in ("cuda", "triton")]
GPU_EVERYWHERE = [_gpu(implementation, quick=False) for implementation in ("cuda", "triton", "cuda+triton")]
