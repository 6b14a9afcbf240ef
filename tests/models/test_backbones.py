"""Networks of torchvision and timm with the authors' head: outputs, trained parameters and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
import torchvision
from tiers import few
from torch import Tensor, nn

from gcahng.errors import UserError
from gcahng.models.backbones import Backbone, build_backbone
from gcahng.train import BackboneConfig

GOOGLENET, RESNET50, DINO = "torchvision:googlenet", "torchvision:resnet50", "timm:vit_small_patch16_224.dino"
TINY_VIT, TINY_NET = "timm:test_vit", "timm:test_resnet"  # timm's own for tests: 160 pixels, 2 blocks
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def fresh(name: str, **fields: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=name, **{"embedding_dim": 16, "pretrained": False} | fields))


@cache
def shared(name: str, pool: str = "avg") -> Backbone:
    """For tests that change nothing; in evaluation mode."""
    return fresh(name, pool=pool).eval()


def some_images(size: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def googlenet_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    network = torchvision.models.GoogLeNet(aux_logits=False, transform_input=True, init_weights=False)
    network.load_state_dict(state, strict=False)
    return pooled_of(network.eval(), x)


def resnet50_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    network = torchvision.models.resnet50()
    network.load_state_dict(state, strict=False)
    return pooled_of(network.eval(), x)


def pooled_of(network: nn.Module, x: Tensor) -> Tensor:
    found = []
    network.avgpool.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    network(x)
    return found[0].mean(dim=(2, 3))


def resnet50_sum(state: dict[str, Tensor], x: Tensor) -> Tensor:
    network = torchvision.models.resnet50()
    network.load_state_dict(state, strict=False)
    found = []
    network.layer4.register_forward_hook(lambda module, inputs, output: found.append(output))
    network.eval()(x)
    return found[0].mean(dim=(2, 3)) + found[0].amax(dim=(2, 3))


def dino_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    network = timm.create_model("vit_small_patch16_224.dino")
    network.load_state_dict(state)
    return network.eval().forward_features(x)[:, 0]


@pytest.mark.parametrize(
    ("name", "pool", "features", "expected", "size"),
    [
        pytest.param(GOOGLENET, "avg", 1024, googlenet_features, 64, id="googlenet"),
        pytest.param(RESNET50, "avg", 2048, resnet50_features, 64, id="resnet50"),
        pytest.param(RESNET50, "avg+max", 2048, resnet50_sum, 64, id="resnet50-avg+max", marks=pytest.mark.thorough),
        pytest.param(DINO, "avg", 384, dino_features, 224, id="dino"),
    ],
)
@torch.no_grad()
def test_features_are_the_librarys(
    name: str, pool: str, features: int, expected: Callable[..., Tensor], size: int
) -> None:
    network, images = shared(name, pool), some_images(size)
    x = (images / 255 - MEAN) / STD
    state = network.body.state_dict()
    found = expected(state, x)
    assert found.shape == (2, features) and network.head[0].num_features == features
    torch.testing.assert_close(network(images), network.head(found))
    assert [type(part) for part in network.head] == [nn.BatchNorm1d, nn.Linear]
    assert {key.split(".")[0] for key in network.state_dict()} == {"body", "head"}
    assert not [key for key in state if key.startswith(("fc.", "aux"))]


def test_googlenet_rescales_its_input_itself_and_drops_nothing() -> None:
    body = shared(GOOGLENET).body
    assert body.transform_input and not body.aux_logits
    assert not [module for module in body.modules() if isinstance(module, nn.Dropout)]


def test_dinos_head_starts_orthogonal_and_the_others_do_not() -> None:
    linear = fresh(DINO, embedding_dim=384).head[1]
    assert torch.equal(linear.bias, torch.zeros(384))
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(384), rtol=0, atol=1e-5)
    other = shared(RESNET50).head[1]
    assert other.bias.abs().max() > 0


@pytest.mark.parametrize("name", [TINY_NET, "timm:mobilenetv3_small_050", "timm:test_convnext"])
@torch.no_grad()
def test_the_sum_of_poolings_in_timms_networks(name: str) -> None:
    average, both = shared(name), shared(name, "avg+max")
    images = some_images(96)
    seen = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        for module in both.body.modules()
        if isinstance(module, timm.layers.SelectAdaptivePool2d)
    ]
    both(images)
    for handle in handles:
        handle.remove()
    ((map_, pooled),) = seen
    expected = map_.mean(dim=(2, 3)) + map_.amax(dim=(2, 3))
    torch.testing.assert_close(pooled.flatten(1), expected)
    assert both.state_dict().keys() == average.state_dict().keys()
    assert both(images).shape == average(images).shape == (2, 16)


@torch.no_grad()
def test_gray_images_are_expanded_and_small_ones_scaled_up() -> None:
    network = shared(RESNET50)
    gray = some_images(32)[:, 0]
    color = gray[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(network(gray), network(color))
    up = nn.functional.interpolate(color / 255, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(network(gray), network.head(network.body((up - MEAN) / STD)))

    wide = some_images(32)[:, :, :, :24]
    assert network._scaled(wide.float()).shape == (2, 3, 85, 64)
    assert network._scaled(some_images(64).float()).shape == (2, 3, 64, 64)
    assert fresh(TINY_NET, min_size=100)._scaled(wide.float()).shape == (2, 3, 133, 100)


@torch.no_grad()
def test_a_network_with_one_size_scales_to_it_and_refuses_more() -> None:
    network = shared(TINY_VIT)
    assert network(some_images(32)).shape == (2, 16)
    assert network(some_images(160)).shape == (2, 16)
    with pytest.raises(UserError, match=r"images are 224x224; this network takes 160x160: set data.image_size to 160"):
        network(some_images(224))


@pytest.mark.parametrize("name", ["glyph_conv", TINY_NET, GOOGLENET])
def test_frozen_batch_norm(name: str) -> None:
    network = fresh(name, freeze_bn=True)
    network.eval()
    network.train()
    norms = [module for module in network.body.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(not norm.training for norm in norms) and network.head[0].training
    before = {key: value.clone() for key, value in network.named_buffers()}
    network(some_images(64, count=3)).sum().backward()
    for key, value in network.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            assert torch.equal(value, before[key]) == (not key.startswith("head.")), key
    assert all(norm.weight.grad is not None and norm.bias.grad is not None for norm in norms)

    network.freeze_bn = False
    network.train()
    assert all(norm.training for norm in norms)


def test_warm_up_leaves_the_body_out_of_the_graph() -> None:
    network = fresh(TINY_NET)
    network.train_body(False)
    seen = []
    network.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    network(some_images(64)).sum().backward()
    assert seen == [False]
    assert {key.split(".")[0] for key, value in network.named_parameters() if value.grad is not None} == {"head"}
    network.train_body(True)
    network(some_images(64)).sum().backward()
    assert all(value.grad is not None for value in network.parameters())


def gradients(network: Backbone) -> dict[str, Tensor | None]:
    network.zero_grad()
    network(some_images(160)).square().sum().backward()
    return {key: value.grad for key, value in network.named_parameters()}


def test_freezing_the_patch_embedding() -> None:
    off, official = fresh(TINY_VIT), fresh(TINY_VIT, freeze_patch_embed="official")
    plain, same = gradients(off), gradients(official)
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    assert len(off.trainable()) == len(official.trainable()) == len(list(off.parameters()))

    strict = fresh(TINY_VIT, freeze_patch_embed="strict")
    frozen = {key for key in plain if key.startswith("body.patch_embed.")}
    assert len(frozen) == 2
    for _ in range(2):
        found = gradients(strict)
        assert {key for key, value in found.items() if value is None} == frozen
        torch.testing.assert_close(found["body.cls_token"], plain["body.cls_token"])
        strict.train_body(False)
        strict.train_body(True)
    held = {id(value) for value in strict.trainable()}
    assert {key for key, value in strict.named_parameters() if id(value) not in held} == frozen


def test_gradient_checkpointing_gives_the_same_with_less_kept() -> None:
    plain, saving = fresh(TINY_VIT), fresh(TINY_VIT, grad_checkpointing=True)

    def kept(network: Backbone) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            network(some_images(160))
        return sum(sizes)

    assert kept(saving) < kept(plain) / 2
    one, other = gradients(plain), gradients(saving)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value)
    saving.train_body(False)
    saving(some_images(160)).sum().backward()


@pytest.mark.parametrize("name", ["glyph_conv", TINY_NET, TINY_VIT])
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_have_the_batchs_gradients_and_keep_no_activations(name: str, size: int) -> None:
    images, found, kept = some_images(64 if name == "glyph_conv" else 160, count=5), [], []
    for options in ({}, {"micro_batch": size}):
        network = fresh(name, freeze_bn=True, **options).double()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t):
            out = network(images)
        out.square().sum().backward()
        kept.append(sum(sizes))
        found.append({"out": out.detach(), **{key: value.grad for key, value in network.named_parameters()}})
    assert kept[1] < kept[0] / 20
    for key, value in found[0].items():
        assert value is not None
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-11, msg=lambda text, k=key: f"{k}: {text}")


def test_micro_batches_draw_a_dropout_once() -> None:
    """Both passes of a part draw the same dropout."""
    network = fresh(TINY_VIT, micro_batch=2)
    network.body.pos_drop = nn.Dropout(0.5)
    drawn: list[Tensor] = []
    network.body.pos_drop.register_forward_hook(lambda module, inputs, out: drawn.append(out.detach()))
    network(some_images(160, count=6)).sum().backward()
    assert len(drawn) == 6  # the backward begins with the last part
    assert all(torch.equal(first, again) for first, again in zip(drawn[:3], reversed(drawn[3:]), strict=True))
    assert not torch.equal(drawn[0] == 0, drawn[1] == 0)


def test_micro_batches_wait_for_training_of_the_body() -> None:
    network = fresh(TINY_VIT, micro_batch=2)
    network.train_body(False)
    network(some_images(160, count=5)).sum().backward()
    assert all(p.grad is None for p in network.body_parameters()) and network.head[1].weight.grad is not None
    with torch.no_grad():
        assert network(some_images(160, count=5)).shape == (5, 16)


@pytest.mark.parametrize("name", few(["glyph_conv", TINY_NET, TINY_VIT, RESNET50], 3))
def test_channels_last_and_compilation_change_no_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def without_code(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        def call(*arguments: Tensor) -> Tensor:
            compiled.append(arguments[0].is_contiguous(memory_format=torch.channels_last))
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", without_code)
    plain, fast = fresh(name).eval(), fresh(name).eval()
    fast.speed_up(channels_last=True, compile=True)
    assert {key: value.shape for key, value in plain.state_dict().items()} == {
        key: value.shape for key, value in fast.state_dict().items()
    }
    fast.load_state_dict(plain.state_dict())
    images = some_images(64)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)
    assert compiled == [True]


@pytest.mark.slow
def test_compiled_for_real() -> None:
    """In evaluation mode: BatchNorm over a batch of two makes signs of differences, and noise of their gradients."""
    plain, fast = fresh(TINY_NET).eval(), fresh(TINY_NET).eval()
    fast.speed_up(compile=True)
    one, other = gradients(plain), gradients(fast)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=key)
    for network in (plain, fast):
        network.train_body(False)
    with torch.no_grad():
        torch.testing.assert_close(fast(some_images(64)), plain(some_images(64)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", few([TINY_VIT, GOOGLENET, RESNET50]))
def test_lower_precision_under_autocast(name: str) -> None:
    network = shared(name)
    with torch.no_grad():
        expected = network(some_images(64))
        with torch.autocast("cpu", torch.bfloat16):
            found = network(some_images(64))
    assert found.dtype is torch.bfloat16
    assert nn.functional.cosine_similarity(found.float(), expected).min() > 0.99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet50"}, "backbone.name is 'resnet50'; did you mean torchvision:resnet50?"),
        ({"name": "torchvision:resnet51"}, "did you mean torchvision:resnet50?"),
        ({"name": "vit_small_patch16_224"}, "did you mean timm:vit_small_patch16_224?"),
        ({"name": "timm:resnet5O"}, r"backbone.name is 'timm:resnet5O'; did you mean timm:resnet50"),
        ({"name": "timm:vit_small_patch16_224.dyno"}, r"its weights are .*timm:vit_small_patch16_224.dino"),
        ({"name": "timm:§"}, "timm has no such network"),
        ({"name": "timm:ResNet-50"}, r"did you mean timm:resnet50\?$"),
        ({"name": "timm/resnet50.a1_in1k"}, r"did you mean timm:resnet50.a1_in1k\?"),
        ({"name": "timm:hf-hub:timm/resnet18"}, r"did you mean timm:resnet18\?"),
        ({"name": "timm:resnet50.a1_in"}, "did you mean timm:resnet50.a1_in1k or timm:.*its weights are timm:"),
        ({"name": "ResNet51"}, "did you mean torchvision:resnet50 or timm:resnet"),
        ({"name": "mobilenet_v3"}, "did you mean timm:mobilenetv3"),
        ({"name": "something"}, "it must be glyph_conv, efficientnet_lite0, torchvision:googlenet"),
        ({"name": TINY_VIT, "pool": "avg+max"}, r"backbone.pool is 'avg\+max'; timm:test_vit pools no feature map"),
        ({"name": "glyph_conv", "pool": "avg+max"}, r"for glyph_conv it must be 'avg'"),
        ({"name": "glyph_conv", "grad_checkpointing": True}, "for glyph_conv it must be false"),
        ({"name": RESNET50, "grad_checkpointing": True}, "for torchvision:resnet50 it must be false"),
        ({"name": RESNET50, "freeze_patch_embed": "official"}, "torchvision:resnet50 has no patch embedding"),
        ({"name": TINY_NET, "freeze_patch_embed": "strict"}, "timm:test_resnet has no patch embedding"),
        (
            {"name": TINY_NET, "micro_batch": 2},
            r"backbone.micro_batch is 2; the BatchNorm of timm:test_resnet .*freeze_bn",
        ),
    ],
)
def test_mistakes(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_backbone(BackboneConfig(**{"pretrained": False} | fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "least", "trains"),
    [
        ("glyph_conv", 5, 8, True),
        ("glyph_conv", 5, 8, False),
        ("torchvision:googlenet", 8, 15, True),
        ("timm:inception_v3", 64, 75, False),
    ],
)
def test_images_that_are_too_small_name_the_option(name: str, size: int, least: int, trains: bool) -> None:
    min_size = 1 if size < 64 else 64
    network = build_backbone(BackboneConfig(name=name, pretrained=False, embedding_dim=4, min_size=min_size))
    network.train(trains)
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    options = "data.image_size" + ("" if name == "glyph_conv" else ", or backbone.min_size, which .* up,")
    says = rf"images are {size}x{size}, which this network cannot .* {least}x{least}: raise {options} to {least}$"
    with pytest.raises(UserError, match=says):
        network(images)
    assert all(torch.equal(before[key], value) for key, value in network.named_parameters())
    assert network(torch.zeros(2, 3, least, least, dtype=torch.uint8)).shape == (2, 4), "that size is taken"


def test_another_error_of_a_network_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_backbone(BackboneConfig(name="glyph_conv", pretrained=False, embedding_dim=4))
    with torch.no_grad(), pytest.raises(RuntimeError, match="a bug"):
        network.features.register_forward_pre_hook(_bug)
        network(torch.zeros(2, 32, 32, dtype=torch.uint8))


def _bug(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("name", "module"), [(RESNET50, "torchvision"), (DINO, "timm"), ("efficientnet_lite0", "timm")]
)
def test_a_missing_library_names_the_extra(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.extras.find_spec", lambda asked: None if asked == module else object())
    with pytest.raises(UserError, match=rf'{module} is not installed; pip install "gcahng\[train\]"'):
        fresh(name)
