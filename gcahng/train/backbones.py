"""Networks that turn images into embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gcahng.train.config import BackboneConfig

_LUMA = (0.299, 0.587, 0.114)  # of RGB, ITU-R BT.601, as PIL turns colour into grey


class GlyphConv(nn.Module):
    """A small convolutional network for grey images: five 3×3 convolutions and a global mean.

    Each convolution is followed by BatchNorm and ReLU, the first, second and fourth also by a 2×2 maximum; their widths
    are `width` times 1, 2, 4, 4, 8. The head on top is BatchNorm1d → Linear, as in the authors' networks. The
    embeddings are not normalised.

    Args:
        embedding_dim: D.
        width: channels of the first convolution.
    """

    def __init__(self, embedding_dim: int = 64, width: int = 32) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 1
        for factor, pools in ((1, True), (2, True), (4, False), (4, True), (8, False)):
            outputs = factor * width
            stages += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if pools:
                stages.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.BatchNorm1d(8 * width), nn.Linear(8 * width, embedding_dim))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs

    def forward(self, images: Tensor) -> Tensor:
        """(n, H, W) or (n, 3, H, W) uint8, H and W at least 8 → (n, D)."""
        x = images.to(self.head[1].weight.dtype) / 255
        x = x[:, None] if x.ndim == 3 else (x * x.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
        x = self.features(x.contiguous(memory_format=torch.channels_last))
        return self.head(x.mean(dim=(2, 3)))


def build_backbone(config: BackboneConfig, pretrained: bool | None = None) -> nn.Module:
    """The network that `config` describes, with fresh weights from torch's generator where it is not pretrained.

    Args:
        config: which network.
        pretrained: in the place of config.pretrained; False where weights are loaded afterwards.
    """
    return {"glyph_conv": GlyphConv}[config.name](config.embedding_dim, config.width)
