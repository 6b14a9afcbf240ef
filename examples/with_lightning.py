"""GCA-HNG in Lightning.

    pip install "gcahng[train,lightning]"
    python examples/with_lightning.py

A small network learns from half of scikit-learn's handwritten digits, and is measured on the other half: how well each
image finds those of its digit. It takes a few seconds.
"""

from __future__ import annotations

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gcahng import GCAHNGLoss
from gcahng.data import BalancedBatchSampler
from gcahng.integrations.lightning import GeneratorCallback
from gcahng.retrieval import retrieval_metrics

CHANNELS = 64


class Digits(LightningModule):
    """The network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CHANNELS))
        self.gca = GCAHNGLoss(num_classes=10, embedding_dim=CHANNELS, seed=0)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        return self.gca(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3)  # not self.parameters()


def main() -> None:
    """Train, and print MAP@R of the other half of the images before and after."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    sampler = BalancedBatchSampler(labels[::2], classes_per_batch=10, samples_per_class=3)
    loader = DataLoader(TensorDataset(images[::2], labels[::2]), batch_sampler=sampler)

    model = Digits()
    before = map_at_r(model.network, images[1::2], labels[1::2])
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[GeneratorCallback()], logger=False, enable_checkpointing=False
    )
    trainer.fit(model, loader)
    after = map_at_r(model.network, images[1::2], labels[1::2])
    print(f"MAP@R of the other images: {before:.1f} before, {after:.1f} after")


@torch.no_grad()
def map_at_r(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """MAP@R of images among themselves, in percent."""
    embeddings = network.eval()(images)
    network.train()
    return 100 * retrieval_metrics(embeddings, labels)["map@r"]


if __name__ == "__main__":
    main()
