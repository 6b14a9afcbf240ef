"""GCA-HNG in a loop with accelerate, in one process or in several that share each batch.

    pip install "gcahng[train]" accelerate
    python examples/with_accelerate.py
    accelerate launch --cpu --num_processes 2 examples/with_accelerate.py

A small network learns from half of scikit-learn's handwritten digits, and is measured on the other half: how well each
image finds those of its digit. It takes a few seconds.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gcahng import GCAHNGLoss
from gcahng.data import BalancedBatchSampler
from gcahng.retrieval import retrieval_metrics

CHANNELS = 64


def main() -> None:
    """Train, and print MAP@R of the other half of the images before and after."""
    accelerator = Accelerator(cpu=True)
    processes, rank = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, targets = images[::2], labels[::2]
    sampler = BalancedBatchSampler(
        targets, classes_per_batch=10, samples_per_class=3, num_replicas=processes, rank=rank
    )

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CHANNELS))
    before = map_at_r(model, images[1::2], labels[1::2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    gca = GCAHNGLoss(10, CHANNELS, seed=0, process_group="world" if processes > 1 else None).to(accelerator.device)
    accelerator.register_for_checkpointing(gca)  # save_state and load_state then hold it

    for _ in range(3):
        for rows in sampler:
            with accelerator.autocast():
                loss = gca(model(train[rows]), targets[rows])
            optimizer.zero_grad()
            accelerator.backward(loss)
            gca.generator_step(accelerator.scaler)
            optimizer.step()
        gca.end_epoch()
    after = map_at_r(accelerator.unwrap_model(model), images[1::2], labels[1::2])
    accelerator.print(f"MAP@R of the other images: {before:.1f} before, {after:.1f} after")
    accelerator.end_training()


@torch.no_grad()
def map_at_r(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """MAP@R of images among themselves, in percent."""
    return 100 * retrieval_metrics(model(images), labels)["map@r"]


if __name__ == "__main__":
    main()
