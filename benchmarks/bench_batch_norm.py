"""Time of SharedBatchNorm, beside that of nn.BatchNorm2d over the same part of a batch on the CPU.

    python benchmarks/bench_batch_norm.py --processes 1 2
    python benchmarks/bench_batch_norm.py --shape 4 8 6 6 --reps 1      # a check that it runs

Each repetition runs both, forward and backward, one after the other, and takes the ratio of their times. The processes
communicate through gloo on this machine and share its cores. No ratio is shown if outputs or gradients differ from
nn.BatchNorm2d's on the whole batch by more than rounding.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gcahng.engine.ranks import Ranks
from gcahng.train.batch_norm import share_batch_norm

ROUNDING = 1e-5  # of float32, relative to the largest entry


def step(model: nn.Module, x: Tensor, upstream: Tensor) -> tuple[float, list[Tensor]]:
    """The seconds of a forward and a backward pass; output and gradients."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    out = model(x)
    out.backward(upstream)
    seconds = time.perf_counter() - start
    assert x.grad is not None
    return seconds, [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def process(rank: int, count: int, threads: int, shape: list[int], reps: int, folder: str) -> None:
    """Measure in this process; the first one writes the result to a file."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{count}", rank=rank, world_size=count)
    torch.manual_seed(rank)
    x, upstream = torch.randn(shape), torch.randn(shape)
    plain, shared = nn.Sequential(nn.BatchNorm2d(shape[1])), nn.Sequential(nn.BatchNorm2d(shape[1]))
    ranks, own = Ranks(dist.group.WORLD), slice(rank * shape[0], (rank + 1) * shape[0])
    share_batch_norm(shared, ranks, "this")
    out, dx, *of_weights = step(plain, ranks.gather(x), ranks.gather(upstream))[1]  # the warm-up, too
    wanted, found = [out[own], dx[own], *of_weights], step(shared, x, upstream)[1]
    ranks.add_up(*found[2:])
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    pairs = [(step(plain, x, upstream)[0], step(shared, x, upstream)[0]) for _ in range(reps)]
    if rank == 0:
        torch.save({"error": error, "pairs": pairs}, Path(folder) / f"{count}.pt")
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[32, 64, 56, 56], help="of a process's part")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--reps", type=int, default=20, help="repetitions (20)")
    chosen = parser.parse_args(arguments)
    threads, bad = torch.get_num_threads(), False
    for count in chosen.processes:
        with tempfile.TemporaryDirectory() as folder:
            each = max(1, threads // count)
            mp.spawn(process, (count, each, chosen.shape, chosen.reps, folder), nprocs=count)
            result = torch.load(Path(folder) / f"{count}.pt", weights_only=True)
        if result["error"] > ROUNDING:
            print(f"{count} process: differs from nn.BatchNorm2d by {result['error']:.1e}; no times")
            bad = True
            continue
        plain, shared = ([1e3 * pair[i] for pair in result["pairs"]] for i in range(2))
        ratios = sorted(b / a for a, b in result["pairs"])
        print(
            f"{count} process(es), {each} thread(s) each: nn.BatchNorm2d {statistics.median(plain):.2f} ms, "
            f"SharedBatchNorm {statistics.median(shared):.2f} ms, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
