"""The optimizers that the loss owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
        return CapturableAdamW(parameters, lr, weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


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


def check_state(state: Mapping[str, Any], optimizer: torch.optim.AdamW) -> None:
    """Checks that an optimizer's state fits its parameters, since fused AdamW would read beyond smaller moments.

    Args:
        state: the optimizer's state dict.
        optimizer: what it is for.

    Raises:
        UserError: moments have other shapes than the parameters.
    """
    (group,) = optimizer.param_groups
    for number, moments in state["state"].items():
        shape, own = tuple(moments["exp_avg"].shape), tuple(group["params"][number].shape)
        if shape != own:
            raise UserError(
                f"state_dict holds optimizer state of a weight of shape {shape}, and this loss's has shape {own}; "
                "num_classes and embedding_dim must be those of the state_dict (for weights alone leave its "
                "_extra_state out)"
            )


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
        if state := optimizer.state.pop(parameter, {}):
            optimizer.state[moved[parameter]] = {
                name: _beside(value, moved[parameter]) if name == "step" else fn(value) for name, value in state.items()
            }
    group["params"] = [moved[parameter] for parameter in group["params"]]
    if isinstance(group["lr"], Tensor):
        group["lr"] = _beside(group["lr"], group["params"][0])


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
        graphs: the cache of captured steps; None to capture none. The first step is never captured, since the
            optimizer has no state yet.
    """

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
