"""Files of embeddings: both forms return what was written, and a broken file is a clear error."""

from __future__ import annotations

import csv
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import embeddings as module
from gcahng.retrieval.embeddings import SUFFIXES, EmbeddingSet, check_free, read_embeddings, write_embeddings
from gcahng.retrieval.items import EmbeddingModel, Items, Source, unnamed

MODEL = EmbeddingModel("f" * 64, "glyph_conv", "runs/a/checkpoints/last.pt", 256, 224)


def example(rows: int = 7, dim: int = 5) -> EmbeddingSet:
    """Names that are hard for CSV and UTF-8: a comma, quotes, a line break, a byte that is not UTF-8."""
    names = ('a,b "c".png', "line\nbreak.png", "byte \udcff.png", *(f"sub/ü{i}.png" for i in range(rows - 3)))
    labels = torch.tensor([2, 0, -1, 0, 1, 2, 1][:rows])
    sources = (Source(3, "/pictures"), Source(rows - 3, None, {"name": "glyphs"}, "test", 4))
    items = Items(names, labels, ("x", "y, z", "w"), sources)
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1))
    return EmbeddingSet(values, items, MODEL, "k" * 64)


def same(a: Items, b: Items) -> bool:
    return replace(a, labels=b.labels) == b and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_what_is_written_is_read(
    suffix: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    written = example()
    path = tmp_path / f"x{suffix}"
    write_embeddings(path, written)
    found = read_embeddings(path)
    assert torch.equal(found.embeddings, written.embeddings)
    assert same(found.items, written.items)
    assert (found.model, found.key) == (MODEL, "k" * 64)
    assert not recwarn.list
    names = {file.name for file in tmp_path.iterdir()}
    assert names == ({"x.npy", "x.csv", "x.json"} if suffix == ".npy" else {f"x{suffix}"})


def test_paths_may_be_strings(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        write_embeddings(str(tmp_path / f"x{suffix}"), example())
        assert torch.equal(read_embeddings(str(tmp_path / f"x{suffix}")).embeddings, example().embeddings)


def test_the_rows_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds X.npy finds what belongs to it."""
    renamed = []
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(Path(b).suffix), replace_file(a, b)))
    write_embeddings(tmp_path / "x.npy", example())
    assert sorted(renamed) == [".csv", ".json", ".npy"] and renamed[-1] == ".npy"


def test_labels_that_no_class_has(tmp_path: Path) -> None:
    for labels in (torch.tensor([0, 3]), torch.tensor([-2, 0])):
        items = Items(("a", "b"), labels, ("x", "y"), (Source(2),))
        write_embeddings(tmp_path / "x.safetensors", EmbeddingSet(torch.ones(2, 3), items))
        with pytest.raises(UserError, match="x.safetensors is not a file .* .it has labels beyond its 2 classes"):
            read_embeddings(tmp_path / "x.safetensors")


def test_tensors_of_a_file_are_aligned(tmp_path: Path) -> None:
    for more in range(8):
        items = Items(("a" * more,), torch.tensor([0]), ("x" * (more + 1),), (Source(1),))
        write_embeddings(tmp_path / "x.safetensors", EmbeddingSet(torch.ones(1, 3), items))
        assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    """safetensors' own reader and numpy see the same numbers, the csv module the same names and labels."""
    from safetensors.torch import load_file

    written = example()
    for suffix in (".safetensors", ".npy"):
        write_embeddings(tmp_path / f"x{suffix}", written)
    tensors = load_file(tmp_path / "x.safetensors")
    assert set(tensors) == {"embeddings", "labels", "names"}
    assert torch.equal(tensors["embeddings"], written.embeddings)
    assert torch.equal(tensors["labels"], written.items.labels)
    assert np.array_equal(np.load(tmp_path / "x.npy"), written.embeddings.numpy())
    with open(tmp_path / "x.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "label"] and [row[0] for row in rows[1:]] == list(written.items.names)
    assert [row[1] for row in rows[1:]] == ["w", "x", "", "x", "y, z", "w", "y, z"]


def test_embeddings_made_elsewhere(tmp_path: Path) -> None:
    values = np.random.RandomState(0).randn(4, 3)
    np.save(tmp_path / "x.npy", values)  # float64
    found = read_embeddings(tmp_path / "x.npy")
    assert torch.equal(found.embeddings, torch.from_numpy(values).float())
    assert found.items.names == ("0", "1", "2", "3") and not found.items.labeled and found.model is None
    (tmp_path / "x.csv").write_text("id,path,label\n1,a.png,dog\n2,b.png,cat\n3,c.png,dog\n4,d.png,\n")
    items = read_embeddings(tmp_path / "x.npy").items
    assert items.names == ("a.png", "b.png", "c.png", "d.png") and items.class_names == ("dog", "cat")
    assert items.labels.tolist() == [0, 1, 0, -1] and items.path(0) is None
    csv_file = tmp_path / "x.csv"
    csv_file.write_text(csv_file.read_text().replace("id,path", "path,id"), encoding="utf-8-sig")  # of a spreadsheet
    assert read_embeddings(tmp_path / "x.npy").items.names == ("1", "2", "3", "4")
    np.save(tmp_path / "vector.npy", values[0])
    assert read_embeddings(tmp_path / "vector.npy").embeddings.shape == (1, 3)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "last byte": content[:-1],
            "text": b"no embeddings at all, but a text of some length\n" * 20,
        }[how]
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["empty", "cut", "last byte", "text"])
def test_damaged_files(suffix: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_embeddings(path, example())
    damage(path, how)
    with pytest.raises(UserError, match=f"x{suffix} is not .*or is damaged"):
        read_embeddings(path)


def test_mistakes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for path, message in (
        ("x.txt", "its name must end in .safetensors, .npy or .parquet"),
        ("x.npy", "x.npy is not a file"),
    ):
        with pytest.raises(UserError, match=message):
            read_embeddings(tmp_path / path)
    save_file({"embeddings": torch.ones(2, 2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="foreign.safetensors has the format None; it must be"):
        read_embeddings(tmp_path / "foreign.safetensors")
    np.save(tmp_path / "integers.npy", np.arange(6).reshape(2, 3))
    with pytest.raises(UserError, match="integers.npy contains int64 values; they must be floating point"):
        read_embeddings(tmp_path / "integers.npy")
    np.save(tmp_path / "nan.npy", np.array([[1.0, 2.0], [np.nan, 1.0]], np.float32))
    with pytest.raises(UserError, match="nan.npy has non-finite values in row 1; they must be finite"):
        read_embeddings(tmp_path / "nan.npy")
    np.save(tmp_path / "large.npy", np.array([[1.0, 2.0], [1e300, 1.0]]))
    with (
        warnings.catch_warnings(),
        pytest.raises(UserError, match="large.npy has non-finite values in row 1; they must be"),
    ):
        warnings.simplefilter("error")
        read_embeddings(tmp_path / "large.npy")
    np.save(tmp_path / "number.npy", np.float32(3))
    with pytest.raises(UserError, match="number.npy contains a single number; it must contain embeddings"):
        read_embeddings(tmp_path / "number.npy")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="pickled.npy is not a .npy file"):
        read_embeddings(tmp_path / "pickled.npy")


def test_a_csv_or_json_of_something_else(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "x.npy", example())
    lines = (tmp_path / "x.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "x.csv").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match="x.npy has 7 rows and .*x.csv has 6; they must be equal"):
        read_embeddings(tmp_path / "x.npy")
    (tmp_path / "x.json").unlink()
    with pytest.raises(UserError, match="x.npy has 7 rows and .*x.csv has 6; they must be equal"):
        read_embeddings(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("file\na\n")
    with pytest.raises(UserError, match="x.csv has no column path"):
        read_embeddings(tmp_path / "x.npy")
    (tmp_path / "x.csv").unlink()
    (tmp_path / "x.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(UserError, match="x.json has the format 'something else'"):
        read_embeddings(tmp_path / "x.npy")


def test_a_table_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    check_free(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("my own table\n")
    with pytest.raises(UserError, match="and x.csv beside it would be overwritten"):
        check_free(tmp_path / "x.npy")
    check_free(tmp_path / "x.safetensors")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_embeddings(tmp_path / "x.safetensors", example())
    before = (tmp_path / "x.safetensors").read_bytes()
    monkeypatch.setattr(module, "write_rows", full)
    with pytest.raises(UserError, match="x.safetensors cannot be written: No space left on device"):
        write_embeddings(tmp_path / "x.safetensors", example(5))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.safetensors", before)]


def test_items_subset_and_places() -> None:
    items = example().items
    some = items.subset([4, 5, 0, 2, 6])
    assert some.names == tuple(items.names[i] for i in (4, 5, 0, 2, 6))
    assert [some.class_name(i) for i in range(5)] == [items.class_name(i) for i in (4, 5, 0, 2, 6)]
    assert [source.rows for source in some.sources] == [2, 2, 1]
    assert [some.place(i)[1] for i in (0, 1, 4)] == [items.place(i)[1] for i in (4, 5, 6)] == [5, 6, 7]
    assert some.path(2) == items.path(0) == Path("/pictures", items.names[0]) and some.path(0) is None


def test_items_of_both_share_classes() -> None:
    a = Items(("1", "2"), torch.tensor([1, 0]), ("x", "y"), (Source(2),))
    b = Items(("3", "4", "5"), torch.tensor([0, -1, 1]), ("y", "z"), (Source(3),))
    both = a.followed_by(b)
    assert [both.class_name(i) for i in range(5)] == ["y", "x", "y", None, "z"] and both.class_names == ("x", "y", "z")
    assert not both.labeled and a.labeled
    with pytest.raises(UserError, match="names, labels and sources have 2, 1 and 2 rows; these must be equal"):
        Items(("1", "2"), torch.tensor([0]), ("x",), (Source(2),))
    assert unnamed(2).identities() == [(None, "0"), (None, "1")]
