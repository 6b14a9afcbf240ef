"""The optimizers that the loss owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.engine.cuda_graph import GraphCache, capturing
from gcahng.errors import UserError


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, capturable: bool) -> torch.optim.AdamW:
    """Fused AdamW: one pass over memory for each parameter; with small batches it is a good part of a step."""
    if capturable:
        return CapturableAdamW(parameters, lr, weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Sets the learning rate, in place where a captured step reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
            group["rate"] = rate
        else:
            group["lr"] = rate


def set_gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Puts the loss's gradients in place of those that its parameters have; None where it does not depend on one.

    Unlike loss.backward() it is no concern of hooks on accumulation. DistributedDataParallel has such hooks, and, where
    it holds the loss too, would take these gradients for what is left of the caller's backward.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = [None] * len(wanted)
    if wanted and loss.requires_grad:
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    places = set()
    for parameter, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            place = gradient.untyped_storage().data_ptr()
            if place in places or gradient.stride() != parameter.stride():  # a step changes gradients in place
                gradient = torch.empty_like(parameter).copy_(gradient)
            places.add(place)
        parameter.grad = gradient


def check_state(state: Mapping[str, Any], optimizer: torch.optim.AdamW) -> None:
    """UserError where an optimizer's state dict has moments of other shapes than its parameters: fused AdamW would read
    beyond them."""
    (group,) = optimizer.param_groups
    for number, moments in state["state"].items():
        given, own = tuple(moments["exp_avg"].shape), tuple(group["params"][number].shape)
        if given != own:
            raise UserError(
                f"state_dict holds optimizer state of a weight of shape {given}, here it is {own}; num_classes and "
                "embedding_dim must be those of the state_dict (for weights alone leave its _extra_state out)"
            )


def move_state(
    optimizer: torch.optim.AdamW, moved: dict[nn.Parameter, nn.Parameter], fn: Callable[[Tensor], Tensor]
) -> None:
    """Has an optimizer go on with what its parameters have become. moved: from old to new; fn: what was applied."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        if state := optimizer.state.pop(parameter, {}):
            optimizer.state[moved[parameter]] = {
                name: _beside(value, moved[parameter]) if name == "step" else fn(value) for name, value in state.items()
            }
    group["params"] = [moved[parameter] for parameter in group["params"]]
    if isinstance(group["lr"], Tensor):
        group["lr"] = _beside(group["lr"], group["params"][0])


def _beside(count: Tensor, parameter: nn.Parameter) -> Tensor:
    """A step count or rate on its parameter's device, in its own dtype; a parameter without data leaves it there."""
    return count if parameter.device.type == "meta" else count.to(parameter.device)


class CapturableAdamW(torch.optim.AdamW):
    """AdamW whose steps may be captured in a CUDA graph: its learning rate is a tensor (fp32, as torch's kernel takes
    it) beside its parameters, and a step that is to be left out is told so on the device.

    Its state dict is that of a plain AdamW, so that either can go on with the other's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        parameters = list(parameters)
        device = parameters[0].device
        rate = torch.tensor(lr, dtype=torch.float32, device=device)
        super().__init__(parameters, lr=rate, weight_decay=weight_decay, fused=True, capturable=True)
        for group in self.param_groups:
            group["rate"] = lr
        self._warned_capturable_if_run_uncaptured = True  # torch's warning: here steps run either way

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned_capturable_if_run_uncaptured = True

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
        """A step, left out where found_inf (0-dim, on the device) is 1."""
        self.found_inf = found_inf
        self.step()
        del self.found_inf


def clipped_step(
    optimizer: torch.optim.AdamW,
    parameters: list[nn.Parameter],
    clip_value: float | None,
    graphs: GraphCache | None,
) -> None:
    """Steps these parameters, which have gradients, clipped to ± clip_value; graphs: as a CUDA graph, once there is a
    state to go on with."""

    def step() -> None:
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)
        optimizer.step()

    states = [optimizer.state.get(parameter) for parameter in parameters]
    if graphs is None or not isinstance(optimizer, CapturableAdamW) or capturing() or not all(states):
        step()
    else:
        rates = [group["lr"] for group in optimizer.param_groups]
        graphs.step(step, parameters, [*rates, *(tensor for state in states for tensor in state.values())])
