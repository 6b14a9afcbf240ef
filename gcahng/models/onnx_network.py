"""An exported ONNX network as a module, which ONNX Runtime runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gcahng.errors import UserError

INPUT, OUTPUT = "images", "embeddings"  # the names that gcahng export gives them


class OnnxNetwork(nn.Module):
    """A network that ONNX Runtime runs, as a module without parameters.

    Args:
        content: of an ONNX file.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        usable = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in usable]
        self._session = onnxruntime.InferenceSession(content, options, providers=providers)

    def about(self) -> dict[str, str]:
        """What the file says about itself."""
        return self._session.get_modelmeta().custom_metadata_map

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (n, 3, H, W), or (n, H, W) for a network of glyphs → (n, D), on the device of the images.

        Raises:
            UserError: images of another dtype or size.
        """
        wanted = self._session.get_inputs()[0].shape
        if images.dtype != torch.uint8 or list(images.shape[1:]) != wanted[1:]:
            sizes = ", ".join(map(str, wanted))
            raise UserError(f"images are {images.dtype} {tuple(images.shape)}; the ONNX file takes uint8 ({sizes})")
        (embeddings,) = self._session.run([OUTPUT], {INPUT: images.cpu().numpy()})
        return torch.from_numpy(embeddings).to(images.device)
