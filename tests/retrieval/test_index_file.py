"""Index files: they answer like the index that was saved, and a broken file is one clear line."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import index_file
from gcahng.retrieval.embeddings import EmbeddingSet
from gcahng.retrieval.index import KINDS
from gcahng.retrieval.index_file import build, load, read_header, save
from gcahng.retrieval.items import EmbeddingModel, Items, Source, unnamed

MODEL = EmbeddingModel("a" * 64, "glyph_conv", "runs/a/checkpoints/last.pt", 256, 224)


def embeddings(rows: int = 300, dim: int = 8, seed: int = 0, root: str = "/pictures", names: str = "p") -> EmbeddingSet:
    generator = torch.Generator().manual_seed(seed)
    items = Items(
        tuple(f"{names}{i}.png" for i in range(rows)), torch.arange(rows) % 3, ("a", "b", "c"), (Source(rows, root),)
    )
    return EmbeddingSet(torch.randn(300, dim, generator=generator)[:rows], items, MODEL)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.index"
    save(path, build(embeddings(20)))
    return path


def test_paths_may_be_strings(tmp_path: Path) -> None:
    save(str(tmp_path / "x.index"), build(embeddings(20)))
    assert len(load(str(tmp_path / "x.index"))) == 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_loaded_index_answers_as_the_one_saved(kind: str, metric: str, tmp_path: Path) -> None:
    whole, queries = embeddings(), embeddings(5, seed=1)
    contents = build(whole, kind, metric)
    expected = contents.search("queries", queries, 4)
    save(tmp_path / "x.index", contents)
    found = load(tmp_path / "x.index")
    assert (found.index.kind, found.index.metric, found.model) == (kind, metric, MODEL)
    assert found.items.names == whole.items.names and torch.equal(found.items.labels, whole.items.labels)
    result = found.search("queries", queries, 4)
    assert torch.equal(result.indices, expected.indices)
    torch.testing.assert_close(result.values, expected.values, rtol=0, atol=1e-5)
    header, items = read_header(tmp_path / "x.index")
    assert header["normalised"] is (metric == "cosine") and header["dim"] == 8 and len(items) == 300


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_adding(kind: str, tmp_path: Path) -> None:
    first, second = embeddings(40), embeddings(30, seed=1, names="q")
    path = tmp_path / "x.index"
    save(path, build(first, kind))
    save(path, load(path, to_add=True).add("second", second))
    found = load(path)
    assert found.items.names == first.items.names + second.items.names and len(found.index) == 70
    result = found.search("second", second, 1)
    assert result.indices.squeeze(1).tolist() == list(range(40, 70))
    assert [source.rows for source in found.items.sources] == [40, 30]


def test_what_does_not_fit_is_refused(saved: Path) -> None:
    contents = load(saved)
    other = replace(MODEL, fingerprint="b" * 64, path="runs/b")
    wrong = [
        (embeddings(5, dim=9), "queries has 9 channels; it must have 8, like the index"),
        (replace(embeddings(5), model=other), r"queries does not fit the index: .*runs/a.*runs/b.* different networks"),
        (
            replace(embeddings(5), model=replace(MODEL, crop=32)),
            "cropped to 224 pixels for one, and to 256 and 32 pixels for",
        ),
    ]
    for queries, message in wrong:
        for use in (contents.search, contents.add):
            with pytest.raises(UserError, match=message):
                use("queries", queries)
    nameless = replace(embeddings(5), model=None)
    assert contents.search("queries", nameless, 1).indices[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="k is 0; it must be a whole number of at least 1"):
        contents.search("queries", nameless, 0)
    assert contents.search("queries", nameless, 50).indices.shape == (5, 20)


def test_images_that_are_there_already(saved: Path) -> None:
    contents = load(saved)
    again = embeddings(5)
    with pytest.raises(UserError, match="5 of the 5 images of again are in the index already, such as /pictures/p0"):
        contents.add("again", again)
    # The same file below another root is the same file.
    moved = Items(
        tuple(f"pictures/{n}" for n in again.items.names), again.items.labels, ("a", "b", "c"), (Source(5, "/"),)
    )
    with pytest.raises(UserError, match="5 of the 5"):
        contents.add("again", replace(again, items=moved))
    assert len(contents.add("again", again, allow_duplicates=True)) == 25
    # Rows that nothing is known of are no duplicates.
    bare = EmbeddingSet(again.embeddings, unnamed(5))
    assert len(build(bare).add("bare", bare)) == 10


def test_an_index_of_an_unknown_network_takes_on_that_of_what_is_added(tmp_path: Path) -> None:
    both = build(replace(embeddings(20), model=None)).add("second", embeddings(5, names="q"))
    assert both.model == MODEL
    other = replace(embeddings(5), model=replace(MODEL, fingerprint="b" * 64))
    with pytest.raises(UserError, match="different networks"):
        both.search("queries", other)


def test_images_of_two_splits_are_two_images() -> None:
    """In a data set without files, image 3 of train is not image 3 of test."""
    parts = [
        replace(embeddings(4), items=replace(embeddings(4).items, sources=(Source(4, None, {"name": name}, split),)))
        for name, split in (("glyphs", "train"), ("glyphs", "test"), ("others", "train"))
    ]
    contents = build(parts[0])
    for part in parts[1:]:
        contents = contents.add("part", part)
    assert len(contents) == 12
    with pytest.raises(UserError, match="4 of the 4 images of part are in the index already"):
        contents.add("part", parts[1])


def test_a_query_in_the_index_can_be_left_out(tmp_path: Path) -> None:
    whole = embeddings(20)
    contents = build(whole).add("again", embeddings(3), allow_duplicates=True)
    plain = contents.search("queries", whole, 22)
    result = contents.search("queries", whole, 4, leave_out_same=True)
    for query in range(20):
        others = [row for row in plain.indices[query].tolist() if contents.items.names[row] != f"p{query}.png"]
        assert result.indices[query].tolist() == others[:4]
    everything = contents.search("queries", embeddings(1), 30, leave_out_same=True)
    assert everything.indices[0, :21].ge(0).all() and everything.indices[0, 21:].tolist() == [-1, -1]
    assert everything.values[0, -1] == -torch.inf


def test_vectors_without_names_have_no_image_to_leave_out() -> None:
    """Row 1 of the queries need not be row 1 of the index."""
    whole = replace(embeddings(6), items=unnamed(6), model=None)
    queries = replace(whole, embeddings=whole.embeddings[[3, 0]], items=whole.items.subset([3, 0]))
    contents = build(whole)
    assert contents.search("queries", queries, 1).indices.tolist() == [[3], [0]]
    with pytest.raises(UserError, match="leave_out_same needs the names .* queries has vectors without names"):
        contents.search("queries", queries, 1, leave_out_same=True)
    named = replace(queries, items=replace(queries.items, names=("d.png", "a.png")))
    assert contents.search("queries", named, 1, leave_out_same=True).indices.tolist() == [[3], [0]]


def test_every_byte_is_checked(saved: Path) -> None:
    """Any wrong byte, and a file that ends anywhere, is one clear line that names the file."""
    content = saved.read_bytes()
    places = [*range(0, 40), *range(40, len(content), 37), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.index (is not an index of gcahng|has version|is truncated)"):
            load(saved)
        saved.write_bytes(content[:place])
        with pytest.raises(UserError, match=r"x\.index is (not an index of gcahng|truncated)"):
            load(saved)
    saved.write_bytes(content + b"more")
    with pytest.raises(UserError, match="its checksum is wrong"):
        load(saved)
    saved.write_bytes(content)
    assert len(load(saved)) == 20


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_names_for_other_rows_than_there_are(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    save(path, replace(build(embeddings(20), kind), items=embeddings(19).items))
    with pytest.raises(UserError, match="x.index has 20 rows of 8 channels; by its header it must have 19 of 8"):
        load(path)


def test_rows_lie_where_memory_can_be_mapped(saved: Path) -> None:
    content = saved.read_bytes()
    assert content.index(b"\x93NUMPY") % 64 == 0


def test_foreign_newer_and_missing_files(saved: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    flat = faiss.IndexFlatL2(8)
    flat.add(embeddings(20).embeddings.numpy())
    faiss.write_index(flat, str(tmp_path / "foreign.index"))
    with pytest.raises(
        UserError, match="foreign.index is not an index of gcahng; it must be a file that gcahng index build"
    ):
        load(tmp_path / "foreign.index")
    content = bytearray(saved.read_bytes())
    content[8:12] = struct.pack("<I", 2)
    saved.write_bytes(content)
    with pytest.raises(
        UserError, match="x.index has version 2; it must have version 1, which this version of gcahng reads"
    ):
        load(saved)
    with pytest.raises(UserError, match="no.index cannot be read: No such file"):
        load(tmp_path / "no.index")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class_names": ["one"]}, "labels beyond its 1 classes"),
        ({"class_names": [1, 2, 3]}, "a class has a name that is no text"),
        ({"kind": "best"}, "kind is 'best'"),
        ({"metric": None}, "metric is None"),
        ({"rows": -3}, "-3 rows"),
        ({"rows": 10**12}, "1000000000000 rows"),
        ({"dim": "8"}, "channels"),
        ({"sources": [{"rows": 20, "root": 5}]}, "it has a source"),
        ({"sources": [{"rows": "20"}]}, "it has a source"),
        ({"sources": [{"rows": 19}]}, "names, labels and sources have 20, 20 and 19 rows"),
        ({"model": "a network"}, "TypeError"),
        ({"model": {}}, "KeyError"),
        ({"model": asdict(MODEL) | {"fingerprint": 5}}, "the fingerprint of its model is 5"),
    ],
)
def test_a_header_that_lies_under_a_right_checksum(saved: Path, change: dict, reason: str) -> None:
    content = saved.read_bytes()
    header_size, names_size, payload_size = struct.unpack_from("<QQQ", content, 12)
    header = json.loads(content[36 : 36 + header_size]) | change
    text, body = json.dumps(header).encode(), content[36 + header_size : -32]
    text += b" " * (-(36 + len(text) + len(body) - payload_size) % 64)
    lengths = content[:12] + struct.pack("<QQQ", len(text), names_size, payload_size)
    saved.write_bytes(lengths + text + body + hashlib.sha256(text + body + lengths).digest())
    for read in (load, read_header):
        with pytest.raises(UserError, match=f"x.index is not an index that gcahng can read .*{reason}"):
            read(saved)


def test_a_save_that_fails_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    contents = load(saved)
    monkeypatch.setattr(type(contents.index), "write", full)
    with pytest.raises(UserError, match="x.index cannot be written: No space left on device"):
        save(saved, contents)
    assert [file.read_bytes() for file in saved.parent.iterdir()] == [before]


def test_equal_contents_are_equal_files(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "y.index", build(embeddings(20)))
    assert saved.read_bytes() == (tmp_path / "y.index").read_bytes()


def test_without_faiss_flat_works_and_the_others_say_what_is_missing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "hnsw.index", build(embeddings(20), "hnsw"))
    expected = load(saved).search("queries", embeddings(20), 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("gcahng.extras.find_spec", lambda name: None)
    contents = load(saved)
    assert contents.index.backend == "torch"
    assert torch.equal(contents.search("queries", embeddings(20), 3).indices, expected.indices)
    with pytest.raises(UserError, match=r'faiss is not installed; pip install "gcahng\[faiss-cpu\]"'):
        load(tmp_path / "hnsw.index")


def test_the_checksum_reports_its_progress(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "_BLOCK", 100)
    seen: list[tuple[int, int]] = []
    load(saved, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1][0] == seen[-1][1] == saved.stat().st_size - 32


def test_distances_of_normalized_and_other_embeddings(tmp_path: Path) -> None:
    """Refused where it matters: a cosine does not depend on norms."""
    unit = replace(embeddings(20), model=replace(MODEL, normalized=True))
    for built, asked, line in (
        (unit, embeddings(5), "queries does not fit the index: it is not normalized and the rows of the index are"),
        (embeddings(20), replace(unit, items=unit.items), "it is normalized and the rows of the index are not"),
    ):
        save(tmp_path / "x.index", build(built, metric="euclidean"))
        contents = load(tmp_path / "x.index")
        assert contents.model == built.model
        for use in (contents.search, contents.add):
            with pytest.raises(UserError, match=line):
                use("queries", asked)
        assert len(contents.search("queries", replace(asked, model=built.model)).indices)
        assert len(build(built).search("queries", asked).indices)


def test_a_model_of_an_earlier_version() -> None:
    from dataclasses import asdict

    from gcahng.retrieval.items import model_from

    known = asdict(MODEL)
    del known["normalized"]
    assert model_from(known) == MODEL
    del known["crop"]
    with pytest.raises(KeyError):
        model_from(known)
