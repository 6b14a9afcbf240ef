"""What synthetic negatives are compared with: every pairing in the engine as in the reference, and as its formula."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case, assert_exact, run_step
from error_draws import Variant, assert_errors, draw_errors
from pytorch_metric_learning import losses
from pytorch_metric_learning.reducers import ClassWeightedReducer
from tiers import few
from torch import nn
from torch.nn import functional as F

import gcahng
from gcahng.losses.synthetic import BaseOnNegatives
from gcahng.reference.npair import L2_WEIGHT
from gcahng.reference.synthetic import Synthetic, synthetic_loss


class OwnBase(nn.Module):
    """A user's loss with a parameter, which no library knows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 2.0, dim))

    def forward(self, embeddings, labels):
        return (F.normalize(embeddings) @ self.weight - labels / 10).square().mean()


BASES = {
    "npair": lambda case: "npair",
    "arcface": lambda case: losses.ArcFaceLoss(case.num_classes, case.dim),
    "soft_triple": lambda case: losses.SoftTripleLoss(case.num_classes, case.dim, centers_per_class=2),
    "proxy_anchor": lambda case: losses.ProxyAnchorLoss(case.num_classes, case.dim),
    "supcon": lambda case: losses.SupConLoss(),
    "multi_similarity": lambda case: losses.MultiSimilarityLoss(),
    "contrastive": lambda case: losses.ContrastiveLoss(),
    "triplet": lambda case: losses.TripletMarginLoss(margin=0.5),
    "own": lambda case: OwnBase(case.dim),
}


