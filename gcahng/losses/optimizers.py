"""The optimizers that the loss owns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.engine.cuda_graph import GraphCache, capturing
from gcahng.errors import UserError


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, capturable: bool) -> torch.optim.AdamW:
    """Makes a fused AdamW, which passes over memory once. With small batches it is a good part of a step.

    Args:
        parameters: what is stepped.
        lr: learning rate.
        weight_decay: weight decay.
        capturable: whether steps may be captured in a CUDA graph.
    """
    if capturable:
        optimizer = CapturableAdamW(parameters, lr, weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    start_state(optimizer)  # so that a state dict has the same names and shapes before the first step and after it
    return optimizer


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Sets the learning rate, in place if a captured step reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
            group["rate"] = rate
        else:
            group["lr"] = rate


def set_gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the parameters' gradients by those of a loss. A parameter that it does not depend on gets None.

    Unlike loss.backward() it does not run hooks on accumulation. DistributedDataParallel has such hooks and, where it
    holds the loss too, would take these gradients for part of the caller's backward.

    Args:
        loss: 0-dim.
        parameters: what it is differentiated by.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [None] * len(wanted)
    if wanted and loss.requires_grad:
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    places = set()
    for parameter, gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            place = gradient.untyped_storage().data_ptr()
            if place in places or gradient.stride() != parameter.stride():  # a step changes gradients in place
                gradient = torch.empty_like(parameter).copy_(gradient)
            places.add(place)
        parameter.grad = gradient


def check_holds(optimizer: torch.optim.AdamW, module: nn.Module) -> None:
    """Checks that an optimizer steps the parameters that a module has now.

    Args:
        optimizer: the optimizer.
        module: its parameters were given to the optimizer, though not all need have been.

    Raises:
        UserError: other parameters have taken their place.
    """
    own = {id(parameter) for parameter in module.parameters()}
    if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UserError(
            "the loss's parameters have been replaced (transformers' from_pretrained does so in a model that holds the "
            "loss), and its optimizers hold the old ones; make the loss after that, or keep it out of the model"
        )


class OptimizerState(NamedTuple):
    """The state of one of the loss's optimizers.

    Attributes:
        numbers: learning rate, both betas, epsilon, weight decay.
        steps: how often each weight was stepped, (P,).
        moments: the first and the second moment of each weight, in the weight's shape.
    """

    numbers: tuple[float, ...]
    steps: Tensor
    moments: list[tuple[Tensor, Tensor]]


NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
_HOLD = (torch.float32, torch.float64)  # the dtypes that moments may have: squares vanish in lower ones


def start_state(optimizer: torch.optim.AdamW) -> None:
    """Makes the moments of all weights that have none yet, as AdamW would in its first step."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        if not optimizer.state.get(parameter):
            moments = parameter.detach().to(parameter.dtype if parameter.dtype in _HOLD else torch.float32)
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(moments, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(moments, memory_format=torch.preserve_format),
            }


def state_of(optimizer: torch.optim.AdamW) -> OptimizerState:
    """An optimizer's state. The moments are its own, not copies."""
    start_state(optimizer)
    (group,) = optimizer.param_groups
    states = [optimizer.state[parameter] for parameter in group["params"]]
    rate = group["rate"] if isinstance(group["lr"], Tensor) else group["lr"]
    return OptimizerState(
        (rate, *group["betas"], group["eps"], group["weight_decay"]),
        torch.stack([state["step"] for state in states]),
        [(state["exp_avg"], state["exp_avg_sq"]) for state in states],
    )


def take_state(optimizer: torch.optim.AdamW, given: OptimizerState) -> None:
    """Copies a state into an optimizer, into the tensors that it has: a captured step knows their places.

    Args:
        optimizer: the optimizer.
        given: a state that `check_state` has passed.
    """
    own = state_of(optimizer)
    (group,) = optimizer.param_groups
    set_rate(optimizer, given.numbers[0])
    group |= {"betas": given.numbers[1:3], "eps": given.numbers[3], "weight_decay": given.numbers[4]}
    with torch.no_grad():
        for parameter, steps in zip(group["params"], given.steps, strict=True):
            optimizer.state[parameter]["step"].copy_(steps)
        for moments, values in zip(own.moments, given.moments, strict=True):
            for moment, value in zip(moments, values, strict=True):
                moment.copy_(value)


