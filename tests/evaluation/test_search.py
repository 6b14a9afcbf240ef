"""gcahng embed, index and search from the command line: what they print and write, and every mistake one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.errors import UserError, UserNote
from gcahng.evaluation.image_inputs import files_images
from gcahng.retrieval import nearest
from gcahng.retrieval.embeddings import read_embeddings
from gcahng.retrieval.index_file import load

PIL_Image = pytest.importorskip("PIL.Image")
SIZE = ["--data.resize", "32", "--data.image_size", "32", "--data.workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures/{a,b}/0.png … 4.png."""
    root = tmp_path_factory.mktemp("search")
    random = np.random.RandomState(0)
    for name in "ab":
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(5):
            pixels = random.randint(0, 255, (32, 40, 3), np.uint8)
            PIL_Image.fromarray(pixels).save(root / "pictures" / name / f"{i}.png")
    return root


@pytest.fixture
def built(run: str, place: Path, tmp_path: Path) -> Path:
    """An index of the pictures with their labels."""
    path = tmp_path / "x.index"
    sources = [str(place / "pictures"), "--labels_from_folders", "--model", run]
    assert main(["index", "build", *sources, "--out", str(path), *SIZE]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["x.index"]
    return path


def test_train_embed_index_search(
    run: str, small_data: DataSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The workflow of docs/search.md on glyphs, and that search finds what exact search finds."""
    file, index, picture = tmp_path / "test.safetensors", tmp_path / "test.index", tmp_path / "found.png"
    assert main(["embed", run, "--out", str(file), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"480 embeddings of 16 channels, 40 classes\nwritten     {file}\n"
    assert main(["index", "build", str(file), "--out", str(index)]) == 0
    assert main(["index", "info", str(index)]) == 0
    info = capsys.readouterr().out
    assert "kind        flat, cosine, rows normalized" in info and "source      480 rows: glyphs, test" in info
    search = ["search", str(index), str(file), "--rows", "0", "77", "200", "--k", "5", "--leave_out_same"]
    assert main([*search, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    embeddings = read_embeddings(file).embeddings
    rows = (0, 77, 200)
    exact = nearest(embeddings, 5, queries=torch.tensor(rows)).tolist()
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    for query, row, neighbors in zip(found["queries"], rows, exact, strict=True):
        similarities = [hit["similarity"] for hit in query["results"]]
        # The index compares in float32: rows that are equally near to its precision may be swapped.
        assert similarities == pytest.approx([float(unit[row] @ unit[i]) for i in neighbors], abs=1e-6)
        assert query["name"] == small_data.test.name(row) and query["path"] is None
        for rank, hit in enumerate(query["results"], start=1):
            assert hit["rank"] == rank and hit["similarity"] == pytest.approx(
                float(unit[row] @ unit[hit["row"]]), abs=1e-6
            )
            assert hit["right"] is (row // 12 == hit["row"] // 12)
            assert hit["label"] == small_data.test.class_names[hit["row"] // 12]
    assert PIL_Image.open(picture).size[0] > 500
    assert main(search) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"query {small_data.test.name(0)} ({small_data.test.class_names[0]})"
    assert lines[1].split() == ["rank", "similarity", "label", "name"] and len(lines) == 3 * 7 + 2
    assert len([line for line in lines if re.match(r" +[1-5] +[01]\.\d{4}  U\+", line)]) == 15


def test_a_picture_shows_the_images_that_were_found(
    built: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cell holds the pixels of its file; frames say right, wrong, or nothing where a label is missing."""
    from matplotlib.colors import to_hex

    from gcahng.evaluation import search_plot

    figures = []
    save = search_plot.save_png
    monkeypatch.setattr(search_plot, "save_png", lambda figure, path: (figures.append(figure), save(figure, path)))
    query, picture = str(place / "pictures" / "b" / "3.png"), str(tmp_path / "p.png")
    arguments = ["search", str(built), query, "--k", "10", "--device", "cpu", "--picture", picture]
    assert main([*arguments, "--labels_from_folders"]) == 0
    assert main(arguments) == 0
    with_labels, without = figures
    shown = [ax.images[0].get_array() for ax in with_labels.axes]
    assert len(shown) == 11
    files = [np.asarray(PIL_Image.open(file)) / 255 for file in sorted(place.glob("pictures/*/*.png"))]
    which = [next(i for i, file in enumerate(files) if np.abs(file - image).max() < 1e-6) for image in shown]
    assert which[:2] == [8, 8] and sorted(which[1:]) == list(range(10))
    frames = [to_hex(ax.spines["top"].get_edgecolor()) for ax in with_labels.axes[1:]]
    assert frames == ["#009e73" if i >= 5 else "#d55e00" for i in which[1:]]
    texts = " ".join(text.get_text() for text in with_labels.texts)
    assert "cosine similarity. 5 of 10 are of the query's class." in texts
    assert all(ax.spines["top"].get_linewidth() == 1.0 for ax in without.axes)
    assert [ax.get_xlabel() for ax in without.axes][0] == "3.png"
    captions = [ax.get_xlabel() for ax in with_labels.axes]
    assert captions[0] == "b" and captions[1] == "1.000  b"


@pytest.mark.filterwarnings("ignore:1 of 1 images are named more than once")
def test_adding_images_and_searching_by_folder_and_list(
    built: Path, run: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    PIL_Image.fromarray(np.full((50, 40, 3), 200, np.uint8)).save(more / "gray.png")
    capsys.readouterr()
    # Resized as for the index, though no option says so.
    assert main(["index", "add", str(built), str(more), "--model", run, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"11 rows, 1 of them new\nwritten     {built}\n"
    (tmp_path / "list.txt").write_text("more/gray.png\n\nmore/../more/gray.png\n")
    for queries in ([str(more)], [str(tmp_path / "list.txt")], [str(more / "gray.png")]):
        assert main(["search", str(built), *queries, "--k", "1", "--json", "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)["queries"]
        assert len(found) == (2 if queries[0].endswith(".txt") else 1)
        hit = found[0]["results"][0]
        assert (hit["row"], hit["path"], hit["label"], hit["right"]) == (10, str(more / "gray.png"), None, None)
    before = built.read_bytes()
    assert main(["index", "add", str(built), str(more / "gray.png"), "--model", run, "--device", "cpu"]) == 2
    assert "1 of the 1 images" in capsys.readouterr().err and built.read_bytes() == before
    assert not list(tmp_path.glob("x.index.embeddings*"))


def test_an_index_that_another_process_adds_to_meanwhile_loses_nothing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load(built).index.dim
    for name in ("one.npy", "other.npy"):
        np.save(tmp_path / name, np.eye(2, rows, dtype=np.float32))

    added = []

    def read_late(path: Path) -> Any:
        monkeypatch.undo()
        added.append(main(["index", "add", str(built), str(tmp_path / "other.npy"), "--allow_duplicates"]))
        return read_embeddings(path)

    monkeypatch.setattr("gcahng.retrieval.shards.read_embeddings", read_late)
    before = len(load(built))
    again = ["index", "add", str(built), str(tmp_path / "one.npy"), "--allow_duplicates"]
    assert main(again) == 2
    assert f"{built} was written by another process meanwhile; run this command again" in capsys.readouterr().err
    assert added == [0] and len(load(built)) == before + 2
    assert main(again) == 0 and len(load(built)) == before + 4


def test_searching_by_vector(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gcahng.retrieval.index_file import load

    vector = load(built, to_add=True).index._blocks[0][7].numpy()
    np.save(tmp_path / "vector.npy", 3 * vector)
    assert main(["search", str(built), str(tmp_path / "vector.npy"), "--k", "2", "--json"]) == 0
    out = capsys.readouterr().out
    (query,) = json.loads(out[out.index("{") :])["queries"]
    assert query["results"][0]["name"] == "b/2.png" and query["results"][0]["similarity"] == pytest.approx(1, abs=1e-6)
    assert query["path"] is None and query["results"][0]["right"] is None


def test_a_data_set_as_queries(built: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", str(built), "--data.name", "glyphs", "--split", "val", "--rows", "5", "--k", "3"]
    assert main([*arguments, "--json", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    (query,) = json.loads(out[out.index("{") :])["queries"]
    assert query["name"].endswith("(image 5)") and len(query["results"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("embed {run} --out x.txt", "--out is x.txt; its name must end in .safetensors, .npy or .parquet"),
        ("embed {run}", "the following arguments are required: --out; see gcahng embed --help"),
        ("embed {run} nowhere --out {tmp}/x.npy", "nowhere does not exist; name an image, a folder or a list"),
        ("embed {run} nowhere.png --out {tmp}/x.npy", "nowhere.png does not exist; name an image"),
        (
            "embed {run} {tmp}/empty --out {tmp}/x.npy",
            "{tmp}/empty holds no images; it must hold files that end in .bmp",
        ),
        (
            "embed {run} {tmp}/empty.txt --out {tmp}/x.npy",
            "{tmp}/empty.txt lists no images; it must have one path",
        ),
        ("embed {run} {tmp}/x.pdf --out {tmp}/x.npy", "{tmp}/x.pdf is neither an image"),
        (
            "embed {run} --split gallery --out {tmp}/x.npy",
            "split is gallery; of glyphs it must be one of test, train, val",
        ),
        ("embed {run} a.png --data.name sop --out {tmp}/x.npy", "--data.name is sop and a.png is given too"),
        ("index", "the following arguments are required: action; see gcahng index --help"),
        ("index drop", "argument action: invalid choice: 'drop'"),
        ("index build --out {tmp}/y.index", "name files of embeddings (.safetensors, .npy, .parquet), or images"),
        ("index build {tmp}/e.npy --model {run} --out {tmp}/y.index", "--model is given and {tmp}/e.npy is a file"),
        ("index build {tmp}/e.npy --out {index}", "--out is {index}, which exists; it must be a new file"),
        (
            "index build {tmp}/e.npy --out {tmp}/y.index --kind ivf_pq",
            "embeddings has 2 rows; it must have at least 256",
        ),
        (
            "index build {tmp}/e.npy --out {tmp}/y.index --kind hnsw --links 0",
            "links is 0; it must be a whole number of at least 2 and at most 4,096",
        ),
        ("index add {index} {tmp}/e.npy", "{tmp}/e.npy has 3 channels; it must have 16, like the index"),
        ("index add {tmp}/e.npy {tmp}/e.npy", "{tmp}/e.npy is not an index of gcahng"),
        ("index info {tmp}/no.index", "{tmp}/no.index cannot be read: No such file or directory"),
        ("search {index}", "no queries are given; name images, a file of embeddings, or a data set"),
        ("search {index} {tmp}/e.npy {tmp}/e.npy", "2 queries are given; a file of embeddings must be the only one"),
        ("search {index} {tmp}/v.npy --rows 3", "--rows has 3; it must be from 0 to 0"),
        ("search {index} {tmp}/v.npy --k 0", "k is 0; it must be a whole number of at least 1"),
        ("search {index} {tmp}/v.npy --effort 2", 'effort is 2; it must be None for kind "flat"'),
        ("search {index} {tmp}/v.npy --picture x.jpg", "--picture is x.jpg; its name must end in .png"),
        ("search {index} {tmp}/x.png", "{tmp}/x.png cannot be read as an image"),
        ("search {index} {pictures}/a/0.png --model {other}", "{other} does not fit the index: glyph_conv"),
        (
            "search {index} {pictures}/a/0.png --data.resize 40",
            "images were resized to 32 and cropped to 32 pixels for",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: str,
    message: str,
    built: Path,
    run: str,
    place: Path,
    small_config: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "x.pdf").touch()
    (tmp_path / "x.png").write_bytes(b"no image")
    np.save(tmp_path / "e.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "v.npy", np.ones(16, np.float32))
    names = {"run": run, "tmp": tmp_path, "index": built, "pictures": place / "pictures", "other": tmp_path / "o"}
    if "{other}" in arguments:
        other_network(run, tmp_path / "o.safetensors")
        names["other"] = tmp_path / "o.safetensors"
    capsys.readouterr()
    before = built.read_bytes()
    assert main(arguments.format(**names).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gcahng: error: ") and message.format(**names) in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert built.read_bytes() == before and not (tmp_path / "y.index").exists()


def other_network(run: str, out: Path) -> None:
    """The network of a run with one weight changed."""
    from gcahng.models.model_file import load_model, save_model

    model = load_model(Path(run))
    tensors = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    tensors["head.1.bias"][0] += 1
    save_model(out, tensors, model.config)


def test_an_index_leaves_the_embeddings_that_it_was_built_of(built: Path, run: str, tmp_path: Path) -> None:
    """A user's file stays, even if it has the name of the temporary file of an index that embeds images."""
    embeddings = tmp_path / "own.index.embeddings.safetensors"
    assert main(["embed", run, "--out", str(embeddings)]) == 0
    assert main(["index", "build", str(embeddings), "--out", str(tmp_path / "own.index")]) == 0
    assert embeddings.is_file()


def test_sources(place: Path, tmp_path: Path) -> None:
    images, items = files_images([place / "pictures" / "b", place / "pictures" / "a" / "4.png"])
    assert images.root == place / "pictures" and items.names == tuple(f"b/{i}.png" for i in range(5)) + ("a/4.png",)
    assert not items.labeled and items.class_names == ()
    (tmp_path / "list.lst").write_text(f"{place}/pictures/b/1.png\n{place}/pictures/a/0.png\n")
    images, items = files_images([tmp_path / "list.lst"], labels_from_folders=True)
    assert items.names == ("b/1.png", "a/0.png") and items.labels.tolist() == [1, 0]
    (tmp_path / "notepad.txt").write_text(f"{place}/pictures/b/1.png\r\n", encoding="utf-8-sig")
    assert files_images([tmp_path / "notepad.txt"])[0].file(0) == place / "pictures" / "b" / "1.png"
    (place / "pictures" / ".hidden.png").touch()
    with pytest.warns(UserNote, match=r"left out: 1 hidden \(.hidden.png\)"):
        assert len(files_images([place / "pictures"])[0]) == 10
    with pytest.raises(UserError, match="no images are given"):
        files_images([])


def test_normalized_embeddings_from_the_command_line(
    run: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queries and images that are added are scaled as the index says; vectors of another kind are refused."""
    pictures, unit, plain = str(place / "pictures"), str(tmp_path / "unit.npy"), str(tmp_path / "plain.parquet")
    assert main(["embed", run, pictures, "--normalize", "--out", unit, *SIZE]) == 0
    assert "10 embeddings of 16 channels, normalized, without labels" in capsys.readouterr().out
    assert main(["embed", run, f"{pictures}/a", "--out", plain, *SIZE]) == 0
    index = str(tmp_path / "x.index")
    assert main(["index", "build", unit, "--metric", "euclidean", "--out", index]) == 0
    assert main(["index", "info", index]) == 0
    assert ", embeddings normalized\n" in capsys.readouterr().out
    assert main(["search", index, f"{pictures}/b/3.png", "--json", "--device", "cpu"]) == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    assert query["results"][0]["name"] == "b/3.png" and query["results"][0]["distance"] < 1e-3
    more = tmp_path / "more.png"
    PIL_Image.fromarray(np.full((50, 40, 3), 200, np.uint8)).save(more)
    assert main(["index", "add", index, str(more), "--model", run, "--device", "cpu"]) == 0
    rows = load(Path(index), to_add=True).index
    assert torch.cat(rows._blocks).norm(dim=1).tolist() == pytest.approx([1] * 11, abs=1e-6)
    capsys.readouterr()
    assert main(["search", index, plain]) == 2
    assert (
        "plain.parquet does not fit the index: it is not normalized and the rows of the index"
        in capsys.readouterr().err
    )
