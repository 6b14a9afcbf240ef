"""What a run prints while it trains: a progress bar on a terminal, or plain lines where nobody watches."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from typing import Protocol

from gcahng.errors import UserNote
from gcahng.streams import nobody_reads

_SHOWN = ("loss", "J_m", "J_syn", "J_gen")


class Terminal(Protocol):
    """Prints a run's progress. The run calls these methods."""

    def start(self, title: str, steps: int) -> None:
        """The run begins or continues, and has so many steps in all."""

    def losses(self, step: int, logs: Mapping[str, float]) -> None:
        """The mean losses of the last steps."""

    def evaluation(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """The metrics of an evaluation; `kind` is "val" or "test"."""

    def status(self, text: str) -> None:
        """Something that is worth a line."""

    def warning(self, text: str) -> None:
        """Something that the user should know."""

    def nobody_reads(self) -> bool:
        """Whether what is printed goes to a reader that has gone, as in `gcahng train | head`."""

    def close(self) -> None:
        """Called at the end, when nothing follows."""


class Silent:
    """Prints nothing, and warns as Python does."""

    def start(self, title: str, steps: int) -> None: ...
    def losses(self, step: int, logs: Mapping[str, float]) -> None: ...
    def evaluation(self, step: int, kind: str, metrics: Mapping[str, float]) -> None: ...
    def status(self, text: str) -> None: ...

    def warning(self, text: str) -> None:
        warnings.warn(text, UserNote, stacklevel=2)

    def nobody_reads(self) -> bool:
        return False

    def close(self) -> None: ...


class Mute(Silent):
    """Prints nothing at all, because another process does."""

    def warning(self, text: str) -> None: ...


class Lines(Silent):
    """Prints a line at each evaluation, for files and pipes."""

    def __init__(self) -> None:
        self._losses = ""
        self._steps = 0
        self._start = time.monotonic()

    def start(self, title: str, steps: int) -> None:
        self._steps = steps
        print(title, flush=True)

    def losses(self, step: int, logs: Mapping[str, float]) -> None:
        self._losses = _losses(logs)

    def evaluation(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        seconds = time.monotonic() - self._start
        print(f"step {step}/{self._steps}  {self._losses}  {_metrics(kind, metrics)}  {seconds:.0f} s", flush=True)

    def status(self, text: str) -> None:
        print(text, flush=True)

    def warning(self, text: str) -> None:
        print(f"gcahng: warning: {text}", file=sys.stderr, flush=True)

    def nobody_reads(self) -> bool:
        return nobody_reads(sys.stdout)


class Bar(Silent):
    """A progress bar of rich with the losses and the time left, and above it a line at each evaluation."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("train", total=None, losses="")

    def start(self, title: str, steps: int) -> None:
        self._progress.update(self._task, total=steps)
        self._progress.start()
        self._progress.console.print(title, highlight=False, markup=False)

    def losses(self, step: int, logs: Mapping[str, float]) -> None:
        # In 80 columns all losses would cut off the count and the times.
        shown = _SHOWN if self._progress.console.width >= 100 else _SHOWN[:1]
        self._progress.update(self._task, completed=step, losses=_losses(logs, shown))

    def evaluation(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        self._progress.console.print(f"step {step}  {_metrics(kind, metrics)}", highlight=False, markup=False)

    def status(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def warning(self, text: str) -> None:
        self._progress.console.print(f"warning: {text}", highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


class NotebookLines(Lines):
    """Lines for the output of a notebook's cell, the last of which is written again and again as the run proceeds."""

    def __init__(self) -> None:
        super().__init__()
        self._first_step: int | None = None
        self._first_seconds = 0.0
        self._length = 0

    def losses(self, step: int, logs: Mapping[str, float]) -> None:
        super().losses(step, logs)
        seconds = time.monotonic() - self._start
        if self._first_step is None:  # of a resumed run, the steps before are not of this time
            self._first_step, self._first_seconds = step, seconds
        left = ""
        if step > self._first_step:
            pace = (seconds - self._first_seconds) / (step - self._first_step)
            left = f"  {pace * (self._steps - step):.0f} s left"
        self._rewrite(f"step {step}/{self._steps}  {self._losses}  {seconds:.0f} s{left}")

    def evaluation(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        self._rewrite("")
        super().evaluation(step, kind, metrics)

    def status(self, text: str) -> None:
        self._rewrite("")
        super().status(text)

    def close(self) -> None:
        self._rewrite("")

    def _rewrite(self, text: str) -> None:
        """Put a text in the place of the last one, without a line break."""
        if text or self._length:
            print(f"\r{text:<{self._length}}", end="" if text else "\r", flush=True)
        self._length = len(text)


def in_notebook() -> bool:
    """Whether this process runs the cells of a Jupyter or Colab notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" or type(shell).__module__.startswith("google.colab")


def terminal_for(verbose: bool | None, speaks: bool = True) -> Terminal:
    """A progress bar where standard output is a terminal, a line that changes in a notebook, and lines elsewhere.

    Args:
        verbose: whether anything but warnings is printed; None: in a notebook.
        speaks: whether this process prints anything at all; of several processes one does.
    """
    if not speaks:
        return Mute()
    notebook = in_notebook()
    if not (notebook if verbose is None else verbose):
        return Silent()
    if notebook:
        return NotebookLines()
    return Bar() if sys.stdout.isatty() else Lines()


def _losses(logs: Mapping[str, float], shown: tuple[str, ...] = _SHOWN) -> str:
    return "  ".join(f"{name} {logs[name]:.3f}" for name in shown if name in logs)


def _metrics(kind: str, metrics: Mapping[str, float]) -> str:
    title = "validation" if kind == "val" else kind
    return f"{title} R@1 {100 * metrics['recall@1']:.2f}  MAP@R {100 * metrics['map@r']:.2f}"
