"""The good inputs that cases damage: small trees, runs, embeddings, indices and states of the loss."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

ROWS, DIM = 300, 16  # of the embeddings; ivf_pq needs 256 rows
KINDS = ("flat", "ivf_flat", "ivf_pq", "hnsw")
# Options with which a run on the tree takes a second.
SMALL = {
    "steps": 4,
    "steps_per_epoch": 2,
    "eval_every": 2,
    "log_every": 1,
    "device": "cpu",
    "threads": 1,
    "data": {
        "name": "folder",
        "classes_per_batch": 2,
        "samples_per_class": 2,
        "val_classes": 0,
        "image_size": 16,
        "resize": 16,
        "workers": 0,
    },
    "backbone": {"embedding_dim": 8, "width": 2},
    "gca": {"heads": 2, "layers": 1},
}


def import_everything() -> None:
    """Import what commands import when they need it, and whatever those import, so that forks need not."""
    import gcahng

    for module in pkgutil.walk_packages(gcahng.__path__, "gcahng."):
        if not module.name.startswith(("gcahng.kernels", "gcahng.testing", "gcahng.__main__", "gcahng._C")):
            importlib.import_module(module.name)
    for name in [
        "faiss",
        "pyarrow.parquet",
        "pyarrow.parquet",
        "jsonargparse",
        "yaml",
        "rich.progress",
        "scipy.io",
        "sklearn.metrics",
        "torchvision.transforms.v2",
        "safetensors.torch",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "trees",
        "killed_runs",
        "multiprocessing.util",
    ]:
        importlib.import_module(name)
    from PIL import Image

    Image.init()
    from killed_runs import no_pictures

    from gcahng.train import session

    session.draw_pictures = no_pictures  # curves take longer than all the rest of such a run


def config(out: Path, root: Path, **fields: Any) -> Any:
    """The options of a run on the tree `root`."""
    from gcahng.config import config_from_dict

    values = {**SMALL, **fields, "out": str(out)}
    values["data"] = {**SMALL["data"], "root": str(root)}
    return config_from_dict(values)


def build(world: Path) -> None:
    """Make every good input below `world`. It takes some seconds."""
    import torch

    torch.set_num_threads(1)
    _trees(world)
    _runs(world)
    _embeddings(world)
    _states(world)
    for path in world.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    world.chmod(0o755)


def _trees(world: Path) -> None:
    import trees  # of tests/data

    trees.make_folder(world / "folder", classes=6, images=3, size=16)
    trees.make_csv(world / "csv", classes=4, images=2)
    trees.make_cub200(world / "cub200", classes=4, images=2)
    trees.make_cars196(world / "cars196", numbers=(1, 98, 99, 196), images=2)
    trees.make_sop(world / "sop", classes=4, images=2)
    trees.make_inshop(world / "inshop", classes=4, images=3)


def _runs(world: Path) -> None:
    """run: finished; half: stopped by a signal after a step in the middle of an epoch."""
    import os
    import signal

    from gcahng.cli import main
    from gcahng.train import TrainingInterrupted, fit
    from gcahng.train.trainer import Trainer

    fit(config(world / "run", world / "folder"))
    real = Trainer.train_step

    def then_a_signal(self: Any) -> Any:
        logs = real(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return logs

    Trainer.train_step = then_a_signal
    try:
        fit(config(world / "half", world / "folder"))
    except TrainingInterrupted:
        pass
    finally:
        Trainer.train_step = real
    words = ["embed", str(world / "run"), "--out", str(world / "right.npy"), "--data.workers", "0"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    for name in ("run", "half"):
        shutil.rmtree(world / name / "tensorboard", ignore_errors=True)


def embedding_set() -> Any:
    """ROWS embeddings of 30 classes, with names."""
    import torch

    from gcahng.retrieval.embeddings import EmbeddingSet
    from gcahng.retrieval.items import Items, Source

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) // 10
    centers = torch.randn(30, DIM, generator=generator)
    values = centers[labels] + 0.7 * torch.randn(ROWS, DIM, generator=generator)
    names = tuple(f"thing {label}/{row}.jpg" for row, label in enumerate(labels.tolist()))
    classes = tuple(f"thing {label}" for label in range(30))
    return EmbeddingSet(values, Items(names, labels, classes, (Source(ROWS, "/nowhere"),)), None, None)


def _embeddings(world: Path) -> None:
    import numpy as np
    import torch

    from gcahng.retrieval.embeddings import write_embeddings
    from gcahng.retrieval.index import IndexSettings
    from gcahng.retrieval.index_file import build as build_index
    from gcahng.retrieval.index_file import save
    from gcahng.retrieval.items import Items

    whole = embedding_set()
    write_embeddings(world / "vectors" / "x.safetensors", whole)
    write_embeddings(world / "vectors" / "x.npy", whole)
    write_embeddings(world / "vectors" / "x.parquet", whole)
    np.save(world / "vectors" / "bare.npy", whole.embeddings.numpy())
    chosen = torch.arange(0, ROWS, 37)
    queries = replace(whole, embeddings=whole.embeddings[chosen] + 0.1, items=whole.items.subset(chosen.tolist()))
    assert isinstance(queries.items, Items)
    write_embeddings(world / "vectors" / "q.safetensors", queries)
    for kind in KINDS:
        save(world / "vectors" / f"{kind}.index", build_index(whole, kind, "cosine", IndexSettings()))


def _states(world: Path) -> None:
    import torch

    import gcahng
    from hostile.states import make_loss, train

    loss = make_loss()
    train(loss, 0, 3)
    (world / "states").mkdir()
    torch.save(loss.state_dict(), world / "states" / "loss.pt")
    torch.save(gcahng.official_state_dict(loss), world / "states" / "official.pt")
