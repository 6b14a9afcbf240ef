"""What a user can get wrong, and when the loss says so."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from loss_cases import CLASSES, DIM, NUM_CLASSES, VIEWS, make_batch, make_loss, same, snapshot, train_step
from tiers import few

import gcahng

pytestmark = pytest.mark.usefixtures("implementation")


def broken(edit):
    """The usual batch, edited in place or replaced."""
    z, labels = make_batch()
    changed = edit(z, labels)
    return (z, labels) if changed is None else changed


def set_row(row, value):
    def edit(z, labels):
        z[row] = value

    return edit


def set_label(old, new):
    """Every sample of the old-th class gets this label."""

    def edit(z, labels):
        labels[labels == labels.unique()[old]] = new

    return edit


def drop_one(z, labels):
    return z[1:], labels[1:]


def single_samples(z, labels):
    return z[:CLASSES], torch.arange(CLASSES)


def one_single_sample(z, labels):
    labels = torch.tensor([0] * 6 + [1] * 5 + [2])
    return z, labels


VALUES = {
    "nan": (set_row(2, float("nan")), "embeddings holds non-finite values; they must be finite"),
    "inf": (set_row(2, float("inf")), "embeddings holds non-finite values; they must be finite"),
    "constant": (set_row(2, 0.3), "embeddings has a constant row .*every row needs two different channels"),
    "zero": (set_row(2, 0.0), "embeddings has a constant row .*every row needs two different channels"),
    "underflow": (
        set_row(2, torch.linspace(1, 2, DIM, dtype=torch.float64) * 1e-200),
        "embeddings has a constant row .*too close to normalize",
    ),
    "label above": (set_label(3, NUM_CLASSES), "labels is out of range; with num_classes=7 labels must lie in 0 … 6"),
    "label below": (set_label(0, -1), "labels is out of range; with num_classes=7 labels must lie in 0 … 6"),
}
SHAPES = {
    "unequal classes": (
        drop_one,
        r"labels has 2 sample\(s\) of class \d and 3 of class \d; .* the same number, .*BalancedBatchSampler",
    ),
    "single samples": (single_samples, r"labels has 1 sample\(s\) of class 0 .* the same number, at least 2"),
    "one single sample": (one_single_sample, r"labels has 1 sample\(s\) of class 2 and 6 of class 0; .* at least 2"),
    "one class": (lambda z, y: (z, torch.zeros_like(y)), r"labels has 1 class\(es\); it must have at least 2"),
    "no sample": (lambda z, y: (z[:0], y[:0]), r"labels has 0 class\(es\); it must have at least 2"),
    "labels of another length": (lambda z, y: (z, y[1:]), "labels has 11 entries; embeddings has 12 rows"),
    "labels with two dimensions": (
        lambda z, y: (z, y[:, None]),
        r"labels is a int64 tensor of shape \(12, 1\); it must be an integer tensor of shape \(n,\)",
    ),
    "float labels": (lambda z, y: (z, y.double()), "labels is a float64 tensor .*; it must be an integer tensor"),
    "bool labels": (lambda z, y: (z, y > 3), "labels is a bool tensor .*; it must be an integer tensor"),
    "list of labels": (lambda z, y: (z, y.tolist()), "labels is a list; it must be an integer tensor"),
    "integer embeddings": (lambda z, y: (z.long(), y), "embeddings is a int64 tensor .* must be a floating-point"),
    "complex embeddings": (lambda z, y: (z + 0j, y), "embeddings is a complex128 .* must be a floating-point"),
    "embeddings with one dimension": (lambda z, y: (z[:, 0], y), r"embeddings is .*\(12,\); it must be .*\(n, D\)"),
    "embeddings with three dimensions": (lambda z, y: (z[None], y), r"embeddings is .*\(1, 12, 8\); .*\(n, D\)"),
    "sparse embeddings": (lambda z, y: (z.to_sparse(), y), "embeddings is a sparse_coo tensor; it must be dense"),
    "labels without values": (lambda z, y: (z, y.to("meta")), "labels is on meta, where tensors have no values"),
    "another embedding_dim": (lambda z, y: (z[:, :6], y), "embeddings has 6 channels; it must have embedding_dim, 8"),
}


@pytest.mark.parametrize("call", few(["training", "eval", "generate"]))
@pytest.mark.parametrize("case", [*VALUES, *SHAPES])
def test_bad_batches_are_named_and_change_nothing(case, call):
    edit, message = (VALUES | SHAPES)[case]
    gca = make_loss()
    train_step(gca, *make_batch(1))
    gca.train(call != "eval")
    before = snapshot(gca)
    with pytest.raises(ValueError, match=message) as caught:
        (gca.generate if call == "generate" else gca)(*broken(edit))
    assert isinstance(caught.value, gcahng.UserError) and "\n" not in str(caught.value)
    assert same(snapshot(gca), before)


def test_a_constant_row_is_one_though_its_mean_is_rounded():
    z, labels = make_batch(dtype=torch.float32)
    z[2] = 0.1
    assert (z[2] - z[2].mean()).norm() > 0
    with pytest.raises(gcahng.UserError, match="embeddings has a constant row"):
        make_loss(dtype=torch.float32)(z, labels)


@pytest.mark.parametrize(
    ("labels", "num_per_class", "message"),
    [
        (None, 2, "labels does not hold num_per_class=2 samples of every class"),
        (None, 4, "labels does not hold num_per_class=4 samples of every class"),
        (None, 5, "labels has 12 entries; with num_per_class=5 it must have a multiple of 5, at least 10"),
        (None, 12, "labels has 12 entries; with num_per_class=12 .* at least 24"),
        ([0] * 2 + [1] * 4 + [2] * 6, VIEWS, "labels does not hold num_per_class=3 samples of every class"),
        ([0] * 6 + [1] * 6, VIEWS, "labels does not hold num_per_class=3 samples of every class"),
        ([0] * 12, VIEWS, "labels does not hold num_per_class=3 samples of every class"),
    ],
)
def test_num_per_class_that_the_labels_do_not_have(labels, num_per_class, message):
    z, usual = make_batch()
    with pytest.raises(ValueError, match=message):
        make_loss(num_per_class=num_per_class)(z, usual if labels is None else torch.tensor(labels))


def test_num_per_class_gives_the_same_step():
    read, given = make_loss(), make_loss(num_per_class=VIEWS)
    assert same(train_step(given, *make_batch()), train_step(read, *make_batch()))
    assert same(snapshot(given), snapshot(read))


def test_precision_and_device_mismatches():
    z, labels = make_batch()
    with pytest.raises(ValueError, match=r"embeddings is float64 .* call gca\.double\(\), or pass float32"):
        make_loss(dtype=torch.float32)(z, labels)
    with pytest.raises(ValueError, match=r"parameters are torch\.bfloat16; .*use torch\.autocast"):
        make_loss().bfloat16()(z.bfloat16(), labels)
    with pytest.raises(ValueError, match="embeddings is on meta; it must be on the loss's device, cpu"):
        make_loss()(z.to("meta"), labels)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("heads", 3, "embedding_dim is 8 and heads is 3; embedding_dim must be divisible by heads"),
        ("heads", 0, "heads is 0; it must be a whole number of at least 1"),
        ("layers", 0, "layers is 0; it must be a whole number of at least 1"),
        ("layers", 1.5, r"layers is 1\.5; it must be a whole number of at least 1"),
        ("alpha", 0.0, r"alpha is 0\.0; it must be a number above 0"),
        ("beta", -1.0, r"beta is -1\.0; it must be a number above 0"),
        ("clip_value", float("nan"), "clip_value is nan; it must be a number above 0"),
        ("dot_weight", -1, "dot_weight is -1; it must be a number of at least 0"),
        ("div_weight", "1", "div_weight is '1'; it must be a number of at least 0"),
        ("softmax_factor", None, "softmax_factor is None; it must be a number of at least 0"),
        ("graph_lr", -1e-4, "graph_lr is -0.0001; it must be a number of at least 0"),
        ("edge_dropout", 1.0, r"edge_dropout is 1\.0; it must be a number of at least 0 and under 1"),
        ("base", "triplet", r"base is 'triplet'; it must be .npair. or a module called as base\(embeddings, labels\)"),
        ("compat", "old", "compat is 'old'; it must be one of fixed, official"),
        ("impl", "numpy", "impl is 'numpy'; it must be one of auto, reference, torch, cpp, cuda, triton"),
        ("edge_memory", "disk", "edge_memory is 'disk'; it must be one of auto, store, hidden, recompute"),
        ("edge_dtype", torch.float16, r"edge_dtype is torch\.float16; it must be None, torch\.float32"),
        ("check", True, "check is True; it must be one of auto, raise, deferred, off"),
        ("num_per_class", 1, "num_per_class is 1; it must be None or a whole number of at least 2"),
        ("epochs", 0, "epochs is 0; it must be None or a whole number of at least 1"),
        ("steps_per_epoch", 2.0, r"steps_per_epoch is 2\.0; it must be None or a whole number of at least 1"),
        ("seed", -1, "seed is -1; it must be None or a whole number"),
        (
            "seed",
            2**63,
            r"seed is 9223372036854775808; it must be None or a whole number of at least 0 and at most 2",
        ),
        ("symmetric", "no", "symmetric is 'no'; it must be True or False"),
        ("cuda_graph", 1, "cuda_graph is 1; it must be True or False"),
    ],
)
def test_bad_arguments_are_named(option, value, message):
    with pytest.raises(gcahng.UserError, match=message):
        make_loss(**{option: value})


def test_numpys_scalars_are_numbers():
    whole, real = {"seed": 11, "num_per_class": VIEWS, "epochs": 4, "layers": 1}, {"graph_lr": 0.25, "alpha": 2.0}
    given = {n: np.int64(v) for n, v in whole.items()} | {n: np.float32(v) for n, v in real.items()}
    numpys, plain = make_loss(**given), make_loss(**whole, **real)
    assert same(train_step(numpys, *make_batch()), train_step(plain, *make_batch()))
    file = io.BytesIO()
    torch.save(numpys.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), snapshot(plain))
    assert type(gcahng.GCAHNGLoss(np.int64(NUM_CLASSES), np.int32(DIM)).num_classes) is int


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda z: z.sum(1), r"base returned a float64 tensor of shape \(12,\); it must return its loss, a 0-dim"),
        (lambda z: {"loss": z.sum()}, "base returned a dict"),
        (lambda z: 0.0, "base returned a float"),
    ],
    ids=["vector", "dict", "number"],
)
def test_what_base_returns_must_be_a_loss(returned, message):
    gca = make_loss(base=lambda embeddings, labels: returned(embeddings))
    before = snapshot(gca)
    with pytest.raises(gcahng.UserError, match=message):
        gca(*make_batch())
    assert same(snapshot(gca), before)


# -- when values are checked


@pytest.mark.parametrize("report", ["generator_step", "end_epoch"])
@pytest.mark.parametrize("case", VALUES)
def test_deferred_raises_later_and_once(case, report):
    edit, message = VALUES[case]
    gca = make_loss(check="deferred")
    loss = gca(*broken(edit))
    loss.backward()
    with pytest.raises(gcahng.UserError, match=message):
        getattr(gca, report)()
    # The bad batch is forgotten, and so is its report.
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()
    gca.end_epoch()


def test_deferred_raises_for_classes_that_num_per_class_does_not_fit():
    gca = make_loss(check="deferred", num_per_class=VIEWS)
    z, labels = make_batch()
    labels[0] = (labels[0] + 1) % NUM_CLASSES
    gca(z, labels).backward()
    with pytest.raises(gcahng.UserError, match="labels does not hold num_per_class=3 samples of every class"):
        gca.generator_step()


def test_deferred_steps_no_weight_on_a_bad_batch():
    gca = make_loss(check="deferred")
    before = snapshot(gca)
    gca(*broken(set_row(2, 0.0))).backward()
    with pytest.raises(gcahng.UserError, match="constant row"):
        gca.generator_step()
    after = snapshot(gca)
    for name, _ in gca.named_parameters():
        assert torch.equal(after[name], before[name]), name
    assert same(after["_extra_state"], before["_extra_state"])
    assert same(after["_metric_sum"], before["_metric_sum"])


def test_deferred_keeps_a_problem_until_it_is_reported():
    """A good batch after a bad one does not hide it; evaluation counts too."""
    gca = make_loss(check="deferred").eval()
    gca(*broken(set_row(2, float("nan"))))
    gca.train()
    gca(*make_batch()).backward()
    with pytest.raises(gcahng.UserError, match="non-finite"):
        gca.generator_step()


def test_loading_a_state_forgets_a_deferred_problem():
    gca = make_loss(check="deferred")
    saved = snapshot(gca)
    gca(*broken(set_row(2, float("nan"))))
    gca.load_state_dict(saved)
    train_step(gca, *make_batch())


def test_deferred_is_the_same_on_good_batches():
    at_once, later, off = (make_loss(check=check) for check in ("raise", "deferred", "off"))
    for step in range(2):
        results = [train_step(gca, *make_batch(step)) for gca in (at_once, later, off)]
        assert same(results[1], results[0]) and same(results[2], results[0])
    later.end_epoch()


@pytest.mark.parametrize("report", ["generator_step", "end_epoch"])
def test_auto_defers_where_a_compiler_looks(report, monkeypatch):
    """A graph cannot raise; on the CPU too it is the next eager call that does."""
    gca = make_loss(check="auto", num_per_class=VIEWS)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        loss = gca(*broken(set_row(2, float("nan"))))
    loss.backward()
    with pytest.raises(gcahng.UserError, match="embeddings holds non-finite values"):
        getattr(gca, report)()
    train_step(gca, *make_batch())
    gca.end_epoch()


def test_generate_raises_at_once_though_checks_are_deferred():
    gca = make_loss(check="deferred")
    with pytest.raises(gcahng.UserError, match="non-finite"):
        gca.generate(*broken(set_row(2, float("nan"))))
    train_step(gca, *make_batch())


def test_off_never_looks_at_values():
    gca = make_loss(check="off")
    loss = gca(*broken(set_label(3, NUM_CLASSES)))
    loss.backward()
    gca.generator_step()
    gca.end_epoch()
    assert gca(*broken(set_row(2, float("nan")))).isnan()
    # Shapes cost nothing and are always looked at.
    with pytest.raises(gcahng.UserError, match="6 channels"):
        gca(*broken(lambda z, y: (z[:, :6], y)))


def test_deferred_labels_out_of_range_do_not_reach_the_base_loss():
    """Proxies looked up by such a label would crash a GPU before the report."""
    seen = []

    def base(embeddings, labels):
        seen.append(labels)
        return embeddings.square().mean()

    gca = make_loss(check="deferred", base=base)
    gca(*broken(set_label(3, NUM_CLASSES)))
    assert seen[0].max() == NUM_CLASSES - 1
