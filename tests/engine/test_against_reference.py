"""A whole training step of the engine against the reference: every loss, gradient, log and running statistic."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from engine_cases import (
    IMPLEMENTATIONS,
    LOW_CASES,
    WIDE_CASES,
    Case,
    assert_exact,
    buffers,
    error,
    run_step,
    scale_of,
)
from tiers import few

from gcahng import dispatch
from gcahng.reference.training_step import GeneratorWeights

# C odd and even, K and D over their ranges, one class a tile, tiles that end anywhere, each way to keep edges.
CASES = [
    Case(classes=2, views=2),
    Case(classes=2, views=8, layers=1, memory="recompute"),
    Case(classes=5, views=3, layers=1),
    Case(classes=6, views=3, compat="official"),
    Case(classes=5, views=3, compat="official", memory="hidden", p=0.0),
    Case(classes=6, views=2, layers=3, memory="hidden"),
    Case(classes=5, views=4, memory="recompute", compat="official"),
    Case(classes=6, views=2, layers=4, memory="recompute"),
    Case(classes=7, views=5, dim=24, heads=3, memory="hidden"),
    Case(classes=4, views=6, dim=24, heads=8, layers=1, p=0.5),
    Case(classes=3, views=7, heads=1, memory="recompute", p=0.0),
    Case(classes=4, views=3, dim=64, layers=4),
    Case(classes=5, views=3, symmetric=False),
    Case(classes=4, views=2, symmetric=False, layers=1, memory="hidden", compat="official"),
    Case(classes=4, views=3, symmetric=False, layers=3, memory="recompute", compat="official"),
    Case(classes=7, views=2, symmetric=False, dim=24, heads=6, p=0.0),
    *(
        Case(classes=classes, views=3, memory=memory, tile_rows=rows)
        for classes, rows in ((5, 9), (8, 40), (8, 130))
        for memory in ("store", "hidden", "recompute")
    ),
    Case(classes=7, views=2, layers=3, memory="hidden", tile_rows=9, compat="official"),
    Case(classes=9, views=4, layers=1, tile_rows=130, compat="official"),
    *(Case(classes=5, views=3, symmetric=False, memory="store", tile_rows=rows) for rows in (9, 40, 130)),
    Case(classes=4, views=3, symmetric=False, layers=3, memory="recompute", tile_rows=40),
]
OWN_TILES = Case(classes=5, views=3, tile_rows=40)

engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


# -- float64


@engines
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_in_float64(impl, case, tiles):
    tiles(case)
    z, labels = case.batch()
    assert_exact(run_step(case.loss(impl), z, labels), reference_step(case))


@functools.lru_cache(maxsize=2)  # for every implementation
def reference_step(case):
    z, labels = case.batch()
    return run_step(case.loss("reference"), z, labels)


@pytest.mark.slow
@engines
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_wide_step_in_float64(impl, case, tiles):
    test_step_in_float64(impl, case, tiles)


def test_cases_hold_both_kinds_of_negatives():
    """Those nearer than the positive, which are left alone, and those farther, which are pulled."""
    for case in (case for case in (*CASES, *LOW_CASES) if case.classes * case.views >= 10):
        z, labels = case.batch()
        by_class = z[torch.sort(labels, stable=True).indices].view(case.classes, case.views, -1)
        near = (by_class - by_class.roll(-1, 1)).norm(dim=-1)
        far = torch.cdist(by_class.flatten(0, 1), by_class.flatten(0, 1)).view(*by_class.shape[:2], -1)
        own = torch.eye(case.classes, dtype=torch.bool).repeat_interleave(case.views, 1)[:, None]
        easy = (near[..., None] < far)[~own.expand_as(far)]
        assert easy.any() and not easy.all(), str(case)


@engines
@pytest.mark.parametrize("symmetric", [True, False])
def test_second_step_follows_the_first(impl, symmetric, tiles):
    """Other masks (the draw goes on) and running statistics that have moved."""
    case = OWN_TILES.but(symmetric=symmetric)
    tiles(case)
    found = []
    for gca in (case.loss(impl), case.loss("reference")):
        first, second = (run_step(gca, *case.batch(seed)) for seed in (0, 0))
        assert error(first["loss"], second["loss"]) > 1e-6 * scale_of("loss", first), "dropout is drawn anew"
        found.append(second)
    assert_exact(*found)


@engines
def test_upstream_gradient_scales_every_gradient(impl):
    case = Case()
    z, labels = case.batch()
    assert_exact(*(run_step(case.loss(name), z, labels, scale=-2.75) for name in (impl, "reference")))


@engines
def test_both_losses_of_the_first_phase_have_gradients_of_their_own(impl, tiles):
    tiles(OWN_TILES)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        found = []
        for name in (impl, "reference"):
            gca, batch = canonical_batch(OWN_TILES, name, training=True)
            z = batch.z.requires_grad_()
            losses = dispatch.passes(gca.impl, batch, gca._pass_options).metric_pass(
                gca.graph_network, batch._replace(z=z)
            )
            sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
            values = {n: value.detach() for n, value in losses._asdict().items()}
            found.append(values | {"dz": z.grad} | gradients(gca, 1))
        if weights[1] == 0:  # J_syn reaches the embeddings alone
            for one in found:
                zeros = [one.pop(n) for n in list(one) if n.startswith("phase 1")]
                assert zeros and not any(zero.any() for zero in zeros)
        assert_exact(*found)


@engines
@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
def test_embeddings_without_gradient(impl, memory, tiles):
    case = OWN_TILES.but(memory=memory)
    tiles(case)
    z, labels = case.batch()
    assert_exact(*(run_step(case.loss(name), z, labels, want_z=False) for name in (impl, "reference")))


@engines
@pytest.mark.parametrize("seed", range(4))
def test_embeddings_that_are_all_one(impl, seed):
    """Without dropout every θ is the same, but for rounding: J_div is at its end, and every gradient a number."""
    case = Case(classes=5, views=3, p=0.0)
    z, labels = case.batch(seed, torch.float32)
    z = z[:1].expand_as(z)
    found, wanted = (run_step(case.loss(name, torch.float32), z, labels) for name in (impl, "reference"))
    assert not [name for name, value in found.items() if not value.isfinite().all()]
    torch.testing.assert_close(found["J_div"], wanted["J_div"], rtol=0, atol=1e-6)


@engines
@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
def test_frozen_graph_network(impl, memory, tiles):
    """Only the embeddings ask for a gradient."""
    case = OWN_TILES.but(memory=memory)
    tiles(case)
    z, labels = case.batch()
    found = []
    for name in (impl, "reference"):
        gca, leaf = case.loss(name), z.clone().requires_grad_()
        gca.graph_network.requires_grad_(False)
        loss = gca(leaf, labels)
        loss.backward()
        assert all(p.grad is None for p in gca.graph_network.parameters())
        found.append({"loss": loss.detach(), "dz": leaf.grad} | buffers(gca))
    assert_exact(*found)


@engines
@pytest.mark.parametrize("memory", few(["store", "recompute", "hidden"], 2))
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(impl, memory, training, tiles):
    case = OWN_TILES.but(memory=memory)
    tiles(case)
    z, labels = case.batch()
    found = []
    for name in (impl, "reference"):
        gca = case.loss(name).train(training)
        with torch.no_grad():
            loss = gca(z, labels)
        assert not loss.requires_grad
        found.append({"loss": loss} | buffers(gca))
    assert_exact(*found)


@engines
@pytest.mark.parametrize("memory", few(["store", "recompute", "hidden"], 2))
@pytest.mark.parametrize("symmetric", [True, False])
def test_evaluation_has_gradients(impl, memory, symmetric, tiles):
    """Running statistics in force: no gradient goes through them, none of them moves."""
    case = OWN_TILES.but(memory=memory, symmetric=symmetric, layers=3)
    tiles(case)
    z, labels = case.batch()
    found = []
    for name in (impl, "reference"):
        gca, leaf = case.loss(name).eval(), z.clone().requires_grad_()
        before = buffers(gca)
        loss = gca(leaf, labels)
        loss.backward()
        after = buffers(gca)
        assert all(torch.equal(after[n], before[n]) for n in before)
        found.append({"loss": loss.detach(), "dz": leaf.grad} | gradients(gca, 1))
    assert_exact(*found)


def gradients(gca, phase):
    named = gca.graph_network.named_parameters()
    return {f"phase {phase} {name}": p.grad for name, p in named if p.grad is not None}


def canonical_batch(case, impl, *, training):
    """The batch of a loss's next forward (the sorted rows; GCAHNGLoss makes it)."""
    gca = case.loss(impl).train(training)
    layout, z = gca._enter(*case.batch())
    return gca, gca._batch(z, layout, None)


