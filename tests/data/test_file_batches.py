"""Training batches of files: the same bits for any number of workers, and after a resume."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torch import Tensor

from gcahng.data import (
    BalancedBatchSampler,
    FileBatches,
    ImageFiles,
    ImageSet,
    InMemoryBatches,
    UnreadableImage,
    build_batches,
    load_data,
    random_shifts,
    read_rgb,
)
from gcahng.data.config import DataConfig
from gcahng.errors import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """4 classes of 5 images."""
    root = trees.make_folder(tmp_path_factory.mktemp("tree"), classes=8, images=5)
    return load_data(DataConfig(name="folder", root=str(root), val_classes=0)).train


def batches_of(files: ImageFiles, seed: int = 3, **fields: object) -> FileBatches:
    config = DataConfig(**{"classes_per_batch": 2, "samples_per_class": 2, "image_size": 16, "workers": 0, **fields})
    batches = build_batches(config, files, seed=seed, device=CPU)
    assert isinstance(batches, FileBatches)
    return batches


def draw(batches: FileBatches, steps: range) -> tuple[Tensor, Tensor, list[list[str]]]:
    images, labels, names = [], [], []
    for step in steps:
        batch = batches.batch(step)
        images.append(batch[0])
        labels.append(batch[1])
        names.append(batches.names())
    return torch.stack(images), torch.stack(labels), names


def test_batch_is_balanced_uint8_and_named(tree: ImageFiles) -> None:
    images, labels, names = draw(batches_of(tree), range(4))
    assert images.shape == (4, 4, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(labels[:, 0], labels[:, 1]) and torch.equal(labels[:, 2], labels[:, 3])
    assert (labels[:, 0] != labels[:, 2]).all()
    for row, named in zip(labels.tolist(), names, strict=True):
        assert [tree.labels[tree.paths.index(name)] for name in named] == row
    # A class has its own color, so pixels belong to their labels.
    for step in range(4):
        for place in range(4):
            whole = torch.tensor(list(read_rgb(tree.root / names[step][place]).resize((1, 1)).tobytes())).float()
            assert (images[step, place].float().mean((1, 2)) - whole).abs().max() < 20


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_a_bit(workers: int, tree: ImageFiles) -> None:
    expected = draw(batches_of(tree), range(9))
    batches = batches_of(tree, workers=workers)
    state = torch.get_rng_state()
    images, labels, names = draw(batches, range(9))
    batches.close()
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1]) and names == expected[2]
    assert torch.equal(torch.get_rng_state(), state), "dropout of a resumed run would differ"


def test_torch_generator_is_left_alone_without_workers(tree: ImageFiles) -> None:
    state = torch.get_rng_state()
    draw(batches_of(tree), range(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0), (3, 1)])
def test_resume_continues_with_the_same_bits(before: int, after: int, tree: ImageFiles) -> None:
    expected = draw(batches_of(tree), range(8))
    first = batches_of(tree, workers=before)
    draw(first, range(5))
    state = first.state_dict()
    draw(first, range(5, 6))  # the state is a copy, and does not move on
    first.close()
    second = batches_of(tree, workers=after)
    draw(second, range(2))  # whatever it has done before
    second.load_state_dict(state)
    images, labels, names = draw(second, range(5, 8))
    second.close()
    assert torch.equal(images, expected[0][5:]) and torch.equal(labels, expected[1][5:]) and names == expected[2][5:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_of_the_same_step_takes_the_place_of_what_was_read_ahead(workers: int, tree: ImageFiles) -> None:
    other = batches_of(tree)
    draw(other, range(6))
    batches = batches_of(tree, workers=workers)
    draw(batches, range(2))
    batches.load_state_dict(other.state_dict())
    names = draw(batches, range(2, 4))[2]
    batches.close()
    assert names == draw(other, range(6, 8))[2]


def test_crops_follow_the_step_that_is_asked_for(tree: ImageFiles) -> None:
    batches, other = batches_of(tree), batches_of(tree)
    draw(batches, range(1))
    other.load_state_dict(batches.state_dict())
    assert torch.equal(draw(batches, range(7, 8))[0], draw(other, range(7, 8))[0])


def test_close_and_go_on(tree: ImageFiles) -> None:
    expected = draw(batches_of(tree), range(4))[0]
    batches = batches_of(tree, workers=1)
    halves = [draw(batches, range(2))[0]]
    batches.close()
    halves.append(draw(batches, range(2, 4))[0])
    batches.close()
    assert torch.equal(torch.cat(halves), expected)


def test_crops_and_flips_follow_seed_step_and_place(tmp_path: Path) -> None:
    """One image only: whatever differs is the augmentation."""
    for name in ("a", "b"):
        trees.write_image(tmp_path / f"{name}.png", size=32)
    files = ImageFiles(tmp_path, ("a.png", "b.png"), torch.tensor([0, 1]), ("a", "b"))
    images = draw(batches_of(files, samples_per_class=4), range(3))[0].flatten(0, 1)
    assert len({image.numpy().tobytes() for image in images}) == len(images)
    other = draw(batches_of(files, samples_per_class=4, seed=4), range(3))[0].flatten(0, 1)
    assert not (images.flatten(1)[:, None] == other.flatten(1)).all(-1).any()


def test_whole_images_are_only_mirrored(tmp_path: Path) -> None:
    """crop_scale_min = 1 of a square can only be all of it: half of the draws are its mirror image."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png")
    files = ImageFiles(tmp_path, ("a.png", "b.png"), torch.tensor([0, 1]), ("a", "b"))
    sampler = BalancedBatchSampler(files.labels, 2, 50)
    batches = FileBatches(files, sampler, image_size=16, crop_scale_min=1.0, seed=0, device=CPU)
    images = batches.batch(0)[0]
    straight = torch.from_numpy(pixels).movedim(-1, 0)
    as_is, mirrored = (images == straight).flatten(1).all(1), (images == straight.flip(-1)).flatten(1).all(1)
    assert (as_is ^ mirrored).all() and 30 <= int(mirrored.sum()) <= 70