@dataclass(frozen=True)
class Paired(Case):
    """A case with a base loss and a pairing."""

    base: str = "npair"
    synthetic: str = "npair"
    anchor_gradient: bool = True

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.base}-{self.synthetic}-{self.anchor_gradient}"

    def loss(self, impl, dtype=torch.float64, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            base = options.pop("base", None) or BASES[self.base](self)
        pairing = {"synthetic": self.synthetic, "anchor_gradient": self.anchor_gradient, "synthetic_weight": 1.5}
        gca = super().loss(impl, dtype, base=base, **(pairing | options))
        gca.mean_metric, gca.mean_generator = 1.25, 40.0
        return gca


def step(gca, z, labels, **more):
    """A step, with the gradients of the base's parameters."""
    found = run_step(gca, z, labels, **more)
    named = gca.base.named_parameters() if isinstance(gca.base, nn.Module) else ()
    return found | {f"phase 1 base {name}": p.grad for name, p in named if p.grad is not None}


# C odd and even, odd K and D, tiles that end anywhere, one and several layers, each way to keep edges.
SIZES = [
    Case(classes=5, views=3, dim=15, heads=3, tile_rows=9),
    Case(classes=4, views=5, dim=24, layers=1, memory="hidden", symmetric=False, tile_rows=40),
    Case(classes=7, views=2, dim=9, layers=3, heads=3, memory="recompute", tile_rows=40),
]
PAIRINGS = [
    *(("npair", pairing) for pairing in ("npair", "cosine")),
    *((base, "base") for base in BASES if base != "npair"),
    ("arcface", "cosine"),
]


def paired(size, base, synthetic, anchor_gradient):
    return Paired(**vars(size), base=base, synthetic=synthetic, anchor_gradient=anchor_gradient)


MATRIX = [
    paired(SIZES[(i + j) % 3], base, synthetic, anchor)
    for (i, (base, synthetic)), (j, anchor) in itertools.product(enumerate(PAIRINGS), enumerate((True, False)))
]
REST = [
    paired(size, base, synthetic, anchor)
    for size, (base, synthetic), anchor in itertools.product(SIZES, PAIRINGS, (True, False))
]
ALL = few([*MATRIX, *(case for case in REST if case not in MATRIX)], len(MATRIX))
engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@functools.lru_cache(maxsize=2)  # for every implementation
def reference_step(case):
    return step(case.loss("reference"), *case.batch())


@engines
@pytest.mark.parametrize("case", ALL, ids=str)
def test_step_equals_the_reference(impl, case, tiles):
    """Every gradient: of embeddings, of the base's class vectors, of the graph network."""
    tiles(case)
    found = step(case.loss(impl), *case.batch())
    assert any(name.startswith("phase 1 base") for name in found) == (
        case.base in ("arcface", "soft_triple", "proxy_anchor", "own")
    )
    assert_exact(found, reference_step(case))


@engines
@pytest.mark.parametrize("synthetic", ["cosine", "base"])
@pytest.mark.parametrize("training", [True, False])
def test_embeddings_or_weights_without_gradient(impl, synthetic, training, tiles):
    """Whatever is frozen gets none, and what is left gets the same; in eval mode too."""
    case = paired(SIZES[0], "arcface", synthetic, True)
    tiles(case)
    z, labels = case.batch()
    for frozen in ("z", "base", "graph", "all"):
        found = []
        for name in (impl, "reference"):
            gca, leaf = case.loss(name).train(training), z.clone().requires_grad_(frozen not in ("z", "all"))
            for part, module in (("base", gca.base), ("graph", gca.graph_network)):
                if frozen in (part, "all"):
                    module.requires_grad_(False)
            loss = gca(leaf, labels)
            assert loss.requires_grad == (frozen != "all")
            if frozen != "all":
                loss.backward()
            named = [("dz", leaf), *((f"phase 1 {n}", p) for n, p in gca.named_parameters())]
            found.append({"loss": loss.detach()} | {n: p.grad for n, p in named if p.grad is not None})
        assert ("dz" in found[0]) == (frozen in ("base", "graph"))
        assert_exact(*found)


@engines
@pytest.mark.parametrize("synthetic", ["cosine", "base"])
def test_nothing_is_recorded_without_gradients(impl, synthetic, monkeypatch):
    """Though weights ask for gradients: no backward of the mix or of the graph network runs."""
    case = paired(SIZES[0], "arcface", synthetic, True)
    z, labels = case.batch()
    monkeypatch.setattr("gcahng.engine.graph.GraphPass.backward", None)
    monkeypatch.setattr("gcahng.engine.synthetic.MixGradients.add", None)
    with torch.no_grad():
        loss = case.loss(impl)(z.requires_grad_(), labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, case.loss("reference")(z, labels).detach(), rtol=1e-12, atol=0)


@engines
@pytest.mark.parametrize(("base", "synthetic"), [("npair", "npair"), ("npair", "cosine"), ("supcon", "base")])
@pytest.mark.parametrize("anchor_gradient", [True, False])
def test_two_forwards_before_a_backward(impl, base, synthetic, anchor_gradient):
    """The engine uses its memory again, but not that of gradients which are still to be taken."""
    case = paired(SIZES[0], base, synthetic, anchor_gradient)
    batches = [(z.requires_grad_(), labels) for z, labels in (case.batch(seed) for seed in (0, 1))]
    together = [case.loss(impl)(*batch) for batch in batches]
    for loss, batch in zip(together, batches, strict=True):
        loss.backward()
        leaf = batch[0].detach().requires_grad_()
        case.loss(impl)(leaf, batch[1]).backward()
        assert torch.equal(batch[0].grad, leaf.grad)


# -- what the pairings are


def negatives_and_views(case, z, labels, anchors):
    """The batch's views (K, C, D), and its negatives as generate makes them, from rows z that have a gradient."""
    gca = case.loss("reference", synthetic="npair", base="npair")
    made = gca.generate(z.detach(), labels)
    rows = torch.argsort(labels, stable=True)
    views = z[rows].view(case.classes, case.views, -1).transpose(0, 1)
    fixed = anchors[rows].view(case.classes, case.views, -1).transpose(0, 1)
    theta = made.coefficients[rows][:, rows].view(case.classes, case.views, case.classes, case.views, -1)
    batch = gca._batch(z.detach()[rows], gca._enter(z.detach(), labels)[0], None)
    found = {}
    for a, k, c in itertools.product(range(case.classes), range(case.views), range(case.classes)):
        anchor, positive = fixed[k, a], fixed[(k + 1) % case.views, a]
        if a == c:
            continue
        d_plus, mixed = (anchor - positive + 1e-6).norm(), None
        for v in range(case.views):
            real = views[v, c]
            d_minus = (anchor - real + 1e-6).norm()
            share = (d_plus + (d_minus - d_plus) * theta[a, k, c, v] * batch.pull) / d_minus
            pulled = anchor + (real - anchor) * share if d_plus < d_minus else real
            mixed = pulled if v == 0 else pulled + batch.u[k, v - 1] * (mixed - pulled)
        torch.testing.assert_close(mixed.detach(), made.negatives[k, a, c], rtol=1e-12, atol=1e-13)
        found[a, k, c] = mixed
    return found, fixed


@pytest.mark.parametrize("anchor_gradient", [True, False])
@pytest.mark.parametrize("synthetic", ["npair", "cosine", "base"])
def test_loss_and_gradient_by_hand(synthetic, anchor_gradient):
    """One negative after the other. With anchor_gradient=False anchors and positives are a constant copy."""
    case = paired(Case(classes=3, views=2, dim=4, layers=1, heads=2), "supcon", synthetic, anchor_gradient)
    z, labels = case.batch()
    leaf = z.clone().requires_grad_()
    negatives, fixed = negatives_and_views(case, leaf, labels, leaf if anchor_gradient else z)
    terms = []
    for a, k in itertools.product(range(case.classes), range(case.views)):
        anchor, positives = fixed[k, a], [fixed[v, a] for v in range(case.views) if v != k]
        others = [negatives[a, k, c] for c in range(case.classes) if c != a]
        if synthetic == "npair":
            logits = torch.stack([anchor @ x for x in (*positives, *others)])
            squares = sum(x.square().sum() for x in (*positives, *others)) / case.classes**2
            l2 = L2_WEIGHT * (anchor.square().sum() / case.classes + squares)
            terms.append(-logits.log_softmax(0)[0] / (case.classes * case.views) + l2 / case.views)
        else:  # SupCon's formula with one positive is the softmax of cosines, too
            temperature = 0.25 if synthetic == "cosine" else 0.1
            logits = torch.stack([F.cosine_similarity(anchor, x, dim=0) for x in (*positives, *others)]) / temperature
            terms.append(-logits.log_softmax(0)[0] / (case.classes * case.views))
    sum(terms).backward()
    gca = case.loss("torch", synthetic_weight=1, synthetic_temperature=0.25)
    moved = z.clone().requires_grad_()
    J_syn = gca(moved, labels) - rest_of(case, moved, labels)
    J_syn.backward()
    torch.testing.assert_close(J_syn, sum(terms), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved.grad, leaf.grad, rtol=1e-9, atol=1e-11)


def rest_of(case, z, labels):
    """The loss without J_syn."""
    return case.loss("torch", synthetic_weight=0)(z, labels)


@engines
def test_base_npair_is_npair_bit_for_bit(impl):
    case = Paired()
    z, labels = case.batch()
    found = [step(case.loss(impl, synthetic=synthetic), z, labels) for synthetic in ("npair", "base")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@engines
@pytest.mark.parametrize("name", ["arcface", "soft_triple"])
@pytest.mark.parametrize("anchor_gradient", [True, False])
def test_a_base_of_single_samples_in_tiles_is_that_of_all(impl, name, anchor_gradient, monkeypatch):
    """A tile's negatives at a time, and all at once; no more than a tile's are handed to the base."""
    case, found, rows = paired(SIZES[0], name, "base", anchor_gradient), [], []
    call = BaseOnNegatives.__call__

    def counted(self, negatives, *rest):
        rows.append(len(negatives))
        return call(self, negatives, *rest)

    monkeypatch.setattr(BaseOnNegatives, "__call__", counted)
    for tile in (9, 10_000):
        monkeypatch.setattr("gcahng.engine.prepare.default_tile_rows", lambda *_, tile=tile: tile)
        found.append(step(case.loss(impl), *case.batch()))
    of_all = case.classes * case.views * (case.classes - 1)
    assert len(rows) > 5 and sum(rows) == 2 * of_all and max(rows[:-1]) < of_all / 4 and rows[-1] == of_all
    assert_exact(*found)


def test_which_losses_are_of_pairs_and_which_of_single_samples():
    sizes = {"num_classes": 6, "embedding_size": 8}
    pairs = [losses.SupConLoss(), losses.NTXentLoss(), losses.CircleLoss(), losses.ContrastiveLoss()]
    pairs += [losses.TripletMarginLoss(), losses.MultiSimilarityLoss(), losses.MarginLoss(num_classes=6)]
    single = [losses.ArcFaceLoss(**sizes), losses.CosFaceLoss(**sizes), losses.SubCenterArcFaceLoss(**sizes)]
    single += [losses.NormalizedSoftmaxLoss(**sizes), losses.SoftTripleLoss(**sizes)]
    neither = [losses.ProxyAnchorLoss(**sizes), losses.ProxyNCALoss(**sizes), losses.NPairsLoss(), OwnBase(8)]
    neither += [losses.FastAPLoss(), losses.ArcFaceLoss(**sizes, reducer=ClassWeightedReducer(torch.ones(6)))]
    for group, of_pairs, additive in ((pairs, True, False), (single, False, True), (neither, False, False)):
        for base in group:
            found = BaseOnNegatives(base)
            assert (found.of_pairs, found.additive) == (of_pairs, additive), type(base).__name__


def test_losses_that_are_derived_from_others():
    """Their own method may add to that of the loss, which is neither a loss of pairs then nor a mean over samples."""

    class ArcFaceLoss(losses.ArcFaceLoss):
        def compute_loss(self, embeddings, *arguments):
            found = super().compute_loss(embeddings, *arguments)
            found["loss"]["losses"] = found["loss"]["losses"] / len(embeddings)
            return found

    class SupCon(losses.SupConLoss):
        @functools.lru_cache  # noqa: B019 - a decorated method, whatever it does
        def compute_loss(self, *arguments):
            return super().compute_loss(*arguments)

    arcface, supcon = BaseOnNegatives(ArcFaceLoss(6, 8)), BaseOnNegatives(SupCon())
    assert (arcface.of_pairs, arcface.additive) == (False, False)
    assert (supcon.of_pairs, supcon.additive) == (True, False)
    negatives, classes, node = torch.randn(6, 8), torch.tensor([1, 2, 0, 2, 0, 1]), torch.arange(6)
    assert arcface(negatives, classes, node, torch.randn(6, 8), torch.arange(3).repeat(2)).dim() == 0


def test_a_miner_has_a_say_on_real_samples_alone():
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    case = paired(SIZES[0], "multi_similarity", "base", True)
    z, labels = case.batch()
    gca, plain = case.loss("cpp", miner=MultiSimilarityMiner(epsilon=0.01)), case.loss("cpp")
    mined, whole = step(gca, z, labels), step(plain, z, labels)
    assert torch.equal(mined["J_syn"], whole["J_syn"]) and not torch.equal(mined["J_m"], whole["J_m"])


@pytest.mark.parametrize("anchor_gradient", [True, False])
@pytest.mark.parametrize("synthetic", ["cosine", "base"])
def test_gradient_of_the_reference(synthetic, anchor_gradient):
    """By differences. Those of anchors and positives are none where they are held fixed."""
    views, negatives = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 3, 4).double()
    how = Synthetic(synthetic, anchor_gradient, 0.3, BaseOnNegatives(losses.SupConLoss()))
    classes = torch.arange(3)

    def call(views, negatives):
        return synthetic_loss(how, views if anchor_gradient else views.detach(), negatives, classes)

    leaves = [x.requires_grad_() for x in (views, negatives)]
    if anchor_gradient:
        assert torch.autograd.gradcheck(call, leaves)
    else:
        assert torch.autograd.gradcheck(lambda negatives: call(views, negatives), leaves[1:])
        assert torch.autograd.grad(call(*leaves), views, allow_unused=True) == (None,)


@engines
@pytest.mark.parametrize("synthetic", ["npair", "cosine", "base"])
def test_a_fixed_anchors_class_moves_only_as_negatives(impl, synthetic):
    """Of two classes, the terms of one as anchor move the rows of the other alone."""
    case = paired(Case(classes=2, views=2, dim=8, layers=1, heads=2), "supcon", synthetic, False)
    z, labels = case.batch()
    found = []
    for scale in (1.0, 3.0):  # cosines do not depend on lengths
        leaf = z.clone().requires_grad_()
        loss = case.loss(impl)(leaf, labels) - rest_of(case, leaf, labels)
        (dz,) = torch.autograd.grad(scale * loss, leaf)
        found.append(dz)
    torch.testing.assert_close(found[0] * 3, found[1])
    assert found[0].abs().amax(dim=1).min() > 0


# -- weight and warm-up


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_weight_and_warm_up(impl):
    case = Case(layers=1)
    z, labels = case.batch()

    def weighted(gca, steps=4):
        found = []
        for _ in range(steps):
            gca(z.clone().requires_grad_(), labels).backward()
            found.append(gca.generator_step()["J_syn"].item())
        return found

    plain = weighted(case.loss(impl, synthetic_weight=1))
    paper = 1 - torch.exp(torch.tensor(-20.0 / 40.0, dtype=torch.float64)).item()
    for options, factors in (
        ({}, [paper] * 4),
        ({"synthetic_weight": 0.5}, [0.5] * 4),
        ({"synthetic_weight": 2, "synthetic_warmup": 3}, [0, 2 / 3, 4 / 3, 2]),
        ({"synthetic_warmup": 2}, [0, paper / 2, paper, paper]),
    ):
        assert weighted(case.loss(impl, **options)) == pytest.approx(
            [f * x for f, x in zip(factors, plain, strict=True)], rel=1e-5
        )


def test_warm_up_goes_on_after_a_state_is_loaded():
    case = Case(layers=1)
    z, labels = case.batch()
    options = {"synthetic_warmup": 5, "synthetic_weight": 1.0, "synthetic": "cosine"}
    gca, other = (case.loss("cpp", **options) for _ in range(2))
    for _ in range(3):
        gca(z.clone().requires_grad_(), labels).backward()
        gca.generator_step()
    other.load_state_dict(gca.state_dict())
    results = []
    for one in (gca, other):
        one.eval()
        with torch.no_grad():
            one(z, labels)  # an evaluation in between is no step
        one.train()(z.clone().requires_grad_(), labels).backward()
        results.append(one.generator_step()["J_syn"])
    assert torch.equal(*results) and results[0] > 0
    assert gca.pairing.weight(gca.mean_generator, gca.beta, gca.draw // 2).item() == pytest.approx(0.8)


# -- precision, captures and compilation


LOW = [("npair", "cosine", True), ("arcface", "base", True), ("supcon", "base", False), ("npair", "npair", False)]


@pytest.mark.parametrize("pairing", few([pytest.param(one, id="-".join(map(str, one))) for one in LOW], 2))
@pytest.mark.parametrize("edge_dtype", few([torch.bfloat16, None]), ids=str)
def test_step_in_lower_precision(pairing, edge_dtype, tiles):
    """As exact as plain PyTorch, as in test_lower_precision."""
    case = paired(Case(tile_rows=40), *pairing)
    tiles(case)
    variants = {impl: Variant(impl, edge_dtype=edge_dtype, autocast=edge_dtype) for impl in IMPLEMENTATIONS}
    errors = draw_errors(case, variants | {"plain": Variant("reference", autocast=edge_dtype)})
    for impl, variant in variants.items():
        assert_errors(case, variant, errors[impl], errors["plain"])


@pytest.mark.simulated
@pytest.mark.parametrize("anchor_gradient", [True, False])
@pytest.mark.parametrize(("base", "synthetic"), [("npair", "cosine"), ("arcface", "base")])
def test_step_on_triton_kernels(base, synthetic, anchor_gradient):
    case = paired(Case(classes=3, views=2, dim=8, layers=1, heads=2), base, synthetic, anchor_gradient)
    assert_exact(step(case.loss("triton"), *case.batch()), step(case.loss("reference"), *case.batch()))


@pytest.mark.parametrize("anchor_gradient", [True, False])
def test_captured_passes_are_replayed(anchor_gradient, captures):
    case = paired(Case(layers=1), "npair", "cosine", anchor_gradient)
    gca, plain = (case.loss("torch", torch.float32, cuda_graph=graph) for graph in (True, False))
    for seed in range(3):
        batch = case.batch(seed, torch.float32)
        torch.testing.assert_close(*(run_step(one, *batch) for one in (gca, plain)))
    assert len(captures) == 2


@pytest.mark.slow
@pytest.mark.parametrize("impl", few(["cpp", "torch"]))
def test_fullgraph_step_equals_eager(impl):
    torch.compiler.reset()
    case = paired(Case(layers=1), "npair", "cosine", False)
    gca, eager = (case.loss(impl, num_per_class=3, synthetic_warmup=2) for _ in range(2))
    compiled = torch.compile(gca, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        z, labels = case.batch(seed)
        leaves = [z.clone().requires_grad_() for _ in range(2)]
        for call, leaf in zip((compiled, eager), leaves, strict=True):
            call(leaf, labels).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        torch.testing.assert_close(gca.generator_step(), eager.generator_step())


@engines
@pytest.mark.parametrize("synthetic", ["cosine", "base"])
def test_double_backward_is_refused(impl, synthetic):
    case = paired(SIZES[0], "own", synthetic, True)
    z, labels = case.batch()
    (dz,) = torch.autograd.grad(case.loss(impl)(z.requires_grad_(), labels), z, create_graph=True)
    with pytest.raises(gcahng.UserError, match="once, not twice"):
        dz.square().sum().backward()


@engines
def test_a_scaled_loss_and_a_copy(impl):
    """As under a GradScaler; and a copy has a base of its own."""
    case = paired(SIZES[0], "arcface", "base", True)
    z, labels = case.batch()
    assert_exact(*(step(case.loss(name), z, labels, scale=-256.0) for name in (impl, "reference")))
    gca = case.loss(impl)
    twin = copy.deepcopy(gca)
    assert_exact(step(twin, z, labels), step(case.loss(impl), z, labels))
    assert gca.base.W.grad is None and twin.base.W.grad is not None
    gca.base = OwnBase(case.dim).double()  # a loss that is put in its place is used for both
    gca(z, labels).backward()
    assert gca.base.weight.grad is not None


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synthetic": "arcface"}, "synthetic is 'arcface'; it must be one of npair, base, cosine"),
        ({"synthetic": None}, "synthetic is None; it must be one of"),
        ({"anchor_gradient": 0}, "anchor_gradient is 0; it must be True or False"),
        ({"synthetic_temperature": 0.0}, "synthetic_temperature is 0.0; it must be a number above 0"),
        ({"synthetic_temperature": None}, "synthetic_temperature is None"),
        ({"synthetic_weight": -1}, "synthetic_weight is -1; it must be"),
        ({"synthetic_weight": float("nan")}, "synthetic_weight is nan"),
        ({"synthetic_warmup": 1.5}, "synthetic_warmup is 1.5; it must be a whole number"),
        ({"synthetic_warmup": None}, "synthetic_warmup is None"),
        ({"synthetic": "cosine", "compat": "official"}, "synthetic is 'cosine' and compat is 'official'"),
        ({"anchor_gradient": False, "compat": "official"}, "anchor_gradient is False and compat is 'official'"),
        ({"synthetic": "base", "base": OwnBase(8), "cuda_graph": True}, 'synthetic is "base" and cuda_graph is given'),
        ({"synthetic": "base", "base": OwnBase(8), "process_group": "world"}, "and process_group is given"),
        ({"synthetic": "base", "base": losses.CrossBatchMemory(losses.SupConLoss(), 8)}, "has a CrossBatchMemory"),
        (
            {
                "synthetic": "base",
                "base": losses.MultipleLosses([losses.SupConLoss(), losses.CrossBatchMemory(losses.SupConLoss(), 8)]),
            },
            "has a CrossBatchMemory",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(gcahng.UserError, match=message) as refusal:
        gcahng.GCAHNGLoss(9, 8, heads=2, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("base", "more"), [("proxy_anchor", 0), ("supcon", 4 * 15 * (15 + 60) * 8)])
def test_negatives_that_do_not_fit_are_refused_before_they_are_made(base, more, monkeypatch):
    case = paired(SIZES[0], base, "base", True)
    need = 4 * 60 * 15 * 8 + more
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr("gcahng.engine.base_pass.free_memory", lambda device, free=free: free)
        if fits:
            case.loss("cpp")(*case.batch())
            continue
        with pytest.raises(gcahng.UserError, match=f"takes all 60 synthetic negatives .* about {need:,} bytes"):
            case.loss("cpp")(*case.batch())


@pytest.mark.slow
def test_compiling_the_base_is_refused():
    torch.compiler.reset()
    case = paired(Case(layers=1), "own", "base", True)
    gca = case.loss("torch", num_per_class=3)
    with pytest.raises(Exception, match='synthetic is "base", which torch.compile does not take'):
        torch.compile(gca, fullgraph=True, backend="eager")(*case.batch())


def test_a_base_that_returns_no_loss_is_named():
    case = Case(layers=1)

    class Changing(nn.Module):
        def forward(self, z, labels):
            return z.mean() if len(z) == case.classes * case.views else z

    gca = case.loss("cpp", base=Changing(), synthetic="base")
    with pytest.raises(gcahng.UserError, match="base returned .*; it must return its loss, a 0-dim tensor"):
        gca(*case.batch())
