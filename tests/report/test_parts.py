"""The map's numbers, charts and thumbnails."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gcahng.data import DataSplits, ImageSet
from gcahng.errors import UserError
from gcahng.report import embedding_map as maps
from gcahng.report import sections
from gcahng.report.charts import MAX_POINTS, Line, bar_chart, line_chart, number, ticks
from gcahng.report.embedding_map import EmbeddingMap, embedding_map
from gcahng.report.ranking import rank
from gcahng.report.thumbnails import SPRITE_COLUMNS, data_uri, sprite


def test_pca_keeps_distances_of_a_plane() -> None:
    """Points of a sphere near a pole of 16 dimensions, on a plane through it."""
    generator = torch.Generator().manual_seed(0)
    plane = 0.3 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    points = plane @ basis[:2] + (1 - plane.square().sum(1, keepdim=True)).clamp_min(0).sqrt() @ basis[2:3]
    found = embedding_map(5 * points, torch.arange(40) // 4, method="pca", classes=10)
    assert found.method == "pca" and found.rows.tolist() == list(range(40))
    assert found.explained > 0.9
    expected = torch.cdist(plane, plane)
    assert (torch.cdist(found.places, found.places) - expected).abs().max() < 0.15 * expected.max()
    again = embedding_map(points, torch.arange(40) // 4, method="pca", classes=10)
    torch.testing.assert_close(found.places, again.places)  # lengths of embeddings do not matter


def test_whole_classes_are_chosen() -> None:
    labels = torch.arange(200) % 20
    found = embedding_map(torch.randn(200, 4), labels, method="pca", images=57, classes=9, seed=1)
    assert len(found.rows) == 50 and len(labels[found.rows].unique()) == 5
    found = embedding_map(torch.randn(200, 4), labels, method="pca", images=200, classes=3, seed=1)
    assert len(found.rows) == 30
    assert len(embedding_map(torch.randn(9, 4), torch.zeros(9).long(), method="pca", images=4).rows) == 4
    assert embedding_map(torch.randn(2, 1), torch.zeros(2).long(), method="pca").places.shape == (2, 2)


def test_umap_where_it_is_installed_else_pca(monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels = torch.randn(40, 4), torch.arange(40) // 4
    monkeypatch.setattr(maps, "_umap", lambda points, seed: torch.zeros(len(points), 2))
    monkeypatch.setattr(maps, "find_spec", lambda name: object())
    assert embedding_map(points, labels).method == "umap"
    assert embedding_map(points[:10], labels[:10]).method == "pca"  # too few for neighborhoods
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    assert embedding_map(points, labels).method == "pca"
    monkeypatch.setattr("gcahng.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'UMAP: umap is not installed; pip install "gcahng\[umap\]"'):
        embedding_map(points, labels, method="umap")
    with pytest.raises(UserError, match="map is 'tsne'; it must be one of auto, umap, pca"):
        embedding_map(points, labels, method="tsne")


@pytest.mark.slow
def test_umap_keeps_clusters_apart() -> None:
    pytest.importorskip("umap", reason='umap is not installed; pip install "gcahng[umap]" brings it')
    labels = torch.arange(120) // 30
    points = torch.eye(8)[labels] + 0.05 * torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    found = embedding_map(points, labels, method="umap")
    assert found.method == "umap" and found.explained is None
    distances = torch.cdist(found.places, found.places).fill_diagonal_(math.inf)
    assert (labels[found.rows][distances.argmin(1)] == labels[found.rows]).all()
    assert torch.equal(found.places, embedding_map(points, labels, method="umap").places)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.3, 0.31), (-5, 7), (80.01, 99.8), (0, 1e-6), (12345, 67890), (2, 2), (0, 0), (-1e-3, 0)],
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    steps = {round((b - a) / (found[-1] - found[0]), 6) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1
    assert len({number(value) for value in found}) == len(found)


def paths(markup: str, kind: str = "line") -> list[list[tuple[str, float, float]]]:
    """The commands of each path of a kind."""
    drawn = re.findall(rf'<path class="{kind}[^"]*" d="([^"]+)"', markup)
    return [[(c, float(x), float(y)) for c, x, y in re.findall(r"([ML])([\d.-]+),([\d.-]+)", d)] for d in drawn]


def test_a_line_is_drawn_to_scale() -> None:
    markup = line_chart([Line("a", [(0, 0), (50, 5), (100, 10)])], title="T", note="n")
    ((_, x0, y0), (_, x1, y1), (_, x2, y2)) = paths(markup)[0]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2 and y0 > y2


def test_a_gap_where_a_loss_was_not_finite() -> None:
    markup = line_chart([Line("", [(0, 1), (1, 2), (2, math.nan), (3, 1), (4, math.inf), (5, 1)])], title="T")
    assert [command for command, *_ in paths(markup)[0]] == ["M", "L", "M", "M"]
    assert "nan" not in markup and "inf" not in markup
    assert paths(line_chart([Line("", [(0, math.nan)])], title="T")) == []


def test_long_curves_are_thinned_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)]
    (thin, thick) = paths(line_chart([Line("", points, smooth=True)], title="T"))
    assert len(thin) == len(thick) == MAX_POINTS
    assert len({y for _, _, y in thin}) == 1  # each the mean of as many zeros as ones


def test_bars_are_as_high_as_their_shares() -> None:
    markup = bar_chart([0.1, 0.4, 0.5], [0.3, 0.3, 0.4], title="T", note="", x_label="x", key=("now", "then"))
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', markup)]
    assert heights[0] / heights[2] == pytest.approx(0.2, abs=0.01) and heights[1] / heights[2] == pytest.approx(
        0.8, abs=0.01
    )
    assert len(paths(markup)) == 1 and "then" in markup
    assert "then" not in bar_chart([1.0], None, title="T", note="", x_label="x", key=("now", "then"))


def test_the_map_shows_who_is_lost_and_where() -> None:
    """A rim where the nearest is wrong, though there is something right to find; up is up."""
    images = ImageSet(torch.zeros(5, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2]), ("a", "b", "c"))
    embeddings = torch.tensor([[1, 0], [0, 1], [1, 0.1], [1, 0.3], [0, 1.0]])
    rows = torch.tensor([4, 0, 1, 2, 3])
    places = torch.tensor([[0, 0], [1, 3], [2, 1], [0, 2], [4, 0.0]])
    shown = SimpleNamespace(
        map=EmbeddingMap(rows, places, "pca", 0.5), images=images, ranking=rank(embeddings, images.labels, 2)
    )
    markup = sections.embedding_map(shown)
    circles = re.findall(r'<circle( class=lost)? cx="([\d.]+)" cy="([\d.]+)"', markup)
    assert [bool(lost) for lost, *_ in circles] == [False, True, True, True, False]
    x, y = (torch.tensor([float(circle[axis]) for circle in circles]) for axis in (1, 2))
    torch.testing.assert_close(x - x[0], (y[0] - y[1]) / 3 * places[:, 0], atol=0.2, rtol=0)
    torch.testing.assert_close(y[0] - y, (y[0] - y[1]) / 3 * places[:, 1], atol=0.2, rtol=0)
    assert y[0] > y[1]


def test_a_query_is_shown_with_what_it_found() -> None:
    images = ImageSet(torch.zeros(4, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("cat", "dog"))
    embeddings = torch.tensor([[5, 0], [4, 3], [3, 4], [-1, 0.0]])
    shown = SimpleNamespace(images=images, gallery=images, ranking=rank(embeddings, images.labels, 3))
    root = ElementTree.fromstring(re.sub("(<img[^>]*)>", r"\1/>", sections._query(shown, 1)))
    assert [e.text for e in root.iter() if e.get("class") == "score"] == ["AP@R 0 %", "0.960", "0.800", "-0.800"]
    assert [e.get("class") for e in root.iter("li")] == ["item wrong", "item wrong", "item right"]
    assert [e.text for e in root.iter() if e.get("class") == "mark"] == ["✗", "✗", "✓"]
    assert [e.text for e in root.iter() if e.get("class") == "name"] == ["dog", "cat", "cat", "dog"]
    shown.ranking = rank(embeddings, torch.tensor([0, 1, 0, 0]), 3)
    assert "AP@R 25 %" in sections._query(shown, 0)


def test_names_are_escaped_in_charts() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    markup = bar_chart([1.0], [1.0], title="T", note=hostile, x_label=hostile, key=(hostile, hostile))
    assert [item.text for item in ElementTree.fromstring(markup).iter("li")] == [hostile] * 2
    markup = line_chart(
        [Line(hostile, [(0, 1), (1, 2)], dots=True)], title="T", note=hostile, x_label=hostile, x_names=[hostile, "b"]
    )
    root = ElementTree.fromstring(markup)  # well-formed, and no element of that name
    assert not list(root.iter("script"))
    assert root.find("ul/li").text == hostile


def decoded(uri: str) -> Image.Image:
    head, _, content = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("L"))).long()


def test_small_gray_images_are_kept_as_they_are(runs) -> None:
    images = runs.data.test
    assert torch.equal(pixels(decoded(data_uri(images, 7))), images.images[7].long())
    chosen = list(range(40))
    uri, side = sprite(images, chosen)
    sheet = pixels(decoded(uri))
    assert side == 32 and sheet.shape == (2 * 32, SPRITE_COLUMNS * 32)
    for place, index in enumerate(chosen):
        row, column = divmod(place, SPRITE_COLUMNS)
        tile = sheet[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert torch.equal(tile, images.images[index].long())


def test_files_become_small_squares(file_data: DataSplits) -> None:
    picture = decoded(data_uri(file_data.test, 0))
    assert picture.size == (112, 112) and picture.mode == "RGB"
    uri, side = sprite(file_data.test, [0, 1])
    assert side == 64 and decoded(uri).size == (64 * SPRITE_COLUMNS, 64)
