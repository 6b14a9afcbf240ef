"""Calls of the Python API with wrong arguments, beside the reference where they are taken."""

from __future__ import annotations

import inspect
import random
from typing import Any

from hostile.case import FINE, REFUSED, Case, Fault, refused
from hostile.values import anything

CLASSES, DIM = 5, 8


def case(case: Case) -> str:
    """One call: the loss's options, a batch, or an op."""
    return case.chance.choice((_options, _options, _batch, _batch, _npair, _mix, _edges, _settings))(case)


def _options(case: Case) -> str:
    """A loss with odd options; one that is made can train a step."""
    import torch

    import gcahng

    chance = case.chance
    names = list(inspect.signature(gcahng.GCAHNGLoss.__init__).parameters)[1:]
    options: dict[str, Any] = {"num_classes": CLASSES, "embedding_dim": DIM, "layers": 1, "heads": 2}
    for name in chance.sample(names, chance.choice((1, 1, 2))):
        options[name] = anything(chance)
    case.tell(f"GCAHNGLoss({', '.join(f'{k}={_short(v)}' for k, v in options.items())})")
    made: list[Any] = []
    if refused(lambda: made.append(gcahng.GCAHNGLoss(**options))):
        return REFUSED
    dim = made[0].embedding_dim
    z = torch.randn(6, dim, requires_grad=True)

    def step() -> None:
        loss = made[0](z, torch.tensor([0, 1, 0, 1, 1, 0]))
        loss.backward()
        made[0].generator_step()
        made[0].end_epoch()

    return REFUSED if refused(step) else FINE


def _batch(case: Case) -> str:
    """An odd batch. The loss and its gradient must be the reference's."""
    import torch

    import gcahng

    chance = case.chance
    impl = chance.choice(("torch", "cpp", "auto"))
    z, labels = torch.randn(6, DIM), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(chance.choice((1, 1, 2))):
        z, labels, how = _odd_batch(chance, z, labels)
        case.tell(f"{impl}: {how}")
    found = []
    for name in (impl, "reference"):
        torch.manual_seed(1)
        loss = gcahng.GCAHNGLoss(CLASSES, DIM, layers=1, heads=2, seed=5, impl=name)
        own = z.detach().clone().requires_grad_() if isinstance(z, torch.Tensor) and z.is_floating_point() else z

        def step(loss: Any = loss, own: Any = own) -> Any:
            value = loss(own, labels)
            value.backward()
            logs = loss.generator_step()
            found.append([value.detach(), own.grad, *logs.values()])

        if refused(step):
            found.append(None)
            _usable(loss)
    if (found[0] is None) != (found[1] is None):
        raise Fault("wrong", f"{impl} {'refused' if found[0] is None else 'took'} it, and the reference did not do so")
    if found[0] is None:
        return REFUSED
    for a, b in zip(*found, strict=True):
        if a.dtype != b.dtype or not torch.allclose(
            a.double(), b.double(), rtol=2e-3, atol=2e-4 * max(1, float(b.abs().max())), equal_nan=True
        ):
            raise Fault("wrong", f"{float((a.double() - b.double()).abs().max()):.2e} off the reference")
        if not a.isfinite().all() and bool(torch.as_tensor(z).abs().max() < 1e6):
            raise Fault("wrong", "a value that is not finite")
    return FINE


