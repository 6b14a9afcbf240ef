"""The loss in the trainer of sentence-transformers: by label and for pairs, its optimizer, checkpoints, batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from integrations.examples import check_example
from pytorch_metric_learning.losses import ProxyAnchorLoss
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import TrainerCallback

import gcahng
from gcahng.engine.plan import StepSize, choose_memory
from gcahng.integrations.sentence_transformers import BalancedBatches, GCAHNGSentenceLoss, GeneratorCallback

WORDS = [f"word{i}" for i in range(40)]
CLASSES, DIM = 6, 16


def make_model() -> SentenceTransformer:
    """The mean of a vector for each word."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: i + 1 for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIM)], device="cpu")


def texts_by_label(rows: int = 60) -> Dataset:
    """Texts of a few words, which are mostly those of their class."""
    generator = torch.Generator().manual_seed(0)
    labels = [i % CLASSES for i in range(rows)]
    own = torch.randint(0, 6, (rows, 3), generator=generator)
    other = torch.randint(0, 40, (rows, 2), generator=generator)
    words = [
        [6 * label + o for o in mine] + rest
        for label, mine, rest in zip(labels, own.tolist(), other.tolist(), strict=True)
    ]
    return Dataset.from_dict({"text": [" ".join(WORDS[w] for w in row) for row in words], "label": labels})


def pairs(count: int = 40) -> Dataset:
    """Queries and documents, each pair a class of its own."""
    texts = texts_by_label(2 * count)["text"]
    return Dataset.from_dict({"query": texts[:count], "document": texts[count:], "label": list(range(count))})


def make_trainer(folder: Path, data: Any, loss: nn.Module, **more: Any) -> SentenceTransformerTrainer:
    options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 12, "learning_rate": 1e-2} | more
    evaluated = options.pop("eval_dataset", None)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **options
    )
    return SentenceTransformerTrainer(
        loss.model,
        arguments,
        train_dataset=data,
        eval_dataset=evaluated,
        loss=loss,
        callbacks=[GeneratorCallback(loss)],
    )


def everything(loss: GCAHNGSentenceLoss) -> dict[str, Tensor]:
    """All tensors that a run changes."""
    return dict(loss.state_dict()) | {f"gca.{name}": value for name, value in loss.gca.state_dict().items()}


