"""States that do not fit: one error before anything of the loss has changed, wherever the loss sits."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from loss_cases import DIM, NUM_CLASSES, make_batch, same, snapshot, train_step
from pytorch_metric_learning.losses import ProxyAnchorLoss
from test_state_savers import as_version_1, go_on, held
from test_state_savers import trained as newly_trained
from tiers import few
from torch import Tensor, nn

import gcahng
from gcahng.losses.state import EXTRA


@functools.cache
def kept(steps: int, **options: int) -> gcahng.GCAHNGLoss:
    return newly_trained(steps, **options)


def trained(steps: int, base: nn.Module | None = None, **options: int) -> gcahng.GCAHNGLoss:
    """A trained loss. Copies of one are quicker than as many trainings."""
    return copy.deepcopy(kept(steps, **options)) if base is None else newly_trained(steps, base=base, **options)


def refused(gca: gcahng.GCAHNGLoss, state: dict, message: str, strict: bool = True) -> None:
    """A state is refused by the loss alone and within a module, and the loss goes on as if nothing had been."""
    before, alike = snapshot(gca), copy.deepcopy(gca)
    with pytest.raises(gcahng.UserError, match=message) as error:
        gca.load_state_dict(state, strict=strict)
    assert "\n" not in str(error.value)
    module = nn.ModuleDict({"before": nn.Linear(2, 2), "loss": gca, "after": nn.Linear(2, 2)})
    whole = {name: value for name, value in module.state_dict().items() if not name.startswith("loss.")}
    with pytest.raises(gcahng.UserError, match=message):
        module.load_state_dict(whole | {f"loss.{name}": value for name, value in state.items()}, strict=strict)
    assert same(snapshot(gca), before)
    assert same(go_on(gca, 7, 8), go_on(alike, 7, 8))


DAMAGES = {
    "text": lambda value: "tensor",
    "none": lambda value: None,
    "shape": lambda value: torch.cat([value.reshape(-1), value.reshape(-1)]),
    "empty": lambda value: value.reshape(-1)[:0],
    "complex": lambda value: torch.complex(value.double(), value.double()),
    "kind": lambda value: value.round().to(torch.int32) if value.is_floating_point() else value.double(),
    "meta": lambda value: value.to("meta"),
    "sparse": lambda value: value.reshape(-1).to_sparse() if value.dim() < 1 else value.to_sparse(),
}


@pytest.mark.parametrize("damage", few([*DAMAGES]))
def test_any_damaged_entry_is_refused_before_anything_is_copied(damage):
    gca, good = trained(1), snapshot(trained(3, seed=99))
    before = snapshot(gca)
    for number, (name, value) in enumerate(good.items()):
        with pytest.raises(gcahng.UserError, match="state_dict"):
            gca.load_state_dict(good | {name: DAMAGES[damage](value)}, strict=number % 2 == 0)
    assert same(snapshot(gca), before)
    train_step(gca, *make_batch())


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_names_must_be_those_of_the_loss(change):
    state = snapshot(trained(3, seed=99))
    if change == "missing":  # the last entry that torch copies
        del state["classifier.bias"]
        wanted = r"missing classifier\.bias, unexpected none"
    else:
        state["classifier.scale"] = torch.zeros(3)
        wanted = r"missing none, unexpected classifier\.scale"
    refused(trained(1), state, wanted)
    gca = trained(1)
    bias = gca.classifier.bias.detach().clone()
    gca.load_state_dict(state, strict=False)
    assert torch.equal(gca.classifier.weight, state["classifier.weight"])
    assert torch.equal(gca.classifier.bias, bias) is (change == "missing")


def test_nothing_for_the_loss_is_nothing_lost():
    """A state dict of the model alone, for the module around both."""
    module = held(trained(1))
    before = snapshot(module["loss"])
    state = {f"model.{name}": torch.zeros_like(value) for name, value in module["model"].state_dict().items()}
    result = module.load_state_dict(state, strict=False)
    assert not module["model"].weight.any() and f"loss.{EXTRA}" in result.missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state)
    module.load_state_dict(copy.deepcopy(state), strict=False, assign=True)
    assert same(snapshot(module["loss"]), before)
    with pytest.raises(
        gcahng.UserError, match="missing _counted_steps, _extra_state, _generator_sum and 75 more|missing"
    ):
        module["loss"].load_state_dict({})


def test_weights_alone_keep_optimizers_and_seed():
    gca, state = trained(1), snapshot(trained(3, seed=99))
    extra = gca.get_extra_state()
    del state[EXTRA]
    refused(gca, state, r"missing _extra_state, unexpected none \(with strict=False what fits is loaded\)")
    gca = trained(1)
    held(gca).load_state_dict({f"loss.{name}": value for name, value in state.items()}, strict=False)
    assert torch.equal(gca.get_extra_state(), extra)
    assert same({name: value for name, value in snapshot(gca).items() if name != EXTRA}, state)


def test_assignment_within_a_module_changes_nothing():
    gca = trained(1)
    before = snapshot(gca)
    with pytest.raises(gcahng.UserError, match="assign is True; it must be False"):
        held(gca).load_state_dict(held(trained(2)).state_dict(), assign=True)
    assert same(snapshot(gca), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_counted_steps", float("nan"), "_counted_steps is nan; it must be a finite number of at least 0"),
        ("_counted_steps", -1.0, "_counted_steps is -1.0; it must be"),
        ("_metric_sum", float("inf"), "_metric_sum is inf; it must be"),
        ("_mean_generator", float("nan"), "_mean_generator is nan; it must be"),
        ("_mean_metric", -2.0, "_mean_metric is -2.0; it must be"),
        ("_mean_metric_weight", float("inf"), "_mean_metric_weight is inf; it must be"),
        ("draw", -1, "draw is -1; it must be a finite number of at least 0"),
        ("graph_network.edge_batch_norm.num_batches_tracked", -1, "num_batches_tracked is -1; it must be"),
    ],
)
def test_counters_must_be_possible(name, value, message):
    state = snapshot(trained(2))
    state[name] = torch.full_like(state[name], value)
    refused(trained(1), state, message)


def test_a_mean_may_be_infinite():
    """It switches pulling or J_syn off."""
    gca, other = trained(1), trained(1)
    gca.mean_generator = float("inf")
    other.load_state_dict(snapshot(gca))
    assert other.mean_generator == float("inf")


# -- the extra state


@pytest.mark.parametrize("byte", [0, 9, 17, 25, 100, 3000, -1])
def test_any_changed_byte_is_noticed(byte):
    state = snapshot(trained(2))
    state[EXTRA][byte] ^= 1
    refused(trained(1), state, "another checksum|extra state of version 3; this gcahng reads versions 1 and 2")


@pytest.mark.parametrize("length", [0, 7, 100, 1000, -4])
def test_a_truncated_extra_state_is_noticed(length):
    state = snapshot(trained(2))
    state[EXTRA] = state[EXTRA][:length]
    refused(trained(1), state, "has 0 bytes|has 7 bytes|has 100 bytes|another checksum")


def test_averaged_bytes_are_noticed():
    first, second = (snapshot(trained(steps)) for steps in (1, 3))
    mean = {name: ((first[name].double() + second[name].double()) / 2).to(first[name].dtype) for name in first}
    refused(trained(1), mean, r"another checksum than it was saved with; .*not averaged or damaged \(for weights alone")
    del mean[EXTRA]
    gca = trained(1)
    gca.load_state_dict(mean, strict=False)
    go_on(gca, 3, 5)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -1.0])
def test_moments_must_be_finite(spoiled):
    source = trained(2)
    next(iter(source.classifier_optimizer.state.values()))["exp_avg_sq"][0, 0] = spoiled
    refused(trained(1), snapshot(source), "moments of an optimizer that are not finite, or squares that are negative")


@pytest.mark.parametrize("extra", ["text", 3, None, [], torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)])
def test_extra_state_of_another_kind(extra):
    refused(trained(1), snapshot(trained(2)) | {EXTRA: extra}, "state_dict's _extra_state is|state of version None")


# -- version 1


def first_moments(extra: dict) -> dict:
    return extra["graph_optimizer"]["state"][0]


def put(*path, value):
    def edit(extra):
        for step in path[:-1]:
            extra = extra[step]
        extra[path[-1]] = value

    return edit


def drop(*path):
    def edit(extra):
        for step in path[:-1]:
            extra = extra[step]
        del extra[path[-1]]

    return edit


VERSION_1 = {
    "no-version": (drop("version"), "version None; this gcahng reads versions 1 and 2"),
    "version": (put("version", value=7), "version 7; this gcahng"),
    "version-text": (put("version", value="1"), "version '1'; this gcahng"),
    "version-tensor": (put("version", value=torch.ones(2)), r"version a float32 tensor of shape \(2,\)"),
    "no-seed": (drop("seed"), "seed None; it must be a whole number"),
    "seed": (put("seed", value=-1), "seed -1; it must be a whole number"),
    "epoch": (put("epoch", value=1.5), "epoch 1.5; it must be a whole number"),
    "steps-text": (put("steps_in_epoch", value="3"), "steps_in_epoch '3'; it must be a whole number"),
    "steps-huge": (put("steps_in_epoch", value=10**21), "steps_in_epoch 10+; it must be a whole number"),
    "steps-none": (put("steps_in_epoch", value=None), "steps_in_epoch None; it must be"),
    "no-optimizer": (drop("graph_optimizer"), r"graph_optimizer that cannot be read \(KeyError\)"),
    "optimizer-list": (
        put("classifier_optimizer", value=[]),
        r"classifier_optimizer that cannot be read \(TypeError\)",
    ),
    "no-groups": (put("graph_optimizer", "param_groups", value=[]), r"cannot be read \(ValueError\)"),
    "two-groups": (
        lambda extra: extra["graph_optimizer"]["param_groups"].append({"params": []}),
        r"cannot be read \(ValueError\)",
    ),
    "no-rate": (drop("graph_optimizer", "param_groups", 0, "lr"), r"cannot be read \(KeyError\)"),
    "rate": (put("graph_optimizer", "param_groups", 0, "lr", value=float("nan")), "lr of an optimizer is nan; it must"),
    "beta": (put("graph_optimizer", "param_groups", 0, "betas", value=(0.9, 1.0)), "beta2 of an optimizer is 1.0"),
    "fewer": (
        lambda extra: extra["classifier_optimizer"]["param_groups"][0]["params"].pop(),
        "classifier of 1 weights",
    ),
    "stranger": (put("graph_optimizer", "state", 999, value={}), "moments of a weight 999"),
    "no-step": (drop("graph_optimizer", "state", 0, "step"), r"cannot be read \(KeyError\)"),
    "no-moment": (drop("graph_optimizer", "state", 0, "exp_avg"), r"cannot be read \(KeyError\)"),
    "step-shape": (put("graph_optimizer", "state", 0, "step", value=torch.ones(3)), r"cannot be read"),
    "step": (put("graph_optimizer", "state", 0, "step", value=torch.tensor(-1.0)), "no whole numbers of at least 0"),
    "step-nan": (put("graph_optimizer", "state", 0, "step", value=torch.tensor(torch.nan)), "no whole numbers"),
    "moment-text": (put("graph_optimizer", "state", 0, "exp_avg", value="x"), "exp_avg of a weight is a str"),
    "moment-whole": (
        put("graph_optimizer", "state", 0, "exp_avg", value=torch.zeros(DIM, DIM, dtype=torch.int64)),
        "exp_avg of a weight is a tensor of torch.int64",
    ),
    "moment-shape": (
        put("graph_optimizer", "state", 0, "exp_avg_sq", value=torch.zeros(DIM, 2)),
        r"of a weight of shape \(8, 2\), and this loss's has shape \(8, 8\)",
    ),
    "moment-empty": (put("graph_optimizer", "state", 0, "exp_avg", value=torch.zeros(0)), r"of shape \(0,\), and this"),
    "moment-expanded": (
        put("graph_optimizer", "state", 0, "exp_avg", value=torch.zeros(1).expand(DIM, DIM)),
        "exp_avg of a weight is an expanded view",
    ),
    "moment-meta": (
        put("graph_optimizer", "state", 0, "exp_avg", value=torch.zeros(DIM, DIM, device="meta")),
        "exp_avg of a weight is on the meta device",
    ),
    "moment-nan": (
        put("graph_optimizer", "state", 0, "exp_avg", value=torch.full((DIM, DIM), torch.nan)),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", few([*VERSION_1], 8))
def test_a_malformed_state_of_version_1_is_refused(case):
    edit, message = VERSION_1[case]
    state = as_version_1(trained(2))
    edit(state[EXTRA])
    refused(trained(1), state, message)


def test_moments_of_version_1_may_be_transposed_views():
    source, target = trained(2), trained(1)
    state = as_version_1(source)
    for moments in state[EXTRA]["graph_optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()
    target.load_state_dict(state)
    assert same(go_on(target, 2, 3), go_on(source, 2, 3))


# -- modules that load in ways of their own


def test_hooks_may_rename():
    """Hooks of the loss and of its modules run once for each load, before the checks."""
    calls = []

    def renames(old, new):
        def hook(state_dict, prefix, *rest):
            calls.append(prefix)
            for name in [name for name in state_dict if name.startswith(prefix + old)]:
                state_dict[prefix + new + name[len(prefix + old) :]] = state_dict.pop(name)

        return hook

    source, gca = trained(2), trained(1)
    gca._register_load_state_dict_pre_hook(renames("head.", "classifier."))
    gca.graph_network.class_head._register_load_state_dict_pre_hook(renames("w", "weight"))
    state = snapshot(source)
    for name in ("weight", "bias"):
        state[f"head.{name}"] = state.pop(f"classifier.{name}")
    state["graph_network.class_head.w"] = state.pop("graph_network.class_head.weight")
    gca.load_state_dict(state)
    assert calls == ["", "graph_network.class_head."]
    assert same(snapshot(gca), snapshot(source))
    held(gca).load_state_dict({f"loss.{name}": value for name, value in state.items()}, strict=False)
    assert calls[2:] == ["loss.", "loss.graph_network.class_head."]


def test_hooks_after_loading_may_excuse_names():
    gca, state = trained(1), snapshot(trained(2))
    gca.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    del state["classifier.bias"]
    gca.load_state_dict(state)
    assert torch.equal(gca.classifier.weight, state["classifier.weight"])


class WithState(nn.Module):
    """A base loss with extra state and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.calls = 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(embeddings).square().mean()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)