def test_crops_keep_from_the_least_part_to_the_whole(tmp_path: Path) -> None:
    """Columns have the values 0, 4 … 252: how many of the 64 a crop spans is what its values span. A quarter of the
    area is 28 to 37 columns wide."""
    pixels = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 64, 3))
    for name in "ab":
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{name}.png")
    files = ImageFiles(tmp_path, ("a.png", "b.png"), torch.tensor([0, 1]), ("a", "b"))
    sampler = BalancedBatchSampler(files.labels, 2, 100)
    batches = FileBatches(files, sampler, image_size=64, crop_scale_min=0.25, seed=0, device=CPU)
    images = batches.batch(0)[0].flatten(1).int()
    columns = (images.amax(dim=1) - images.amin(dim=1)) / 4 + 1
    assert 27 <= columns.min() <= 34 and 60 <= columns.max() <= 64
    assert 42 <= columns.mean() <= 54


def damaged(tree: ImageFiles, root: Path, *bad: int) -> ImageFiles:
    """A copy whose images `bad` are cut in half."""
    for path in tree.paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes((tree.root / path).read_bytes())
    for index in bad:
        content = (root / tree.paths[index]).read_bytes()
        (root / tree.paths[index]).write_bytes(content[: len(content) // 2])
    return ImageFiles(root, tree.paths, tree.labels, tree.class_names)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_stops_with_its_path(workers: int, tree: ImageFiles, tmp_path: Path) -> None:
    batches = batches_of(damaged(tree, tmp_path, 7), workers=workers)
    with pytest.raises(UnreadableImage, match=r"class_2/2.png cannot be read .*data.skip_unreadable=true") as caught:
        draw(batches, range(20))
    assert caught.value.path == tmp_path / tree.paths[7] and "\n" not in str(caught.value)


def test_skipped_images_are_replaced_by_others_of_their_class(tree: ImageFiles, tmp_path: Path) -> None:
    files = damaged(tree, tmp_path, 7, 8)
    good = draw(batches_of(tree), range(20))
    results = []
    for workers in (0, 2):
        batches = batches_of(files, workers=workers, skip_unreadable=True)
        results.append(draw(batches, range(20)))
        drawn = sum(name in (tree.paths[7], tree.paths[8]) for named in good[2] for name in named)
        assert batches.skipped == drawn > 2
        assert int(batches.state_dict()["skipped"]) == drawn
        again = batches_of(files, skip_unreadable=True)
        again.load_state_dict(batches.state_dict())
        assert again.skipped == drawn
        batches.close()
    assert torch.equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]
    assert torch.equal(results[0][1], good[1]), "labels are those of the images that were drawn"
    for named, wanted, images, untouched in zip(results[0][2], good[2], results[0][0], good[0], strict=True):
        assert len(set(named)) == 4, "a replacement is an image that the batch has not"
        for name, drawn_name, image, good_image in zip(named, wanted, images, untouched, strict=True):
            if drawn_name in (tree.paths[7], tree.paths[8]):
                assert Path(name).parent == Path(drawn_name).parent and name not in (tree.paths[7], tree.paths[8])
            else:
                assert name == drawn_name and torch.equal(image, good_image)


def test_two_replacements_of_a_class_differ(tree: ImageFiles, tmp_path: Path) -> None:
    batches = batches_of(damaged(tree, tmp_path, 5, 6, 7), skip_unreadable=True)
    named = draw(batches, range(40))[2]
    assert batches.skipped > 20
    assert all(len(set(names)) == 4 for names in named), "images 8 and 9 are enough for the two of the class"


def test_class_without_a_readable_image(tree: ImageFiles, tmp_path: Path) -> None:
    batches = batches_of(damaged(tree, tmp_path, 5, 6, 7, 8, 9), skip_unreadable=True)
    with pytest.raises(UserError, match=r"no image of class_2 can be read, .*class_2/\d.png included"):
        draw(batches, range(20))


def test_interrupt_of_the_process_group_leaves_the_workers(tree: ImageFiles) -> None:
    """Ctrl-C reaches every process of the group: the run must still get the batches of the step that it finishes."""
    expected = draw(batches_of(tree), range(6))[0]
    batches = batches_of(tree, workers=1)
    first = draw(batches, range(1))[0]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
            assert os.getpgid(child.pid) != os.getpgid(0)
        images = torch.cat([first, draw(batches, range(1, 6))[0]])
    finally:
        signal.signal(signal.SIGINT, before)
        batches.close()
    assert torch.equal(images, expected)


def test_close_ends_the_workers(tree: ImageFiles) -> None:
    before = set(multiprocessing.active_children())
    batches = batches_of(tree, workers=2)
    batches.batch(0)
    mine = set(multiprocessing.active_children()) - before
    assert len(mine) == 2
    batches.close()
    assert not mine & set(multiprocessing.active_children())


@pytest.mark.parametrize("least", [0.0, 1.5])
def test_crop_scale_out_of_range(least: float, tree: ImageFiles) -> None:
    with pytest.raises(UserError, match=f"crop_scale_min is {least}; it must be a number above 0 and at most 1"):
        batches_of(tree, crop_scale_min=least)


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4)])
def test_a_part_has_the_bits_of_the_whole_batch(part: slice, tree: ImageFiles) -> None:
    small = ImageSet(
        torch.arange(20 * 64, dtype=torch.int64).view(20, 8, 8).to(torch.uint8), tree.labels, tree.class_names
    )
    for images in (tree, small):
        config = DataConfig(classes_per_batch=2, samples_per_class=2, image_size=16, workers=0)
        whole = build_batches(config, images, seed=3, device=CPU)
        mine = build_batches(config, images, seed=3, device=CPU, part=part)
        for step in range(3):
            for found, wanted in zip(mine.batch(step), whole.batch(step), strict=True):
                assert torch.equal(found, wanted[part])
            assert mine.names() == whole.names()
            assert all(torch.equal(mine.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_batches_in_memory_are_shifted_by_seed_and_step() -> None:
    pixels = torch.randint(1, 256, (12, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet(pixels, torch.arange(4).repeat_interleave(3), tuple("abcd"))
    config = DataConfig(classes_per_batch=2, samples_per_class=2, max_shift=3)
    batches = build_batches(config, images, seed=9, device=CPU)
    sampler = BalancedBatchSampler(images.labels, 2, 2, seed=9)
    for step in range(4):
        found, labels = batches.batch(step)
        rows = sampler.draw()
        assert torch.equal(labels, images.labels[rows])
        assert torch.equal(found, random_shifts(pixels[rows], 3, seed=9, step=step))
        assert not torch.equal(found, pixels[rows])


def test_batches_in_memory_have_the_same_interface() -> None:
    labels = torch.arange(4).repeat_interleave(3)
    images = ImageSet(torch.arange(12, dtype=torch.uint8)[:, None, None].expand(12, 4, 4), labels, tuple("abcd"))
    config = DataConfig(classes_per_batch=2, samples_per_class=2, max_shift=0)
    batches = build_batches(config, images, seed=0, device=CPU)
    assert isinstance(batches, InMemoryBatches)
    drawn, drawn_labels = batches.batch(0)
    assert batches.names() == [
        f"{'abcd'[label]} (image {int(image[0, 0])})" for image, label in zip(drawn, drawn_labels, strict=True)
    ]
    assert batches.batches_per_epoch == 12 // 4 and batches.skipped == 0
    batches.close()
