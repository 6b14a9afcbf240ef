"""Networks that turn images into embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from gcahng.config import BackboneConfig
from gcahng.engine.fits import check_fits
from gcahng.errors import UserError
from gcahng.models.feature_extractors import FeatureExtractor, build_extractor
from gcahng.models.input_size import next_size
from gcahng.models.pretrained import check_names, read_tensors

_LUMA = (0.299, 0.587, 0.114)  # of RGB, ITU-R BT.601, as PIL turns color into gray


class Backbone(nn.Module):
    """A body that extracts features and a head that embeds them: (n, H, W) or (n, 3, H, W) uint8 → (n, D).

    The head is BatchNorm1d → Linear, as in the authors' networks. The embeddings are not normalized. A subclass defines
    the `pooled` features.

    Attributes:
        body: the network without its head.
        head: the part that trains during warm-up.
        freeze_bn: whether the body's BatchNorm2d use their running statistics in training too, and leave them
            unchanged; their scale and shift train.
        frozen: prefixes of the names of the body's parameters that never train.
        micro_batch: how many images the body takes at once in training. It drops their activations, which the backward
            computes again; gradients are the same up to rounding. None: it takes the whole batch.
    """

    body: nn.Module
    head: nn.Sequential
    freeze_bn: bool = False
    frozen: tuple[str, ...] = ()
    micro_batch: int | None = None
    _size_option = "raise data.image_size"

    def pooled(self, images: Tensor) -> Tensor:
        """(n, H, W) or (n, 3, H, W) uint8 → (n, F), the features that the head embeds."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(n, H, W) or (n, 3, H, W) uint8 → (n, D).

        Raises:
            UserError: the network takes images of one size, and these are larger; or it takes larger ones only.
        """
        size = self.micro_batch
        if size is None or not self.training or len(images) <= size or not torch.is_grad_enabled():
            return self.head(self.pooled(images))
        parts = [checkpoint(self.pooled, part, use_reentrant=False) for part in images.split(size)]
        return self.head(torch.cat(parts))

    def _run_body(self, x: Tensor) -> Tensor:
        """The body on (n, C, H, W); where it cannot take images of this size, the error says which option to raise."""
        if torch.compiler.is_compiling():
            return self.body(x)
        try:
            return self.body(x)
        except (RuntimeError, ValueError, AssertionError) as error:
            if (size := next_size(self.body, x)) is None:
                raise
            height, width = x.shape[-2:]
            raise UserError(
                f"images are {height}x{width}, which this network cannot take; the next larger size that it takes is "
                f"{size}x{size}: {self._size_option} to {size}"
            ) from error

    def body_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters outside the head that train after warm-up."""
        for name, parameter in self.body.named_parameters():
            if not name.startswith(self.frozen):
                yield parameter

    def trainable(self) -> list[nn.Parameter]:
        """All parameters that train at some time of a run."""
        return [*self.body_parameters(), *self.head.parameters()]

    def train_body(self, trains: bool) -> None:
        """Set whether the body trains. If not, no graph is recorded through it and its gradients are None."""
        for parameter in self.body_parameters():
            parameter.requires_grad_(trains)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of all modules but frozen BatchNorm2d, which stay in evaluation mode."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def speed_up(self, *, channels_last: bool = False, compile: bool = False) -> None:
        """Set the memory layout and the compilation of the body; names and values of the state dict do not change.

        Args:
            channels_last: whether convolutions run on channels-last memory.
            compile: whether the body's forward runs through torch.compile, which compiles at its first call.
        """
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            self.body.compile()


