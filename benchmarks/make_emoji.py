"""Makes a set of emoji for retrieval: one class for each code point, with a picture from each of several vendors.

    pip install resvg-py "gcahng[train]"
    python benchmarks/make_emoji.py ~/data/emoji
    gcahng train --data.name folder --data.root ~/data/emoji --backbone.name efficientnet_lite0

The drawings come from npm packages, which `npm pack` downloads (or `--packages FOLDER` has already). They are rendered
at 96 × 96 pixels on white, into train/CLASS/VENDOR.png and test/CLASS/VENDOR.png. No class is in both. The folder also
gets LICENSES.txt, which says where each vendor's drawings are from and what their license asks for.

A class is one code point without a skin tone. Sequences (flags, families, professions) are left out, since many of them
look the same. So are pictures that one vendor draws alike, to the pixel, for several classes: no network could tell
those classes apart. A class needs pictures from at least five vendors.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gcahng.commands.progress_bar import progress_bar

VERSIONS = {
    "emojione": "1.2.3",
    "emojione-monotone": "1.2.1",
    "emojione-v1": "1.2.3",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "fxemoji": "1.2.2",
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "openmoji": "1.2.29",
    "twemoji": "1.2.5",
}
"""The vendors: npm packages of the scope @iconify-json, and the versions that the results were made with."""

SKIN_TONES = {0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF}
EMOJI_STYLE = "fe0f"  # asks for the colored form of a character
FEWEST_VENDORS = 5
SIZE = 96


class Drawings(NamedTuple):
    """A vendor's drawings.

    Attributes:
        svgs: SVG text by the drawing's name.
        chars: name by code points in hexadecimal, joined by hyphens; empty where the package does not say.
        license: a line about the license, with the address of its text.
        source: the address of the vendor's project.
    """

    svgs: dict[str, str]
    chars: dict[str, str]
    license: str
    source: str


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("out", type=Path, help="the folder to make, which must not be there yet")
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="where the packages' .tgz files are, or go")
    parser.add_argument("--seed", type=int, default=0, help="of the split into training and test classes (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="(one a processor)")
    options = parser.parse_args(arguments)
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        sys.exit("make_emoji.py: resvg_py is not installed; pip install resvg-py brings it")
    if options.out.exists():
        sys.exit(f"make_emoji.py: {options.out} is there already; out must be a new folder")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    packages = options.packages or options.out.parent / "emoji-packages"
    drawings = {vendor: read_drawings(package_file(vendor, packages)) for vendor in VERSIONS}
    classes = find_classes(drawings)
    pictures = render(drawings, classes, options.processes)
    classes = distinct(classes, pictures)
    write(options.out, classes, pictures, drawings, options.seed)


# -- packages


def package_file(vendor: str, folder: Path) -> Path:
    """The archive of a vendor's package, which npm downloads if it is not there."""
    name, version = f"@iconify-json/{vendor}", VERSIONS[vendor]
    file = folder / f"iconify-json-{vendor}-{version}.tgz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{name}@{version}"]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            sys.exit(f"make_emoji.py: npm is not installed; install it, or put {file.name} into {folder}")
        except subprocess.CalledProcessError:
            sys.exit(f"make_emoji.py: npm could not download {name} {version}; its message is above")
    return file


def read_drawings(file: Path) -> Drawings:
    """Reads a package of drawings."""
    with tarfile.open(file) as archive:

        def read(name: str) -> dict:
            try:
                return json.load(archive.extractfile(f"package/{name}"))
            except KeyError:
                return {}

        icons, info, chars = read("icons.json"), read("info.json"), read("chars.json")
    svgs = {name: svg_of(icons, icon) for name, icon in icons["icons"].items()}
    for name, alias in icons.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in svgs:  # another name for the same drawing
            svgs[name] = svgs[alias["parent"]]
    says = info["license"]
    return Drawings(
        svgs, chars, f"{says['title']} ({says['url']})", f"{info['author']['name']}, {info['author']['url']}"
    )


