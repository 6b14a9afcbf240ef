"""Weights in the authors' names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loss_cases import make_batch, make_loss, same, snapshot, train_step

import gcahng

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "official_checkpoint_keys.json").read_text())


@pytest.mark.parametrize("network", ["Googlenet", "Resnet50", "DINO"])
def test_names_and_shapes_are_the_authors(network):
    wanted = {
        name: tuple(shape) for name, shape in KEYS[network].items() if name.startswith(("gnn.", "softmax_classifier."))
    }
    others = KEYS[network].keys() - wanted.keys()
    assert wanted and others and all(name.startswith("feature_extractor.") for name in others)
    num_classes, dim = wanted["softmax_classifier.weight"]
    layers = len({name.split(".")[2] for name in wanted if name.startswith("gnn.gnn.")})
    with torch.device("meta"):
        gca = gcahng.GCAHNGLoss(num_classes, dim, layers=layers, seed=0)
    ours = gcahng.official_state_dict(gca)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == wanted
    assert all(tensor.dtype is torch.int64 for name, tensor in ours.items() if name.endswith("num_batches_tracked"))


def randomised(seed):
    gca = make_loss()
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in gcahng.losses.official._names(gca):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 1.0, generator=generator)
    gca.graph_network.edge_batch_norm.num_batches_tracked.fill_(seed)
    return gca


def test_round_trip():
    source, target = randomised(1), randomised(2)
    state = gcahng.official_state_dict(source)
    target.mean_metric = 3.0
    before = snapshot(target)
    gcahng.load_official_state_dict(target, state | {"feature_extractor.fc.1.weight": torch.zeros(3)})
    assert same(gcahng.official_state_dict(target), state)
    # Every weight and buffer of network and classifier is in it, and nothing else changed.
    after = snapshot(target)
    for name, value in snapshot(source).items():
        loaded = name.startswith(("graph_network.", "classifier."))
        assert same(after[name], value if loaded else before[name]), name
    batch = make_batch()
    source.mean_metric = 3.0
    assert torch.equal(target.eval()(*batch), source.eval()(*batch))


def test_official_state_is_a_copy():
    gca = make_loss()
    state = gcahng.official_state_dict(gca)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    train_step(gca, *make_batch())
    assert same(state, kept)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_loads_lower_precision_into_the_losss_own():
    source, target = randomised(1), randomised(2)
    state = gcahng.official_state_dict(source)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    gcahng.load_official_state_dict(target, state)
    assert target.classifier.weight.dtype is torch.float64
    assert torch.equal(target.classifier.weight, source.classifier.weight.float().double())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("gnn.fc.0.weight"), r"layers=2\): missing gnn\.fc\.0\.weight, unexpected none"),
        (lambda s: s.update({"gnn.fc.9.weight": torch.zeros(1)}), r"missing none, unexpected gnn\.fc\.9\.weight"),
        (lambda s: s.update({"classifier.weight": torch.zeros(1)}), r"unexpected classifier\.weight"),
        (
            lambda s: s.update({"softmax_classifier.weight": torch.zeros(9, 8)}),
            r"softmax_classifier\.weight has shape \(9, 8\); it must be \(7, 8\) \(embedding_dim and",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("gnn.gnn.1.")],
            r"missing gnn\.gnn\.1\..* and \d+ more",
        ),
    ],
    ids=["missing", "unexpected", "ours", "shape", "fewer-layers"],
)
def test_what_does_not_fit_changes_nothing(edit, message):
    gca = randomised(1)
    state = gcahng.official_state_dict(randomised(2))
    edit(state)
    before = snapshot(gca)
    with pytest.raises(gcahng.UserError, match=message):
        gcahng.load_official_state_dict(gca, state)
    assert same(snapshot(gca), before)


def test_a_file_name_is_no_checkpoint():
    with pytest.raises(gcahng.UserError, match="state_dict is a str; it must be a dict of tensors"):
        gcahng.load_official_state_dict(randomised(1), "checkpoint.pth")