@engines
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("memory", few(["store", "recompute", "hidden"], 2))
@pytest.mark.parametrize("training", [True, False])
def test_generator_pass(impl, memory, training, official, tiles):
    """Each part of J_gen alone, too, and running statistics in force."""
    case = OWN_TILES.but(memory=memory)
    tiles(case)
    order = torch.tensor([3, 0, 4, 1, 2]) if official else None
    for weights in ((1.5, 4.0, 5.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        found = []
        for name in (impl, "reference"):
            gca, batch = canonical_batch(case, name, training=training)
            losses = dispatch.passes(gca.impl, batch, gca._pass_options).generator_pass(
                gca.graph_network, gca.classifier, batch, order, GeneratorWeights(*weights)
            )
            (-1.5 * losses.total).backward()
            assert batch.z.grad is None
            values = {n: value.detach() for n, value in losses._asdict().items()}
            found.append(values | gradients(gca, 3) | buffers(gca))
        assert_exact(*found)


@engines
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", few(["store", "recompute", "hidden"], 2))
def test_generate(impl, symmetric, training, memory, tiles):
    case = OWN_TILES.but(symmetric=symmetric, memory=memory)
    tiles(case)
    z, labels = case.batch()
    for anchors in (None, labels[[4, 0]].unique()):
        found = []
        for name in (impl, "reference"):
            gca = case.loss(name).train(training)
            before = buffers(gca)
            made = gca.generate(z, labels, anchors=anchors)
            after = buffers(gca)
            assert all(torch.equal(after[n], before[n]) for n in before)
            found.append({"negatives": made.negatives, "coefficients": made.coefficients})
        assert_exact(*found)


@engines
def test_auto_edge_memory(impl):
    case = Case()
    z, labels = case.batch()
    assert_exact(run_step(case.but(memory="auto").loss(impl), z, labels), run_step(case.loss("reference"), z, labels))


@engines
def test_deep_copies_are_apart(impl):
    """The engine's memory is shared from step to step: a copy's step changes nothing that another one returned."""
    case = Case()
    one = case.loss(impl)
    other = copy.deepcopy(one)
    z, labels = case.batch()
    first = run_step(one, z, labels)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    run_step(other, *case.batch(1))
    assert all(torch.equal(first[name], kept[name]) for name in kept)


@engines
def test_weights_need_not_be_contiguous(impl):
    """The reference's are: torch's batch_norm has a wrong backward on the CPU where its weight is strided."""
    case = Case()
    z, labels = case.batch()
    gca = case.loss(impl)
    for parameter in gca.graph_network.parameters():
        apart = parameter.data.repeat_interleave(2, dim=-1)[..., ::2]
        parameter.data = parameter.data.T.contiguous().T if parameter.dim() == 2 else apart
    assert not any(parameter.is_contiguous() for parameter in gca.graph_network.parameters())
    assert_exact(run_step(gca, z, labels), run_step(case.loss("reference"), z, labels))
