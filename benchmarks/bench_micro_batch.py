"""Time and peak memory of a network's forward and backward pass if its feature extractor takes a batch in parts
(backbone.micro_batch), compared with the whole batch at once.

    python benchmarks/bench_micro_batch.py --batch 96 --micro_batch 16
    python benchmarks/bench_micro_batch.py --name timm:test_vit --size 160 --batch 6 --micro_batch 2   # a quick check

Each size is measured in a process of its own, and its peak is the growth of that process's high-water mark. A size is
not shown if its embeddings or gradients differ from those of the whole batch by more than rounding. BatchNorm is
frozen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from gcahng.bench.rows import show
from gcahng.bench.system import seconds
from gcahng.errors import UserError
from gcahng.models.backbones import build_backbone
from gcahng.train import BackboneConfig
from gcahng.train.throughput import peak_memory_mib

# The error of float32 sums over images in another order, relative to the largest entry.
ROUNDING = 1e-3
COMPARED = ("embeddings", "gradients")


def process(rank: int, options: argparse.Namespace, micro_batch: int | None, threads: int, file: str) -> None:
    """Measure one size in this process, and write the result to a file."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = BackboneConfig(options.name, 512, pretrained=False, freeze_bn=True, micro_batch=micro_batch)
    network = build_backbone(config)
    images = torch.randint(256, (options.batch, 3, options.size, options.size), dtype=torch.uint8)
    cpu = torch.device("cpu")
    before = peak_memory_mib(cpu)
    embeddings = torch.empty(0)

    def step() -> None:
        nonlocal embeddings
        network.zero_grad()
        embeddings = network(images)
        embeddings.square().mean().backward()

    times = [seconds(step) for _ in range(options.reps)]
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    result = {"times": times, "peak_mib": peak_memory_mib(cpu) - before}
    torch.save(result | {"embeddings": embeddings.detach(), "gradients": gradients}, file)


def run(options: argparse.Namespace, micro_batch: int | None) -> dict[str, Any]:
    """Measure one size in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "found.pt")
        mp.spawn(process, (options, micro_batch, torch.get_num_threads(), file))
        return torch.load(file, weights_only=True)


def row(options: argparse.Namespace, micro_batch: int | None, result: dict[str, Any], whole: dict[str, Any]) -> dict:
    """A row of the table.

    Raises:
        UserError: the parts do not compute what the whole batch does.
    """
    offs = {name: float((result[name] - whole[name]).abs().max() / whole[name].abs().max()) for name in COMPARED}
    if wrong := {name: off for name, off in offs.items() if not off <= ROUNDING}:
        raise UserError(
            f"the results of micro_batch {micro_batch} are off by {wrong}; they must be within {ROUNDING:.0e} of the "
            "whole batch's"
        )
    return {
        "network": options.name,
        "size": options.size,
        "n": options.batch,
        "micro_batch": micro_batch,
        "seconds": statistics.median(result["times"]),
        "all_s": result["times"],
        "peak_mib": result["peak_mib"],
        "off": max(offs.values()),
    }


def text(row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    cells = (row["network"], row["n"], row["micro_batch"] or "all", f"{row['seconds']:.2f}", f"{row['peak_mib']:.0f}")
    return f"| {' | '.join(map(str, cells))} | {row['off']:.0e} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="torchvision:resnet50", help="the network, as in backbone.name")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=96, help="batch size (96)")
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[16], help="images per part (16)")
    parser.add_argument("--reps", type=int, default=3, help="repetitions (3)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    head = "| network | n | micro_batch | forward and backward, s | peak, MiB | off by |"
    return show("bench_micro_batch", head, _rows(options), text, options.json)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    whole = run(options, None)
    for micro_batch in (None, *options.micro_batch):
        yield row(options, micro_batch, run(options, micro_batch) if micro_batch else whole, whole)


if __name__ == "__main__":
    raise SystemExit(main())
