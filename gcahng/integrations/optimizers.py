"""Which parameters another library's optimizers step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gcahng.errors import UserError
from gcahng.losses.gca_hng import GCAHNGLoss


def check_optimizers(loss: GCAHNGLoss, optimizers: Iterable[Any], cure: str) -> None:
    """Checks that no optimizer steps what the loss steps itself, and that one steps the parameters of its base.

    Args:
        loss: the loss.
        optimizers: of the trainer.
        cure: what to do about the first, as the message ends.

    Raises:
        UserError: that is not so.
    """
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = {id(parameter) for group in groups for parameter in group["params"]}

    def are_held(parameters: Iterable[nn.Parameter]) -> list[bool]:
        return [id(parameter) in held for parameter in parameters if parameter.requires_grad]

    if any(are_held([*loss.graph_network.parameters(), *loss.classifier.parameters()])):
        raise UserError(
            "an optimizer of the trainer holds parameters of the loss, which steps them itself, so that they would be "
            f"stepped twice; {cure}"
        )
    if not all(are_held(loss.base_parameters())):
        raise UserError(
            "no optimizer of the trainer holds the parameters of the loss's base, such as proxies; give it "
            "loss.base_parameters() beside those of the model"
        )
