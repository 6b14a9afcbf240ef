"""Modules that own parameters."""

from gcahng.nn.graph_network import EdgeLayer, GraphLayer, GraphNetwork, NodeLayer

__all__ = ["EdgeLayer", "GraphLayer", "GraphNetwork", "NodeLayer"]
