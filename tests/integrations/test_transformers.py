"""The loss in transformers' Trainer: the generator's step, what the optimizer holds, checkpoints, evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.clouds import CLASSES, DIM, VIEWS, clouds
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import gcahng
from gcahng.data import BalancedBatchSampler
from gcahng.integrations.transformers import FILE, EmbeddingLoss, GeneratorCallback


class Points(Dataset):
    """Clouds of points, one for each class."""

    def __init__(self) -> None:
        self.points, self.labels = clouds()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.points[index], "labels": self.labels[index]}


class Network(nn.Module):
    """A small model with outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, DIM))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embeddings": self.layers(x)}


class BalancedTrainer(Trainer):
    """A trainer whose batches hold classes of equal size."""

    def get_train_dataloader(self) -> DataLoader:
        sampler = BalancedBatchSampler(self.train_dataset.labels, 4, VIEWS, seed=0)
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=sampler))


def make_loss(**options: Any) -> gcahng.GCAHNGLoss:
    torch.manual_seed(0)
    return gcahng.GCAHNGLoss(CLASSES, DIM, layers=1, seed=0, **options)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """What every trainer here takes: 4 batches an epoch."""
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "save_strategy": "steps"} | more
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-3,
        label_names=["labels"],
        remove_unused_columns=False,
        **options,
    )


def make_trainer(
    folder: Path, loss: gcahng.GCAHNGLoss, kind: type[Trainer] = BalancedTrainer, **more: Any
) -> tuple[Trainer, GeneratorCallback]:
    callback = GeneratorCallback(loss)
    own = {name: more.pop(name) for name in ("eval_dataset", "optimizers") if name in more}
    trainer = kind(
        model=Network(),
        args=arguments(folder, **more),
        train_dataset=Points(),
        compute_loss_func=EmbeddingLoss(loss),
        callbacks=[callback],
        **own,
    )
    return trainer, callback


