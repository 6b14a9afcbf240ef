"""How the engine's stages become torch ops: a stage's arguments are NamedTuples, and its schema is read off them.

The same NamedTuples travel from the engine to the Triton launcher. They are flattened where torch's dispatcher is
called (`Ops`) and put together again where a Triton launcher is. Schemas and fakes are made here, in Python, so that
they exist without a native library.

Every op exists in two namespaces: `gcahng`, which the native libraries implement (C++ on the CPU, CUDA C++ on CUDA
devices), and `gcahng_triton`, which runs the Triton launchers of `gcahng.kernels`. They are bare forwards and backwards
without autograd; they write into tensors that the engine owns.
"""

from __future__ import annotations

import functools
import importlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
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
    """A tile as the ops take it: one int[].

    Attributes:
        A: anchor classes.
        K: views of a class.
        O: offsets.
        first: the first anchor class.
        offset: the first offset.
        mirrored: how many of the offsets stand for one direction alone; the others stand for both.
        classes: classes C of the batch.
    """

    A: int
    K: int
    O: int  # noqa: E741  as in (A, K, O, K)
    first: int
    offset: int
    mirrored: int
    classes: int


# -- NamedTuples and schemas


def _is_struct(kind: Any) -> bool:
    """Whether a type is a NamedTuple."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(struct: type) -> dict[str, Any]:
    """The declared type of each field of a NamedTuple."""
    return typing.get_type_hints(struct, include_extras=True)


@functools.cache
def _is_whole(struct: type) -> bool:
    """Whether a NamedTuple holds whole numbers alone; it is then passed as one int[]."""
    return all(kind is int for kind in _fields(struct).values())


def _optional(kind: Any) -> tuple[Any, bool]:
    """X | None → X, True."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return inner, True
    return kind, False


class Leaf(NamedTuple):
    """One argument of an op.

    Attributes:
        name: the argument's name.
        kind: its type in the schema.
        written: whether the op writes to it.
    """

    name: str
    kind: str
    written: bool


def leaves(struct: type, all_optional: bool = False) -> Iterator[Leaf]:
    """The arguments that a NamedTuple's fields become, in order. The fields of nested NamedTuples are among them.

    Args:
        struct: the NamedTuple's type.
        all_optional: whether every argument may be None, because the whole NamedTuple may be.
    """
    for name, declared in _fields(struct).items():
        kind, optional = _optional(declared)
        optional = optional or all_optional
        if _is_struct(kind) and not _is_whole(kind):
            yield from leaves(kind, optional)
            continue
        written = typing.get_origin(kind) is Annotated
        base = "int[]" if _is_struct(kind) else _PLAIN[typing.get_args(kind)[0] if written else kind]
        yield Leaf(name, f"{base}?" if optional else base, written)


def schema_of(*structs: type) -> str:
    """The argument list of an op that takes these NamedTuples, in the form that torch.library.define reads."""
    parts, letters = [], iter("abcdefghijklmnopqrstuvwxyz")
    for leaf in (leaf for struct in structs for leaf in leaves(struct)):
        kind = leaf.kind.replace("Tensor", f"Tensor({next(letters)}!)", 1) if leaf.written else leaf.kind
        parts.append(f"{kind} {leaf.name}")
    return ", ".join(parts)


class _Part(NamedTuple):
    """A field of a NamedTuple.

    Attributes:
        struct: the field's type if that is a NamedTuple, else None.
        count: how many leaves the field has.
        optional: whether it may be None.
    """

    struct: type | None
    count: int
    optional: bool


@functools.cache  # every call of an op asks for it
def _parts(struct: type) -> tuple[_Part, ...]:
    """The fields of a NamedTuple."""
    parts = []
    for declared in _fields(struct).values():
        kind, optional = _optional(declared)
        nested = _is_struct(kind)
        count = len(list(leaves(kind))) if nested and not _is_whole(kind) else 1
        parts.append(_Part(kind if nested else None, count, optional))
    return tuple(parts)


def flatten(struct: type, value: Any) -> list[Any]:
    """Lists the leaves of a NamedTuple. A nested NamedTuple that is None becomes as many Nones as it has leaves.

    Args:
        struct: the NamedTuple's type.
        value: an instance of it.
    """
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
    """Undoes `flatten`. An optional NamedTuple whose leaves are all None becomes None.

    Args:
        struct: the NamedTuple's type.
        flat: an iterator over the leaves, which is advanced by as many as the NamedTuple has.
    """
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