def _usable(loss: Any) -> None:
    """After a refusal the loss takes a good batch."""
    import torch

    z = torch.randn(6, DIM, requires_grad=True)
    loss(z, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    loss.generator_step()


def _odd_batch(chance: random.Random, z: Any, labels: Any) -> tuple[Any, Any, str]:
    import torch

    if not isinstance(z, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return z, labels, "nothing more"
    changes: dict[str, Any] = {
        "float64": lambda: (z.double(), labels),
        "half": lambda: (z.half(), labels),
        "bfloat16": lambda: (z.bfloat16(), labels),
        "whole": lambda: (z.long(), labels),
        "complex": lambda: (z.to(torch.complex64), labels),
        "nan": lambda: (_with(z, float("nan")), labels),
        "inf": lambda: (_with(z, float("inf")), labels),
        "zeros": lambda: (z * 0, labels),
        "equal rows": lambda: (z[:1].expand(len(z), -1), labels),
        "huge": lambda: (z * 1e18, labels),
        "tiny": lambda: (z * 1e-30, labels),
        "large": lambda: (z * 1000, labels),
        "empty": lambda: (z[:0], labels[:0]),
        "one channel less": lambda: (z[:, :-1], labels),
        "one row more": lambda: (torch.cat([z, z[:1]]), labels),
        "3-dim": lambda: (z[None], labels),
        "transposed": lambda: (z.T.contiguous().T, labels),
        "strided": lambda: (torch.stack([z, z], -1)[..., 0], labels),
        "sparse": lambda: (z.to_sparse(), labels),
        "meta": lambda: (z.to("meta"), labels),
        "list": lambda: (z.tolist(), labels),
        "numpy": lambda: (z.numpy() if z.dtype == torch.float32 else z, labels),
        "float labels": lambda: (z, labels.float()),
        "bool labels": lambda: (z, labels.bool()),
        "int32 labels": lambda: (z, labels.int()),
        "uint8 labels": lambda: (z, labels.to(torch.uint8)),
        "column of labels": lambda: (z, labels[:, None]),
        "list of labels": lambda: (z, labels.tolist()),
        "labels beyond": lambda: (z, labels + CLASSES),
        "huge labels": lambda: (z, labels.long() + 2**62),
        "negative labels": lambda: (z, labels.long() - 1),
        "one class": lambda: (z, labels * 0),
        "unequal classes": lambda: (z, torch.tensor([0, 0, 0, 0, 1, 1])[: len(labels)]),
        "single samples": lambda: (z[:3], labels[:3]),
        "two classes": lambda: (z[:4], torch.tensor([0, 1, 1, 0])),
        "three views": lambda: (torch.randn(12, DIM), torch.arange(12) % 4),
        "labels on meta": lambda: (z, labels.to("meta")),
    }
    how = chance.choice(sorted(changes))
    try:
        return *changes[how](), how
    except (RuntimeError, TypeError, NotImplementedError):  # the change before does not allow this one
        return z, labels, f"not {how}"


def _with(x: Any, value: float) -> Any:
    x = x.clone()
    x.view(-1)[: min(1, x.numel())] = value
    return x


def _npair(case: Case) -> str:
    import torch

    import gcahng

    z, labels = torch.randn(6, DIM), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(2):
        z, labels, how = _odd_batch(case.chance, z, labels)
        case.tell(f"npair_loss: {how}")
    options = case.chance.choice(({}, {}, {"num_per_class": anything(case.chance)}))
    case.tell(str(options))
    found: list[Any] = []
    if refused(lambda: found.append(gcahng.npair_loss(z, labels, **options))):
        return REFUSED
    if found[0].dim() or (not found[0].isfinite() and bool(z.double().abs().max() < 1e15)):
        raise Fault("wrong", f"a loss of {found[0]}")
    return FINE


def _mix(case: Case) -> str:
    """`channel_mix` beside its reference."""
    import torch

    from gcahng.ops import channel_mix

    chance = case.chance
    given: dict[str, Any] = {
        "embeddings": torch.randn(6, 4),
        "coefficients": torch.rand(6, 6, 4),
        "num_per_class": 3,
        "pull": 0.5,
        "draws": torch.rand(3, 2),
    }
    case.tell(_odd_argument(chance, given))
    return _like_reference(channel_mix, given, chance)


def _edges(case: Case) -> str:
    """`edge_update` beside its reference."""
    import torch

    from gcahng.ops import EdgeUpdateWeights, edge_update

    chance, dim = case.chance, 4
    shapes = [(dim, dim), (dim,)] * 3 + [(dim,), (dim,), (4 * dim, dim)] + [(4 * dim,)] * 3 + [(dim, 4 * dim), (dim,)]
    weights: Any = EdgeUpdateWeights(*(torch.randn(*shape) / 2 for shape in shapes))
    given: dict[str, Any] = {
        "edges": torch.randn(5, 5, dim),
        "nodes": torch.randn(5, dim),
        "weights": weights,
        "symmetric": True,
        "dropout": None,
        "edge_memory": "store",
    }
    if chance.random() < 0.3:
        named = weights._asdict()
        how = _odd_argument(chance, named)
        given["weights"] = (
            EdgeUpdateWeights(**named) if named.keys() == weights._asdict().keys() else tuple(named.values())
        )
    else:
        how = _odd_argument(chance, given)
    case.tell(how)
    return _like_reference(edge_update, given, chance)


def _odd_argument(chance: random.Random, given: dict[str, Any]) -> str:
    """Replace an argument, and say how."""
    import torch

    name = chance.choice(sorted(given))
    old = given[name]
    if not isinstance(old, torch.Tensor) or chance.random() < 0.2:
        given[name] = anything(chance)
        return f"{name} = {_short(given[name])}"
    changes: dict[str, Any] = {
        "float64": lambda: old.double(),
        "half": lambda: old.half(),
        "whole": lambda: old.long(),
        "one row less": lambda: old[:-1],
        "empty": lambda: old[:0],
        "flat": lambda: old.reshape(-1),
        "one more dim": lambda: old[None],
        "strided": lambda: torch.stack([old, old], -1)[..., 0],
        "reversed": lambda: old.flip(0),
        "expanded": lambda: old.reshape(-1)[:1].sum().expand(old.shape),
        "nan": lambda: _with(old, float("nan")),
        "inf": lambda: _with(old, float("inf")),
        "huge": lambda: old * 1e20,
        "meta": lambda: old.to("meta"),
        "sparse": lambda: old.to_sparse(),
        "list": lambda: old.tolist(),
        "half band": lambda: old.reshape(-1, old.shape[-1])[:15],
    }
    how = chance.choice(sorted(changes))
    given[name] = changes[how]()
    return f"{name} made {how}"


def _like_reference(op: Any, given: dict[str, Any], chance: random.Random) -> str:
    import torch

    found = []
    impl = chance.choice(("torch", "cpp", "auto"))
    for name in (impl, "reference"):
        own: list[Any] = []
        torch.manual_seed(0)
        found.append(None if refused(lambda name=name, own=own: own.append(op(**given, impl=name))) else own[0])
    if (found[0] is None) != (found[1] is None):
        raise Fault("wrong", f"{impl} {'refused' if found[0] is None else 'took'} it, and the reference did not do so")
    if found[0] is None:
        return REFUSED
    a, b = found
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Fault("wrong", f"{a.dtype} {tuple(a.shape)}; the reference has {b.dtype} {tuple(b.shape)}")
    if a.is_meta:
        return FINE
    tensors = [x for x in (*given.values(), *given.get("weights", ())) if isinstance(x, torch.Tensor) and x.numel()]
    plain = all(x.isfinite().all() and x.abs().max() < 1e6 for x in tensors)
    if plain and not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, float(b.abs().max()) if b.numel() else 1)):
        raise Fault("wrong", f"{float((a - b).abs().max()):.2e} off the reference")
    return FINE


def _settings(case: Case) -> str:
    """Options of runs, data and indices from Python, where no command line has looked at their types."""
    from dataclasses import fields

    from gcahng.config import TrainConfig, config_from_dict, config_to_dict
    from gcahng.retrieval import IndexSettings

    chance = case.chance
    if chance.random() < 0.2:
        name = chance.choice([field.name for field in fields(IndexSettings)])
        value = anything(chance)
        case.tell(f"IndexSettings({name}={_short(value)})")
        return REFUSED if refused(lambda: IndexSettings(**{name: value})) else FINE
    values = config_to_dict(TrainConfig())
    group = chance.choice((values, values["data"], values["gca"], values["backbone"], values["optimizer"]))
    name = chance.choice(sorted(group))
    group[name] = anything(chance)
    case.tell(f"TrainConfig with {name} = {_short(group[name])}")
    return REFUSED if refused(lambda: config_from_dict(values).check()) else FINE


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}…"