def svg_of(icons: dict, icon: dict) -> str:
    """An icon as a whole SVG file. What takes the text's color is black."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


# -- classes


def find_classes(drawings: dict[str, Drawings]) -> dict[int, dict[str, str]]:
    """The drawing's name by vendor, by code point.

    Where a package does not say which characters its drawings show, their names do, by what the same name means in the
    other packages and in Unicode, if it means one character only.
    """
    meanings: dict[str, set[str]] = defaultdict(set)
    for vendor in drawings.values():
        for code, name in vendor.chars.items():
            meanings[squeezed(name)].add(without_style(code))
    for code in list({code for codes in meanings.values() for code in codes if "-" not in code}):
        meanings[squeezed(unicodedata.name(chr(int(code, 16)), ""))].add(code)
    classes: dict[int, dict[str, str]] = defaultdict(dict)
    for vendor, (svgs, chars, *_) in drawings.items():
        named = [(without_style(code), name) for code, name in chars.items()] if chars else by_name(svgs, meanings)
        for code, name in named:
            if "-" not in code and name in svgs and int(code, 16) not in SKIN_TONES:
                classes[int(code, 16)].setdefault(vendor, name)
    return {code: classes[code] for code in sorted(classes) if len(classes[code]) >= FEWEST_VENDORS}


def by_name(svgs: dict[str, str], meanings: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Code and name of each drawing whose name has one meaning."""
    for name in svgs:
        codes = meanings.get(squeezed(name), ())
        if len(codes) == 1:
            yield next(iter(codes)), name


def squeezed(name: str) -> str:
    """A name in small letters, without spaces and hyphens."""
    return name.lower().replace("-", "").replace(" ", "")


def without_style(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != EMOJI_STYLE)


def distinct(classes: dict[int, dict[str, str]], pictures: dict[tuple[str, str], bytes]) -> dict[int, dict[str, str]]:
    """Leaves out each picture that its vendor has for several classes, and then each class with too few pictures."""
    shows: dict[tuple[str, bytes], set[int]] = defaultdict(set)
    digests = {key: hashlib.sha256(picture).digest() for key, picture in pictures.items()}
    for code, names in classes.items():
        for item in names.items():
            shows[item[0], digests[item]].add(code)
    kept = {
        code: {v: name for v, name in names.items() if len(shows[v, digests[v, name]]) == 1}
        for code, names in classes.items()
    }
    return {code: names for code, names in kept.items() if len(names) >= FEWEST_VENDORS}


# -- pictures


def render_one(svg: str) -> bytes:
    """A drawing as PNG on white, 96 × 96 pixels, in the middle where it is not square."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True, width=SIZE)
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
    if image.size != (SIZE, SIZE):
        image.thumbnail((SIZE, SIZE))
        square = Image.new("RGB", (SIZE, SIZE), "white")
        square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = square
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def render(
    drawings: dict[str, Drawings], classes: dict[int, dict[str, str]], processes: int
) -> dict[tuple[str, str], bytes]:
    """The picture of each vendor and name that the classes have."""
    keys = list(dict.fromkeys(item for names in classes.values() for item in names.items()))
    svgs = [drawings[vendor].svgs[name] for vendor, name in keys]
    pictures = {}
    with ProcessPoolExecutor(processes) as pool, progress_bar("pictures") as progress:
        for key, picture in zip(keys, pool.map(render_one, svgs, chunksize=32), strict=True):
            pictures[key] = picture
            progress(len(pictures), len(keys))
    return pictures


def write(
    out: Path,
    classes: dict[int, dict[str, str]],
    pictures: dict[tuple[str, str], bytes],
    drawings: dict[str, Drawings],
    seed: int,
) -> None:
    """Writes the folder: first beside its place, so that it is whole or not there."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    order = list(classes)
    random.Random(seed).shuffle(order)
    training = set(order[: len(order) // 2])
    for code, names in classes.items():
        label = f"{code:05x}_{unicodedata.name(chr(code), 'unnamed').lower().replace(' ', '_')}"
        folder = part / ("train" if code in training else "test") / label
        folder.mkdir(parents=True)
        for vendor, name in names.items():
            (folder / f"{vendor}.png").write_bytes(pictures[vendor, name])
    lines = (f"{v}: npm @iconify-json/{v} {VERSIONS[v]}; {d.source}; {d.license}" for v, d in drawings.items())
    (part / "LICENSES.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.rename(out)
    count = sum(map(len, classes.values()))
    print(f"{out}: {len(training)} training classes, {len(classes) - len(training)} test classes, {count} pictures")


if __name__ == "__main__":
    main()
