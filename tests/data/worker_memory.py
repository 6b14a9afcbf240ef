"""The memory of worker processes that read the names of a long listing; prints it as JSON. Run by test_workers.py.

python worker_memory.py METHOD ROWS WORKERS
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from gcahng.data import ImageFiles
from gcahng.data.file_batches import _BatchReader
from gcahng.data.workers import read_in_order


def pss() -> int:
    """This process's share of the memory in bytes: pages that k processes share count 1/k."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]


class Names(_BatchReader):
    """Reads names and labels of all parts of the listing, as a long training run does, and no image."""

    def __getitem__(self, job: int) -> Tensor:  # type: ignore[override]
        count = sum(len(self._files.name(i)) for i in range(0, len(self._files), 20))
        return torch.tensor([torch.utils.data.get_worker_info().id, pss(), count, int(self._files.labels.sum())])


def main(method: str, rows: int, workers: int) -> None:
    multiprocessing.set_start_method(method)
    labels = torch.arange(rows) // 10
    paths = [f"images/class_{i // 10:07d}/a_usual_name_of_{i:09d}.jpg" for i in range(rows)]
    files = ImageFiles(Path("/data"), paths, labels, tuple(f"class_{i:07d}" for i in range(rows // 10)))
    del paths
    reader = Names(files, 224, 0.5, 0, False, slice(None))
    results = read_in_order(reader, range(4 * workers), workers)
    found = {int(worker): int(size) for worker, size, *_ in (next(results).tolist() for _ in range(2 * workers))}
    assert len(found) == workers
    print(json.dumps({"workers": sum(found.values()), "listing": files.paths.nbytes + labels.nbytes}))
    results.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
