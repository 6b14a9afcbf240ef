"""`gcahng bench` and `gcahng plan` on tiny cases, and the comparison with the reference on planted errors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gcahng.bench import agreement as agreement_module
from gcahng.bench import memory, step, system
from gcahng.bench.agreement import Agreement, outputs
from gcahng.bench.cases import Case, Problem
from gcahng.bench.peak import Peak, from_json, measure_peak, to_json
from gcahng.cli import main
from gcahng.commands.plan import parse_bytes
from gcahng.engine.stages.edge_update import EdgeUpdate
from gcahng.errors import UserError

TINY = Case(12, 3, 16, 1, impl="cpp")
SIZES = ["--dim", "16", "--layers", "1"]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@pytest.fixture(scope="module")
def agreement() -> Agreement:
    return Agreement(TINY)


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_right_results_agree(agreement: Agreement, impl: str, precision: str) -> None:
    for memory_mode in ("store", "hidden", "recompute") if impl != "reference" else ("store",):
        assert agreement.problem(Case(12, 3, 16, 1, impl=impl, precision=precision, memory=memory_mode)) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planted_errors_disagree(agreement: Agreement, precision: str) -> None:
    right = outputs(Case(12, 3, 16, 1, impl="cpp", precision=precision))
    assert agreement.compare(right, precision) is None
    for name in right:
        wrong = dict(right) | {name: right[name] * 1.5}
        assert agreement.compare(wrong, precision).startswith(f"{name} is off by 0.")
    nan = dict(right) | {"dz": right["dz"].clone().fill_(float("nan"))}
    assert agreement.compare(nan, precision).startswith("dz is off by inf")
    cut = dict(right) | {"dz": right["dz"][1:]}
    assert agreement.compare(cut, precision).startswith("dz is off by inf")
    del right["dz"]
    assert agreement.compare(right, precision) == "its outputs differ in dz"
    slight = outputs(Case(12, 3, 16, 1, impl="cpp"))
    slight["losses"][1] *= 1 + 2e-6
    assert agreement.compare(slight, "fp32").startswith("losses is off by 2e-06")


def test_a_wrong_stage_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EdgeUpdate.mlp_backward
    monkeypatch.setattr(EdgeUpdate, "mlp_backward", lambda *arguments: right(*arguments).mul_(1.001))
    found = step.measure([TINY], [TINY], reps=1, peaks=False)
    baseline, case = found["rows"]
    assert "is off by" in case["disagrees"]
    assert case["share_of_floor"] is None
    assert not any(name.endswith("_ratio") for name in case)
    assert "No ratio for cpp fp32 store at n = 12: " in step.table(found)
    assert baseline["disagrees"] is None


def test_a_case_that_cannot_be_checked_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = int(1.5 * step.REFERENCE_BYTES * TINY.batch**2 * TINY.dim * TINY.layers)
    monkeypatch.setattr(step, "free_memory", lambda device: fits)
    _, case = step.measure([TINY], [TINY], reps=1, peaks=False)["rows"]
    assert "cannot be checked" in case["disagrees"] and "step_ratio" not in case


def test_a_reference_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "free_memory", lambda device: 1000)
    (case,) = step.measure([TINY], [TINY], reps=1, peaks=False)["rows"]
    assert case["case"].startswith("cpp") and case["step_s"]["median"] > 0
    assert "cannot be checked" in case["disagrees"]


def test_outputs_do_not_move_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(*arguments: object, **options: object) -> Problem:
        problem = Problem(*arguments, **options)
        made.append((problem, [p.detach().clone() for p in problem.gca.parameters()]))
        return problem

    monkeypatch.setattr(agreement_module, "Problem", make)
    outputs(TINY)
    ((problem, before),) = made
    assert all(torch.equal(a, b) for a, b in zip(before, problem.gca.parameters(), strict=True))


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
def test_forward_touches_no_state(impl: str) -> None:
    problem = Problem(Case(12, 3, 16, 1, impl=impl))
    before = {name: x.clone() for name, x in problem.gca.state_dict().items() if isinstance(x, torch.Tensor)}
    problem.forward()
    after = problem.gca.state_dict()
    assert before and all(torch.equal(x, after[name]) for name, x in before.items())


def test_step_prints_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "new" / "step.json"
    options = ["--batch", "6", "12", *SIZES, "--reps", "2", "--no-peak", "--json", str(written)]
    assert main(["bench", "step", *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| 12 \| cpp bf16 hidden \|.* % \|", out)
    assert f"threads {torch.get_num_threads()}" in out and "environment:" in out
    assert "24 D² n² multiply-adds at L = 1 (20.5 hidden)" in out
    found = json.loads(written.read_text())
    assert [row["case"] for row in found["rows"]][:2] == ["reference fp32", "cpp fp32 store"]
    assert len(found["rows"]) == 2 * 5
    row = found["rows"][1]
    assert row["disagrees"] is None and len(row["all_s"]["step"]) == 2
    times = row["step_s"]
    assert times["p20"] <= times["median"] <= times["p80"]
    for part in ("step", "forward"):
        reference, ours = (one[f"{part}_s"]["median"] for one in found["rows"][:2])
        assert row[f"{part}_ratio"] == pytest.approx(reference / ours)
    rests = [step - 2 * forward for step, forward in zip(row["all_s"]["step"], row["all_s"]["forward"], strict=True)]
    assert row["rest_s"]["median"] == pytest.approx(sum(rests) / 2)
    assert row["floor_flops"] == 48 * 16**2 * 6**2
    assert set(found["rates"]) == {"fp32, D = 16", "bf16, D = 16"}
    assert "authors_step_ratio" not in row


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_ratios_are_against_the_fp32_reference(precision: str) -> None:
    """The fp32 reference is measured once, also if it is among the variants."""
    size = replace(TINY, precision=precision)
    reference = replace(TINY, impl="reference")
    rows = step.measure([size], [size, reference, replace(reference, precision=precision)], 1, peaks=False)["rows"]
    assert [row["case"] for row in rows] == [
        "reference fp32",
        f"cpp {precision} store",
        f"reference {precision}",
    ]
    times = [row["step_s"]["median"] for row in rows]
    assert [row.get("step_ratio") for row in rows] == [None, times[0] / times[1], times[0] / times[2]]
    assert all(len(row["all_s"]["step"]) == 1 for row in rows)


def test_auto_is_measured_as_it_runs() -> None:
    case = Case(130, 65, 8, 1)
    assert case.name == "torch fp32 store" and memory.plan_size(case).stages == "torch"
    assert replace(case, views=5).name == "cpp fp32 store"
    Problem(case).forward()


@pytest.mark.parametrize("command", ["step", "memory"])
def test_a_place_for_numbers_is_looked_at_first(command: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    below_file = tmp_path / "file" / "x.json"
    places = {tmp_path: ", a folder; it must be a file", below_file: f"; {tmp_path / 'file'} is a file, not a folder"}
    for place, message in places.items():
        assert main(["bench", command, "--batch", "12", *SIZES, "--json", str(place)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"gcahng: error: --json is {place}{message}") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_authors_numbers_are_for_their_sizes_alone() -> None:
    ratios = step._authors_ratios(Case(129), 2.0, 0.5)
    assert ratios["authors_step_ratio"] == pytest.approx(22.7 / (2 * torch.get_num_threads()))
    for other in (Case(132), Case(129, dim=256), Case(129, layers=1)):
        assert step._authors_ratios(other, 2.0, 0.5) == {}


def test_spread_is_by_nearest_rank() -> None:
    assert step.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "p20": 1.0, "p80": 4.0}
    assert step.spread([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


@linux
@pytest.mark.thorough
def test_memory_prints_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "memory.json"
    options = ["--batch", "12", *SIZES, "--memory", "store", "--steps", "1", "--no-classes", "--json", str(written)]
    assert main(["bench", "memory", *options]) == 0
    out = capsys.readouterr().out
    assert "| 12 | 100 | cpp fp32 store |" in out
    (row,) = json.loads(written.read_text())["rows"]
    assert row["peak"] == max(row["phase1"], row["phase3"]) > 0


@pytest.mark.thorough
@linux
def test_a_peak_holds_at_least_what_the_edges_take() -> None:
    case = Case(192, 3, 64, 2, impl="cpp")
    store = 3 * (192 * 195 // 2) * 64 * 4
    assert store < measure_peak(case, steps=1).phase3 < 6 * store


def test_growth_and_extra_are_those_of_the_same_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Case, steps: int) -> Peak:
        peak = case.batch**2 * 1000 + (5 * 10**6 if case.classes > 100 else 0)
        return Peak(peak, peak // 2, peak, peak)

    monkeypatch.setattr(memory, "measure_peak", measured)
    cases = [Case(n, memory=memory_mode) for n in (12, 24) for memory_mode in ("store", "hidden")]
    many, few = Case(243, classes=11318), Case(243)
    rows = memory.measure(cases, [(many, few)], steps=1)
    assert [row["growth"] for row in rows[:2]] == [None, None]
    assert [row["growth"] for row in rows[2:4]] == pytest.approx([2, 2])
    assert rows[4]["phase3_extra"] == 5 * 10**6
    assert rows[4]["all_logits"] == 3 * 81**2 * 11318 * 4
    assert "Phase 3 at n = 243 with M = 11,318, cpp fp32 store: 5 MB more" in memory.table(rows)


@pytest.mark.thorough
@linux
def test_a_process_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCAHNG_CPU_ARCH", "nonsense")
    with pytest.raises(UserError, match="measures cpp fp32 store failed: .*nonsense"):
        measure_peak(TINY)


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Case, steps: int) -> Peak:
        if case.batch == 24:
            raise UserError("memory was short")
        return Peak(1000, 500, 1000, 1000)

    monkeypatch.setattr(memory, "measure_peak", measured)
    rows = memory.measure([Case(12), Case(24)], [(Case(24), Case(12))], steps=1)
    assert [row["peak"] for row in rows] == [1000, None]
    assert "No result for cpp fp32 store at n = 24: memory was short." in memory.table(rows)


def test_cases_survive_json() -> None:
    case = Case(12, memory="hidden", edge_dtype=torch.bfloat16, symmetric=False)
    assert from_json(to_json(case)) == case


def test_settings_name_what_changes_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    found = system.settings()
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    assert "MALLOC_MMAP_THRESHOLD_=65536" in system.describe(found).splitlines()[1]


def test_plan_prints_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--batch", "1024", "--memory-limit", "16GB", "--rate", "180"]) == 0
    out = capsys.readouterr().out
    assert "n = 1,024 (256 classes of 4), D = 512, L = 2" in out
    for mode in ("hidden", "store", "recompute"):
        assert re.search(rf"^\s*{mode}\s.*\d$", out, re.M)
    assert "at 180 GFLOP/s (given)" in out and "in 16 GB (given)" in out
    assert main(["plan", "--batch", "1024", "--device", "cuda", "--precision", "bf16", "--memory-limit", "80GB"]) == 0
    out = capsys.readouterr().out
    assert "fused stages on cuda" in out and "floor:" not in out
    assert main(["plan", "--batch", "1024", "--ranks", "4", "--rate", "180"]) == 0
    out = capsys.readouterr().out
    assert "131,584 pairs for each of 4 processes" in out
    assert "Pairs by process: 131,584 in 4; the largest share is 1.000 of the mean." in out
    assert "sums of edges at nodes (1,024 × 512, 4 times)" in out and "Derived, with links of 25 GB/s" in out
    assert "round differently, the first one's gradients are sent too" in out
    assert re.search(r"^Repeated by every process: 1\.\d\d% of the products", out, re.M)
    assert re.search(
        r"^  linear maps of nodes: 1\.\d\d%; shared it would save 0\.4\d* s and send for 0\.0\d* s$", out, re.M
    )


@pytest.mark.parametrize("sizes", [["130", "--views", "65"], ["12", "--dim", "1028", "--device", "cuda"]], ids=str)
def test_plan_takes_the_stages_that_take_the_sizes(sizes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As impl="auto" does."""
    assert main(["plan", "--batch", *sizes, "--rate", "1"]) == 0
    assert "torch stages on" in capsys.readouterr().out


