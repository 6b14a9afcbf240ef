"""The range of every number that a user passes, in one table for the command line, YAML files and Python.

An option is found by the last part of its name, so that `gca.layers` of a run, `layers` of GCAHNGLoss and `--layers` of
`gcahng plan` have one range. The upper ends are far above what anyone computes with. They are there so that a slip of
the keyboard is refused at once, and not after hours or when memory is full.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import is_dataclass
from numbers import Integral
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from gcahng.errors import UserError

_C_INT = 2**31 - 1  # in which faiss and k-means hold a number


class Bound(NamedTuple):
    """A range of numbers.

    Attributes:
        least: the smallest number.
        most: the largest number.
        meaning: what the numbers are, for the documentation.
        whole: whether they are whole numbers.
        above: whether `least` itself is outside.
        under: whether `most` itself is outside.
    """

    least: float
    most: float
    meaning: str
    whole: bool = True
    above: bool = False
    under: bool = False

    def __str__(self) -> str:
        """The range in words, such as "a whole number of at least 1 and at most 1,024"."""
        least = f"above {_number(self.least)}" if self.above else f"of at least {_number(self.least)}"
        most = f" and under {_number(self.most)}" if self.under else f" and at most {_number(self.most)}"
        return f"a {'whole ' * self.whole}number {least}{'' if self.most == math.inf else most}"

    def holds(self, value: object) -> bool:
        """Whether a value is a number of this range. NaN and bools never are."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else (int, float)):
            return False
        low = value > self.least if self.above else value >= self.least  # type: ignore[operator]
        return bool(low and (value < self.most if self.under else value <= self.most))  # type: ignore[operator]


_CHANNELS = Bound(1, 2**20, "embedding channels D")
_CLASSES = Bound(2, 10**9, "classes M that train")
_BATCH = Bound(4, 2**20, "samples n in a batch")
_VIEWS = Bound(2, 2**20, "samples K of each class in a batch")
_IMAGES = Bound(1, 2**20, "images that the network takes at once")
_PIXELS = Bound(1, 2**14, "sides of images, in pixels")
_SEED = Bound(0, 2**63 - 1, "seeds of training, of dropout and of mixing")
_SEED_32 = Bound(0, 2**32 - 1, "seed of a report")
_SEED_31 = Bound(0, _C_INT, "seeds of k-means and of an index")
_STEPS = Bound(1, 10**12, "optimizer steps")
_EPOCHS = Bound(1, 10**6, "epochs")
_NEIGHBORS = Bound(1, 10**9, "ranks K, neighbors and queries that are shown")
_EFFORT = Bound(1, _C_INT, "settings of an approximate index")
_PROCESSES = Bound(1, 1024, "threads, and processes that share a batch")
_RATE = Bound(0, 1000, "learning rates and weight decay", whole=False)
_WEIGHT = Bound(0, 10**6, "weights of the loss's terms", whole=False)
_CHANCE = Bound(0, 1, "chances of dropout", whole=False, under=True)
_SPEED = Bound(0, 10**6, "speeds of the loss's schedules", whole=False, above=True)

