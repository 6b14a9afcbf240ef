"""The loss within pytorch-metric-learning: its calling convention, miners, MultipleLosses, trainers and testers."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from integrations.examples import check_example
from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    ContrastiveLoss,
    CrossBatchMemory,
    MultipleLosses,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
)
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly, TrainWithClassifier
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gcahng
from gcahng.integrations.pytorch_metric_learning import GCAHNGMetricLoss, trainer_hooks

CLASSES, DIM, VIEWS = 6, 16, 3


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (12, D) of 4 classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(CLASSES, generator=generator)[:4].repeat_interleave(VIEWS)
    return torch.randn(12, DIM, generator=generator), labels


def make(kind: type[gcahng.GCAHNGLoss] = GCAHNGMetricLoss, **options: object) -> gcahng.GCAHNGLoss:
    """A small loss whose weights depend on nothing else."""
    torch.manual_seed(0)
    return kind(CLASSES, DIM, layers=1, seed=0, **options)


def test_called_as_the_librarys_losses_are() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (GCAHNGMetricLoss.forward, BaseMetricLossFunction.forward))
    names = list(theirs)
    assert list(ours)[: len(names)] == names
    assert [ours[name].default for name in names] == [theirs[name].default for name in names]


def test_the_loss_is_the_same() -> None:
    embeddings, labels = batch()
    assert torch.equal(make()(embeddings, labels), make(gcahng.GCAHNGLoss)(embeddings, labels))


@pytest.mark.parametrize("miner", [MultiSimilarityMiner(epsilon=0.05), TripletMarginMiner(margin=0.1)])
def test_mined_pairs_reach_the_base(miner: nn.Module) -> None:
    embeddings, labels = batch()
    base = ContrastiveLoss()
    own = base(embeddings, labels, miner(embeddings, labels))
    assert not torch.equal(own, base(embeddings, labels))  # else this test would show nothing
    synthetic = make(base=base)(embeddings, labels) - base(embeddings, labels)
    for loss, mined in ((make(base=base, miner=miner), None), (make(base=base), miner(embeddings, labels))):
        torch.testing.assert_close(loss(embeddings, labels, mined), own + synthetic)
    plain = make(gcahng.GCAHNGLoss, base=base, miner=miner)
    torch.testing.assert_close(plain(embeddings, labels), own + synthetic)


def test_what_is_refused() -> None:
    embeddings, labels = batch()
    mined = MultiSimilarityMiner()(embeddings, labels)
    with pytest.raises(gcahng.UserError, match="labels is None"):
        make()(embeddings)
    with pytest.raises(gcahng.UserError, match="ref_emb is given; it must be None"):
        make()(embeddings, labels, None, embeddings, labels)
    with pytest.raises(gcahng.UserError, match='indices_tuple is given and base is "npair"'):
        make()(embeddings, labels, mined)
    with pytest.raises(gcahng.UserError, match='miner is given and base is "npair"'):
        make(miner=MultiSimilarityMiner())
    with pytest.raises(gcahng.UserError, match="miner is 3; it must be None or a miner"):
        make(base=ContrastiveLoss(), miner=3)
    with pytest.raises(gcahng.UserError, match="and the loss has a miner"):
        make(base=ContrastiveLoss(), miner=MultiSimilarityMiner())(embeddings, labels, mined)


def test_proxies_are_seen() -> None:
    proxies = ProxyAnchorLoss(CLASSES, DIM)
    loss = make(base=proxies, miner=MultiSimilarityMiner())
    assert [p.shape for p in loss.base_parameters()] == [(CLASSES, DIM)]
    assert "base.proxies" in loss.state_dict()


GLOBAL_PROXIES = ProxyAnchorLoss(CLASSES, DIM)


class Holder:
    """A callable that is no module, and holds one."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.base(embeddings, labels)

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.base(embeddings, labels)


