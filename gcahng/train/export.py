"""The former place of `gcahng.models.export`."""

from gcahng.models.export import export_model, onnx_network

__all__ = ["export_model", "onnx_network"]
