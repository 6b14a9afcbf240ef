"""GCA-HNG in a loop of your own: one process, several on one machine, or several machines that meet by torchrun.

    pip install "gcahng[train]" scikit-learn
    python examples/with_several_devices.py
    torchrun --standalone --nproc-per-node 2 examples/with_several_devices.py
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id run1 \\
        examples/with_several_devices.py            # the same line on each of two machines, of which HOST is one

A small network learns from half of scikit-learn's handwritten digits. Its checkpoint, if --checkpoint names one, does
not depend on the number of processes: start the script again with any other number and it continues. It takes a few
seconds. On GPUs it uses NCCL, with which it has never been run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcahng import GCAHNGLoss
from gcahng.data import BalancedBatchSampler
from gcahng.retrieval import retrieval_metrics

CHANNELS = 64


def main() -> None:
    """Train, and print MAP@R of the other half of the images before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="epochs from the checkpoint on (3)")
    parser.add_argument("--checkpoint", type=Path, help="file to continue from and to write")
    options = parser.parse_args()

    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun sets it
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if shared:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, count = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)

    torch.manual_seed(0)  # all processes make the same network, and draw the same classes
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(labels, device=device)
    # A batch has 10 classes of 4; each process takes 40 / R of its samples.
    sampler = BalancedBatchSampler(
        labels[::2].cpu(), classes_per_batch=10, samples_per_class=4, num_replicas=count, rank=rank
    )
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CHANNELS)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gca = GCAHNGLoss(10, CHANNELS, seed=0, process_group="world" if shared else None).to(device)
    first_epoch = 0
    if options.checkpoint is not None and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (gca, "loss")):
            part.load_state_dict(state[name])
        first_epoch = state["epoch"]
    before = map_at_r(model, images[1::2], labels[1::2])
    network = DistributedDataParallel(model) if shared else model  # around the model alone

    for epoch in range(first_epoch, first_epoch + options.epochs):
        sampler.set_epoch(epoch)
        for rows in sampler:  # this process's part of the batch; the loss is that of the whole batch, in all of them
            loss = gca(network(images[::2][rows]), labels[::2][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gca.generator_step()
        gca.end_epoch()

    if rank == 0:
        after = map_at_r(model, images[1::2], labels[1::2])
        print(f"{count} process(es), epochs {first_epoch + 1} to {first_epoch + options.epochs}")
        print(f"MAP@R of the other images: {before:.1f} before, {after:.1f} after")
        if options.checkpoint is not None:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": gca.state_dict()}
            torch.save({**parts, "epoch": first_epoch + options.epochs}, options.checkpoint)
    if shared:
        dist.destroy_process_group()


@torch.no_grad()
def map_at_r(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """MAP@R of images among themselves, in percent."""
    return 100 * retrieval_metrics(model(images), labels)["map@r"]


if __name__ == "__main__":
    main()