def everything(trainer: Trainer, loss: gcahng.GCAHNGLoss) -> dict[str, Tensor]:
    """All tensors that a run changes."""
    model = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    return model | {f"loss.{name}": value for name, value in loss.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_trains_as_a_loop_does(tmp_path: Path) -> None:
    loss, by_hand = make_loss(), make_loss()
    trainer, callback = make_trainer(tmp_path, loss, max_grad_norm=0.0, lr_scheduler_type="constant")
    trainer.train()
    model, data = Network(), Points()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    sampler, step = BalancedBatchSampler(data.labels, 4, VIEWS, seed=0), 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for rows in sampler:
            if step == 6:
                break
            optimizer.zero_grad()
            by_hand(model(data.points[rows])["embeddings"], data.labels[rows]).backward()
            logs = by_hand.generator_step()
            optimizer.step()
            step += 1
        by_hand.end_epoch()
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(loss.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert callback.logs["J_gen"] == pytest.approx(logs["J_gen"].item())
    assert [entry["J_m"] for entry in trainer.state.log_history if "loss" in entry][-1] == callback.logs["J_m"]
    assert loss.mean_generator < 1e5  # the epochs ended


def test_a_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = make_loss()
    trainer, _ = make_trainer(tmp_path / "whole", whole)
    trainer.train()
    for steps in (3, 6):  # stops, and goes on in new objects
        part = make_loss()
        trainer_of_part, _ = make_trainer(tmp_path / "parts", part, lr_scheduler_type="linear", max_steps=steps)
        if steps == 3:
            trainer_of_part.args.max_steps = 6  # the schedule of the whole run
            trainer_of_part.add_callback(stop_after(3))
            trainer_of_part.train()
        else:
            trainer_of_part.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert trainer_of_part.state.global_step == 6
    assert same(everything(trainer, whole), everything(trainer_of_part, part))


def stop_after(step: int) -> Any:
    """A callback that stops a trainer."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_a_checkpoint_elsewhere(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "a", make_loss())
    trainer.train()
    (tmp_path / "a").rename(tmp_path / "moved")
    folder, loss = tmp_path / "moved" / "checkpoint-3", make_loss()
    trainer, callback = make_trainer(tmp_path / "b", loss)
    with pytest.raises(gcahng.UserError, match="holds no state of the loss.*resume_from=FOLDER"):
        trainer.train(resume_from_checkpoint=str(folder))
    callback.resume_from = tmp_path / "moved" / "checkpoint-6"
    with pytest.raises(gcahng.UserError, match="belongs to other weights of the model"):
        trainer.train(resume_from_checkpoint=str(folder))
    callback.resume_from = folder
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 6
    (folder / FILE).write_bytes(b"x" * 100)
    with pytest.raises(gcahng.UserError, match="is damaged"):
        make_trainer(tmp_path / "moved", make_loss())[0].train(resume_from_checkpoint=str(folder))


class HoldsTheLoss(Network):
    """A model that computes its loss itself. The optimizer must be the user's own then."""

    def __init__(self) -> None:
        super().__init__()
        self.gca = make_loss()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.gca(super().forward(x)["embeddings"], labels)}


class StepsTheGenerator(TrainerCallback):
    """A callback of the user's own."""

    def on_pre_optimizer_step(self, *_: Any, model: HoldsTheLoss, **__: Any) -> None:
        model.gca.generator_step()


def test_a_model_that_holds_the_loss_continues_bit_for_bit(tmp_path: Path) -> None:
    """The trainer writes it with safetensors, and loads it with strict=False."""

    def train(folder: str, **options: Any) -> nn.Module:
        model = HoldsTheLoss()
        optimizer = torch.optim.AdamW(model.layers.parameters(), lr=1e-3)
        trainer = BalancedTrainer(
            model,
            arguments(tmp_path / folder),
            train_dataset=Points(),
            callbacks=[StepsTheGenerator()],
            optimizers=(optimizer, None),
        )
        trainer.train(**options)
        return model

    whole = train("a")
    assert (tmp_path / "a" / "checkpoint-3" / "model.safetensors").exists()
    rest = train("b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(rest.state_dict(), whole.state_dict())


class Pretrained(PreTrainedModel):
    """A model of transformers that holds the loss."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.network, self.gca = Network(), make_loss()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves all weights as they are."""


def test_a_loss_whose_weights_from_pretrained_replaces_is_refused(tmp_path: Path) -> None:
    Pretrained(PreTrainedConfig()).save_pretrained(tmp_path)
    model, data = Pretrained.from_pretrained(tmp_path), Points()
    model.train()
    rows = next(iter(BalancedBatchSampler(data.labels, 4, VIEWS)))
    model.gca(model.network(data.points[rows])["embeddings"], data.labels[rows]).backward()
    with pytest.raises(gcahng.UserError, match="from_pretrained does so in a model that holds the loss"):
        model.gca.generator_step()


def test_without_the_callback_there_is_a_warning(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, make_loss(), max_steps=2)
    trainer.remove_callback(callback)
    with pytest.warns(UserWarning, match=r"call gca\.generator_step\(\) after every loss\.backward\(\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2; it must be 1"),
        ({"fp16": True}, "fp16 is True; it must be False"),
    ],
)
def test_arguments_that_would_train_wrongly(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, **{name: value for name, value in options.items() if name != "fp16"})
    args.fp16 = options.get("fp16", False)
    callback = GeneratorCallback(make_loss())
    with pytest.raises(gcahng.UserError, match=message):
        callback.on_train_begin(args, None, None, optimizer=torch.optim.SGD(Network().parameters()))


