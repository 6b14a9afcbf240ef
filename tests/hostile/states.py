"""States of the loss, of authors' checkpoints and of runs whose tensors and numbers are not what they should be.

A load is all or nothing: what is refused has changed nothing, and what is accepted can train.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from hostile.case import FINE, REFUSED, Case, Fault, contents, no_temporaries, refused, unchanged
from hostile.values import OTHER, REAL, TEXT, WHOLE

CLASSES, DIM = 5, 8


def make_loss(seed: int = 3, layers: int = 1) -> Any:
    """A small loss."""
    import gcahng

    return gcahng.GCAHNGLoss(CLASSES, DIM, layers=layers, heads=2, seed=seed, epochs=4, steps_per_epoch=2)


def train(loss: Any, first: int, last: int) -> list[Any]:
    """Train steps on batches that follow from their numbers; returns the losses."""
    import torch

    found = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        z = torch.randn(6, DIM, generator=generator, requires_grad=True)
        value = loss(z, torch.tensor([0, 1, 2, 0, 1, 2]))
        value.backward()
        loss.generator_step()
        found.append(value.detach())
    return found


def case(case: Case) -> str:
    """One damaged state, loaded in one of the ways in which states are loaded."""
    return case.chance.choice((_loss, _loss, _loss, _official, _checkpoint))(case)


def _loss(case: Case) -> str:
    import torch

    chance = case.chance
    good = torch.load(case.world / "states" / "loss.pt", weights_only=True)
    state = copy.deepcopy(good)
    for _ in range(chance.choice((1, 1, 1, 2))):
        case.tell(f"load_state_dict with {mutate(chance, state)}")
    loss = make_loss(seed=99)
    train(loss, 10, 11)
    before = copy.deepcopy(loss.state_dict())
    # torch's own words for keys and shapes that do not fit are RuntimeErrors, as for every module.
    if refused(lambda: loss.load_state_dict(state), also=(RuntimeError,)):
        if not same(before, loss.state_dict()):
            raise Fault("half-changed", f"the loss changed: {', '.join(different(before, loss.state_dict())[:4])}")
        _goes_on(loss)
        return REFUSED
    _goes_on(loss, as_before=state if same(state, good) else None)
    return FINE


def _goes_on(loss: Any, as_before: dict[str, Any] | None = None) -> None:
    """Two more steps must not crash; they may be refused. From an unchanged state they give what it gives."""
    import torch

    losses: list[Any] = []
    stopped = refused(lambda: losses.extend(train(loss, 3, 5)))
    if as_before is not None and not stopped:
        other = make_loss(seed=1)
        other.load_state_dict(as_before)
        if not torch.equal(torch.stack(losses), torch.stack(train(other, 3, 5))):
            raise Fault("wrong", "the same state gave other losses")


def _official(case: Case) -> str:
    import torch

    import gcahng

    chance = case.chance
    state = torch.load(case.world / "states" / "official.pt", weights_only=True)
    case.tell(f"load_official_state_dict with {mutate(chance, state)}")
    loss = make_loss(seed=99)
    before = copy.deepcopy(loss.state_dict())
    if refused(lambda: gcahng.load_official_state_dict(loss, state)):
        if not same(before, loss.state_dict()):
            raise Fault("half-changed", f"the loss changed: {', '.join(different(before, loss.state_dict())[:4])}")
        return REFUSED
    _goes_on(loss)
    return FINE


def _checkpoint(case: Case) -> str:
    """A checkpoint that is whole as a file, and holds something else than it should."""
    import torch

    chance = case.chance
    run = case.copy("half")
    command = chance.choice((["train", "--resume"], ["train", "--resume"], ["eval"], ["embed"]))
    for name in ("last", "previous"):
        path = run / "checkpoints" / f"{name}.pt"
        state = torch.load(path, weights_only=True)
        how = mutate(chance, state)
        if name == "last" or chance.random() < 0.5:
            try:
                torch.save(state, path)
            except Exception:  # such a state is on no disk
                return FINE
            case.tell(f"{name}.pt with {how}")
    before = contents(run)
    if command == ["embed"]:
        ran = case.command("embed", run, "--out", case.folder / "x.npy")
    else:
        ran = case.command(*command, run)
    no_temporaries(case.folder)
    if ran.status == 2 and command[0] != "train":
        unchanged(before, contents(run))
    return ran.verdict


# -- mutations


def mutate(chance: random.Random, state: Any) -> str:
    """Change something in a nested state, and say what."""
    places = list(_places(state, ""))
    deep = [place for place in places if place[0].count("/") > 1] or places
    path, parent, key = chance.choice(chance.choice((places, deep)))
    value = parent[key]
    kind = chance.choice(("drop", "other", "tensor", "tensor", "tensor", "extra"))
    if kind == "drop":
        del parent[key]
    elif kind == "extra" and isinstance(parent, dict):
        parent["surprise"] = 1
        return f"a surprise beside {path}"
    elif _is_tensor(value) and kind == "tensor":
        name, change = chance.choice(TENSORS)
        parent[key] = change(value)
        return f"{path} made {name}"
    else:
        new = chance.choice(
            (chance.choice(WHOLE), chance.choice(REAL), chance.choice(TEXT[:8]), chance.choice(OTHER[:7]))
        )
        if isinstance(value, (int, float)) and chance.random() < 0.3:
            new = type(value)(value)  # neutral
        parent[key] = new
        return f"{path} = {new!r}"
    return f"{path} dropped"


def _places(value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield f"{path}/{key}", value, key
        yield from _places(value[key], f"{path}/{key}")


def _tensor_changes() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    import torch

    yield "empty", lambda t: t.new_empty(0)
    yield "0-dim", lambda t: t.reshape(-1)[:1].sum()
    yield "an expanded view", lambda t: t.reshape(-1)[:1].sum().expand(t.shape)
    yield "flat", lambda t: t.reshape(-1).clone()
    yield "one row short", lambda t: t[:-1].clone() if t.ndim and len(t) > 1 else t.new_empty(2)
    yield "one row long", lambda t: torch.cat([t, t[:1]]) if t.ndim else t.new_zeros(3)
    yield "transposed", lambda t: t.T if t.ndim == 2 else t[None]
    yield "strided", lambda t: torch.stack([t, t], dim=-1)[..., 0]
    yield "float64", lambda t: t.double()
    yield "float16", lambda t: t.half()
    yield "int64", lambda t: t.long()
    yield "bool", lambda t: t.bool()
    yield "complex", lambda t: t.to(torch.complex64)
    yield "nan", lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, -1)
    yield "inf", lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else torch.full_like(t, 2**31 - 1)
    yield "huge", lambda t: t * 1e30 if t.is_floating_point() else t + 2**40
    yield "negative", lambda t: -t - 1
    yield "meta", lambda t: t.to("meta")
    yield "sparse", lambda t: t.to_sparse() if t.ndim else t.new_zeros(1).to_sparse()
    yield "a parameter", lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t.clone()
    yield "a copy", lambda t: t.clone()


class _Lazy:
    """TENSORS without importing torch with this module."""

    def __getitem__(self, index: int) -> tuple[str, Callable[[Any], Any]]:
        return list(_tensor_changes())[index]

    def __len__(self) -> int:
        return len(list(_tensor_changes()))


TENSORS = _Lazy()


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def different(a: Any, b: Any) -> list[str]:
    """Where two nested states differ."""
    from killed_runs import differences

    return differences(a, b)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states, in which NaN equals NaN."""
    import torch

    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        return alike and not a.is_meta and not a.is_sparse and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
