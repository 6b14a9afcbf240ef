"""Small trees in the exact formats of the data sets: noisy images of random sizes, with one color for each class."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CAR_NAMES = {  # class numbers on both sides of 98, which is the last training class
    1: "AM General Hummer SUV 2000",
    6: "Acura Integra Type R 2001",
    47: "Buick Regal GS 2012",
    98: "Eagle Talon Hatchback 1998",
    99: "FIAT 500 Abarth 2012",
    120: "Ford F-150 Regular Cab 2012",
    176: "Ram C/V Cargo Van Minivan 2012",
    196: "smart fortwo Convertible 2012",
}


def write_image(path: Path, color_of: int = 0, seed: int = 0, size: int = 24) -> None:
    """Write an image with sides of about `size` pixels in the color of class `color_of`, with its own noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([color_of, seed])
    color = np.random.default_rng(color_of).integers(0, 256, 3)
    height, width = random.integers(size, size + size // 2 + 1, 2)
    pixels = np.clip(color + random.integers(-40, 41, (height, width, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90) if path.suffix == ".jpg" else Image.fromarray(pixels).save(path)


def make_cub200(root: Path, classes: int = 6, images: int = 4, size: int = 24) -> Path:
    """CUB-200-2011 with half of the classes from 1 on and half from 101 on; `root` has images.txt."""
    root.mkdir(parents=True, exist_ok=True)
    numbers = [*range(1, classes // 2 + 1), *range(101, 101 + classes - classes // 2)]
    listed, labeled, split = [], [], []
    for number in numbers:
        for i in range(images):
            image = len(listed) + 1
            name = f"{number:03}.Some_Bird/Some_Bird_{image:04}_{number * 100 + i}.jpg"
            write_image(root / "images" / name, number, i, size)
            listed.append(f"{image} {name}\n")
            labeled.append(f"{image} {number}\n")
            split.append(f"{image} {i % 2}\n")
    (root / "images.txt").write_text("".join(listed))
    (root / "image_class_labels.txt").write_text("".join(labeled))
    (root / "train_test_split.txt").write_text("".join(split))
    (root / "classes.txt").write_text("".join(f"{n} {n:03}.Some_Bird\n" for n in numbers))
    return root


def make_cars196(root: Path, layout: str = "annos", numbers: Sequence[int] = tuple(CAR_NAMES), images: int = 4) -> Path:
    """Cars196 in the layout "annos", "devkit", "folders" (train/ and test/) or "numbers" (folders 001 …).

    Images 0, 2, … of each class are its training images in the publishers' image-level split.
    """
    root.mkdir(parents=True, exist_ok=True)
    names = np.empty((1, 196), dtype=object)
    names[0] = [CAR_NAMES.get(n, f"Car {n}") for n in range(1, 197)]
    rows: list[tuple[int, int, str]] = [(n, i % 2, "") for n in numbers for i in range(images)]
    counts = [0, 0]
    for at, (number, is_test, _) in enumerate(rows):
        counts[is_test] += 1
        side = ("train", "test")[is_test]
        name = {
            "annos": f"car_ims/{at + 1:06}.jpg",
            "devkit": f"cars_{side}/{counts[is_test]:05}.jpg",
            "folders": f"{side}/{CAR_NAMES.get(number, '').replace('/', '-')}/{at:05}.jpg",
            "numbers": f"{number:03}/{at:05}.jpg",
        }[layout]
        write_image(root / name, number, at)
        rows[at] = (number, is_test, name)
    if layout == "annos":
        fields = ["relative_im_path", *_BOX, "class", "test"]
        annotations = _structs(fields, [(name, 1, 1, 20, 20, number, is_test) for number, is_test, name in rows])
        savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names})
    if layout == "devkit":
        devkit = root / "devkit"
        devkit.mkdir()
        savemat(devkit / "cars_meta.mat", {"class_names": names})
        train = [(1, 1, 20, 20, number, Path(name).name) for number, is_test, name in rows if not is_test]
        test = [(1, 1, 20, 20, number, Path(name).name) for number, is_test, name in rows if is_test]
        fields = [*_BOX, "class", "fname"]
        savemat(devkit / "cars_train_annos.mat", {"annotations": _structs(fields, train)})
        savemat(root / "cars_test_annos_withlabels.mat", {"annotations": _structs(fields, test)})
        unlabeled = [(*box, name) for *box, _, name in test]
        savemat(devkit / "cars_test_annos.mat", {"annotations": _structs([*_BOX, "fname"], unlabeled)})
    return root


_BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def _structs(fields: Sequence[str], rows: Sequence[tuple]) -> np.ndarray:
    """A MATLAB struct array, (1, rows)."""
    structs = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    structs[0] = rows
    return structs


def make_sop(root: Path, classes: int = 6, images: int = 4) -> Path:
    """Stanford Online Products: the first half of the classes train. File names carry other numbers than classes."""
    root.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    image = 0
    for label in range(1, classes + 1):
        for i in range(images):
            image += 1
            name = f"bicycle_final/{111085122871 + 7 * (label // 2)}_{image}.JPG"
            write_image(root / name, label, i)
            lines["train" if label <= classes // 2 else "test"].append(f"{image} {label} 1 {name}\n")
    for split, own in lines.items():
        (root / f"Ebay_{split}.txt").write_text("image_id class_id super_class_id path\n" + "".join(own))
    return root


def make_inshop(root: Path, classes: int = 6, images: int = 4, *, published: bool = False) -> Path:
    """In-Shop: half of the items train, the last of them with one image; of each other the first image is a query.

    `published`: the folders Eval/ and Img/, as the archives have them.
    """
    lists, base = (root / "Eval", root / "Img") if published else (root, root)
    lists.mkdir(parents=True, exist_ok=True)
    lines = []
    for item in range(1, classes + 1):
        for i in range(1 if item == classes // 2 else images):
            name = f"img/WOMEN/Dresses/id_{item:08}/{i:02}_1_front.jpg"
            write_image(base / name, item, i)
            status = "train" if item <= classes // 2 else "query" if i == 0 else "gallery"
            lines.append(f"{name:<70} id_{item:08} {status}\n")
    content = f"{len(lines)}\nimage_name item_id evaluation_status\n{''.join(lines)}"
    (lists / "list_eval_partition.txt").write_text(content)
    return root


def make_folder(
    root: Path, classes: int = 6, images: int = 4, splits: Sequence[str] = ("train", "test"), size: int = 24
) -> Path:
    """Class folders, `classes` in all, shared out among `splits` in turn."""
    for c in range(classes):
        for i in range(images):
            write_image(root / splits[c % len(splits)] / f"class_{c}" / f"{i}.png", c, i, size)
    return root


def make_csv(root: Path, classes: int = 6, images: int = 4, splits: Sequence[str] = ("train", "test")) -> Path:
    """Images below `root`, and the path of list.csv beside them; classes are shared out among `splits` in turn."""
    rows = []
    for c in range(classes):
        for i in range(images):
            write_image(root / "pictures" / f"{c}-{i}.jpg", c, i)
            rows.append({"path": f"pictures/{c}-{i}.jpg", "label": f"thing {c}", "split": splits[c % len(splits)]})
    with open(root / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("path", "label", "split"))
        writer.writeheader()
        writer.writerows(rows)
    return root / "list.csv"