def hiding() -> dict[str, Callable[..., Tensor]]:
    """Callables that hide ProxyAnchorLoss, each in another way."""
    base, miner = ProxyAnchorLoss(CLASSES, DIM), MultiSimilarityMiner()

    def inner(e: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return (lambda: base(e, l))()

    return {
        "closure": lambda e, l: base(e, l, miner(e, l)),  # noqa: E741
        "global": lambda e, l: GLOBAL_PROXIES(e, l),  # noqa: E741
        "default": lambda e, l, f=base: f(e, l),  # noqa: E741
        "partial": functools.partial(base, ref_emb=None),
        "object": Holder(base),
        "method": Holder(base).loss,
        "bound": base.forward,
        "nested": inner,
    }


@pytest.mark.parametrize("way", list(hiding()))
def test_hidden_proxies_are_warned_of(way: str) -> None:
    with pytest.warns(UserWarning, match="hides the parameters of ProxyAnchorLoss") as found:
        make(base=hiding()[way])
    assert len(found) == 1


def test_functions_that_hide_nothing_are_not() -> None:
    base, miner = ContrastiveLoss(), MultiSimilarityMiner()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(base=lambda e, l: base(e, l, miner(e, l)))  # noqa: E741
        make(base=functools.partial(base))
        make(base=ProxyAnchorLoss(CLASSES, DIM))


def test_multiple_losses_and_a_memory() -> None:
    embeddings, labels = batch()
    memory = CrossBatchMemory(ContrastiveLoss(), DIM, memory_size=48)
    gca = make(base=memory)
    both = MultipleLosses([gca, ContrastiveLoss()], miners=[None, MultiSimilarityMiner()], weights=[1, 0.5])
    embeddings.requires_grad_()
    both(embeddings, labels).backward()
    assert embeddings.grad.isfinite().all()
    assert gca.generator_step()["J_gen"].isfinite()


class Trained:
    """A trainer's parts on two clouds of points a class."""

    def __init__(self, **options: object) -> None:
        torch.manual_seed(0)
        labels = torch.arange(CLASSES).repeat_interleave(20)
        self.data = TensorDataset(torch.randn(CLASSES, 8)[labels] + 0.3 * torch.randn(120, 8), labels)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.loss = make(**options)
        self.sampler = MPerClassSampler(labels, m=VIEWS, batch_size=12, length_before_new_iter=120)

    def arguments(self, **more: object) -> dict[str, object]:
        """The arguments that every trainer takes."""
        return {
            "models": {"trunk": self.model},
            "optimizers": {"trunk_optimizer": torch.optim.AdamW(self.model.parameters(), lr=1e-3)},
            "batch_size": 12,
            "loss_funcs": {"metric_loss": self.loss},
            "dataset": self.data,
            "sampler": self.sampler,
            "dataloader_num_workers": 0,
            "data_device": torch.device("cpu"),
            **more,
        }


def test_a_trainer_steps_the_generator() -> None:
    logged, ended = [], []
    parts = Trained(base=MultiSimilarityLoss())
    before = [p.clone() for p in parts.loss.graph_network.parameters()]
    hooks = trainer_hooks(parts.loss, lambda _: ended.append("step"), lambda t: ended.append(t.epoch), logged.append)
    trainer = MetricLossOnly(**parts.arguments(mining_funcs={"tuple_miner": MultiSimilarityMiner()}, **hooks))
    trainer.train(num_epochs=2)
    assert len(logged) == 20 and all(logs["J_gen"].isfinite() for logs in logged)
    assert ended == (["step"] * 10 + [1]) + (["step"] * 10 + [2])
    assert parts.loss.mean_generator < 1e5  # two epochs ended
    moved = [not torch.equal(a, b) for a, b in zip(before, parts.loss.graph_network.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)  # a few have no gradient


def test_a_trainer_does_what_a_loop_does() -> None:
    by_trainer, by_hand = Trained(), Trained()
    np.random.seed(0)  # the sampler draws from it
    MetricLossOnly(**by_trainer.arguments(**trainer_hooks(by_trainer.loss))).train(num_epochs=1)
    np.random.seed(0)
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=1e-3)
    for samples, labels in torch.utils.data.DataLoader(by_hand.data, batch_size=12, sampler=by_hand.sampler):
        optimizer.zero_grad()
        by_hand.loss(by_hand.model(samples), labels).backward()
        optimizer.step()
        by_hand.loss.generator_step()
    by_hand.loss.end_epoch()
    for a, b in zip(by_trainer.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(by_trainer.loss.parameters(), by_hand.loss.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_hook_may_stop_the_trainer() -> None:
    parts = Trained()
    trainer = MetricLossOnly(**parts.arguments(**trainer_hooks(parts.loss, end_of_epoch=lambda _: False)))
    trainer.train(num_epochs=5)
    assert trainer.epoch == 1


def test_a_trainer_with_a_classifier_and_several_losses() -> None:
    parts = Trained()
    classifier = nn.Linear(DIM, CLASSES)
    arguments = parts.arguments(**trainer_hooks(parts.loss))
    arguments["models"] |= {"classifier": classifier}
    arguments["loss_funcs"] = {
        "metric_loss": MultipleLosses([parts.loss, ContrastiveLoss()]),
        "classifier_loss": nn.CrossEntropyLoss(),
    }
    arguments["optimizers"] |= {"classifier_optimizer": torch.optim.AdamW(classifier.parameters())}
    TrainWithClassifier(**arguments).train(num_epochs=1)
    assert parts.loss.mean_generator < 1e5


def test_a_tester_leaves_the_loss_alone() -> None:
    parts = Trained()
    trainer = MetricLossOnly(**parts.arguments(**trainer_hooks(parts.loss)))
    trainer.train(num_epochs=1)
    before = {name: value.clone() for name, value in parts.loss.named_buffers()}
    tester = GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        accuracy_calculator=AccuracyCalculator(include=("mean_average_precision_at_r",), device=torch.device("cpu")),
    )
    found = tester.test({"val": parts.data}, 1, parts.model)
    assert 0 < found["val"]["mean_average_precision_at_r_level0"] <= 1
    assert all(torch.equal(before[name], value) for name, value in parts.loss.named_buffers())


@pytest.mark.processes
def test_the_example_prints_what_the_page_says() -> None:
    check_example("with_pytorch_metric_learning.py", "pytorch_metric_learning.md")