# By the last part of an option's name.
BOUNDS: dict[str, Bound] = {
    "embedding_dim": _CHANNELS,
    "dim": _CHANNELS,
    "num_classes": Bound(1, 10**9, "classes M of GCAHNGLoss"),
    "classes": _CLASSES,
    "train_classes": _CLASSES,
    "val_classes": Bound(0, 10**9, "classes that validate"),
    "classes_per_batch": Bound(2, 2**20, "classes C in a batch"),
    "samples_per_class": _VIEWS,
    "num_per_class": _VIEWS,
    "views": _VIEWS,
    "batch": _BATCH,
    "batch_size": _IMAGES,
    "micro_batch": _IMAGES,
    "layers": Bound(1, 1000, "layers L of the graph network"),
    "heads": Bound(1, 2**20, "heads H of its node attention"),
    "width": Bound(1, 4096, "channels of glyph_conv's first convolution"),
    "image_size": _PIXELS,
    "resize": _PIXELS,
    "crop": _PIXELS,
    "min_size": _PIXELS,
    "max_shift": Bound(0, 1024, "shift of training images, in pixels"),
    "crop_scale_min": Bound(0, 1, "smallest part of an image that a crop takes", whole=False, above=True),
    "workers": Bound(0, 1024, "processes that read image files"),
    "threads": _PROCESSES,
    "jobs": Bound(1, 1024, "runs of a study at a time"),
    "ranks": _PROCESSES,
    "steps": _STEPS,
    "steps_per_epoch": _STEPS,
    "eval_every": _STEPS,
    "log_every": _STEPS,
    "keep_every": _STEPS,
    "timeout": Bound(1, 7 * 86400, "seconds that processes wait for one of them", whole=False),
    "skip_nonfinite": Bound(0, 10**12, "steps in a row that may be left out"),
    "epochs": _EPOCHS,
    "eval_every_epochs": _EPOCHS,
    "step_epochs": _EPOCHS,
    "warmup_epochs": Bound(0, 10**6, "epochs in which only the head trains"),
    "seed": _SEED,
    "lr": _RATE,
    "graph_lr": _RATE,
    "classifier_lr": _RATE,
    "proxy_lr": _RATE,
    "weight_decay": _RATE,
    "graph_weight_decay": _RATE,
    "classifier_weight_decay": _RATE,
    "step_gamma": Bound(0, 1000, "factor of the learning rate", whole=False),
    "clip_value": Bound(0, math.inf, "limit of gradients; inf clips nothing", whole=False, above=True),
    "alpha": _SPEED,
    "beta": _SPEED,
    "dot_weight": _WEIGHT,
    "div_weight": _WEIGHT,
    "softmax_factor": _WEIGHT,
    "synthetic_temperature": Bound(0, 1000, "temperature of J_syn's cosines", whole=False, above=True),
    "synthetic_weight": _WEIGHT,
    "synthetic_warmup": Bound(0, 10**12, "steps in which J_syn sets in"),
    "edge_dropout": _CHANCE,
    "dropout": _CHANCE,
    "k": _NEIGHBORS,
    "recall_at": _NEIGHBORS,
    "precision_at": _NEIGHBORS,
    "map_at": _NEIGHBORS,
    "queries": _NEIGHBORS,
    "rows": Bound(0, 10**12, "rows of embeddings, counted from 0"),
    "effort": _EFFORT,
    "lists": _EFFORT,
    "probes": _EFFORT,
    "code_bytes": _EFFORT,
    "links": Bound(2, 4096, "neighbors of each node in hnsw's graph"),  # faiss crashes with one
    "build_breadth": _EFFORT,
    "search_breadth": _EFFORT,
    "index seed": _SEED_31,
    "k-means seed": _SEED_31,
    "report seed": _SEED_32,
    "opset": Bound(18, 100, "ONNX operator sets"),  # from 18 on the exporter converts nothing
    "reps": Bound(1, 10**6, "repetitions of a measurement"),
    "link": Bound(0, 10**6, "speed of the link between processes, in GB/s", whole=False, above=True),
    "latency": Bound(0, 10**6, "time of a message between processes, in µs", whole=False),
    "rate": Bound(0, 10**12, "speed of matrix products, in GFLOP/s", whole=False, above=True),
}


def check_number(name: str, value: object, *, none: str | None = None, key: str | None = None) -> None:
    """See that a number is in the range of its option.

    Args:
        name: of the option, as its user writes it. The last part finds the range.
        value: what was passed.
        none: how its user writes that there is no number, such as None; None: there must be one.
        key: finds the range, where it is not the last part of `name`.

    Raises:
        UserError: the value is something else.
    """
    if value is None and none is not None:
        return
    bound = BOUNDS[key or name.rpartition(".")[2]]
    if not bound.holds(value):
        either = "" if none is None else f"{none} or "
        raise UserError(f"{name} is {shown_value(value)}; it must be {either}{bound}")


def check_fields(options: Any, prefix: str = "") -> None:
    """See that the fields of a dataclass of options hold what their types and the table allow.

    Numbers must be in their range, Literals one of their values, flags true or false, and texts not empty.

    Args:
        options: the dataclass; fields that are dataclasses are checked too.
        prefix: what stands before the names of its fields in messages, such as "data.".

    Raises:
        UserError: names the field, its value and what it must be.
    """
    for field, hint in get_type_hints(type(options)).items():
        name, value = prefix + field, getattr(options, field)
        kinds = get_args(hint) or (hint,)
        if is_dataclass(hint):
            check_fields(value, f"{name}.")
        elif field == "device":
            check_device(value)
        elif value is None and NoneType in kinds:
            continue
        elif all(isinstance(kind, str) for kind in kinds):
            if value not in kinds:
                raise UserError(f"{name} is {shown_value(value)}; it must be one of {', '.join(kinds)}")
        elif int in kinds or float in kinds:
            check_number(name, value)
        elif bool in kinds:
            if not isinstance(value, bool):
                raise UserError(f"{name} is {shown_value(value)}; it must be true or false")
        elif str in kinds and (not isinstance(value, (str, os.PathLike)) or not os.fspath(value)):
            raise UserError(f"{name} is {shown_value(value)}; it must be text, and not empty")


def check_device(name: object) -> None:
    """See that a name is one of a device that is supported, whether or not this machine has it.

    Raises:
        UserError: it is another one.
    """
    # At most two digits more than any machine has devices: PyTorch holds the number in 8 bits.
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda|cuda:(0|[1-9][0-9]{0,2})", name):
        raise UserError(f"device is {shown_value(name)}; it must be auto, cpu, cuda or cuda:N")


def shown_value(value: object, most: int = 80) -> str:
    """A value as messages show it: its repr, of which the end is left out where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        text = f"a number of more than {value.bit_length() * 3 // 10} digits"  # type: ignore[attr-defined]
    return text if len(text) <= most else f"{text[:most]}…"


def format_bytes(count: int) -> str:
    """A number of bytes with three digits and a unit, such as 1.2 GB."""
    if count < 0:
        return f"-{format_bytes(-count)}"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def _number(value: float) -> str:
    if isinstance(value, int) and value >= _C_INT and (value + 1) & value == 0:
        return f"2^{value.bit_length()} - 1"
    return f"{value:,}"
