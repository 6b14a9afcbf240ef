"""What a study may leave out of the graph network."""

from __future__ import annotations

from dataclasses import dataclass

from gcahng.bounds import shown_value
from gcahng.errors import UserError

COEFFICIENTS = ("channel", "pair", "constant")


@dataclass(frozen=True)
class GraphAblation:
    """What is left out of the graph network, to see what it is worth. By default it is whole.

    Attributes:
        coefficients: what θ is. "channel": a number for each pair and channel, as in the paper. "pair": a number for
            each pair, the same for all of its channels. "constant": ½ for all pairs and channels. Then J_gen has no
            gradient, and the graph network trains on J_gce alone; the values of J_soft, J_sim, J_div and J_gen are
            those of the negatives that are mixed with ½, and the mean of J_gen weighs J_syn as before.
        message_passing: whether nodes attend to each other, and sum over their edges. With False a node's features come
            from its own embedding alone, and θ_ij from those of i and j (batch statistics of the edge BatchNorm apart).
            Everything else stays: the norms and the MLP of the nodes, and each edge's attention to its two nodes.
    """

    coefficients: str = "channel"
    message_passing: bool = True

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: one of them is not what it must be.
        """
        if self.coefficients not in COEFFICIENTS:
            given = shown_value(self.coefficients)
            raise UserError(f"coefficients is {given}; it must be one of {', '.join(COEFFICIENTS)}")
        if not isinstance(self.message_passing, bool):
            raise UserError(f"message_passing is {shown_value(self.message_passing)}; it must be True or False")
