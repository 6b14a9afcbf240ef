"""Damage to embeddings on the disk is found, and files without a checksum are read."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gcahng.cli import main
from gcahng.errors import UserError, UserNote
from gcahng.retrieval import checksums, parquet
from gcahng.retrieval import embeddings as module
from gcahng.retrieval.embeddings import SUFFIXES, EmbeddingSet, read_embeddings, write_embeddings
from gcahng.retrieval.items import EmbeddingModel, Items, Source

MODEL = EmbeddingModel("f" * 64, "glyph_conv", "runs/a/checkpoints/last.pt", 256, 224)


def example(rows: int = 9, dim: int = 6) -> EmbeddingSet:
    items = Items(
        tuple(f"sub/ü{i}.png" for i in range(rows)), torch.arange(rows) % 3, ("x", "y", "z"), (Source(rows, "/p"),)
    )
    return EmbeddingSet(torch.randn(rows, dim, generator=torch.Generator().manual_seed(2)), items, MODEL, "k" * 64)


@pytest.fixture(autouse=True)
def _say_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_noted", set())


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with one fault: a bit, a byte, an end, zeros, two places swapped, bytes doubled or lost."""
    damaged = bytearray(content)
    kind, at = draw.randrange(8), draw.randrange(len(content) - 8)
    if kind <= 2:
        damaged[at] ^= 1 << draw.randrange(8)
    elif kind == 3:
        damaged[at] = draw.randrange(256)
    elif kind == 4:
        del damaged[at:]
    elif kind == 5:
        damaged[at : at + 8] = bytes(8)
    elif kind == 6:
        other = draw.randrange(len(content) - 8)
        damaged[at : at + 4], damaged[other : other + 4] = damaged[other : other + 4], damaged[at : at + 4]
    else:
        damaged[at : at + draw.randrange(2)] = damaged[at : at + 4]
    return bytes(damaged)


# The file that is damaged, and the one that is read.
FILES = [("x.safetensors", "x.safetensors"), ("x.npy", "x.npy"), ("x.csv", "x.npy"), ("x.json", "x.npy")]
FILES += [("x.parquet", "x.parquet")]


@pytest.mark.parametrize(("name", "read"), FILES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(1, 20))])
def test_no_mutation_gives_another_answer_without_a_word(
    name: str, read: str, seed: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    written = example()
    write_embeddings(tmp_path / read, written)
    content = (tmp_path / name).read_bytes()
    draw, counts = random.Random(seed), Counter[str]()
    while counts.total() < 100:
        damaged = mutated(content, draw)
        if damaged == content:
            continue
        (tmp_path / name).write_bytes(damaged)
        recwarn.clear()
        module._noted.clear()
        try:
            found = read_embeddings(tmp_path / read)
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            counts["refused"] += 1
            continue
        if any(warning.category is UserNote for warning in recwarn):
            counts["noted"] += 1
            continue
        # Some bytes mean nothing: those of padding, or of an order of bytes that has two names.
        assert torch.equal(found.embeddings, written.embeddings), damaged
        assert torch.equal(found.items.labels, written.items.labels)
        assert found.items.names == written.items.names and found.items.class_names == written.items.class_names
        assert (found.model, found.key) == (written.model, written.key)
        counts["same"] += 1
    assert counts["refused"] >= {"x.npy": 95, "x.safetensors": 95, "x.parquet": 60}.get(name, 20), counts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bit_of_every_value(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_embeddings(path, example())
    content = path.read_bytes()
    start = content.index(example().embeddings.numpy().tobytes())
    for bit in range(0, 32 * 9 * 6, 7):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"x{suffix} is .*damaged"):
            read_embeddings(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_command_refuses_a_flipped_bit(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, index = tmp_path / "good.safetensors", tmp_path / f"bad{suffix}", tmp_path / "x.index"
    write_embeddings(good, example())
    write_embeddings(bad, example())
    content = bytearray(bad.read_bytes())
    content[content.index(example().embeddings.numpy().tobytes()) + 20] ^= 1
    bad.write_bytes(content)
    assert main(["index", "build", str(good), "--out", str(index)]) == 0
    before = index.read_bytes()
    capsys.readouterr()
    for command in (
        f"index build {bad} --out {tmp_path}/y.index",
        f"index add {index} {bad} --allow_duplicates",
        f"search {index} {bad}",
        f"eval --embeddings {bad}",
        f"eval --embeddings {good} --gallery {bad}",
    ):
        assert main(command.split()) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"gcahng: error: {bad} is" in error and "damaged" in error
    assert index.read_bytes() == before and not (tmp_path / "y.index").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_earlier_versions_are_read_and_this_is_said_once(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    real = json.dumps

    def without(value: object, **options: object) -> str:
        kept = {k: v for k, v in value.items() if k != checksums.KEY} if isinstance(value, dict) else value
        return real(kept, **options)

    monkeypatch.setattr(json, "dumps", without)
    write_embeddings(tmp_path / f"x{suffix}", example())
    monkeypatch.undo()
    monkeypatch.setattr(module, "_noted", set())
    for _ in range(2):
        assert torch.equal(read_embeddings(tmp_path / f"x{suffix}").embeddings, example().embeddings)
    assert [str(warning.message) for warning in recwarn if warning.category is UserNote] == [
        f"{tmp_path}/x{suffix} has no checksum, because an earlier version of gcahng wrote it; damage to it is not "
        "found"
    ]


def test_what_other_programs_wrote_has_no_checksum(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    np.save(tmp_path / "x.npy", example().embeddings.numpy())
    assert torch.equal(read_embeddings(tmp_path / "x.npy").embeddings, example().embeddings)
    assert not [warning for warning in recwarn if warning.category is UserNote]


def test_names_and_labels_may_be_edited(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "x.npy", example())
    table = tmp_path / "x.csv"
    table.write_text(table.read_text().replace("sub/ü1.png,y", "sub/ü1.png,z"))
    with pytest.warns(UserNote, match=r"x\.csv or x\.json was changed since it was written"):
        found = read_embeddings(tmp_path / "x.npy")
    assert found.items.labels.tolist() == [0, 2, 2, 0, 1, 2, 0, 1, 2]


def test_embeddings_that_were_changed_on_purpose(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "x.npy", example())
    np.save(tmp_path / "x.npy", 2 * example().embeddings.numpy())
    with pytest.raises(UserError, match="x.npy is damaged: .* if they were changed on purpose, remove x.json"):
        read_embeddings(tmp_path / "x.npy")
    (tmp_path / "x.json").unlink()
    assert torch.equal(read_embeddings(tmp_path / "x.npy").embeddings, 2 * example().embeddings)


def test_the_checksum_is_crc32_of_the_bytes_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = example().embeddings
    expected = zlib.crc32(b"(9, 6)" + values.numpy().tobytes())
    for block in (1, 30, 1 << 20):
        pieces = list(checksums.rows_as_bytes(values, block))
        crc = checksums.of_no_rows((9, 6))
        for piece in pieces:
            crc = checksums.with_rows(crc, piece)
        assert crc == expected and sum(map(len, pieces)) == 9
    assert checksums.of_embeddings(values) == f"{expected:08x}"
    assert checksums.of_embeddings(values.double()) == checksums.of_embeddings(values.T.contiguous().T)


def damaged_headers() -> list[bytes]:
    """Headers that numpy's parser answers with other errors than ValueError, and some that it takes."""
    return [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9, 6), ",  # TokenError
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9, 6",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': 9 6), }",  # SyntaxError
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (90000000000000000000, 6), }",  # OverflowError
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-9, 6), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 6), }",  # fewer rows than there are
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9, 7), }",
        b"{'descr': '<f2', 'fortran_order': False, 'shape': (9, 6), }",
        b"{'descr': '<q9', 'fortran_order': False, 'shape': (9, 6), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (9, 6), }",
        b"(" * 100,
        b"\xff\xfe" * 50,
        b"",
    ]


