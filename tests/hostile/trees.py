"""Data trees, CSV files and lists of paths: damaged, oddly named, linked in circles, not readable.

For class folders and CSV files the harness knows by itself which images there are.
"""

from __future__ import annotations

import csv
import io
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

from hostile.case import FINE, Case, Fault, Ran, no_temporaries, refused
from hostile.values import TEXT, damage_file

_SETS = ("folder", "csv", "cub200", "sop", "inshop", "cars196")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_NAMES = (
    "a b.png",
    " lead.png",
    "trail.png ",
    "é.png",
    "e\u0301.png",
    "a\nb.png",
    "a\u2028b.png",
    "a\x85b.png",
    "a\x0cb.png",
    "a,b.png",
    'a"b.png',
    "#a.png",
    "-a.png",
    ".hidden.png",
    "._a.png",
    "no\udcffutf8.png",
    "n" * 251 + ".png",
    "UPPER.PNG",
    "two.dots.png",
    "noext",
    "a.png.txt",
    "💥.png",
    "\u202eb.png",
    "~.png",
    "a;b.png",
    "a%20b.png",
    "C:\\a.png",
    "nul.png",
)


def case(case: Case) -> str:
    """One damaged tree, verified, loaded or embedded; or one list of paths."""
    kind = case.chance.choices(("tree", "csv", "list"), (5, 3, 2))[0]
    return {"tree": _tree, "csv": _csv, "list": _list}[kind](case)


def _tree(case: Case) -> str:
    name = case.chance.choice(("folder", *_SETS))
    root = case.copy(name)
    for path in root.glob(".gcahng-*"):
        path.unlink()
    indexed = case.chance.random() < 0.3
    if indexed:  # damage comes after a first look, whose index is found again
        _load(name, root)
    dropped = False
    for _ in range(case.chance.choice((0, 1, 1, 2))):
        how, drop = _damage_tree(case.chance, root)
        case.tell(f"{name}: {how}")
        dropped |= drop
    if dropped and os.getuid() == 0:
        os.setuid(65534)
    more = ["--csv", root / "list.csv"] if name == "csv" else []
    if case.chance.random() < 0.5:
        ran = case.command("data", "verify", name, "--root", root, *more, *case.chance.choice(([], ["--no-images"])))
        if ran.status == 0 and name == "folder" and not indexed:
            _right_folder(root)
        return ran.verdict
    found: list[Any] = []
    if refused(lambda: found.append(_load(name, root))):
        return "refused"
    if name == "folder":
        _compare(found[0], _right_folder(root))
    return FINE


def _load(name: str, root: Path) -> Any:
    from gcahng.data import load_data
    from gcahng.data.config import DataConfig

    return load_data(
        DataConfig(name=name, root=str(root), csv=str(root / "list.csv") if name == "csv" else None, val_classes=0)
    )


def _right_folder(root: Path) -> dict[str, list[tuple[str, str]]]:
    """The images of class folders by split, each with its class: no hidden ones, and only names of images."""
    found: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "test"):
        found[split] = []
        for folder in sorted(os.scandir(root / split), key=lambda entry: entry.name):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            for name in sorted(os.listdir(folder.path)):
                if (
                    not name.startswith(".")
                    and name.lower().endswith(_SUFFIXES)
                    and _may_be_a_picture(f"{folder.path}/{name}")
                ):
                    found[split].append((f"{split}/{folder.name}/{name}", folder.name))
    return found


def _may_be_a_picture(path: str) -> bool:
    """A file, or a link that leads nowhere, which is told when it is read."""
    return os.path.isfile(path) or not os.path.exists(path)


def _compare(data: Any, right: dict[str, list[tuple[str, str]]]) -> None:
    for split in ("train", "test"):
        images = getattr(data, split)
        got = [(images.name(i), images.class_names[int(images.labels[i])]) for i in range(len(images))]
        if sorted(got) != sorted(right[split]):
            odd = sorted(set(got) ^ set(right[split]))
            raise Fault("wrong", f"{split}: {len(got)} images, not {len(right[split])}: {odd[:2]}")


