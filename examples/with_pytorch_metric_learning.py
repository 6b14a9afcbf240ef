"""GCA-HNG in a trainer of pytorch-metric-learning 2, on top of its multi-similarity loss and miner.

    pip install "gcahng[train]"
    python examples/with_pytorch_metric_learning.py

A small network learns from half of scikit-learn's handwritten digits, and is measured on the other half: how well each
image finds those of its digit. It takes a few seconds.
"""

from __future__ import annotations

import logging

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from gcahng.integrations.pytorch_metric_learning import GCAHNGMetricLoss, trainer_hooks
from gcahng.retrieval import retrieval_metrics

CHANNELS = 64


def main() -> None:
    """Train, and print MAP@R of the other half of the images before and after."""
    logging.getLogger("PML").setLevel(logging.WARNING)
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train = TensorDataset(images[::2], labels[::2])
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CHANNELS))

    loss = GCAHNGMetricLoss(10, CHANNELS, base=MultiSimilarityLoss(), miner=MultiSimilarityMiner(), seed=0)
    trainer = MetricLossOnly(
        models={"trunk": model},
        optimizers={"trunk_optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)},  # not the loss's parameters
        batch_size=30,
        loss_funcs={"metric_loss": loss},
        dataset=train,
        sampler=MPerClassSampler(train.tensors[1], m=3, batch_size=30, length_before_new_iter=900),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        **trainer_hooks(loss),
    )

    before = map_at_r(model, images[1::2], labels[1::2])
    trainer.train(num_epochs=3)
    after = map_at_r(model, images[1::2], labels[1::2])
    print(f"MAP@R of the other images: {before:.1f} before, {after:.1f} after")


@torch.no_grad()
def map_at_r(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """MAP@R of images among themselves, in percent."""
    return 100 * retrieval_metrics(model.eval()(images), labels)["map@r"]


if __name__ == "__main__":
    main()
