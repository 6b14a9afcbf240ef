"""The tables of results in README and docs are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stages that had another name when they were measured.
RENAMED = {"hidden": "mlp_in", "close": "mlp_out"}
BASES = {"N-pair": "npair", "Proxy-Anchor": "proxy_anchor", "SupCon": "supcon", "ArcFace": "arcface"}


def found(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))["rows"]


def tables(page: str, heading: str) -> list[list[list[str]]]:
    """The cells, without headings, of a page's tables whose heading row starts so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|\n").split("|")] for line in b.splitlines()] for b in blocks]
    return [block[2:] for block in rows if " | ".join(block[0]).startswith(heading)]


@pytest.mark.parametrize(("place", "classes"), [(0, 16), (1, 64)])
def test_losses_on_glyphs(place: int, classes: int) -> None:
    rows = {row["setting"]: row for row in found(f"wide-c{classes}.json")}
    shown = tables("docs/results.md", "loss | trained for")[place]
    assert len(shown) == len(rows) == 12
    for title, budget, *cells in shown:
        under = title.startswith("GCA-HNG on ")
        name = f"{'gca_hng-' if under else ''}{BASES[title.removeprefix('GCA-HNG on ')]}-c{classes}"
        row = rows[name + ("-equal_time" if budget == "equal time" else "")]
        mean, std = row["mean"], row["std"]
        metrics = [f"{100 * mean[m]:.2f} ± {100 * std[m]:.2f}" for m in ("recall@1", "map@r", "r_precision")]
        assert cells == [f"{mean['steps']:,.0f}", *metrics, f"{mean['seconds']:.0f}"], title


def test_losses_on_glyphs_in_the_readme() -> None:
    (shown,) = tables("README.md", "loss | Recall@1")
    rows = {row["setting"]: row for row in found("glyphs.json")}
    assert [title for title, *_ in shown] == ["N-pair", "GCA-HNG on N-pair"]
    for (_, *cells), setting in zip(shown, ("npair", "gca_hng"), strict=True):
        mean, std = rows[setting]["mean"], rows[setting]["std"]
        assert cells == [f"{100 * mean[m]:.2f} ± {100 * std[m]:.2f}" for m in ("recall@1", "map@r", "r_precision")]


def test_steps_against_the_reference() -> None:
    reference: dict[int, dict[str, Any]] = {}
    (shown,) = tables("docs/cost.md", "n | case | step, s | × reference")
    expected = []
    for row in found("step.json"):
        n, case = row["n"], row["case"]
        first = reference.setdefault(n, row)
        ratios = [f"{first[k]['median'] / row[k]['median']:.2f}" for k in ("step_s", "forward_s")]
        ratios = ["–", "–"] if row is first else ratios
        share = "–" if row["share_of_floor"] is None else f"{100 * row['share_of_floor']:.0f} %"
        times = [f"{row[k]['median']:.3f}" for k in ("step_s", "forward_s")]
        cells = [times[0], ratios[0], times[1], ratios[1], f"{row['peak_bytes'] / 1e6:.0f}", share]
        expected.append([str(n), case, *cells])
    assert shown == expected
    ratios = [float(cells[3]) for cells in expected if cells[3] != "–"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"{min(ratios):.2f} (fp32) to {max(ratios):.2f} (bf16) times as fast" in readme


def test_peaks_and_time_per_pair() -> None:
    (peaks,) = tables("docs/cost.md", "n | M | case | peak")
    assert peaks == [
        [
            *map(str, (row["n"], row["M"], row["case"])),
            *(f"{row[k] / 1e6:.0f}" for k in ("peak", "expected")),
            f"{row['per_pair'] / 1e3:.2f}",
        ]
        for row in found("memory.json")
    ]
    (times,) = tables("docs/cost.md", "n | case | step, s | µs per n²")
    medians = [(r["n"], r["case"], r["step_s"]["median"]) for r in found("step-513.json") if "cpp" in r["case"]]
    assert times == [[str(n), case, f"{s:.3f}", f"{1e6 * s / n**2:.1f}"] for n, case, s in medians]


def test_processes_that_share_a_batch() -> None:
    (shown,) = tables("docs/cost.md", "n | processes | threads each")
    wanted = []
    for row in found("ranks.json"):
        peaks = " / ".join(f"{peak / 1e6:.0f}" for peak in row["peaks"])
        cells = (row["n"], row["processes"], row["threads"], f"{row['step_s']:.3f}", peaks)
        wanted.append([*map(str, cells), f"{row['expected'] / 1e6:.0f}"])
    assert shown == wanted


@pytest.mark.parametrize(
    ("name", "shares", "rates"),
    [("step-avx2.json", "65 % and 67 %", (202, 193)), ("step-avx2-without.json", "61 % and 23 %", (313, 1804))],
)
def test_shares_with_slower_products(name: str, shares: str, rates: tuple[int, int]) -> None:
    of = {row["case"]: row["share_of_floor"] for row in found(name) if row["n"] == 129}
    assert " and ".join(f"{100 * of[f'cpp {kind} store']:.0f} %" for kind in ("fp32", "bf16")) == shares
    text = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
    measured = json.loads(text)["rates"]
    assert tuple(round(measured[f"{kind}, D = 512"] / 1e9) for kind in ("fp32", "bf16")) == rates
    assert shares in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8").replace("\n", " ")


def test_retrieval() -> None:
    (backends,) = tables("docs/retrieval.md", "backend | seconds")
    assert backends == [
        [row["backend"], f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", f"{row['peak_gb']:.2f}"]
        for row in found("retrieval-sop.json")
    ]
    (indices,) = tables("docs/retrieval.md", "index | effort")
    expected = []
    for row in found("retrieval-index.json"):
        name = f"`{row['kind']}`" + (f", {row['backend']}" if row["kind"] == "flat" else "")
        for search in row["searches"]:
            default = "" if row["kind"] == "flat" else "default"
            effort = default if search["effort"] is None else str(search["effort"])
            one = f"{search['milliseconds_one_at_a_time']:.1f}"
            cells = [f"{row['build_seconds']:.0f}", f"{search['milliseconds_a_query']:.2f}", one]
            sizes = [f"{row['index_gb']:.2f}", f"{row['peak_gb']:.1f}", f"{search['recall']:.3f}"]
            expected.append([name, effort, *cells, *sizes])
    assert indices == expected


def test_stages_in_cpp_and_torch() -> None:
    (shown,) = tables("docs/engine.md", "stage | fp32: torch, µs")
    expected = []
    for fp32, bf16 in zip(found("stages.json")[::2], found("stages.json")[1::2], strict=True):
        assert (fp32["precision"], bf16["precision"]) == ("fp32", "bf16") and fp32["stage"] == bf16["stage"]
        times = [(row["torch"], row["cpp"]) for row in (fp32, bf16)]
        cells = [(f"{1e6 * torch:,.0f}", f"{1e6 * cpp:,.0f}", f"{torch / cpp:.1f}") for torch, cpp in times]
        stage = RENAMED.get(fp32["stage"], fp32["stage"])
        expected.append([f"`{stage}`", *cells[0], *cells[1]])
    assert shown == expected
