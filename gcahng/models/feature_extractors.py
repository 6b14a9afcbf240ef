"""Networks of torchvision and timm without their classifiers: they turn an image into a vector of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from gcahng.config import BackboneConfig
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.models.network_names import check_timm_name, meant
from gcahng.models.pretrained import (
    convert_efficientnet_lite0,
    efficientnet_lite0_file,
    from_hub,
    load_extractor,
    read_tensors,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION = ("googlenet", "resnet50")
EFFICIENTNET_LITE0 = "efficientnet_lite0"
BUILT_IN = ("glyph_conv", EFFICIENTNET_LITE0, *(f"torchvision:{name}" for name in TORCHVISION))


@dataclass(frozen=True)
class FeatureExtractor:
    """A network without its classifier.

    Attributes:
        network: (n, 3, H, W) normalized images → (n, F).
        features: F, the number of features.
        mean: the mean of each channel of its training images, in 0 … 1.
        std: their standard deviation.
        size: H = W in pixels, where it takes images of one size only; None: any size.
        class_token: whether it is a transformer whose features are a token and not a pooled map.
    """

    network: nn.Module
    features: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: int | None = None
    class_token: bool = False


class SumPool(nn.Module):
    """Global average + global maximum: (n, F, h, w) → (n, F, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, F, h, w) → (n, F, 1, 1)."""
        return adaptive_avg_pool2d(x, 1) + adaptive_max_pool2d(x, 1)


class _Doubled(nn.Module):
    """Makes timm's `avgmax`, which is the mean of average and maximum, their sum."""

    def __init__(self, mean_of_both: nn.Module) -> None:
        super().__init__()
        self.mean_of_both = mean_of_both

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.mean_of_both(x)


def build_extractor(config: BackboneConfig, pretrained: bool) -> FeatureExtractor:
    """The network that `config.name` names; any but glyph_conv.

    Args:
        config: its name, weights, pool and grad_checkpointing are used.
        pretrained: whether weights are loaded, from config.weights, or else from the hub or the package that has them.

    Raises:
        UserError: the name is unknown (the message suggests close ones), a package is missing, weights cannot be
            obtained or do not fit, or the network does not have an option.
    """
    library, _, name = config.name.partition(":")
    if config.name == EFFICIENTNET_LITE0:
        return _efficientnet_lite0(config, pretrained)
    if library == "torchvision" and name in TORCHVISION:
        return _torchvision(name, config, pretrained)
    if library == "timm" and name:
        return _timm(name, config, pretrained)
    raise UserError(f"backbone.name is {config.name!r}; {meant(config.name, BUILT_IN)}")


def _torchvision(name: str, config: BackboneConfig, pretrained: bool) -> FeatureExtractor:
    require("torchvision", extra="train", purpose=f"the network {config.name} is torchvision's")
    if config.grad_checkpointing:
        raise UserError(
            f"backbone.grad_checkpointing is true; for {config.name} it must be false, as only networks of timm have it"
        )
    from torchvision import models

    network: Any
    if name == "googlenet":
        # transform_input: the network turns ImageNet's scale into the one that the pretrained weights need.
        network = models.GoogLeNet(aux_logits=False, transform_input=True, init_weights=not pretrained)
        network.dropout = nn.Identity()
        weights, features = models.GoogLeNet_Weights.IMAGENET1K_V1, 1024
    else:
        network = models.resnet50()
        weights, features = models.ResNet50_Weights.IMAGENET1K_V1, 2048
    network.fc = nn.Identity()
    if config.pool == "avg+max":
        network.avgpool = SumPool()
    if pretrained:
        _load(network, config, ("fc", "aux1", "aux2"), lambda: weights.get_state_dict(progress=True, check_hash=True))
    return FeatureExtractor(network, features)


def _timm(name: str, config: BackboneConfig, pretrained: bool) -> FeatureExtractor:
    require("timm", extra="train", purpose=f"the network {config.name} is timm's")
    check_timm_name(name)
    extractor = _timm_extractor(name, config)
    if pretrained:
        classifier = extractor.network.pretrained_cfg.get("classifier") or ()
        prefixes = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        _load(extractor.network, config, prefixes, lambda: _timm_weights(name))
    return extractor


def _timm_extractor(name: str, config: BackboneConfig) -> FeatureExtractor:
    import timm

    pool = {"global_pool": "avgmax"} if config.pool == "avg+max" else {}
    try:
        network: Any = timm.create_model(name, num_classes=0, **pool)
    except (AssertionError, TypeError) as error:
        if not pool:
            raise
        raise UserError(f"backbone.pool is 'avg+max'; for {config.name} it must be 'avg'") from error
    if pool:
        _double_pools(network, config)
    if config.grad_checkpointing:
        try:
            network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(
                f"backbone.grad_checkpointing is true; for {config.name} it must be false, as it does not have it"
            ) from None
    about = network.pretrained_cfg
    height, width = about["input_size"][1:]
    return FeatureExtractor(
        network,
        getattr(network, "head_hidden_size", network.num_features),
        about["mean"],
        about["std"],
        height if about.get("fixed_input_size") and height == width else None,
        class_token=getattr(network, "global_pool", None) == "token",
    )


def _double_pools(network: nn.Module, config: BackboneConfig) -> None:
    from timm.layers import SelectAdaptivePool2d

    pools = [module for module in network.modules() if isinstance(module, SelectAdaptivePool2d)]
    if not pools:
        raise UserError(f"backbone.pool is 'avg+max'; {config.name} pools no feature map: it must be 'avg'")
    for pool in pools:
        pool.pool = _Doubled(pool.pool)


def _timm_weights(name: str) -> dict[str, Tensor]:
    import timm

    # The state of a network, because timm converts a download to its own names while it loads it.
    return timm.create_model(name, pretrained=True, num_classes=0).state_dict()


def _efficientnet_lite0(config: BackboneConfig, pretrained: bool) -> FeatureExtractor:
    require("timm", extra="train", purpose=f"the network {config.name} is timm's")
    extractor = _timm_extractor("tf_efficientnet_lite0", config)
    if pretrained:
        path = config.weights or str(efficientnet_lite0_file())
        load_extractor(extractor.network, convert_efficientnet_lite0(read_tensors(path)), path, ("classifier",))
    return extractor


def _load(
    network: nn.Module, config: BackboneConfig, unused: tuple[str, ...], download: Callable[[], dict[str, Tensor]]
) -> None:
    """Load the weights of config.weights, or else the hub's."""
    if config.weights is not None:
        load_extractor(network, read_tensors(config.weights), config.weights, unused)
    else:
        load_extractor(network, from_hub(config.name, download), f"the hub's file of {config.name}", unused)
