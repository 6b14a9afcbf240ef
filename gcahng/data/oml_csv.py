"""The columns of OML's tables (open-metric-learning): a split of train or validation, is_query and is_gallery."""

from __future__ import annotations

from collections.abc import Mapping

from gcahng.data.listing import Difference, NoteDifference

QUERY, GALLERY = "is_query", "is_gallery"
_BOX = ("x_1", "x_2", "y_1", "y_2")
_SEQUENCE = "sequence"
# As pandas writes truth values, in a column that has missing ones too.
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_MISSING = ("", "nan", "none", "null")


class OmlRows:
    """Finds the split of each row of a table.

    OML's validation images are what this package calls test images: queries that are searched in a gallery, or that
    are each searched among all others where they are both.

    Args:
        note: called with what is not supported or contradicts itself, and with boxes and sequences only once.
    """

    def __init__(self, note: NoteDifference) -> None:
        self._note, self._noted = note, set[str]()
        self._first: dict[str, str] = {}

    def split_of(self, row: Mapping[str, str], where: str) -> str | None:
        """The split of a row: train, test or gallery; None if the row was noted.

        Args:
            row: its fields by column.
            where: the file and line.
        """
        if any(not _missing(row.get(column, "")) for column in _BOX):
            self._once("box", where, f"a bounding box ({', '.join(_BOX)}), and images are read whole", "cut them out")
            return None
        split, flags = row["split"], [row[column] for column in (QUERY, GALLERY)]
        if split == "train":
            if any(_TRUTH.get(flag.lower(), False) for flag in flags):
                self._bad(where, f"{_said(flags)} and the split train", "both must be empty for training images")
                return None
            return "train"
        if split != "validation":
            self._bad(where, f"the split {split!r}", f"beside {QUERY} and {GALLERY} it must be train or validation")
            return None
        if not _missing(row.get(_SEQUENCE, "")):
            what = f"a {_SEQUENCE}, whose images OML leaves out of each other's search"
            self._once(_SEQUENCE, where, what, "search each image in all others")
            return None
        if any(flag.lower() not in _TRUTH for flag in flags):
            self._bad(where, _said(flags), "each must be True or False (or 1 or 0) for validation images")
            return None
        return self._searched(*(_TRUTH[flag.lower()] for flag in flags), where)

    def _searched(self, query: bool, gallery: bool, where: str) -> str | None:
        if not query and not gallery:
            self._bad(where, f"{QUERY} and {GALLERY} false", "a validation image must be one of them")
            return None
        kind = "both" if query and gallery else "one"
        other = self._first.get("one" if kind == "both" else "both")
        self._first.setdefault(kind, where)
        if other is not None:
            if "mixed" not in self._noted:
                self._noted.add("mixed")
                both, one = (where, other) if kind == "both" else (other, where)
                self._note(
                    Difference(
                        f"{both} is a query and in the gallery, and {one} only one of them",
                        "all validation images must be both, or each must be one",
                    )
                )
            return None
        return "test" if query else "gallery"

    def _once(self, kind: str, where: str, what: str, remedy: str) -> None:
        if kind not in self._noted:
            self._noted.add(kind)
            self._bad(where, what, f"this is not supported: {remedy}, and remove these columns")

    def _bad(self, where: str, what: str, remedy: str) -> None:
        self._note(Difference(f"{where} has {what}", remedy))


def _missing(value: str) -> bool:
    return value.strip().lower() in _MISSING


def _said(flags: list[str]) -> str:
    return f"{QUERY} {flags[0]!r} and {GALLERY} {flags[1]!r}"