def unflatten_all(structs: tuple[type, ...], flat: Iterable[Any]) -> list[Any]:
    """NamedTuples of these types, from all their leaves."""
    rest = iter(flat)
    return [unflatten(struct, rest) for struct in structs]


# -- ops


@dataclass(frozen=True)
class Op:
    """A stage's forward or backward as a torch op of both namespaces.

    Attributes:
        name: the op's name, such as "gate_fwd_".
        launcher: "<stem>.<function>". The function is in gcahng/kernels/<stem>.py and takes the NamedTuples.
        structs: the types of the NamedTuples that the op takes.
    """

    name: str
    launcher: str
    structs: tuple[type, ...]

    def flat(self, *values: Any) -> list[Any]:
        """Flattens the NamedTuples into the op's arguments."""
        return [leaf for struct, value in zip(self.structs, values, strict=True) for leaf in flatten(struct, value)]

    def launch(self, *flat: Any) -> None:
        """Puts the NamedTuples together again and calls the Triton launcher with them."""
        stem, function = self.launcher.split(".")
        getattr(importlib.import_module(f"gcahng.kernels.{stem}"), function)(*unflatten_all(self.structs, flat))


OPS: dict[str, Op] = {}


def declare(name: str, launcher: str, *structs: type) -> None:
    """Defines an op in both namespaces. It writes into its arguments and returns nothing.

    Args:
        name: the op's name; it ends in an underscore, since the op writes in place.
        launcher: see Op.
        structs: the types of the NamedTuples that the op takes.
    """
    op = OPS[name] = Op(name, launcher, structs)
    for namespace, library in _libraries.items():
        library.define(f"{name}({schema_of(*structs)}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", lambda *_: None, lib=library)
    for key in ("CUDA", "CPU"):  # on the CPU under TRITON_INTERPRET=1
        _libraries[TRITON].impl(name, op.launch, key)


class Operator(NamedTuple):
    """An operator that returns new tensors.

    Attributes:
        structs: the types of the NamedTuples that it takes.
        run: what it does; called with the NamedTuples.
    """

    structs: tuple[type, ...]
    run: Callable[..., Any]

    def values(self, flat: Iterable[Any]) -> list[Any]:
        """Puts the NamedTuples together again."""
        return unflatten_all(self.structs, flat)

    def __call__(self, *flat: Any) -> Any:
        """Runs it on flat arguments, as torch's dispatcher has them."""
        return self.run(*self.values(flat))


def define_operator(
    name: str, structs: tuple[type, ...], returns: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Operator:
    """Defines an operator that returns new tensors; see `differentiate_operator` for its backward.

    Args:
        name: the operator's name in the namespace `gcahng`.
        structs: the types of the NamedTuples that it takes.
        returns: the type of its result, as torch.library.define reads it.
        run: what it does on CPU and CUDA tensors; called with the NamedTuples.
        fake: the same for tensors without data.
    """
    library, operator = _libraries[NATIVE], Operator(structs, run)
    library.define(f"{name}({schema_of(*structs)}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(name, operator, key)
    torch.library.register_fake(f"{NATIVE}::{name}", Operator(structs, fake), lib=library)
    return operator


def differentiate_operator(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Gives an operator its backward.

    Args:
        name: the operator's name.
        backward: see torch.library.register_autograd.
        setup: saves what the backward needs (there: setup_context).
    """
    torch.library.register_autograd(f"{NATIVE}::{name}", backward, setup_context=setup, lib=_libraries[NATIVE])


class Ops:
    """The ops of one implementation: `ops.gate_fwd_(inputs, outputs)` runs the torch op gate_fwd_ on NamedTuples.

    Args:
        base: the implementation of every op that `routes` does not name: cpp, cuda or triton.
        routes: another implementation for some ops, by the op's name.
        triton_products: whether Triton also computes the edge MLP's matrix products.
    """

    def __init__(self, base: str, routes: dict[str, str] | None = None, *, triton_products: bool = False) -> None:
        self._base, self._routes, self.triton_products = base, routes or {}, triton_products

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in OPS:
            raise AttributeError(f"there is no op {name}")
        op, run = OPS[name], self.overload(name)

        def call(*values: Any) -> None:
            run(*op.flat(*values))

        setattr(self, name, call)  # the next call finds it without this function
        return call

    def overload(self, name: str) -> Any:
        """The torch op of this name that runs."""
        namespace = TRITON if self._routes.get(name, self._base) == "triton" else NATIVE
        return getattr(getattr(torch.ops, namespace), name).default