def read_group(group: Mapping[str, Any], states: Mapping[Any, Any], parameters: Sequence[Tensor]) -> OptimizerState:
    """Reads one group of the state dict of a torch.optim.AdamW.

    Args:
        group: the group.
        states: the moments of all weights.
        parameters: as many as the group has.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is malformed. `check_state` says what else must hold.
    """
    numbers = tuple(float(n) for n in (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
    steps, moments = [], []
    for name, parameter in zip(group["params"], parameters, strict=True):
        if name in states:
            steps.append(float(states[name]["step"]))
            moments.append((states[name]["exp_avg"], states[name]["exp_avg_sq"]))
        else:  # it was never stepped
            steps.append(0.0)
            moments.append((torch.zeros_like(parameter), torch.zeros_like(parameter)))
    return OptimizerState(numbers, torch.tensor(steps, dtype=torch.float64, device="cpu"), moments)


LOSS_CURE = (
    "num_classes, embedding_dim and coefficients must be those of the state_dict (for weights alone leave its "
    "_extra_state out)"
)


def check_state(given: OptimizerState, parameters: Sequence[Tensor], cure: str = LOSS_CURE) -> None:
    """Checks that a state fits an optimizer and that one can go on with it. Fused AdamW itself trusts its moments.

    Args:
        given: the state, of as many weights as there are parameters.
        parameters: those of the optimizer.
        cure: what must be so for shapes to fit, for the error.

    Raises:
        UserError: it does not.
    """
    bad: list[Tensor] = []
    for parameter, moments in zip(parameters, given.moments, strict=True):
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            _check_moment(name, moment, parameter, cure)
            bad.append(~moment.isfinite().all() | ((name == "exp_avg_sq") & (moment < 0).any()))
    counts = given.steps.double()
    if bad and torch.stack([flag.to(counts.device) for flag in bad]).any():
        raise UserError(
            "state_dict holds moments of an optimizer that are not finite, or squares that are negative; it must be of "
            "training on finite values"
        )
    if not (counts.isfinite() & (counts >= 0) & (counts == counts.round())).all():
        raise UserError("state_dict holds counts of an optimizer's steps that are no whole numbers of at least 0")
    for name, number in zip(NUMBERS, given.numbers, strict=True):
        if not (0 <= number < math.inf) or (name.startswith("beta") and number >= 1):
            limit = "at least 0 and under 1" if name.startswith("beta") else "a finite number of at least 0"
            raise UserError(f"state_dict's {name} of an optimizer is {number}; it must be {limit}")


def _check_moment(name: str, moment: Any, parameter: Tensor, cure: str) -> None:
    if not isinstance(moment, Tensor) or not moment.is_floating_point() or moment.layout is not torch.strided:
        kind = f"a tensor of {moment.dtype}" if isinstance(moment, Tensor) else f"a {type(moment).__name__}"
        raise UserError(f"state_dict's {name} of a weight is {kind}; it must be a tensor of floating-point numbers")
    shape, own = tuple(moment.shape), tuple(parameter.shape)
    if shape != own:
        raise UserError(
            f"state_dict holds optimizer state of a weight of shape {shape}, and this loss's has shape {own}; {cure}"
        )
    expanded = any(stride == 0 and size > 1 for stride, size in zip(moment.stride(), shape, strict=True))
    if moment.is_meta or expanded:
        what = "on the meta device" if moment.is_meta else "an expanded view"
        raise UserError(f"state_dict's {name} of a weight is {what}; it must be a tensor with memory of its own")


def move_state(
    optimizer: torch.optim.AdamW, moved: dict[nn.Parameter, nn.Parameter], fn: Callable[[Tensor], Tensor]
) -> None:
    """Makes an optimizer go on with parameters that have moved.

    Args:
        optimizer: the optimizer.
        moved: from old parameters to new ones.
        fn: what Module._apply applied to them.
    """
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        state, new = optimizer.state.pop(parameter, {}), moved[parameter]
        # What to_empty makes of the meta device's moments are no numbers: they start anew.
        if state and (new.is_meta or not state["exp_avg"].is_meta):
            optimizer.state[new] = {
                name: _beside(value, new) if name == "step" else _moved(value, fn) for name, value in state.items()
            }
    group["params"] = [moved[parameter] for parameter in group["params"]]
    if isinstance(group["lr"], Tensor):
        group["lr"] = _beside(group["lr"], group["params"][0])
    start_state(optimizer)


def _moved(moment: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """A moment after a move. It does not follow its weight to a lower precision, where the loss does not train."""
    moved = fn(moment)
    return moved if moved.dtype in _HOLD else moment.to(moved.device)


def _beside(count: Tensor, parameter: nn.Parameter) -> Tensor:
    """A step count or rate on its parameter's device, in its own dtype. On the meta device it stays where it is."""
    return count if parameter.device.type == "meta" else count.to(parameter.device)


class CapturableAdamW(torch.optim.AdamW):
    """AdamW whose steps may be captured in a CUDA graph.

    Its learning rate is a tensor on the parameters' device (fp32, as torch's kernel takes it), and whether a step is
    skipped is decided on the device. Its state dict is that of a plain AdamW, so that each can load the other's.

    Args:
        parameters: what is stepped.
        lr: learning rate.
        weight_decay: weight decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        parameters = list(parameters)
        device = parameters[0].device
        rate = torch.tensor(lr, dtype=torch.float32, device=device)
        super().__init__(parameters, lr=rate, weight_decay=weight_decay, fused=True, capturable=True)
        for group in self.param_groups:
            group["rate"] = lr
        self._warned_capturable_if_run_uncaptured = True  # silences torch's warning: steps run captured or not
        self.has_stepped = False  # its kernels are loaded by a first step, which is not captured

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned_capturable_if_run_uncaptured = True
        self.has_stepped = False

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            group |= {"lr": group.pop("rate"), "capturable": False}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group |= {"rate": float(group["lr"]), "lr": rate, "capturable": True}
            set_rate(self, group["rate"])

    def step_unless(self, found_inf: Tensor) -> None:
        """Steps, unless found_inf (0-dim, on the device) is 1."""
        self.found_inf = found_inf
        self.step()
        del self.found_inf


def clipped_step(
    optimizer: torch.optim.AdamW,
    parameters: list[nn.Parameter],
    clip_value: float | None,
    graphs: GraphCache | None,
) -> None:
    """Clips gradients and steps.

    Args:
        optimizer: the optimizer.
        parameters: those that have gradients.
        clip_value: gradients are clipped to ± this value; None does not clip.
        graphs: the cache of captured steps; None to capture none. The first step is never captured.
    """

    def step() -> None:
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)
        optimizer.step()

    if graphs is None or not isinstance(optimizer, CapturableAdamW) or capturing() or not optimizer.has_stepped:
        step()
        if isinstance(optimizer, CapturableAdamW):
            optimizer.has_stepped = True
    else:
        rates = [group["lr"] for group in optimizer.param_groups]
        states = [optimizer.state[parameter] for parameter in parameters]
        graphs.step(step, parameters, [*rates, *(tensor for state in states for tensor in state.values())])
