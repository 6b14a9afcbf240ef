"""Checks whether a folder holds a data set as it was published, for `gcahng data verify`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gcahng.data.class_folders import scan
from gcahng.data.index import write_index
from gcahng.data.listing import SPLITS, DataMismatch, Difference, Listing, collect
from gcahng.data.load import DATA_SETS, find_files
from gcahng.data.reading import UnreadableImage, read_rgb
from gcahng.data.spec import Counts, DataSetSpec
from gcahng.data.workers import read_in_order, usual_workers

_FILES_PER_JOB = 16


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        spec: the data set.
        counts: images and classes of each split that is there.
        differences: everything that differs from the published data set.
        images_read: number of images that were decoded.
        index: where the index was written; None if the files cannot be listed or no place is writable.
        left_out: files and folders that do not count, in one line; "" if there are none.
    """

    spec: DataSetSpec
    counts: dict[str, Counts]
    differences: list[Difference]
    images_read: int
    index: Path | None
    left_out: str = ""


def verify_data(
    name: str,
    root: str | None,
    csv: str | None = None,
    *,
    images: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Verification:
    """Compare label files, image files, counts and classes with the published data set, and write the index.

    Args:
        name: name of the data set, as in `data.name`.
        root: its folder.
        csv: the CSV file, if `name` is "csv".
        images: whether to decode every image.
        workers: number of processes that decode; None means `usual_workers`.
        progress: called with the number of images decoded so far and in total.

    Raises:
        UserError: arguments do not fit together, or an optional package is missing.
    """
    spec = DATA_SETS[name]
    differences: list[Difference] = []
    try:
        data_files = find_files(spec, root, csv)
    except DataMismatch as error:
        differences.append(Difference(error.difference.what, "the expected files and where to get them are below"))
        differences += _image_level_folders(Path(root or "."))
        return Verification(spec, {}, differences, 0, None)
    try:
        listing = collect(data_files, differences.append)
    except DataMismatch as error:
        return Verification(spec, {}, [*differences, error.difference], 0, None)
    # `load_data` stops at any of these differences, but not at those that are added below.
    index = None if differences else write_index(name, data_files, listing)
    counts = {split: Counts(len(files.paths), len(set(files.labels))) for split, files in listing.splits.items()}
    differences += _count_differences(spec, counts)
    read = 0
    if images:
        paths = [listing.root / path for files in listing.splits.values() for path in files.paths]
        for number, unreadable in _decode(paths, usual_workers(workers)):
            read += number
            differences += [_unreadable(listing, error) for error in unreadable]
            if progress is not None:
                progress(read, len(paths))
    return Verification(spec, counts, differences, read, index, str(data_files.left_out))


def _count_differences(spec: DataSetSpec, counts: dict[str, Counts]) -> Iterator[Difference]:
    for split, expected in spec.expected.items():
        here = counts.get(split, Counts(0, 0))
        for what, has, should in zip(("images", "classes"), here, expected, strict=True):
            if has != should:
                remedy = "unpack the original archive again" if has < should else "restore the original label files"
                yield Difference(f"{split} has {has:,} {what}; {spec.title} has {should:,}", remedy)


def _image_level_folders(root: Path) -> Iterator[Difference]:
    """Recognize train/ and test/ folders with the same classes in place of the original files."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = scan(root, "train").classes, scan(root, "test").classes
        if shared := [name for name in train if name in test]:
            yield Difference(
                f"{len(shared)} class folders, such as {shared[0]}, are both in train/ and in test/",
                "this is an image-level split, as in classification; the original files are split by class",
            )


def _decode(paths: list[Path], workers: int) -> Iterator[tuple[int, list[UnreadableImage]]]:
    """Yield how many images were looked at and the errors of those that cannot be read, a few images at a time."""
    jobs = [paths[start : start + _FILES_PER_JOB] for start in range(0, len(paths), _FILES_PER_JOB)]
    for job, unreadable in zip(jobs, read_in_order(_Decoder(), jobs, workers), strict=True):
        yield len(job), unreadable


class _Decoder:
    """Reads a few files and returns the errors of those that cannot be read."""

    def __getitem__(self, job: list[Path]) -> list[UnreadableImage]:
        unreadable = []
        for path in job:
            try:
                read_rgb(path)
            except UnreadableImage as error:
                unreadable.append(error)
        return unreadable


def _unreadable(listing: Listing, error: UnreadableImage) -> Difference:
    path = error.path.relative_to(listing.root).as_posix()
    return Difference(f"{path} cannot be read as an image: {error.reason}", "restore the original file")


def describe(verification: Verification, root: Path) -> str:
    """The text for a person: counts, then every difference with its remedy, then what was expected."""
    spec = verification.spec
    lines = [f"{spec.title} in {root}", f"  {'split':<8}{'images':>10}{'expected':>10}{'classes':>10}{'expected':>10}"]
    for split in SPLITS:
        if split in verification.counts or split in spec.expected:
            here, expected = verification.counts.get(split, Counts(0, 0)), spec.expected.get(split)
            images, classes = (f"{n:,}" for n in expected) if expected else ("any", "any")
            lines.append(f"  {split:<8}{here.images:>10,}{images:>10}{here.classes:>10,}{classes:>10}")
    lines.append(f"  {verification.images_read:,} images decoded")
    if verification.left_out:
        lines.append(f"  left out: {verification.left_out}")
    if not verification.differences:
        lines.append("no differences")
    else:
        lines += [
            "",
            "1 difference:"
            if len(verification.differences) == 1
            else f"{len(verification.differences):,} differences:",
        ]
        for number, difference in enumerate(verification.differences, start=1):
            lines += [f"  {number}. {difference.what}", f"     -> {difference.remedy}"]
        lines += ["", "expected files:", *(_wrapped(line) for line in spec.layout.splitlines())]
        lines += ["where to get them:", _wrapped(spec.source), "image-level splits:", _wrapped(spec.trap), ""]
    unwritten = "could not be written"
    if verification.differences:
        unwritten = "not written, because training would stop at a difference"
    lines.append(f"index {verification.index or unwritten}")
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def table() -> str:
    """A table of the data sets, their splits and their values of K for Recall@K."""
    lines = [f"{'name':<10}{'split':<9}{'images':>8}{'classes':>9}  {'Recall@K':<20}title"]
    for spec in DATA_SETS.values():
        rows = [(split, f"{n.images:,}", f"{n.classes:,}") for split, n in spec.expected.items()] or [("any", "", "")]
        for number, (split, images, classes) in enumerate(rows):
            first = number == 0
            recall, title = (" ".join(map(str, spec.recall_at)), spec.title) if first else ("", "")
            line = f"{spec.name if first else '':<10}{split:<9}{images:>8}{classes:>9}  {recall:<20}{title}"
            lines.append(line.rstrip())
    return "\n".join(lines)
