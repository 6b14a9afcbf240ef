"""Worker processes, however Python starts them: what they are handed, what they share, scripts without a main guard."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

import gcahng
from gcahng.data import ImageFiles, Preprocessing, workers
from gcahng.data.file_batches import _BatchReader
from gcahng.data.reading import _ChunkReader
from gcahng.data.strings import Strings
from gcahng.data.verify import _Decoder
from gcahng.data.workers import read_in_order
from gcahng.errors import UserError
from gcahng.train import TrainConfig, fit, resume

ROOT = Path(gcahng.__file__).parents[1]
MEMORY = Path(__file__).with_name("worker_memory.py")
# Python's own on Linux from 3.14 on, and on other systems: both pass to a worker what can be pickled.
METHODS = ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)]


def python(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=env, timeout=900
    )


def listing(rows: int) -> ImageFiles:
    names = tuple(f"class_{i}" for i in range(rows // 10))
    return ImageFiles(Path("/data"), [f"a/usual/name_{i}.jpg" for i in range(rows)], torch.arange(rows) // 10, names)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows shares memory by name")
def test_workers_get_handles_and_no_listing() -> None:
    """What is pickled for a worker does not grow with the listing: tensors go as handles of shared memory."""
    sizes = []
    for rows in (1_000, 50_000):
        files = listing(rows)
        assert isinstance(files.paths, Strings)
        readers = [_BatchReader(files, 224, 0.5, 0, False, slice(None)), _ChunkReader(files, Preprocessing())]
        sizes.append([len(ForkingPickler.dumps(reader)) for reader in (*readers, _Decoder())])
    assert all(abs(few - many) < 64 for few, many in zip(*sizes, strict=True)) and max(sizes[1]) < 10_000


def test_a_subset_has_its_names() -> None:
    files = listing(100)
    part = files.subset(torch.tensor([99, 3, 3]))
    assert [part.name(i) for i in range(3)] == ["a/usual/name_99.jpg", "a/usual/name_3.jpg", "a/usual/name_3.jpg"]
    assert part.file(0) == Path("/data/a/usual/name_99.jpg") and part.labels.tolist() == [9, 0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks this process")
@pytest.mark.parametrize("what", ["fit", "resume", "read"])
def test_a_script_that_a_worker_imports_does_nothing(what: str, tmp_path: Path) -> None:
    """A process that becomes a worker imports the script, and leaves as soon as that would begin its work."""
    pid = os.fork()
    if pid == 0:
        try:
            multiprocessing.current_process()._inheriting = True  # type: ignore[attr-defined]  # as Python marks it
            if what == "fit":
                fit(TrainConfig(out=str(tmp_path / "run"), device="cpu"))
            elif what == "resume":
                resume(tmp_path)
            else:
                list(read_in_order({}, [], 0))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == workers._NO_MAIN_GUARD
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_left_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(workers.DataLoader, "__iter__", gone)
    with pytest.raises(EOFError):
        next(read_in_order({}, [1], 0))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "forkserver")
    with pytest.raises(
        UserError, match=r"by forkserver, for which each imports .*if __name__ == \"__main__\":, or set"
    ):
        next(read_in_order({}, [1], 2))


WITHOUT_GUARD = """
import multiprocessing
import sys
from pathlib import Path

import torch

from gcahng.data import ImageFiles, Preprocessing, evaluation_batches

multiprocessing.set_start_method(sys.argv[1], force=True)
files = ImageFiles(Path("/nowhere"), ["a.png"] * 4, torch.zeros(4, dtype=torch.int64), ("a",))
for batch in evaluation_batches(files, Preprocessing(8, 8), 2, workers=2):
    pass
"""


@pytest.mark.processes
@pytest.mark.parametrize("method", METHODS)
def test_a_script_without_a_main_guard(method: str, tmp_path: Path) -> None:
    """One error, of the script itself: its workers are silent."""
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_GUARD)
    done = python(script, method)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"Python starts them by {method}, for which each imports {script}, and that does its work again" in last


BATCHES = """
import multiprocessing
import sys
from pathlib import Path

import torch

from gcahng.data import build_batches, evaluation_batches, load_data, Preprocessing
from gcahng.data.config import DataConfig

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1], force=True)
    config = DataConfig(name="folder", root=sys.argv[2], val_classes=0, image_size=16, resize=20)
    config.classes_per_batch, config.samples_per_class = 2, 2
    files = load_data(config).train
    found = []
    for workers in (0, 2):
        config.workers = workers
        batches = build_batches(config, files, seed=3, device=torch.device("cpu"))
        found.append([batches.batch(step) for step in range(4)])
        found[-1] += [(batch, batch) for batch in evaluation_batches(files, Preprocessing(20, 16), 4, workers)]
        batches.close()
    for (images, labels), (others, other_labels) in zip(*found, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    missing = files.file(0)
    missing.unlink()
    try:
        list(evaluation_batches(files, Preprocessing(20, 16), 4, 2))
    except Exception as error:
        print(type(error).__name__, error.path == missing)
"""


@pytest.mark.processes
@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_from_workers_that_are_not_forked(method: str, tmp_path: Path) -> None:
    import trees

    root = trees.make_folder(tmp_path / "tree", classes=8, images=5)
    script = tmp_path / "script.py"
    script.write_text(BATCHES)
    done = python(script, method, str(root))
    assert done.returncode == 0 and done.stdout == "UnreadableImage True\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what processes share")
@pytest.mark.parametrize("method", ["fork", *METHODS])
def test_workers_share_a_long_listing(method: str) -> None:
    """A million rows in eight workers: together they hold it about once, which copies of it would take eight times."""
    few, many = (json.loads(python(MEMORY, method, rows, "8").stdout) for rows in ("1000", "1000000"))
    more = many["workers"] - few["workers"]
    assert more < 2 * many["listing"], (few, many)
