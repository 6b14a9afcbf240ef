"""Modules that own parameters."""

from gcahng.nn.edge_update import EdgeUpdate
from gcahng.nn.graph_network import EdgeLayer, GraphLayer, GraphNetwork, NodeLayer

__all__ = ["EdgeLayer", "EdgeUpdate", "GraphLayer", "GraphNetwork", "NodeLayer"]