@pytest.mark.parametrize("header", damaged_headers())
def test_a_damaged_header_is_one_line(header: bytes, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", example().embeddings.numpy())
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:10] + header.ljust(117) + b"\n" + content[128:])
    with pytest.raises(UserError, match="x.npy is not a .npy file of numbers or is damaged") as error:
        read_embeddings(tmp_path / "x.npy")
    assert "\n" not in str(error.value)


def test_an_archive_of_arrays_is_no_array(tmp_path: Path) -> None:
    with open(tmp_path / "x.npy", "wb") as file:
        np.savez(file, a=np.ones((2, 2), np.float32))
    with pytest.raises(UserError, match="x.npy is not a .npy file of numbers or is damaged"):
        read_embeddings(tmp_path / "x.npy")


def test_tables_of_other_programs(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = np.arange(12, dtype=np.float64).reshape(4, 3)
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 3)):
        table = pa.table({"id": [1, 2, 3, 4], "embedding": pa.array(values.tolist(), kind)})
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
        found = read_embeddings(tmp_path / "x.parquet")
        assert torch.equal(found.embeddings, torch.from_numpy(values).float())
        assert found.items.names == ("0", "1", "2", "3") and not found.items.labeled and found.model is None
    table = table.append_column("path", [["a", "b", "c", "d"]]).append_column("label", [["x", None, "y", "x"]])
    pq.write_table(table.select([1, 2, 3]), tmp_path / "x.parquet")
    items = read_embeddings(tmp_path / "x.parquet").items
    assert items.names == ("a", "b", "c", "d") and items.labels.tolist() == [0, -1, 1, 0]
    for column, message in (
        ({"vectors": values.tolist()}, "has no column embedding; it has vectors"),
        ({"embedding": [1.0, 2.0]}, "has embeddings of type double; they must be lists of floating-point"),
        ({"embedding": [[1, 2], [3, 4]]}, r"has embeddings of type list<.*int64.*>; they must be lists of floating"),
        ({"embedding": [[1.0, 2.0], [3.0]]}, "has rows without an embedding or of unequal length"),
        ({"embedding": [[1.0, 2.0], None]}, "has rows without an embedding or of unequal length"),
        ({"embedding": [[1.0, float("nan")]]}, "has non-finite values in row 0"),
        ({"embedding": pa.array([], pa.list_(pa.float32()))}, "has no rows; it must have embeddings"),
    ):
        pq.write_table(pa.table(column), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=f"x.parquet {message}"):
            read_embeddings(tmp_path / "x.parquet")


def test_tables_are_written_in_pieces_and_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet, "_ROWS", 4)
    write_embeddings(tmp_path / "x.parquet", example())
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    columns = pq.read_table(tmp_path / "x.parquet").to_pydict()
    assert np.array_equal(np.array(columns["embedding"], np.float32), example().embeddings.numpy())
    assert tuple(columns["path"]) == example().items.names and columns["label"] == ["x", "y", "z"] * 3
    assert torch.equal(read_embeddings(tmp_path / "x.parquet").embeddings, example().embeddings)


def test_a_table_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_embeddings(tmp_path / "x.parquet", example())
    monkeypatch.setattr("gcahng.extras.find_spec", lambda name: None)
    line = r'pyarrow is not installed; pip install "gcahng\[parquet\]" brings it'
    for use in (lambda: read_embeddings(tmp_path / "x.parquet"), lambda: write_embeddings("y.parquet", example())):
        with pytest.raises(UserError, match=line):
            use()