def test_by_label(tmp_path: Path) -> None:
    loss = GCAHNGSentenceLoss(make_model(), CLASSES, layers=1, seed=0)
    before = {name: value.clone() for name, value in everything(loss).items()}
    trainer = make_trainer(tmp_path, texts_by_label(), loss, batch_sampler=BalancedBatches(3))
    held = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert held == {id(p) for p in loss.model.parameters()}
    trainer.train()
    after = everything(loss)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("model.") for name in moved)
    assert {"gca.classifier.weight", "gca.draw"} <= moved
    assert after["gca.draw"] == 12  # two a step
    assert all("J_gen" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_a_run_continues_bit_for_bit(tmp_path: Path) -> None:
    def make() -> GCAHNGSentenceLoss:
        model = make_model()
        torch.manual_seed(1)
        return GCAHNGSentenceLoss(model, CLASSES, layers=1, seed=0)

    whole, part = make(), make()
    options = {"batch_sampler": BalancedBatches(3), "max_steps": 8, "save_steps": 4}  # epochs of 5 batches
    make_trainer(tmp_path / "whole", texts_by_label(), whole, **options).train()
    (tmp_path / "whole" / "checkpoint-8").rename(tmp_path / "done")
    trainer = make_trainer(tmp_path / "whole", texts_by_label(), part, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert trainer.state.global_step == 8
    a, b = everything(whole), everything(part)
    assert a.keys() == b.keys() and not [name for name, value in a.items() if not torch.equal(value, b[name])]


def test_pairs(tmp_path: Path) -> None:
    data = pairs()
    loss = GCAHNGSentenceLoss(make_model(), len(data), layers=1, seed=0)
    trainer = make_trainer(tmp_path, data, loss, eval_dataset=data, per_device_eval_batch_size=10)
    trainer.train()
    assert loss.gca.generate(*one_batch(loss, data)).negatives.shape == (2, 12, 12, DIM)
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


def one_batch(loss: GCAHNGSentenceLoss, data: Dataset) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of the first twelve pairs."""
    first = data[:12]
    texts = [*first["query"], *first["document"]]
    return loss.model.encode(texts, convert_to_tensor=True).clone(), torch.tensor(first["label"]).repeat(2)


def test_many_pairs_fit_as_the_planner_says() -> None:
    size = StepSize(64, 384, 1, 2, 100_000, torch.float32, torch.float32, torch.float32, True, "cpp", "cpu", 1)
    assert choose_memory(size, 24 * 2**30) in ("hidden", "store")


def test_proxies_are_in_the_optimizer(tmp_path: Path) -> None:
    loss = GCAHNGSentenceLoss(make_model(), CLASSES, layers=1, seed=0, base=ProxyAnchorLoss(CLASSES, DIM))
    before = loss.base.proxies.clone()
    make_trainer(tmp_path, texts_by_label(), loss, batch_sampler=BalancedBatches(3)).train()
    assert not torch.equal(before, loss.base.proxies)


class HoldsTheLoss(nn.Module):
    """A loss of the user's own, whose parameters the trainer collects."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.gca = make_model(), gcahng.GCAHNGLoss(CLASSES, DIM, layers=1, seed=0)

    def forward(self, sentence_features: Any, labels: Tensor) -> Tensor:
        return self.gca(torch.cat([self.model(f)["sentence_embedding"] for f in sentence_features]), labels)


class StepsAfterwards(TrainerCallback):
    """A callback of the user's own."""

    def __init__(self, gca: gcahng.GCAHNGLoss) -> None:
        self.gca = gca

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.gca.generator_step()


def test_a_loss_whose_parameters_the_trainer_collects_is_refused(tmp_path: Path) -> None:
    loss = HoldsTheLoss()
    trainer = make_trainer(tmp_path, texts_by_label(), loss, batch_sampler=BalancedBatches(3))
    with pytest.raises(gcahng.UserError, match="would be stepped twice; the loss must not be a part of the model"):
        trainer.train()
    trainer.remove_callback(GeneratorCallback)
    trainer.add_callback(StepsAfterwards(loss.gca))
    with pytest.raises(gcahng.UserError, match="only generator_step may step them.*but not gca.parameters"):
        trainer.train()


def test_in_several_processes_the_trainer_splits_the_batches() -> None:
    """So each draws whole ones, and the sampler does not warn that all draw the same."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batches = list(BalancedBatches(3)(texts_by_label(), 12, drop_last=True))
    finally:
        distributed.destroy_process_group()
    assert [len(rows) for rows in batches] == [12] * 5


def test_several_data_sets(tmp_path: Path) -> None:
    loss = GCAHNGSentenceLoss(make_model(), CLASSES, layers=1, seed=0)
    data = {"long": texts_by_label(), "short": texts_by_label(48)}
    make_trainer(tmp_path, data, loss, batch_sampler=BalancedBatches(3)).train()
    assert loss.gca.draw == 12
    two = {name: GCAHNGSentenceLoss(loss.model, CLASSES, layers=1, seed=0) for name in data}
    trainer = make_trainer(tmp_path, data, two["long"], batch_sampler=BalancedBatches(3))
    trainer.add_callback(GeneratorCallback(two["short"]))
    with pytest.raises(gcahng.UserError, match="the trainer has two GeneratorCallbacks; it must have one"):
        trainer.train()


def test_it_moves_as_one() -> None:
    loss = GCAHNGSentenceLoss(make_model(), CLASSES, layers=1, seed=0).double()
    assert {p.dtype for p in loss.gca.parameters()} == {torch.float64}
    assert "gca.classifier.weight" not in loss.state_dict()


def test_what_is_refused(tmp_path: Path) -> None:
    loss = GCAHNGSentenceLoss(make_model(), CLASSES, layers=1, seed=0)
    data = texts_by_label()
    with pytest.raises(gcahng.UserError, match="every class in a batch needs the same number"):
        make_trainer(tmp_path, data, loss, per_device_train_batch_size=13).train()
    with pytest.raises(gcahng.UserError, match="per_device_train_batch_size is 12; it must be a multiple of"):
        make_trainer(tmp_path, data, loss, batch_sampler=BalancedBatches(5)).train()
    with pytest.raises(gcahng.UserError, match="it must have a column `label` with the class of each row"):
        make_trainer(tmp_path, data.remove_columns("label"), loss, batch_sampler=BalancedBatches(3)).train()
    with pytest.raises(gcahng.UserError, match="labels is None; the data set needs a column `label`"):
        make_trainer(tmp_path, pairs().remove_columns("label"), loss).train()


@pytest.mark.processes
def test_the_example_prints_what_the_page_says() -> None:
    check_example("with_sentence_transformers.py", "transformers.md")
