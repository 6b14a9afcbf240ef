"""A module that owns the parameters of gcahng.ops.edge_update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gcahng.bounds import check_number
from gcahng.engine.fits import check_fits
from gcahng.engine.masks import EdgeDropout
from gcahng.nn.graph_network import attention_projection, edge_update_weights
from gcahng.ops.edge_update import edge_update
from gcahng.reference.edge_update import EdgeUpdateWeights


class EdgeUpdate(nn.Module):
    """One dense update of the edges between all pairs of nodes (see gcahng.ops.edge_update).

    Args:
        dim: channels D.
        symmetric: whether e_ij = e_ji, so that half of the pairs are computed.
        dropout: chance p that dropout drops an attention weight, in training mode.
        impl: see gcahng.ops.edge_update.
        edge_memory: see gcahng.ops.edge_update.
        seed: of dropout; None takes one from torch's generator.

    Raises:
        UserError: dim, dropout or seed is out of its range (gcahng.bounds), or the weights would not fit into memory.
    """

    def __init__(
        self,
        dim: int,
        *,
        symmetric: bool = True,
        dropout: float = 0.0,
        impl: str = "auto",
        edge_memory: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("dropout", dropout)):
            check_number(name, value)
        check_number("seed", seed, none="None")
        check_fits(f"an edge update with {dim:,} channels", 4 * 11 * dim**2)
        self.symmetric, self.dropout, self.impl, self.edge_memory = symmetric, dropout, impl, edge_memory
        self.seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        self.query = attention_projection(dim)
        self.key = attention_projection(dim)
        self.value = attention_projection(dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_norm = nn.LayerNorm(4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64))

    def weights(self) -> EdgeUpdateWeights:
        """The parameters in the form in which the op takes them."""
        return edge_update_weights(self)

    def forward(self, edges: Tensor, nodes: Tensor) -> Tensor:
        """Updates the edges. In training mode with dropout, each call draws new masks.

        Args:
            edges: (n, n, D), or (n (n + 1) / 2, D) in half-band storage.
            nodes: (n, D).

        Returns:
            The updated edges, in the form of the edges that entered.
        """
        dropout = None
        if self.training and self.dropout:
            dropout = EdgeDropout(self.dropout, self.seed, self.draw.clone())
            self.draw.add_(1)
        return edge_update(
            edges,
            nodes,
            self.weights(),
            symmetric=self.symmetric,
            dropout=dropout,
            impl=self.impl,
            edge_memory=self.edge_memory,
        )
