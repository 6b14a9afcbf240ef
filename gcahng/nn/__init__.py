"""Modules that own parameters."""

from gcahng.nn.ablation import GraphAblation
from gcahng.nn.edge_update import EdgeUpdate
from gcahng.nn.graph_network import EdgeLayer, GraphLayer, GraphNetwork, NodeLayer

__all__ = ["EdgeLayer", "EdgeUpdate", "GraphAblation", "GraphLayer", "GraphNetwork", "NodeLayer"]
