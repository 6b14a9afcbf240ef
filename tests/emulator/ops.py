"""The engine's ops by their CUDA kernels, run in the emulator: `EmulatedOps` stands for torch.ops.gcahng."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from emulator.build import Guarded, compiled
from torch import Tensor


class Accesses(NamedTuple):
    """Of one argument: the bytes that an op's kernels read and write, through caches or not, and where the lowest
    begins and the highest ends. Numbers that an edge has one of do not count."""

    read: int
    written: int
    lowest: int
    highest: int


class Mode(NamedTuple):
    """What differs from a GPU: see emu::Mode in tests/emulator/cuda_emulator.h."""

    last_block: bool = False
    drop_barriers: bool = False
    approximation: int = 0


Traffic = dict[str, dict[str, Accesses]]  # of each op's last call, by argument ("scratch" is one)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/common/dtype.h


@dataclass(frozen=True)
class Emulated:
    """An op, as `EmulatedOps` calls it.

    Attributes:
        stem: tests/emulator/<stem>.cpp has it.
        inputs: the names of the arguments that are only read, in order.
        outputs: the names of those that are written, which follow.
        wide: an argument of the accumulating type, or edges.
        low: one of the products' type, where the op has that type; given as None, it is the edges' type.
        rows: an argument of shape (T, D). T is passed where the op takes no tile.
        edges: an argument of the edges' type, where the op has that type: the accumulating one, or bf16 beside fp32.
        scratch: the type of scratch, if not the accumulating one.
    """

    stem: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    wide: str
    low: str | None
    rows: str
    edges: str | None = None
    scratch: torch.dtype | None = None


def _op(stem: str, arguments: str, wide: str, low: str | None = None, rows: str | None = None, **more: Any) -> Emulated:
    inputs, outputs = (tuple(part.split()) for part in arguments.split("->"))
    return Emulated(stem, inputs, outputs, wide, low, rows or wide, **more)


_GATE = "tile dropout scale draw u c v gamma beta e"
_MLP_OUT, _MLP_OUT_GRADIENTS = "mean rstd w d gamma", "ds low scaled mean_dn mean_n_dn sums"
_MIX = "tile z d_plus kappa pull"
OPS = {
    "norm_gelu_": _op("norm_gelu", "t gamma beta -> full low", "t", "low", edges="t"),
    "edge_start_fwd_": _op("edge_start", "tile x -> full low", "x", "low"),
    "edge_start_bwd_": _op("edge_start", "tile x de -> dx", "x", edges="de"),
    "edge_to_node_fwd_": _op("edge_to_node", "tile product bias -> sum", "bias", "product"),
    "edge_to_node_bwd_": _op("edge_to_node", "tile product bias ds -> dp db", "bias", "product"),
    "gate_fwd_": _op("gate", f"{_GATE} -> e1 low weight_i weight_j", "e", "low", edges="e"),
    "gate_bwd_": _op("gate", f"{_GATE} de1 weight_i weight_j -> de du dc dv dgamma dbeta", "e", edges="e"),
    "mlp_in_fwd_": _op("mlp_in", "h bias -> g mean rstd", "bias", "h", "h"),
    "mlp_in_bwd_": _op("mlp_in", "h bias dn mean rstd mean_dn mean_n_dn -> g dh db", "bias", "h", "h"),
    "mlp_out_fwd_": _op("mlp_out", f"product e1 {_MLP_OUT} beta -> s full low", "e1", "product", edges="e1"),
    "mlp_out_bwd_": _op("mlp_out", f"s e1 dy {_MLP_OUT} -> {_MLP_OUT_GRADIENTS}", "e1", "low", edges="e1"),
    "head_moments_": _op("head", "tile e -> sums", "e", edges="e", scratch=torch.float64),
    "head_fwd_": _op("head", "product bias -> theta", "bias", "product", "product", edges="theta"),
    "head_bwd_": _op("head", "theta dtheta -> dpre sum", "theta", "dpre", edges="theta"),
    "head_sums_": _op("head", "dy e -> wide sums", "e", "dy", edges="e"),
    "head_norm_": _op("head", "tile dy e scale a b -> de", "e", edges="e"),
    "mix_fwd_": _op("mix", f"{_MIX} theta -> negatives logits squares", "z", edges="theta"),
    "mix_bwd_theta_": _op("mix", f"{_MIX} dn -> dtheta", "z", edges="dtheta"),
    "mix_bwd_z_": _op("mix", f"{_MIX} theta dlogits square dn -> dz dd_plus", "z", edges="theta"),
    "cross_entropy_": _op("cross_entropy", "logits bias labels scale -> loss d", "bias", "logits", "logits"),
    "similarity_": _op("similarity", "anchors node negatives counted scale -> loss dn", "negatives"),
    "diversity_fwd_": _op("diversity", "tile theta -> sum square", "theta", edges="theta"),
    "diversity_bwd_": _op("diversity", "tile theta mean scale -> dtheta", "theta", edges="theta"),
}
STEMS = tuple(dict.fromkeys(op.stem for op in OPS.values()))


def compile_all() -> None:
    """Compiles all stems' libraries, as many at once as there are processors.

    A stem that is not compiled here is when it is used.
    """
    with ThreadPoolExecutor(torch.multiprocessing.cpu_count()) as pool:
        list(pool.map(compiled, STEMS))


class EmulatedOps:
    """Stands for torch.ops.gcahng: it has a method for each op of `OPS`, with the op's flat arguments.

    Every call works on copies between fences of NaN. What is not an output must come back as it was. Scratch is full of
    NaN.

    Args:
        seed: the order of warps (tests/emulator/cuda_emulator.h).
        offset: values by which tensors miss their alignment: all of them, or the `only`-th of each call.
        mode: what differs from a GPU.
        only: see offset.
        bare: whether kernels work on the tensors themselves, which are not copied, and on empty scratch.
        traffic: where the bytes that kernels read and write are put (see `Traffic`); None: they are not counted.
    """

    def __init__(
        self,
        seed: int = -1,
        offset: int = 0,
        mode: Mode = Mode(),  # noqa: B008  # cannot be changed
        only: int | None = None,
        bare: bool = False,
        traffic: Traffic | None = None,
    ) -> None:
        self._seed, self._offset, self._mode, self._only = seed, offset, mode, only
        self._bare, self._traffic = bare, traffic

    def run(self, name: str, *flat: Any) -> None:
        """Runs the op of this name. Raises RuntimeError for what the launcher reports."""
        op = OPS[name]
        arguments = dict(zip((*op.inputs, *op.outputs), flat, strict=True))
        edges = [] if op.edges is None else [arguments[op.edges].dtype]
        dtype = arguments[op.wide].dtype
        if op.wide == op.edges and dtype is torch.bfloat16:
            dtype = torch.float32
        low = [] if op.low is None else [(*edges, dtype)[0] if arguments[op.low] is None else arguments[op.low].dtype]
        shape = arguments[op.rows].shape
        sizes = shape[-1:] if "tile" in op.inputs else (shape.numel() // shape[-1], shape[-1])
        copies = _Copies(self._offset, self._only, self._bare)
        slots = [DTYPES.index(dtype), *map(DTYPES.index, low), *map(copies.passed, flat), *sizes]
        slots += map(DTYPES.index, edges)
        library = compiled(op.stem)
        _function(library, "emulator_mode", None)(*map(int, self._mode))
        count = _function(library, f"scratch_{name}", ctypes.c_int64)(_packed(slots))
        scratch = torch.empty(count, dtype=op.scratch or dtype) if count else None
        if scratch is not None and not self._bare:
            scratch.fill_(torch.nan)
        place = ctypes.c_void_p(copies.passed(scratch))
        counting = nullcontext()
        if self._traffic is not None:
            named = {name: x for name, x in arguments.items() if isinstance(x, Tensor)} | {"scratch": scratch}
            counting = _counted(library, name, {name: copies.of(x) for name, x in named.items()}, self._traffic)
        with counting:
            message = _function(library, f"emulate_{name}", ctypes.c_char_p)(self._seed, _packed(slots), place)
        if message is not None:
            raise RuntimeError(message.decode())
        outputs = (scratch, *flat[len(op.inputs) :])
        copies.give_back({output.data_ptr() for output in outputs if output is not None}, name)


class _Copies:
    """The tensors of one call, each once, between fences."""

    def __init__(self, offset: int, only: int | None, bare: bool) -> None:
        self._offset, self._only, self._bare = offset, only, bare
        self._copies: dict[int, tuple[Tensor, Guarded]] = {}
        self._own: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []

    def passed(self, argument: Any) -> int | float | None:
        """What stands for the argument in a slot: a number, or the address of a copy."""
        if isinstance(argument, Sequence):
            argument = torch.tensor(argument)
            self._alive.append(argument)
        if not isinstance(argument, Tensor):
            return None if argument is None else float(argument)
        assert argument.is_contiguous()
        if not argument.is_floating_point():
            return argument.data_ptr()
        if self._bare:
            self._own[argument.data_ptr()] = argument
            return argument.data_ptr()
        if argument.data_ptr() not in self._copies:
            offset = self._offset if self._only in (None, len(self._copies)) else 0
            guarded = Guarded(*argument.shape, dtype=argument.dtype, offset=offset)
            guarded.tensor.copy_(argument)
            self._copies[argument.data_ptr()] = argument, guarded
        return self._copies[argument.data_ptr()][1].tensor.data_ptr()

    def of(self, argument: Tensor | None) -> Tensor | None:
        """The copy of a tensor that was passed; None of one of whole numbers, and of None."""
        if argument is None or self._bare:
            return None if argument is None else self._own.get(argument.data_ptr())
        found = self._copies.get(argument.data_ptr())
        return None if found is None else found[1].tensor

    def give_back(self, written: set[int], name: str) -> None:
        """Copies back what lies at these addresses, once nothing else was written."""
        for place, (argument, guarded) in self._copies.items():
            if place in written:
                argument.copy_(guarded.check())
            else:
                before, after = (x.reshape(-1).view(torch.uint8) for x in (argument, guarded.check()))
                assert torch.equal(before, after), f"{name} wrote to an input"


@contextmanager
def _counted(library: ctypes.CDLL, op: str, copies: dict[str, Tensor | None], traffic: Traffic) -> Iterator[None]:
    """Counts the accesses of these tensors; of one that has two names, under the first."""
    once = {x.data_ptr(): name for name, x in reversed(copies.items()) if x is not None}
    names = list(once.values())
    begin = (ctypes.c_size_t * len(names))(*once)
    end = (ctypes.c_size_t * len(names))(*(copies[name].data_ptr() + copies[name].nbytes for name in names))
    found = [(ctypes.c_int64 * len(names))(*[start] * len(names)) for start in (0, 0, 2**62, 0)]
    watch = _function(library, "emulator_watch", None)
    watch(len(names), begin, end, *found)
    try:
        yield
    finally:
        watch(0, *[None] * 6)
    traffic[op] = {name: Accesses(*(x[k] for x in found)) for k, name in enumerate(names)}


def _packed(slots: Sequence[int | float | None]) -> ctypes.Array[ctypes.c_uint64]:
    """Slots of 64 bits, as tests/emulator/arguments.h reads them."""
    packed = b"".join(struct.pack("d", x) if isinstance(x, float) else struct.pack("q", x or 0) for x in slots)
    return (ctypes.c_uint64 * len(slots)).from_buffer_copy(packed)


def _function(library: ctypes.CDLL, name: str, result: type | None) -> Callable[..., Any]:
    function = getattr(library, name)
    function.restype = result
    return function


def _method(name: str) -> Callable[..., None]:
    def run(self: EmulatedOps, *flat: Any) -> None:
        self.run(name, *flat)

    op = OPS[name]
    run.__name__, run.__doc__ = name, f"({', '.join((*op.inputs, *op.outputs))}), in {op.stem}.cu."
    return run


for _name in OPS:
    setattr(EmulatedOps, _name, _method(_name))
