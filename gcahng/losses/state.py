"""What the loss's state dict holds beside weights, and the checks that come before any of a state is taken over.

A state dict holds tensors alone, always under the same names and in the same shapes, so that anything that stores
tensors can store it. Seed, epoch and optimizers are one tensor of bytes (version 2):

    int64     version, checksum, seed, epoch
    int64     for each optimizer: its number of weights, and the bytes of a number of its moments
    float64   for each optimizer: learning rate, both betas, epsilon, weight decay
    int64     for each weight of each optimizer: its rows and columns (-1 for a vector)
    int64     for each weight of each optimizer: how often it was stepped
    float     for each optimizer: the first moments of all its weights, then the second ones

Version 1 was a dict with the optimizers' own state dicts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.errors import UserError
from gcahng.losses.layout import describe
from gcahng.losses.means import upgrade_means
from gcahng.losses.optimizers import NUMBERS, OptimizerState, check_state, read_group, state_of

EXTRA = "_extra_state"
VERSION = 2
_FIXED = 4 + 2 * (2 + len(NUMBERS))  # numbers before the shapes
_DTYPES = {4: torch.float32, 8: torch.float64}
# The least value of a counter or a mean, and whether it may be infinite. What averages weights may leave fractions.
_LEAST = {"draw": 0, "num_batches_tracked": 0, "_mean_metric": 0, "_mean_generator": 0, "_metric_sum": 0}
_LEAST |= {"_generator_sum": 0, "_counted_steps": 0, "_mean_metric_weight": 0, "_mean_generator_weight": 0}


class LossState(NamedTuple):
    """What a loss remembers beside its weights and buffers.

    Attributes:
        seed: of dropout and mixing draws.
        epoch: epochs that have ended.
        optimizers: the graph network's and the classifier's.
    """

    seed: int
    epoch: int
    optimizers: tuple[OptimizerState, OptimizerState]


# -- one tensor for all of it


def pack(seed: int, epoch: int, optimizers: Sequence[torch.optim.AdamW]) -> Tensor:
    """Puts everything into one new tensor, without a synchronization.

    Args:
        seed: of dropout and mixing draws.
        epoch: epochs that have ended.
        optimizers: the graph network's and the classifier's.

    Returns:
        (bytes,) uint8 on the weights' device.
    """
    states = [state_of(optimizer) for optimizer in optimizers]
    dtypes = [_moments_dtype(state) for state in states]
    counts = [
        number for state, dtype in zip(states, dtypes, strict=True) for number in (len(state.moments), dtype.itemsize)
    ]
    numbers = torch.tensor([number for state in states for number in state.numbers], dtype=torch.float64, device="cpu")
    shapes = [size for state in states for first, _ in state.moments for size in _as_matrix(first.shape)]
    fixed = [VERSION, 0, seed, epoch, *counts, *numbers.view(torch.int64).tolist(), *shapes]
    device = states[0].moments[0][0].device
    parts = [torch.tensor(fixed, dtype=torch.int64, device="cpu").to(device)]
    parts += [state.steps.to(device, torch.int64) for state in states]
    for state, dtype in zip(states, dtypes, strict=True):
        parts += [moments[which].reshape(-1).to(device, dtype) for which in (0, 1) for moments in state.moments]
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts])
    packed[8:16] = _checksum(packed)
    return packed


def _moments_dtype(state: OptimizerState) -> torch.dtype:
    double = any(first.dtype is torch.float64 for first, _ in state.moments)
    return torch.float64 if double else torch.float32


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], -1)


def _checksum(packed: Tensor) -> Tensor:
    """The sum of all words of 32 bits but those of the checksum itself, (8,) bytes. Whole numbers add up in any order.

    It tells bytes that were averaged, or changed on a disk.
    """
    words = packed.view(torch.int32)
    total = words.sum(dtype=torch.int64) - words[2:4].sum(dtype=torch.int64)
    return total.reshape(1).view(torch.uint8)


def _unpack(packed: Tensor, own: Sequence[OptimizerState], layers: int) -> LossState:
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.layout is not torch.strided or packed.is_meta:
        raise _malformed(f"is a tensor of {packed.dtype} and shape {tuple(packed.shape)} on {packed.device}")
    packed = packed.detach().clone(memory_format=torch.contiguous_format)  # aligned, which a part of a file need not be
    if len(packed) < 8 * _FIXED or len(packed) % 4:
        raise _malformed(f"has {len(packed)} bytes")
    version, _, seed, epoch, *fixed = packed[: 8 * _FIXED].view(torch.int64).tolist()
    if version != VERSION:
        raise _unknown_version(version)
    if not torch.equal(_checksum(packed), packed[8:16]):
        raise UserError(
            f"state_dict's {EXTRA} has another checksum than it was saved with; it must be as it was saved, and not "
            "averaged or damaged (for weights alone leave it out, and load with strict=False)"
        )
    counts, numbers = fixed[:4], torch.tensor(fixed[4:], dtype=torch.int64, device="cpu").view(torch.float64).tolist()
    for number, state in enumerate(own):
        _check_count(number, counts[2 * number], len(state.moments), layers)
    weights = counts[0] + counts[2]
    end = _FIXED + 3 * weights
    words = packed[8 * _FIXED : 8 * end].view(torch.int64)
    shapes = [
        (rows,) if columns < 0 else (rows, columns) for rows, columns in words[: 2 * weights].view(-1, 2).tolist()
    ]
    steps, place, states = words[2 * weights :], 8 * end, []
    for number in range(2):
        first, last = (0, counts[0]) if number == 0 else (counts[0], weights)
        dtype = _DTYPES[counts[2 * number + 1]]
        sizes = [torch.Size(shape).numel() for shape in shapes[first:last]]
        bytes_ = 2 * sum(sizes) * dtype.itemsize
        values = packed[place : place + bytes_].clone().view(dtype)
        place += bytes_
        views = [part.view(shape) for part, shape in zip(values.split(sizes * 2), shapes[first:last] * 2, strict=True)]
        moments = list(zip(views[: len(sizes)], views[len(sizes) :], strict=True))
        mine = tuple(numbers[number * len(NUMBERS) : (number + 1) * len(NUMBERS)])
        states.append(OptimizerState(mine, steps[first:last], moments))
    return LossState(seed, epoch, (states[0], states[1]))


# -- version 1


def _from_version_1(saved: Mapping[str, Any], own: Sequence[OptimizerState], layers: int) -> LossState:
    if type(saved.get("version")) is not int or saved["version"] != 1:
        raise _unknown_version(saved.get("version"))
    for name in ("seed", "epoch", "steps_in_epoch"):
        value = saved.get(name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise UserError(
                f"state_dict's {EXTRA} has {name} {_short(value)}; it must be a whole number in 0 … 2**63 - 1"
            )
    states = []
    for number, name in enumerate(("graph_optimizer", "classifier_optimizer")):
        try:
            states.append(_optimizer_of_version_1(number, saved[name], own[number], layers))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            raise _malformed(f"has a {name} that cannot be read ({type(error).__name__})") from error
    return LossState(saved["seed"], saved["epoch"], (states[0], states[1]))


def _optimizer_of_version_1(number: int, saved: Mapping[str, Any], own: OptimizerState, layers: int) -> OptimizerState:
    (group,) = saved["param_groups"]
    names = group["params"]
    _check_count(number, len(names), len(own.moments), layers)
    if strangers := saved["state"].keys() - set(names):
        raise _malformed(f"has moments of a weight {_short(next(iter(strangers)))} that its optimizer does not have")
    return read_group(group, saved["state"], [first for first, _ in own.moments])


# -- checks


def read_extra_state(extra: Any, optimizers: Sequence[torch.optim.AdamW], layers: int) -> LossState:
    """Reads and checks what get_extra_state returned, in this version or in version 1.

    Args:
        extra: the entry of the state dict.
        optimizers: the graph network's and the classifier's, whose weights it must fit.
        layers: of the graph network, for the error.

    Raises:
        UserError: it is malformed, of another version, or of a loss with other sizes.
    """
    if isinstance(extra, LossState):  # it has been read before
        return extra
    own = [state_of(optimizer) for optimizer in optimizers]
    if isinstance(extra, Tensor):
        try:
            state = _unpack(extra, own, layers)
        except (KeyError, IndexError, RuntimeError) as error:
            raise _malformed(f"cannot be read ({type(error).__name__})") from error
    elif isinstance(extra, Mapping):
        state = _from_version_1(extra, own, layers)
    else:
        raise _malformed(f"is {describe(extra)}")
    if state.seed < 0 or state.epoch < 0:
        raise _malformed(f"has seed {state.seed} and epoch {state.epoch}")
    for given, optimizer in zip(state.optimizers, optimizers, strict=True):
        check_state(given, optimizer.param_groups[0]["params"])
    return state


def check_tensors(loss: nn.Module, state: Mapping[str, Any], strict: bool, with_versions: bool) -> None:
    """Checks everything in a state dict but the extra state, so that copying it cannot fail halfway.

    A module within the loss that loads in a way of its own is left to torch.

    Args:
        loss: the loss.
        state: the part of the state dict that is the loss's, by its own names.
        strict: whether names may neither be missing nor unexpected.
        with_versions: whether the state dict holds versions of modules; without them BatchNorm may miss its count.

    Raises:
        UserError: a name is missing or unexpected, or a tensor does not fit.
    """
    own = dict(loss.named_parameters(remove_duplicate=False))
    names = {EXTRA}
    special: list[str] = []
    late = False
    for place, module in loss.named_modules(remove_duplicate=False):
        start = f"{place}." if place else ""
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                own[start + name] = buffer
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            names.add(start + EXTRA)
        late |= bool(module._load_state_dict_post_hooks)
        if module is not loss and _loads_by_itself(module):
            special.append(start)
    names |= own.keys()
    for name, given in state.items():
        if name in own and not name.startswith(tuple(special)):
            check_tensor(name, given, own[name])
    if not strict or late:  # a hook after loading may excuse names
        return
    missing = [n for n in names - state.keys() if with_versions or not n.endswith(".num_batches_tracked")]
    unexpected = state.keys() - names
    missing, unexpected = (
        sorted(n for n in found if not n.startswith(tuple(special))) for found in (missing, unexpected)
    )
    if missing or unexpected:
        raise UserError(
            f"state_dict does not fit this loss: missing {some(missing)}, unexpected {some(unexpected)} (with "
            "strict=False what fits is loaded)"
        )


def _loads_by_itself(module: nn.Module) -> bool:
    plain = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)
    return bool(module._load_state_dict_pre_hooks) or type(module)._load_from_state_dict not in plain


def check_tensor(name: str, given: Any, own: Tensor) -> None:
    """Checks that copying an entry of a state dict into a tensor keeps its meaning.

    Args:
        name: of the entry.
        given: the entry.
        own: the tensor.

    Raises:
        UserError: it is no tensor, or has another shape, another kind of dtype or no values, or a counter cannot be so.
    """
    if nn.parameter.is_lazy(own):
        return
    if not isinstance(given, Tensor):
        raise UserError(f"state_dict's {name} is {describe(given)}; it must be a tensor")
    if given.shape != own.shape and not (own.dim() == 0 and given.shape == (1,)):
        other = "coefficients" if "coefficient_head" in name else "num_classes"
        raise UserError(
            f"state_dict does not fit this loss: {name} has shape {tuple(given.shape)}; it must be {tuple(own.shape)} "
            f"(embedding_dim and {other} must be those of the state_dict)"
        )
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype is torch.bool) for t in (given, own)]
    if kinds[0] != kinds[1] or given.layout is not own.layout or given.is_quantized:
        raise UserError(f"state_dict's {name} is a tensor of {given.dtype} ({given.layout}); it must be {own.dtype}")
    if given.is_meta and not own.is_meta:
        raise UserError(f"state_dict's {name} is on the meta device; it must be on one that holds values")
    least = _LEAST.get(name.rpartition(".")[2] if name.endswith("num_batches_tracked") else name)
    if least is not None and not given.is_meta:
        value = given.item()
        most = torch.finfo(own.dtype).max if own.is_floating_point() else torch.iinfo(own.dtype).max
        infinite = name in ("_mean_metric", "_mean_generator") and value == math.inf  # it switches J_syn or pulling off
        if not least <= value <= most and not infinite:
            raise UserError(f"state_dict's {name} is {value}; it must be a finite number of at least {least}")


def _check_count(number: int, saved: int, own: int, layers: int) -> None:
    if saved == own:
        return
    if number == 0:
        raise UserError(
            f"state_dict is of a graph network of {saved} weights, this one has {own} (layers={layers}); layers, "
            "coefficients and message_passing must be those of the state_dict"
        )
    raise _malformed(f"is of a classifier of {saved} weights")


def _malformed(what: str) -> UserError:
    return UserError(f"state_dict's {EXTRA} {what}; it must be what GCAHNGLoss.state_dict() gave")


def _unknown_version(version: Any) -> UserError:
    return UserError(f"state_dict has extra state of version {_short(version)}; this gcahng reads versions 1 and 2")


def _short(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, (int, float, str, bool, type(None))) else describe(value)


def some(names: Sequence[str]) -> str:
    """The first names of a list, for error messages."""
    return "none" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- within torch's load_state_dict


def prepare(loss: Any, state_dict: dict[str, Any], prefix: str, strict: bool, with_versions: bool) -> dict[str, Any]:
    """Brings a loss's part of a state dict into this version, and checks all of it.

    Args:
        loss: the loss.
        state_dict: holds the loss's entries under `prefix`, and is changed.
        prefix: of the loss's names; empty where the state dict is the loss's own.
        strict: as torch hands it on, which is True.
        with_versions: whether the state dict holds versions of modules.

    Returns:
        The loss's part by its own names.

    Raises:
        UserError: the state is malformed, or does not fit.
    """
    state = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if prefix and not state:  # a state dict of the modules around the loss
        return {}
    upgrade_means(state, state.get(EXTRA))
    if EXTRA in state:
        state[EXTRA] = read_extra_state(
            state[EXTRA], (loss.graph_optimizer, loss.classifier_optimizer), len(loss.graph_network.layers)
        )
    check_tensors(loss, state, _is_strict(strict), with_versions)
    state_dict |= {prefix + name: value for name, value in state.items()}
    return state


def _is_strict(handed_on: bool) -> bool:
    """Whether the load_state_dict that is under way is strict.

    torch always hands on True and looks at missing names after it has copied everything else, which would leave a loss
    half loaded. So this asks the call itself.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back
    return handed_on