def test_a_base_with_state_of_its_own():
    source, target = trained(2, base=WithState()), trained(1, base=WithState())
    state = snapshot(source)
    target.load_state_dict(state)
    assert target.base.calls == 2 and same(snapshot(target), state)
    # Plain dicts have no versions, and then torch lets BatchNorm's count be missing.
    plain = {name: value for name, value in state.items() if name != "base.norm.num_batches_tracked"}
    trained(1, base=WithState()).load_state_dict(plain)
    del state["base.norm.weight"]
    refused(trained(1, base=WithState()), state, r"missing base\.norm\.weight")


def test_a_base_of_another_size():
    def proxies(classes):
        return trained(1, base=ProxyAnchorLoss(num_classes=classes, embedding_size=DIM))

    state = snapshot(proxies(NUM_CLASSES)) | {"base.proxies": torch.zeros(9, DIM)}
    refused(proxies(NUM_CLASSES), state, r"base\.proxies has shape \(9, 8\); it must be \(7, 8\)")


# -- the authors' checkpoints


@pytest.mark.parametrize("damage", few([*DAMAGES], 3))
def test_a_damaged_official_checkpoint_changes_nothing(damage):
    gca, good = trained(1), gcahng.official_state_dict(trained(3))
    before = snapshot(gca)
    for name, value in good.items():
        with pytest.raises(gcahng.UserError, match="state_dict"):
            gcahng.load_official_state_dict(gca, good | {name: DAMAGES[damage](value)})
    with pytest.raises(gcahng.UserError, match="an entry 3; its names must be strings"):
        gcahng.load_official_state_dict(gca, good | {3: torch.zeros(1)})
    assert same(snapshot(gca), before)
