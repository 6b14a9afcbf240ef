"""The options of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gcahng.bounds import check_number
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
        check_number("queries", self.queries)
        check_number("seed", self.seed, key="report seed")
        if self.map_method not in METHODS:
            raise UserError(f"map is {self.map_method!r}; it must be one of {', '.join(METHODS)}")