def test_plan_needs_no_memory_of_what_it_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--batch", "12", "--dim", "1000000", "--memory-limit", "1TB"]) == 0
    assert "GFLOP/s (measured here)" in capsys.readouterr().out


@pytest.mark.parametrize("classes", ["100", "100000"])
def test_plan_lists_the_whole_peak(classes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Terms add up, those that are below zero included; each is rounded to three digits."""
    assert main(["plan", "--batch", "300", "--classes", classes, "--rate", "1"]) == 0
    out = capsys.readouterr().out
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}
    terms = [
        float(number.replace(",", "")) * units[unit]
        for number, unit in re.findall(r" (-?[\d.,]*\d) ([GMk]?B)[,.]", out[out.index("At store's peak:") :])
    ]
    number, unit = re.search(r"^\s*store\s+([\d.,]+) (\w+)", out, re.M).groups()
    peak = float(number.replace(",", "")) * units[unit]
    assert len(terms) > 5 and abs(sum(terms) - peak) <= 0.005 * (peak + sum(map(abs, terms)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "the following arguments are required: --batch"),
        (["plan", "--batch", "7", "--rate", "1"], "batch is 7 and views is 3"),
        (["plan", "--batch", "12", "--memory-limit", "much"], "--memory-limit is 'much'"),
        (["plan", "--batch", "12", "--dim", "0"], "dim is 0; it must be a whole number of at least 1"),
        (["plan", "--batch", "12", "--ranks", "0"], "ranks is 0; it must be a whole number of at least 1"),
        (["plan", "--batch", "12", "--ranks", "5"], "--ranks is 5; --batch, 12, must be a multiple of it"),
        (["plan", "--batch", "12", "--processes", "2"], "--processes is the old name of an option; it must be --ranks"),
        (["plan", "--batch", "12", "--rate", "0"], "rate is 0.0; it must be a number above 0"),
        (["plan", "--batch", "12", "--rate", "nan"], "rate is nan; it must be a number above 0"),
        (["plan", "--batch", "12", "--classes", "3"], "--classes is 3; it must be at least 4, the classes in a batch"),
        (
            ["plan", "--batch", "130", "--views", "65", "--stages", "fused"],
            "--views is 65; it must be at most 64, unless --stages is torch",
        ),
        (["bench"], "the following arguments are required: {step,memory}"),
        (["bench", "step", "--batch", "0"], "batch is 0; it must be a whole number of at least 4"),
        (["bench", "step", "--batch", "10"], "batch is 10 and views is 3"),
        (["bench", "step", "--impl", "cuda"], "impl is 'cuda', which is not available for loss"),
        (
            ["bench", "memory", "--classes", "3"],
            "classes is 3; it must be at least 43, the classes in a batch of 129 with 3 views",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"gcahng: error: {message}") and err.count("\n") == 1


def test_bytes_are_read() -> None:
    texts = ("16GB", "1.5 GiB", "512", "2k", "80gb")
    assert [parse_bytes(text) for text in texts] == [16 * 10**9, 3 * 2**29, 512, 2000, 80 * 10**9]
    for text in ("", "GB", "-1", "0", "1e9"):
        with pytest.raises(UserError, match="--memory-limit"):
            parse_bytes(text)