class GlyphConv(Backbone):
    """A small convolutional network for gray images: five 3×3 convolutions and a global mean.

    Each convolution is followed by BatchNorm and ReLU, and the first, second and fourth also by a 2×2 maximum. Their
    widths are `width` times 1, 2, 4, 4, 8.

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
            stages += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            stages.append(nn.ReLU(inplace=True))  # no derivative needs what BatchNorm gave
            if pools:
                stages.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.BatchNorm1d(8 * width), nn.Linear(8 * width, embedding_dim))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs

    @property
    def body(self) -> nn.Module:  # type: ignore[override]
        return self.features

    def pooled(self, images: Tensor) -> Tensor:
        """(n, H, W) or (n, 3, H, W) uint8, H and W at least 8 → (n, 8 width)."""
        x = images.to(self.head[1].weight.dtype) / 255
        x = x[:, None] if x.ndim == 3 else (x * x.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
        x = self._run_body(x.contiguous(memory_format=torch.channels_last))
        return x.mean(dim=(2, 3))


def scaling(network: nn.Module) -> tuple[list[float], list[float]]:
    """The mean and the deviation of each channel, for values in 0 … 1, that a network subtracts and divides by.

    Args:
        network: made by `build_backbone`. One for gray images takes them as they are: (0), (1).
    """
    if isinstance(network, ImageBackbone):
        return network.mean.flatten().tolist(), network.std.flatten().tolist()
    return [0.0], [1.0]


class ImageBackbone(Backbone):
    """A network of torchvision or timm with the authors' head on top.

    Images are scaled to 0 … 1 and normalized with the mean and deviation that the network was trained with. Gray images
    get three equal channels. Images whose shorter side is below `min_size` are scaled up to it (bilinear), or to the
    input size of a network that has only one.

    Weights of the head come from torch's generator. On top of a transformer's class token its matrix starts orthogonal
    and its bias at 0, as in the authors' DINO.

    Args:
        extractor: the network.
        embedding_dim: D.
        min_size: in pixels.
    """

    mean: Tensor
    std: Tensor
    _size_option = "raise data.image_size, or backbone.min_size, which scales smaller images up,"

    def __init__(self, extractor: FeatureExtractor, embedding_dim: int, min_size: int = 64) -> None:
        super().__init__()
        self.body = extractor.network
        linear = nn.Linear(extractor.features, embedding_dim)
        if extractor.class_token:
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(extractor.features), linear)
        self.register_buffer("mean", torch.tensor(extractor.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(extractor.std).view(3, 1, 1), persistent=False)
        self._size, self._min_size = extractor.size, min_size
        self._format = torch.contiguous_format

    def pooled(self, images: Tensor) -> Tensor:
        """(n, H, W) or (n, 3, H, W) uint8 → (n, F); raises UserError for images larger than the only input size."""
        x = images.to(self.mean.dtype) / 255
        if x.ndim == 3:
            x = x[:, None].expand(-1, 3, -1, -1)
        x = (self._scaled(x) - self.mean) / self.std
        return self._run_body(x.contiguous(memory_format=self._format))

    def speed_up(self, *, channels_last: bool = False, compile: bool = False) -> None:
        super().speed_up(channels_last=channels_last, compile=compile)
        if channels_last:
            self._format = torch.channels_last

    def _scaled(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = self._size
        if size is None:
            factor = self._min_size / min(height, width)
            if factor <= 1:
                return x
            wanted = (max(self._min_size, round(height * factor)), max(self._min_size, round(width * factor)))
        elif (height, width) == (size, size):
            return x
        elif max(height, width) > size:
            raise UserError(
                f"images are {height}x{width}; this network takes {size}x{size}: set data.image_size to {size}"
            )
        else:
            wanted = (size, size)
        return interpolate(x, size=wanted, mode="bilinear")


def build_backbone(config: BackboneConfig, pretrained: bool | None = None) -> Backbone:
    """The network that `config` describes; parts that are not pretrained get fresh weights from torch's generator.

    Args:
        config: which network.
        pretrained: replaces config.pretrained; False where weights are loaded afterwards.

    Raises:
        UserError: the name is unknown, a package is missing, weights cannot be obtained or do not fit, or the network
            does not have an option.
    """
    wants = config.pretrained if pretrained is None else pretrained
    if config.weights is not None and not config.pretrained:
        raise UserError(
            f"backbone.weights is {config.weights} and backbone.pretrained is false; weights need pretrained true"
        )
    own = _own_weights(config.weights) if wants and config.weights is not None else None
    network: Backbone
    if config.name == "glyph_conv":
        network = _glyph_conv(config, own is None and wants)
    else:
        network = ImageBackbone(build_extractor(config, wants and own is None), config.embedding_dim, config.min_size)
    network.freeze_bn = config.freeze_bn
    network.micro_batch = config.micro_batch
    _freeze_patch_embed(network, config)
    _check_micro_batch(network.train(), config)
    if own is not None:
        expected = network.state_dict()
        check_names(expected, own, str(config.weights), f"{config.name} with embedding_dim {config.embedding_dim}")
        network.load_state_dict(own)
    return network


def _glyph_conv(config: BackboneConfig, wants: bool) -> GlyphConv:
    if wants and config.weights is not None:
        raise UserError(f"backbone.weights is {config.weights}; for glyph_conv it must be a model that gcahng wrote")
    if config.pool != "avg":
        raise UserError(f"backbone.pool is {config.pool!r}; for glyph_conv it must be 'avg'")
    if config.grad_checkpointing:
        raise UserError(
            "backbone.grad_checkpointing is true; for glyph_conv it must be false, as only networks of timm have it"
        )
    # Weights of the convolutions (of the first one, few) and of the head.
    check_fits(
        f"glyph_conv with backbone.width {config.width:,} and backbone.embedding_dim {config.embedding_dim:,}",
        4 * (9 * (2 + 8 + 16 + 32) * config.width**2 + 8 * config.width * config.embedding_dim),
    )
    return GlyphConv(config.embedding_dim, config.width)


def _own_weights(path: str) -> dict[str, Tensor] | None:
    """The tensors of a model that gcahng wrote; None if the file is of another kind."""
    tensors = read_tensors(path)
    return tensors if "head.1.weight" in tensors and any(_is_ours(name) for name in tensors) else None


def _is_ours(name: str) -> bool:
    return name.startswith(("body.", "features."))


def _check_micro_batch(network: Backbone, config: BackboneConfig) -> None:
    if config.micro_batch is None:
        return
    if any(isinstance(module, _BatchNorm) and module.training for module in network.body.modules()):
        raise UserError(
            f"backbone.micro_batch is {config.micro_batch}; the BatchNorm of {config.name} would see only that many "
            "images and not the batch: set backbone.freeze_bn to true, or backbone.micro_batch to null"
        )


def _freeze_patch_embed(network: Backbone, config: BackboneConfig) -> None:
    if config.freeze_patch_embed == "off":
        return
    if not hasattr(network.body, "patch_embed"):
        raise UserError(
            f"backbone.freeze_patch_embed is {config.freeze_patch_embed!r}; {config.name} has no patch embedding: it "
            "must be 'off'"
        )
    if config.freeze_patch_embed == "strict":
        network.frozen = ("patch_embed.",)
        for parameter in network.body.patch_embed.parameters():  # type: ignore[union-attr,operator]
            parameter.requires_grad_(False)