def test_what_the_optimizer_must_hold(tmp_path: Path) -> None:
    loss = make_loss(base=ProxyAnchorLoss(CLASSES, DIM))
    with pytest.raises(gcahng.UserError, match="no optimizer of the trainer holds the parameters of the loss's base"):
        make_trainer(tmp_path, loss)[0].train()
    with pytest.raises(gcahng.UserError, match="would be stepped twice"):
        optimizer = torch.optim.AdamW([*Network().parameters(), *loss.parameters()])
        make_trainer(tmp_path, loss, optimizers=(optimizer, None))[0].train()
    trainer, _ = make_trainer(tmp_path, loss)
    groups = [*trainer.model.parameters(), *loss.base_parameters()]
    trainer.optimizer = torch.optim.AdamW(groups, lr=1e-3)
    before = [p.clone() for p in loss.base_parameters()]
    trainer.train()
    assert not torch.equal(before[0], loss.base_parameters()[0])


def test_evaluation_changes_nothing_and_says_where_it_has_no_loss(tmp_path: Path) -> None:
    loss = make_loss()
    data = Points()
    trainer, _ = make_trainer(tmp_path, loss, eval_dataset=data, per_device_eval_batch_size=16)
    trainer.train()
    before = everything(trainer, loss)
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()  # two classes of 8 in each batch
    trainer.args.per_device_eval_batch_size = 10
    with pytest.warns(UserWarning, match="the evaluation loss is NaN"):
        assert torch.tensor(trainer.evaluate()["eval_loss"]).isnan()
    assert same(before, everything(trainer, loss))


TWO_PROCESSES = """
import os
import sys
from pathlib import Path

import torch
from integrations.clouds import CLASSES, DIM, VIEWS, clouds
from torch.utils.data import DataLoader

from gcahng.data import BalancedBatchSampler
from integrations.test_transformers import VIEWS, BalancedTrainer, everything, make_loss, make_trainer

class WholeBatches(BalancedTrainer):
    # the trainer gives each process its part
    def get_train_dataloader(self):
        data = self.train_dataset
        batches = BalancedBatchSampler(data.labels, 4, VIEWS, seed=0, num_replicas=1, rank=0)
        return self.accelerator.prepare(DataLoader(data, batch_sampler=batches))

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
torch.distributed.init_process_group("gloo")
loss = make_loss(process_group="world")
trainer, _ = make_trainer(
    folder, loss, WholeBatches, average_tokens_across_devices=False, accelerator_config={"split_batches": True},
    ddp_backend="gloo",
)
trainer.train()
torch.save(everything(trainer, loss), folder / f"{rank}.pt")
"""


@pytest.mark.processes
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    root = Path(gcahng.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, tmp_path / "two.py", tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "draw the same batches" not in run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)
    loss = make_loss()
    trainer, _ = make_trainer(tmp_path / "one", loss)
    trainer.train()
    one = everything(trainer, loss)
    for name, value in first.items():
        if value.is_floating_point():  # the optimizers lie in bytes
            torch.testing.assert_close(value, one[name], atol=1e-5, rtol=1e-4, msg=name)


def test_embeddings_are_found() -> None:
    loss, (points, labels) = make_loss(), (torch.randn(12, DIM), torch.arange(4).repeat_interleave(VIEWS))
    expected = make_loss()(points, labels)
    for outputs, where in (
        ({"pooler_output": points}, None),
        ({"last_hidden_state": points[:, None]}, lambda outputs: outputs["last_hidden_state"][:, 0]),
        ({"mine": points, "embeddings": points + 1}, "mine"),
    ):
        assert torch.equal(EmbeddingLoss(make_loss(), where)(outputs, labels), expected)
    with pytest.raises(gcahng.UserError, match=r"the model's outputs \(logits\) hold none of embeddings"):
        EmbeddingLoss(loss)({"logits": points}, labels)
    with pytest.raises(gcahng.UserError, match="labels is None"):
        EmbeddingLoss(loss)({"embeddings": points}, None)
    with pytest.raises(gcahng.UserError, match="loss is a Linear; it must be a GCAHNGLoss"):
        GeneratorCallback(nn.Linear(1, 1))
