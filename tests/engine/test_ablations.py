"""What a study may leave out of the graph network: the engine computes it as the reference does, whatever runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case, assert_exact, buffers, run_step
from error_draws import Variant, assert_errors, draw_errors
from tiers import few

import gcahng
from gcahng.reference.head import CONSTANT


@dataclass(frozen=True)
class Ablated(Case):
    """A case whose graph network leaves something out."""

    coefficients: str = "channel"
    message_passing: bool = True

    def loss(self, impl: str, dtype: torch.dtype = torch.float64, **options) -> gcahng.GCAHNGLoss:
        ablation = {"coefficients": self.coefficients, "message_passing": self.message_passing}
        return super().loss(impl, dtype, **ablation, **options)


ABLATIONS = [
    {"coefficients": "pair"},
    {"coefficients": "constant"},
    {"message_passing": False},
    {"coefficients": "pair", "message_passing": False},
    {"coefficients": "constant", "message_passing": False},
]
# C odd and even, odd K and D, tiles that end anywhere, one and several layers, each way to keep edges.
SIZES = [
    Case(classes=5, views=3, dim=15, heads=3, tile_rows=9),
    Case(classes=4, views=5, dim=24, layers=1, memory="hidden", symmetric=False),
    Case(classes=7, views=2, dim=9, layers=3, heads=3, memory="recompute", tile_rows=40, compat="official"),
]
ablations = pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda one: "-".join(map(str, one.values())))
engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@engines
@ablations
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_step_equals_the_reference(impl, ablation, case, tiles):
    """Every gradient that there is, and where there is none, None in both: AdamW leaves such a weight alone."""
    tiles(case)
    z, labels = case.batch()
    found, wanted = (run_step(case.loss(name, **ablation), z, labels) for name in (impl, "reference"))
    assert_exact(found, wanted)


@engines
@ablations
def test_evaluation_and_what_is_generated(impl, ablation):
    case = SIZES[0]
    z, labels = case.batch()
    found = []
    for name in (impl, "reference"):
        gca, leaf = case.loss(name, **ablation).eval(), z.clone().requires_grad_()
        before = buffers(gca)
        made, loss = gca.generate(z, labels), gca(leaf, labels)
        loss.backward()
        assert all(torch.equal(value, before[key]) for key, value in buffers(gca).items())
        gradients = {f"phase 1 {n}": p.grad for n, p in gca.graph_network.named_parameters() if p.grad is not None}
        values = {"loss": loss.detach(), "negatives": made.negatives, "theta": made.coefficients}
        found.append(values | {"dz": leaf.grad} | gradients)
    assert_exact(*found)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_coefficients_are_what_they_are_called(impl):
    case = SIZES[0]
    z, labels = case.batch()
    theta = {
        kind: case.loss(impl, coefficients=kind).generate(z, labels).coefficients
        for kind in ("channel", "pair", "constant")
    }
    spread = {kind: (x.amax(dim=-1) - x.amin(dim=-1)).max().item() for kind, x in theta.items()}
    assert spread["channel"] > 0.1 and spread["pair"] < 1e-13 and spread["constant"] == 0
    assert theta["pair"][..., 0].std() > 0.01
    assert (theta["constant"] == CONSTANT).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("passing", [True, False])
def test_without_messages_a_pair_knows_of_no_other_sample(impl, passing):
    """In eval mode, where no statistic of the batch enters. Both layers have updated their nodes by then."""
    case = SIZES[0].but(p=0.0)
    z, labels = case.batch()
    gca = case.loss(impl, message_passing=passing).eval()
    before = gca.generate(z, labels).coefficients
    changed = z.clone()
    changed[-1] = z[0].roll(1)
    after = gca.generate(changed, labels).coefficients
    others = before.shape[0] - 1
    moved = (after - before)[:others, :others].abs().max().item()
    assert moved < 1e-13 if not passing else moved > 1e-6
    assert (after - before)[others].abs().max() > 1e-3


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_the_edges_train_once_a_step_without_messages_and_never_without_coefficients(impl):
    """A weight that nothing depends on is not stepped: neither its weight decay nor its moments move it."""
    case = Case(layers=2)
    z, labels = case.batch()
    for ablation, edges, heads in (
        ({}, 1, 1),
        ({"message_passing": False}, 1, 1),
        ({"message_passing": False, "coefficients": "constant"}, 0, 0),
    ):
        gca = case.loss(impl, graph_weight_decay=0.5, **ablation)
        before = {name: p.detach().clone() for name, p in gca.graph_network.named_parameters()}
        gca(z.requires_grad_(), labels).backward()
        gca.generator_step()
        counts = {
            name: int(gca.graph_optimizer.state[p]["step"])
            for name, p in gca.graph_network.named_parameters()
            if p.requires_grad
        }
        assert counts["layers.1.edge.mlp_in.weight"] == edges and counts["edge_batch_norm.weight"] == heads
        assert counts["layers.0.edge.mlp_in.weight"] == edges + (not ablation)
        assert counts["node_input.weight"] == 1 + bool(edges) and counts["class_head.weight"] == 1
        for name, p in gca.graph_network.named_parameters():
            assert torch.equal(before[name], p) == (counts.get(name, 0) == 0), name


def test_constant_coefficients_leave_the_generator_without_a_gradient():
    case = Case()
    z, labels = case.batch()
    found = run_step(case.loss("torch", coefficients="constant"), z, labels)
    assert not [name for name in found if name.startswith("phase 3")]
    assert found["J_div"].item() == pytest.approx(0.01, abs=1e-12)
    assert min(found[name] for name in ("J_soft", "J_sim", "J_gen")) > 0 and not found["J_gen"].requires_grad


@pytest.mark.parametrize("autocast", few([torch.bfloat16, None]), ids=str)
@pytest.mark.parametrize("ablation", few([ABLATIONS[3], ABLATIONS[1], ABLATIONS[0], ABLATIONS[2]]), ids=str)
def test_step_in_lower_precision(ablation, autocast, tiles):
    """As exact as plain PyTorch, as in test_lower_precision."""
    case = Ablated(tile_rows=40, **ablation)
    tiles(case)
    variants = {impl: Variant(impl, autocast=autocast) for impl in IMPLEMENTATIONS}
    errors = draw_errors(case, variants | {"plain": Variant("reference", autocast=autocast)})
    for impl, variant in variants.items():
        assert_errors(case, variant, errors[impl], errors["plain"])


@pytest.mark.simulated
@pytest.mark.parametrize("ablation", [ABLATIONS[3], ABLATIONS[1]], ids=str)
def test_step_on_triton_kernels(ablation):
    case = Ablated(classes=3, views=2, dim=8, layers=1, heads=2, **ablation)
    z, labels = case.batch()
    assert_exact(run_step(case.loss("triton"), z, labels), run_step(case.loss("reference"), z, labels))


@pytest.mark.parametrize(
    "impl", [pytest.param("cpp", marks=pytest.mark.processes), pytest.param("torch", marks=pytest.mark.slow)]
)
def test_fullgraph_step_equals_eager(impl):
    torch.compiler.reset()
    case = Ablated(layers=1, **ABLATIONS[3])
    gca, eager = (case.loss(impl, num_per_class=3) for _ in range(2))
    compiled = torch.compile(gca, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        z, labels = case.batch(seed)
        leaves = [z.clone().requires_grad_() for _ in range(2)]
        for call, leaf in zip((compiled, eager), leaves, strict=True):
            call(leaf, labels).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        torch.testing.assert_close(gca.generator_step(), eager.generator_step())
    for (name, one), other in zip(gca.graph_network.named_parameters(), eager.graph_network.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ablation", [ABLATIONS[3], ABLATIONS[4]], ids=str)
def test_captured_passes_are_replayed(ablation, captures):
    """The zero that stands for what is left out keeps its place, so that one capture of each pass serves all steps."""
    case = Ablated(layers=1, **ablation)
    gca, plain = (case.loss("torch", torch.float32, cuda_graph=graph) for graph in (True, False))
    for seed in range(3):
        batch = case.batch(seed, torch.float32)
        torch.testing.assert_close(*(run_step(one, *batch) for one in (gca, plain)))
    assert len(captures) == 2


# -- what stays, and what does not fit


@ablations
def test_the_same_seed_starts_what_stays_as_in_the_whole_network(ablation):
    torch.manual_seed(3)
    whole = gcahng.GCAHNGLoss(9, 8, layers=2, heads=2, seed=0)
    after = torch.rand(())
    torch.manual_seed(3)
    less = gcahng.GCAHNGLoss(9, 8, layers=2, heads=2, seed=0, **ablation)
    assert torch.equal(after, torch.rand(()))
    named = dict(whole.named_parameters())
    gone = named.keys() - dict(less.named_parameters()).keys()
    assert bool(gone) == (ablation != {"coefficients": "pair"})
    for name, parameter in less.named_parameters():
        assert torch.equal(parameter, named[name][: len(parameter)]), name


@ablations
def test_states_of_other_networks_are_refused_in_one_line(ablation):
    less, whole = (gcahng.GCAHNGLoss(9, 8, layers=2, heads=2, seed=0, **options) for options in (ablation, {}))
    for into, state in ((less, whole.state_dict()), (whole, less.state_dict())):
        before = {name: value.clone() for name, value in into.state_dict().items()}
        for part in (state, {name: value for name, value in state.items() if name != "_extra_state"}):
            with pytest.raises(gcahng.UserError, match="coefficients|message_passing|missing") as refusal:
                into.load_state_dict(part)
            assert "\n" not in str(refusal.value)
        assert all(torch.equal(before[name], value) for name, value in into.state_dict().items())
    again = gcahng.GCAHNGLoss(9, 8, layers=2, heads=2, seed=1, **ablation)
    again.load_state_dict(less.state_dict())
    assert torch.equal(again.graph_network.class_head.weight, less.graph_network.class_head.weight)


def test_authors_checkpoints_hold_the_whole_network():
    state = gcahng.official_state_dict(gcahng.GCAHNGLoss(9, 8, heads=2))
    gca = gcahng.GCAHNGLoss(9, 8, heads=2, message_passing=False)
    with pytest.raises(gcahng.UserError, match="must be 'channel' and True"):
        gcahng.official_state_dict(gca)
    with pytest.raises(gcahng.UserError, match="must be 'channel' and True"):
        gcahng.load_official_state_dict(gca, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "edge"}, "coefficients is 'edge'; it must be one of channel, pair, constant"),
        ({"coefficients": None}, "coefficients is None; it must be one of"),
        ({"message_passing": 1}, "message_passing is 1; it must be True or False"),
    ],
)
def test_other_values_are_refused(options, message):
    with pytest.raises(gcahng.UserError, match=message):
        gcahng.GCAHNGLoss(9, 8, heads=2, **options)


def test_a_loss_from_the_meta_device_has_its_zeros():
    """to_empty leaves them undefined, and no state dict holds them."""
    options = {"heads": 2, "layers": 1, "seed": 0, "impl": "torch", "message_passing": False}
    gca = gcahng.GCAHNGLoss(9, 8, **options)
    moved = gcahng.GCAHNGLoss(9, 8, **options).to("meta").to_empty(device="cpu")
    moved.graph_network.absent.fill_(7)
    moved.to_empty(device="cpu")
    moved.load_state_dict(gca.state_dict())
    z, labels = torch.randn(8, 8), torch.arange(4).repeat(2)
    assert torch.equal(moved(z, labels), gca(z, labels))
