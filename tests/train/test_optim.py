"""Schedules, warm-up, clipping and frozen layers, step by step against plain PyTorch: one AdamW for the head and one
for the body that is not stepped while it is frozen, PyTorch's schedulers, loops over gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR

from gcahng.errors import UserError
from gcahng.losses.official import official_state_dict
from gcahng.models.backbones import Backbone, build_backbone
from gcahng.nn import GraphAblation
from gcahng.train import BackboneConfig, GcaConfig, OptimizerConfig, TrainConfig
from gcahng.train.losses import GcaObjective, build_objective
from gcahng.train.optim import build_optimizer, prepare_step

MakeConfig = Callable[..., TrainConfig]
STEPS, PER_EPOCH = 12, 3


class Oracle:
    """The same training written down plainly; holds copies of everything."""

    def __init__(self, config: TrainConfig, model: Backbone, objective: nn.Module) -> None:
        self.config = config
        self.model, self.objective = copy.deepcopy(model), copy.deepcopy(objective)
        options = {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
        never = [p for name, p in self.model.named_parameters() if "patch_embed" in name] if self.strict else []
        head = list(self.model.head.parameters())
        body = [p for p in self.model.parameters() if not any(p is other for other in head + never)]
        self.head, self.body = torch.optim.AdamW(head, **options), torch.optim.AdamW(body, **options)
        self.schedulers = [self.scheduler(optimizer) for optimizer in (self.head, self.body)]

    @property
    def strict(self) -> bool:
        return self.config.backbone.freeze_patch_embed == "strict"

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Step: once an epoch; cosine: once a step."""
        options = self.config.optimizer
        if options.schedule == "step":
            return StepLR(optimizer, options.step_epochs, options.step_gamma)
        if options.schedule == "cosine":
            return CosineAnnealingLR(optimizer, self.config.steps)
        return LambdaLR(optimizer, lambda _: 1.0)

    def step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        warm_up = step // PER_EPOCH < self.config.optimizer.warmup_epochs
        self.model.train()
        if self.config.backbone.freeze_bn:
            for module in self.model.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.objective(self.model(images), labels)
        loss.backward()
        limit = self.config.optimizer.clip_value
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.maximum(torch.tensor(-limit)).minimum(torch.tensor(limit))
        self.head.step()
        if not warm_up:
            self.body.step()
        self.objective.finish_step()
        ends = (step + 1) % PER_EPOCH == 0
        if ends:
            self.objective.end_epoch()
        if ends or self.config.optimizer.schedule == "cosine":
            for scheduler in self.schedulers:
                scheduler.step()
        return loss.detach()


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    """Classes that differ a little: twelve images of a gray each, with noise."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(4).repeat_interleave(3)
    made = []
    for _ in range(STEPS):
        noise = torch.randint(0, 150, (12, size, size), generator=generator)
        made.append(((noise + 25 * labels[:, None, None]).to(torch.uint8), labels))
    return made


OPTIONS = {
    "constant": {},
    "step": {"schedule": "step", "step_epochs": 2},
    "step-0.3": {"schedule": "step", "step_epochs": 1, "step_gamma": 0.3},
    "cosine": {"schedule": "cosine"},
    "warm-up": {"warmup_epochs": 2, "weight_decay": 0.5},
    "clip": {"clip_value": 1e-3},
    "recipe": {"schedule": "step", "step_epochs": 1, "warmup_epochs": 1, "clip_value": 1e-2},
}
# PyTorch's schedulers multiply their last rate, so that it is rounded at every step; the rest is the same arithmetic.
ROUNDED = ("step-0.3", "cosine")
NETWORKS = {
    "glyph_conv": {},
    "frozen": {"freeze_bn": True},
    "patch": {"name": "timm:test_vit", "freeze_patch_embed": "strict"},
}
CASES = [(options, "glyph_conv") for options in OPTIONS]
CASES += [(options, network) for options in ("warm-up", "recipe") for network in ("frozen", "patch")]


@pytest.mark.filterwarnings("ignore:Detected call of")  # PyTorch suspects a mistake where the body waits
@pytest.mark.parametrize(("options", "network"), CASES)
def test_every_step_is_plain_pytorchs(options: str, network: str, small_config: MakeConfig) -> None:
    fields = {"embedding_dim": 8, "width": 2, "pretrained": False} | NETWORKS[network]
    config = small_config(
        loss="npair",
        steps=STEPS,
        steps_per_epoch=PER_EPOCH,
        backbone=BackboneConfig(**fields),
        optimizer=OptimizerConfig(**{"lr": 0.01} | OPTIONS[options]),
    )
    torch.manual_seed(0)
    model, objective = build_backbone(config.backbone), build_objective(config, 4)
    oracle, optimizer = Oracle(config, model, objective), build_optimizer(config, model, objective)
    clipped = 0
    for step, (images, labels) in enumerate(batches(16)):
        prepare_step(config, step, model, optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(oracle.head.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        expected = oracle.step(step, images, labels)
        loss = objective(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clipped += int((model.head[1].weight.grad.abs() > config.optimizer.clip_value).sum())
        nn.utils.clip_grad_value_([p for g in optimizer.param_groups for p in g["params"]], config.optimizer.clip_value)
        optimizer.step()
        objective.finish_step()
        state = model.state_dict()
        if options in ROUNDED:
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state, oracle.model.state_dict(), rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(loss.detach(), expected)
            for name, value in oracle.model.state_dict().items():
                assert torch.equal(state[name], value), (step, name)
    assert (clipped > 0) == (config.optimizer.clip_value < 1)


def test_a_body_in_warm_up_keeps_its_weights_and_then_moves(small_config: MakeConfig) -> None:
    config = small_config(loss="npair", steps_per_epoch=2, optimizer=OptimizerConfig(warmup_epochs=1, weight_decay=0.5))
    torch.manual_seed(0)
    model, objective = build_backbone(config.backbone), build_objective(config, 4)
    optimizer = build_optimizer(config, model, objective)
    first = copy.deepcopy(model.state_dict())
    moved = []
    for step, (images, labels) in enumerate(batches(16)[:4]):
        prepare_step(config, step, model, optimizer)
        optimizer.zero_grad(set_to_none=True)
        objective(model(images), labels).backward()
        optimizer.step()
        moved.append({name for name, value in model.named_parameters() if not torch.equal(value, first[name])})
    heads = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert moved[0] == moved[1] == heads
    assert moved[2] == {name for name, _ in model.named_parameters()}


def test_proxies_train_in_warm_up_and_follow_the_schedule(small_config: MakeConfig) -> None:
    options = OptimizerConfig(lr=1e-3, weight_decay=0.25, schedule="step", step_epochs=1, warmup_epochs=2, proxy_lr=0.5)
    config = small_config(loss="arcface", steps_per_epoch=2, optimizer=options)
    model, objective = build_backbone(config.backbone), build_objective(config, 4)
    optimizer = build_optimizer(config, model, objective)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    (proxies,) = objective.proxies()
    before = proxies.detach().clone()
    images, labels = batches(16)[0]
    for step, factor in enumerate((1, 1, 0.5, 0.5, 0.25)):
        prepare_step(config, step, model, optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [factor * 1e-3, factor * 0.5]
    prepare_step(config, 0, model, optimizer)
    objective(model(images), labels).backward()
    optimizer.step()
    assert not torch.equal(proxies, before)


def test_the_generators_rates_are_plain_pytorchs(small_config: MakeConfig) -> None:
    """The graph network's rate falls once an epoch along a cosine, the classifier's stays."""
    config = small_config(
        steps=STEPS, steps_per_epoch=PER_EPOCH, gca=GcaConfig(heads=2, graph_lr=0.02, classifier_lr=0.03)
    )
    objective = build_objective(config, 4)
    assert isinstance(objective, GcaObjective)
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = CosineAnnealingLR(plain, T_max=STEPS // PER_EPOCH)
    model = build_backbone(config.backbone)
    for step, (images, labels) in enumerate(batches(16)):
        gca = objective.gca
        assert gca.graph_optimizer.param_groups[0]["lr"] == pytest.approx(plain.param_groups[0]["lr"], rel=1e-6)
        assert gca.classifier_optimizer.param_groups[0]["lr"] == 0.03
        objective(model(images), labels).backward()
        objective.finish_step()
        plain.step()
        if (step + 1) % PER_EPOCH == 0:
            objective.end_epoch()
            scheduler.step()
    assert gca.graph_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_every_option_of_gca_hng_reaches_the_loss(small_config: MakeConfig) -> None:
    plain = {"alpha": 1.5, "beta": 2.5, "dot_weight": 3.5, "div_weight": 4.5, "softmax_factor": 5.5}
    plain |= {"edge_dropout": 0.25, "symmetric": False, "compat": "official", "impl": "torch", "check": "off"}
    plain |= {"clip_value": 6.5, "graph_lr": 0.5}
    built = {
        "layers": 3,
        "heads": 8,
        "coefficients": "pair",
        "message_passing": False,
        "graph_weight_decay": 0.125,
        "classifier_lr": 0.25,
        "classifier_weight_decay": 1.5,
    }
    paired = {"synthetic": "cosine", "anchor_gradient": False, "synthetic_temperature": 0.5}
    paired |= {"synthetic_weight": 7.5, "synthetic_warmup": 9}
    assert {*plain, *built, *paired, "base", "weights"} == {field.name for field in fields(GcaConfig)}
    assert vars(build_objective(small_config(gca=GcaConfig(**paired)), 4).gca.pairing) == paired
    gca = build_objective(small_config(steps=7, seed=77, gca=GcaConfig(**plain, **built)), 4).gca
    assert {name: getattr(gca, name) for name in plain} == plain
    assert (gca.num_classes, gca.embedding_dim, gca.num_per_class, gca.seed, gca.epochs) == (4, 16, 3, 77, 3)
    assert (len(gca.graph_network.layers), gca.graph_network.heads) == (3, 8)
    assert gca.graph_network.ablation == GraphAblation("pair", message_passing=False)
    (graph,), (classifier,) = gca.graph_optimizer.param_groups, gca.classifier_optimizer.param_groups
    assert (graph["lr"], graph["weight_decay"]) == (0.5, 0.125)
    assert (classifier["lr"], classifier["weight_decay"]) == (0.25, 1.5)


def test_weights_of_graph_network_and_classifier(small_config: MakeConfig, tmp_path: Path) -> None:
    def made(path: Path | None, pretrained: bool = True) -> dict[str, Tensor]:
        gca = GcaConfig(heads=2, weights=None if path is None else str(path))
        objective = build_objective(small_config(gca=gca), 4, pretrained)
        assert isinstance(objective, GcaObjective)
        return official_state_dict(objective.gca)

    torch.manual_seed(1)
    first = made(None)
    torch.save(first | {"feature_extractor.fc.1.bias": torch.zeros(3)}, tmp_path / "full.pth")
    found = made(tmp_path / "full.pth")
    assert all(torch.equal(value, first[name]) for name, value in found.items())
    assert not torch.equal(made(tmp_path / "gone.pth", pretrained=False)["gnn.fc.0.weight"], first["gnn.fc.0.weight"])
    with pytest.raises(UserError, match=r"gca.weights is .*full.pth; state_dict does not fit this loss"):
        del first["gnn.fc.0.weight"]
        torch.save(first, tmp_path / "full.pth")
        made(tmp_path / "full.pth")
    with pytest.raises(UserError, match=r"gca.weights is .*gone.pth; .*gone.pth does not exist"):
        made(tmp_path / "gone.pth")
