"""How the engine's stages become torch ops: a stage's arguments are NamedTuples, and its schema is read off them.

The same NamedTuples travel from the engine to the Triton launcher. They are flattened where torch's dispatcher is
called (`Op.__call__`) and put together again where a Triton launcher is. Schemas and fakes are made here, in Python, so
that they exist without a native library.

Every op exists in two namespaces: `gcahng`, which the native libraries implement (C++ on the CPU, CUDA C++ on CUDA
devices), and `gcahng_triton`, which runs the Triton launchers of `gcahng.kernels`. They are bare forwards and backwards
without autograd; they write into tensors that the engine owns.
"""

from __future__ import annotations

import functools
import importlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

NATIVE, TRITON = "gcahng", "gcahng_triton"
NAMESPACES = (NATIVE, TRITON)
Written = Annotated[Tensor, "written"]
"""A tensor that the op writes to, or adds to."""

_libraries = {namespace: torch.library.Library(namespace, "DEF") for namespace in NAMESPACES}
_PLAIN = {int: "int", float: "float", bool: "bool", str: "str", Tensor: "Tensor", list[Tensor]: "Tensor[]"}


class TileNumbers(NamedTuple):
    """A tile as the ops take it, one int[]: A anchor classes of K views, O offsets, the first anchor class, the first
    offset, the offsets that stand for one direction alone, and the C classes of the batch."""

    A: int
    K: int
    O: int  # noqa: E741  as in (A, K, O, K)
    first: int
    offset: int
    mirrored: int
    classes: int


def library(namespace: str) -> torch.library.Library:
    """The library object that owns a namespace's definitions."""
    return _libraries[namespace]


# -- NamedTuples and schemas


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(struct: type) -> dict[str, Any]:
    return typing.get_type_hints(struct, include_extras=True)


@functools.cache
def _is_whole(struct: type) -> bool:
    """A NamedTuple of whole numbers alone is one int[]."""
    return all(kind is int for kind in _fields(struct).values())


def _optional(kind: Any) -> tuple[Any, bool]:
    """X | None → X, True."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return inner, True
    return kind, False


class Leaf(NamedTuple):
    """One argument of an op: its name, its type in the schema, and whether the op writes to it."""

    name: str
    kind: str
    written: bool


def leaves(struct: type, maybe: bool = False) -> Iterator[Leaf]:
    """The arguments that a NamedTuple's fields become, in order, those of NamedTuples in it among them."""
    for name, declared in _fields(struct).items():
        kind, optional = _optional(declared)
        optional = optional or maybe
        if _is_struct(kind) and not _is_whole(kind):
            yield from leaves(kind, optional)
            continue
        written = typing.get_origin(kind) is Annotated
        base = "int[]" if _is_struct(kind) else _PLAIN[typing.get_args(kind)[0] if written else kind]
        yield Leaf(name, f"{base}?" if optional else base, written)


def schema_of(*structs: type) -> str:
    """The arguments of an op that takes these NamedTuples, as torch.library.define reads them."""
    parts, letters = [], iter("abcdefghijklmnopqrstuvwxyz")
    for leaf in (leaf for struct in structs for leaf in leaves(struct)):
        kind = leaf.kind.replace("Tensor", f"Tensor({next(letters)}!)", 1) if leaf.written else leaf.kind
        parts.append(f"{kind} {leaf.name}")
    return ", ".join(parts)


class _Part(NamedTuple):
    """A field of a NamedTuple: what it holds if that is a NamedTuple, and how many leaves it has (1: no NamedTuple)."""

    struct: type | None
    count: int
    optional: bool


@functools.cache  # it is asked for at every call of an op
def _parts(struct: type) -> tuple[_Part, ...]:
    parts = []
    for declared in _fields(struct).values():
        kind, optional = _optional(declared)
        nested = _is_struct(kind)
        count = len(list(leaves(kind))) if nested and not _is_whole(kind) else 1
        parts.append(_Part(kind if nested else None, count, optional))
    return tuple(parts)


def flatten(struct: type, value: Any) -> list[Any]:
    """A NamedTuple's value → its leaves. A NamedTuple in it that is None has so many Nones."""
    flat: list[Any] = []
    for part, field in zip(_parts(struct), value, strict=True):
        if part.struct is None or _is_whole(part.struct):
            flat.append(field)
        elif field is None:
            flat += [None] * part.count
        else:
            flat += flatten(part.struct, field)
    return flat


def unflatten(struct: type, flat: Iterator[Any]) -> Any:
    """What `flatten` made → the NamedTuple; one that is optional and whose leaves are all None is None."""
    values = []
    for part in _parts(struct):
        if part.struct is None:
            values.append(next(flat))
        elif _is_whole(part.struct):
            values.append(part.struct(*next(flat)))
        else:
            inner = [next(flat) for _ in range(part.count)]
            absent = part.optional and all(x is None for x in inner)
            values.append(None if absent else unflatten(part.struct, iter(inner)))
    return struct(*values)


# -- ops


@dataclass(frozen=True)
class Op:
    """A stage's forward or backward as a torch op of both namespaces.

    Attributes:
        name: such as "gate_fwd_".
        launcher: "<stem>.<function>", which gcahng/kernels/<stem>.py has; it takes the NamedTuples.
        structs: the NamedTuples that the op takes.
    """

    name: str
    launcher: str
    structs: tuple[type, ...]

    def flat(self, *values: Any) -> list[Any]:
        """The NamedTuples' values as the op's arguments."""
        return [leaf for struct, value in zip(self.structs, values, strict=True) for leaf in flatten(struct, value)]

    def launch(self, *flat: Any) -> None:
        """Calls the Triton launcher with the NamedTuples of these arguments."""
        stem, function = self.launcher.split(".")
        rest = iter(flat)
        values = [unflatten(struct, rest) for struct in self.structs]
        getattr(importlib.import_module(f"gcahng.kernels.{stem}"), function)(*values)


OPS: dict[str, Op] = {}


def declare(name: str, launcher: str, *structs: type) -> Op:
    """Defines an op that writes into its arguments and returns nothing, in both namespaces."""
    op = OPS[name] = Op(name, launcher, structs)
    for namespace, library in _libraries.items():
        library.define(f"{name}({schema_of(*structs)}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", lambda *_: None, lib=library)
    for key in ("CUDA", "CPU"):  # on the CPU under TRITON_INTERPRET=1
        _libraries[TRITON].impl(name, op.launch, key)
    return op


class Ops:
    """The ops as an implementation has them: `ops(op, *values)` runs one on NamedTuples.

    Args:
        base: the implementation of all ops that `routes` does not name: cpp, cuda or triton.
        routes: implementations by the op's name.
        triton_products: whether the edge MLP's products are Triton's too.
    """

    def __init__(self, base: str, routes: dict[str, str] | None = None, *, triton_products: bool = False) -> None:
        self._base, self._routes, self.triton_products = base, routes or {}, triton_products

    def __call__(self, op: Op, *values: Any) -> None:
        self.overload(op.name)(*op.flat(*values))

    def overload(self, name: str) -> Any:
        """The torch op of this name that runs."""
        namespace = TRITON if self._routes.get(name, self._base) == "triton" else NATIVE
        return getattr(getattr(torch.ops, namespace), name).default
