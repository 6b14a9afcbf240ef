"""gcahng plan"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import TYPE_CHECKING

from gcahng.bounds import format_bytes, shown_value
from gcahng.commands.arguments import Parser
from gcahng.errors import UserError

if TYPE_CHECKING:
    from gcahng.engine.plan import StepSize

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_WIDEST_MEASURED = 1024
_MOST_BYTES = 10**18


def run(arguments: list[str]) -> int:
    """Print the memory and the arithmetic of a training step by its sizes, and the largest batch that fits."""
    parser = Parser(prog="gcahng plan", description=run.__doc__)
    parser.add_number("--batch", "samples in a batch", required=True, metavar="N")
    parser.add_number(
        "--views", "samples of each class (the first of 3, 4, 2, 5 and 7 that divides the batch)", metavar="K"
    )
    parser.add_number("--dim", "embedding channels (512)", default=512, metavar="D")
    parser.add_number("--layers", "graph layers (2)", default=2, metavar="L")
    parser.add_number("--classes", "training classes (100, or as many as the batch has)", metavar="M")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of products (fp32)")
    parser.add_argument("--edge-dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of stored edges (fp32)")
    parser.add_argument(
        "--independent", action="store_true", help="both directions of an edge draw their own dropout (symmetric=False)"
    )
    parser.add_argument(
        "--stages",
        choices=("fused", "torch"),
        help="the engine's stages (fused, or torch for sizes that fused stages do not take)",
    )
    parser.add_number(
        "--ranks", "processes that share a batch; the figures are those of one (1)", default=1, metavar="R"
    )
    parser.add_argument("--processes", help=argparse.SUPPRESS)
    parser.add_number("--link", "speed of each process's link (25)", default=25.0, metavar="GB/S")
    parser.add_number("--latency", "time of a message between two processes (10)", default=10.0, metavar="US")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device that the step runs on (cpu)")
    parser.add_argument(
        "--memory-limit", metavar="BYTES", help="memory to fit into, such as 16GB or 24GiB (what is free here)"
    )
    parser.add_number("--rate", "speed of matrix products (measured here, on the CPU)", metavar="GFLOP/S")
    options = parser.parse_args(arguments)
    if options.processes is not None:
        raise UserError("--processes is the old name of an option; it must be --ranks")

    import torch

    from gcahng.dispatch import MOST_CHANNELS, MOST_VIEWS
    from gcahng.engine.free_memory import free_memory
    from gcahng.engine.plan import StepSize

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    views = options.views or next((k for k in (3, 4, 2, 5, 7) if options.batch % k == 0 and options.batch >= 2 * k), 3)
    if options.classes is not None and options.classes < options.batch // views:
        raise UserError(
            f"--classes is {options.classes}; it must be at least {options.batch // views}, the classes in a batch"
        )
    if options.stages == "fused" and views > MOST_VIEWS:
        raise UserError(f"--views is {views}; it must be at most {MOST_VIEWS}, unless --stages is torch")
    beyond = views > MOST_VIEWS or (options.device == "cuda" and options.dim > MOST_CHANNELS)
    size = StepSize(
        batch=options.batch,
        dim=options.dim,
        layers=options.layers,
        views=views,
        classes=options.classes or max(100, options.batch // views),
        compute=dtypes[options.precision],
        edge_dtype=dtypes[options.edge_dtype],
        symmetric=not options.independent,
        stages=options.stages or ("torch" if beyond else "fused"),
        device=options.device,
        ranks=options.ranks,
    )
    if options.batch % options.ranks:
        raise UserError(
            f"--ranks is {options.ranks:,}; --batch, {options.batch:,}, must be a multiple of it, since the processes' "
            "parts of a batch are equally large"
        )
    limit = None if options.memory_limit is None else parse_bytes(options.memory_limit)
    if limit is None and (options.device == "cpu" or torch.cuda.is_available()):
        limit = free_memory(options.device)
    rate = options.rate * 1e9 if options.rate else None
    if rate is None and options.device == "cpu":
        from gcahng.bench.system import ProductRate

        # Wider products are no faster, and would take the memory that is only planned here.
        rate = ProductRate(min(options.dim, _WIDEST_MEASURED), options.precision).rate()
    print(plan_text(size, limit, bool(options.memory_limit), rate, measured=options.rate is None))
    if size.ranks > 1:
        print(ranks_text(size, rate, options.link * 1e9, options.latency * 1e-6))
    return 0


def plan_text(size: StepSize, limit: int | None, given: bool, rate: float | None, measured: bool = False) -> str:
    """The text that `gcahng plan` prints.

    Args:
        size: of the step.
        limit: the memory in bytes; None: unknown.
        given: whether the user gave the limit; otherwise it is free memory.
        rate: of matrix products in FLOP/s; None: unknown.
        measured: whether the rate was measured here.
    """
    from gcahng.engine import plan

    rows = []
    for memory in plan.MODES:
        peak = plan.expected_bytes(size, memory)
        work = plan.work(size, memory)
        flops = 2 * work.total
        largest = None if limit is None else plan.largest_batch(size, memory, limit)
        rows.append(
            [
                memory,
                format_bytes(peak),
                format_bytes(peak + plan.state_bytes(size)),
                f"{flops / 1e12:,.3g}",
                "–" if rate is None else f"{flops / rate:,.3g}",
                "–" if limit is None else "none" if largest is None else f"{largest:,}",
            ]
        )
    head = ["mode", "peak", "with state", "TFLOP", "floor, s", "largest n"]
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    pairs = f"{size.rows:,} {'' if size.symmetric else 'ordered '}pairs"
    if size.ranks > 1:
        pairs += f" for each of {size.ranks} processes"
    dtype = str(size.compute).removeprefix("torch.")
    lines = [
        f"n = {size.batch:,} ({size.batch // size.views:,} classes of {size.views}), D = {size.dim}, "
        f"L = {size.layers}, M = {size.classes:,}: {pairs}, products in {dtype}, {size.stages} stages on {size.device}",
        "",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]),
        "",
        f"peak: a step's beyond its state, which is {format_bytes(plan.state_bytes(size))} of weights, gradients and "
        "optimizers' moments.",
    ]
    if rate is not None:
        where = "measured here" if measured else "given"
        lines.append(
            f"floor: the step's matrix products at {rate / 1e9:,.0f} GFLOP/s ({where}); real steps take longer."
        )
    if limit is not None:
        lines.append(f"largest n: with its state in {format_bytes(limit)} ({'given' if given else 'free here now'}).")
        lines.append(
            f'edge_memory="auto" would take {plan.choose_memory(size, max(0, limit - plan.state_bytes(size)))}.'
        )
    terms = plan.expected_terms(size, "store")
    if size.device == "cpu":
        terms = terms | {"the process beside its tensors": plan.cpu_overhead(size, "store")}
    parts = [f"{name} {format_bytes(count)}" for name, count in terms.items() if count]
    lines.append(f"At store's peak: {', '.join(parts)}.")
    return "\n".join(lines)


def ranks_text(size: StepSize, rate: float | None, bandwidth: float, latency: float) -> str:
    """What `gcahng plan` adds for several processes: their shares, what they send, and the time that follows.

    Args:
        size: of the step.
        rate: of a process's matrix products in FLOP/s; None: unknown.
        bandwidth: of its link in bytes a second.
        latency: of a message in seconds.
    """
    from gcahng.engine import plan, traffic

    shares = traffic.shares(size)
    mean = sum(shares) / len(shares)
    each = ", ".join(f"{share:,} in {count:,}" for share, count in sorted(Counter(shares).items(), reverse=True))
    lines = [
        "",
        f"Pairs by process: {each}; the largest share is {max(shares) / mean:.3f} of the mean.",
        "",
        "A process sends in a step (payload of each collective):",
    ]
    sent = traffic.collectives(size)
    for one in sent:
        shape = " × ".join(f"{length:,}" for length in one.shape)
        often = f", {one.times} times" if one.times > 1 else ""
        lines.append(f"  {one.kind:<10}  {format_bytes(one.payload):>8}  {one.name} ({shape}{often})")
    totals = [f"{kind} {format_bytes(sum(s.payload for s in sent if s.kind == kind))}" for kind in traffic.KINDS]
    on_link = sum(one.link_bytes(size.ranks) for one in sent)
    seconds = traffic.link_seconds(size, bandwidth, latency)
    lines += [
        f"In total {format_bytes(sum(one.payload for one in sent))}: {', '.join(totals)}. As rings they put "
        f"{format_bytes(int(on_link))} on each link.",
        f"Derived, with links of {bandwidth / 1e9:,.3g} GB/s and {latency * 1e6:,.3g} µs a message: sending takes "
        f"{seconds:,.3g} s.",
    ]
    if rate is not None:
        times = {memory: traffic.product_seconds(size, memory, rate) + seconds for memory in plan.MODES}
        listed = ", ".join(f"{memory} {time:,.3g} s" for memory, time in times.items())
        lines.append(f"Derived, with the floor of products before it: {listed}.")
    late = sum(one.payload for one in traffic.corrections(size))
    lines += [
        f"If processes are found to round differently, the first one's gradients are sent too: {format_bytes(late)}, "
        "broadcast.",
        "",
        *_repeated_lines(size, rate, bandwidth),
    ]
    return "\n".join(lines)


def _repeated_lines(size: StepSize, rate: float | None, bandwidth: float) -> list[str]:
    """What every process computes, and whether sharing it would pay; arguments as of ranks_text."""
    from gcahng.engine import plan, traffic

    whole, parts = plan.work(size, "store").total, traffic.repeated(size)
    share = sum(part.products for part in parts) / whole
    lines = [f"Repeated by every process: {share:.2%} of the products of a step (store)."]
    for part in parts:
        line = f"  {part.name}: {part.products / whole:.2%}"
        if rate is not None:
            saved = 2 * part.products * (1 - 1 / size.ranks) / rate
            line += f"; shared it would save {saved:,.3g} s and send for {part.link_bytes / bandwidth:,.3g} s"
        lines.append(line)
    return lines


def parse_bytes(text: str) -> int:
    """The number of bytes that a text such as 16GB, 24GiB, 512 MB or 1000 means.

    Raises:
        UserError: the text is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)?B?)\s*", text.upper())
    count = 0.0 if match is None else float(match[1]) * _UNITS[match[2] or ""]
    if not 1 <= count <= _MOST_BYTES:
        raise UserError(
            f"--memory-limit is {shown_value(text)}; it must be a number of bytes such as 16GB or 24GiB, at most "
            f"{format_bytes(_MOST_BYTES)}"
        )
    return int(count)
