"""The options of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gcahng.errors import UserError
from gcahng.report.embedding_map import METHODS


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows, and how it is made.

    Attributes:
        baselines: runs to compare with.
        which: the checkpoint of run folders, "last" or "best".
        queries: rows in each of the grids of best, worst and random queries.
        map_method: "umap", "pca", or "auto": UMAP where it is installed.
        seed: of the random queries and of the map.
        device: "auto", "cpu", "cuda" or "cuda:N".
        data_root: the folder of the images; None: the one that the run had.
    """

    baselines: Sequence[Path | str] = ()
    which: str = "last"
    queries: int = 6
    map_method: str = "auto"
    seed: int = 0
    device: str = "auto"
    data_root: Path | str | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: names the option, its value and what it must be.
        """
        if self.queries < 1:
            raise UserError(f"queries is {self.queries}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be in 0 … {2**32 - 1}")
        if self.map_method not in METHODS:
            raise UserError(f"map is {self.map_method!r}; it must be one of {', '.join(METHODS)}")
