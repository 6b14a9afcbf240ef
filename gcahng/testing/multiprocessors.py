"""What a multiprocessor of each NVIDIA architecture has, and how many blocks of a kernel it holds at once."""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
REGISTERS = 64 * 1024  # of a multiprocessor
RESERVED_SHARED = 1024  # bytes of shared memory that the system takes in each block


class Multiprocessor(NamedTuple):
    """What a multiprocessor has: bytes of shared memory, and of these the most for a block; threads; blocks."""

    shared: int
    block_shared: int
    threads: int
    blocks: int


# By compute capability, from the table of technical specifications in NVIDIA's programming guide.
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 163 * 1024, 2048, 32),
    86: Multiprocessor(100 * 1024, 99 * 1024, 1536, 16),
    89: Multiprocessor(100 * 1024, 99 * 1024, 1536, 24),
    90: Multiprocessor(228 * 1024, 227 * 1024, 2048, 32),
    100: Multiprocessor(228 * 1024, 227 * 1024, 2048, 32),
    120: Multiprocessor(100 * 1024, 99 * 1024, 1536, 24),
}


def blocks_at_once(arch: int, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds at once.

    Args:
        arch: compute capability without its dot.
        registers: of a thread.
        shared: bytes of a block, with those that the system takes.
        threads: of a block.
    """
    chip = MULTIPROCESSORS[arch]
    warps = -(-threads // WARP)
    each = -(-registers * WARP // 256) * 256  # registers come to a warp in portions of 256
    fitting = REGISTERS // 4 // max(each, 1) * 4  # each quarter of a multiprocessor has its own
    limits = (fitting // warps, chip.shared // max(shared, 1), chip.threads // (warps * WARP), chip.blocks)
    return min(limits) if shared <= chip.block_shared + RESERVED_SHARED else 0