def _damage_tree(chance: random.Random, root: Path) -> tuple[str, bool]:
    """Damage a tree; returns in words how, and whether rights must be dropped for it to matter."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    folders = [path for path in sorted(root.rglob("*")) if path.is_dir() and not path.is_symlink()]
    labels = [path for path in files if path.suffix in (".txt", ".csv", ".mat", ".json")] or files
    path = chance.choice(chance.choice((files, labels)))
    kind = chance.choice(
        (
            "bytes",
            "bytes",
            "remove",
            "loop",
            "dangling",
            "outside",
            "fifo",
            "folder",
            "name",
            "name",
            "hidden",
            "locked",
            "empty folder",
            "line",
            "line",
            "case",
            "nested",
        )
    )
    short = str(path.relative_to(root))
    if kind == "bytes":
        return damage_file(chance, path), False
    if kind == "line" and path.suffix in (".txt", ".csv"):
        return _damage_line(chance, path), False
    if kind == "locked":
        path = chance.choice((path, chance.choice(folders), root))
        path.chmod(0)
        return f"{path.name} may not be read", True
    if kind == "name":
        new = path.with_name(chance.choice(_NAMES))
        if path.suffix in (".txt", ".csv", ".mat"):
            return "nothing", False
        path.rename(new)
        return f"{short} is named {new.name!r}", False
    if kind == "hidden":
        folder = chance.choice((root, *folders)) / chance.choice((".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"))
        folder.mkdir(exist_ok=True)
        (folder / "copy.png").write_bytes(next(p for p in files if p.suffix in (".png", ".jpg", ".JPG")).read_bytes())
        return f"an image in {folder.relative_to(root)}", False
    if kind == "empty folder":
        (chance.choice((root, *folders)) / "nothing").mkdir(exist_ok=True)
        return "an empty folder", False
    if kind == "nested":
        (path.parent / "deeper").mkdir(exist_ok=True)
        path.rename(path.parent / "deeper" / path.name)
        return f"{short} is one folder deeper", False
    if kind == "case":
        path.rename(path.with_name(path.name.swapcase()))
        return f"{short} with the other case", False
    path.unlink()
    if kind in ("loop", "dangling", "outside"):
        target = {"loop": path.name, "dangling": "gone", "outside": "/etc/hostname"}[kind]
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return f"{short}: {kind}", False


def _damage_line(chance: random.Random, path: Path) -> str:
    data = path.read_bytes()
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    fields = lines[at].split(b"," if path.suffix == ".csv" else b" ")
    which = chance.randrange(len(fields))
    texts = (
        b"",
        b"-1",
        b"0",
        b"9" * 30,
        b"1e3",
        b"../../etc/passwd",
        b"/etc/passwd",
        b"x",
        b"\xff\xfe",
        b"\0",
        "é".encode(),
        b"1.5",
        b'"',
    )
    kind = chance.choice(("field", "field", "drop", "twice", "crlf", "bom", "join", "blank"))
    if kind == "field":
        fields[which] = chance.choice(texts)
        lines[at] = (b"," if path.suffix == ".csv" else b" ").join(fields)
    elif kind == "drop":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "join" and at + 1 < len(lines):
        lines[at] += lines.pop(at + 1)
    elif kind == "blank":
        lines.insert(at, chance.choice((b"", b"   ", b"\t")))
    data = b"\n".join(lines)
    if kind == "crlf":
        data = data.replace(b"\n", b"\r\n")
    elif kind == "bom":
        data = b"\xef\xbb\xbf" + data
    path.write_bytes(data)
    return f"{path.name} line {at + 1}: {kind}"


# -- listings


def _picture(case: Case) -> bytes:
    return next(path for path in sorted((case.world / "folder").rglob("*.png"))).read_bytes()


def _csv(case: Case) -> str:
    """A CSV file whose images have odd names. Each is there, so that only what is no path in a CSV may be refused."""
    chance = case.chance
    root = case.folder / "csv"
    root.mkdir()
    picture = _picture(case)
    names = chance.sample([name for name in _NAMES if "/" not in name], 4) + [f"{i}.png" for i in range(8)]
    chance.shuffle(names)
    decomposed = chance.random() < 0.3
    rows = []
    for i, name in enumerate(names):
        (root / (unicodedata.normalize("NFD", name) if decomposed else name)).write_bytes(picture)
        label = chance.choice((f"c{i % 2}", f"c{i % 2}", f"c{i % 2} ", '"', "é", "0")) + ("t" if i % 4 > 1 else "")
        rows.append(
            (unicodedata.normalize("NFC", name) if decomposed else name, label, "test" if i % 4 > 1 else "train")
        )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=chance.choice(("\n", "\r\n")))
    writer.writerow(("path", "label", "split"))
    writer.writerows(rows)
    (root / "list.csv").write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))
    case.tell(
        f"a CSV of {[name for name in names if name in _NAMES]}{', decomposed on the disk' if decomposed else ''}"
    )
    found: list[Any] = []
    if refused(lambda: found.append(_load("csv", root))):
        return "refused"
    right: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name, label, split in rows:
        right[split].append((name, label.strip()))
    _compare(found[0], right)
    return FINE


def _list(case: Case) -> str:
    """A list of paths, of which only line ends part one from the next."""
    chance = case.chance
    folder = case.folder / "photos"
    folder.mkdir()
    picture = _picture(case)
    names = [name for name in chance.sample(_NAMES, 4) if "\n" not in name and name.lower().rstrip().endswith(".png")]
    names += ["plain.png"]
    for name in names:
        (folder / name).write_bytes(picture)
    end = chance.choice(("\n", "\r\n"))
    content = end.join(names) + chance.choice(("", end, end * 3))
    if chance.random() < 0.3:
        content = chance.choice(("\ufeff", "\n\n")) + content
    extra = chance.choice(
        (
            "",
            "",
            "",
            "gone.png\n",
            "/dev/zero\n",
            "\0\n",
            "x" * 5000 + "\n",
            "photos\n",
            TEXT[chance.randrange(len(TEXT))] + "\n",
        )
    )
    listing = folder / "list.txt"
    listing.write_bytes((content + ("\n" if extra else "") + extra).encode("utf-8", "surrogateescape"))
    case.tell(f"a list of {names}{f' and {extra[:40]!r}' if extra else ''}")
    run = case.copy("run")
    ran: Ran = case.command("embed", run, listing, "--out", case.folder / "e.npy", "--data.workers", "0")
    no_temporaries(case.folder)
    if ran.status == 0:
        with open(case.folder / "e.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = list(csv.reader(file))[1:]
        got = [line[0] for line in lines]
        if extra.strip() == "" and got != names:
            raise Fault("wrong", f"embedded {got}, not {names}")
    elif not extra:
        raise Fault("wrong", f"images that are there were refused: {ran.err.strip()[:300]}")
    return ran.verdict
