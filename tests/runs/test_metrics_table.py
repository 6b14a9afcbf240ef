"""The table of results: as wide as it needs, or as narrow as the terminal is."""

from __future__ import annotations

import pytest

from gcahng.runs.metrics_table import metrics_table

METRICS = {"recall@1": 0.5, "recall@2": 0.625, "recall@4": 0.75, "recall@8": 1.0, "map@r": 0.25, "r_precision": 0.0}
ROWS = {"test (percent)": METRICS | {"queries": 7}, "test, best checkpoint (step 6)": METRICS}


def test_columns_of_one_width() -> None:
    lines = metrics_table({"test (percent)": METRICS}).splitlines()
    assert lines[0].split() == ["Recall@1", "Recall@2", "Recall@4", "Recall@8", "MAP@R", "R-Precision"]
    assert lines[1].split() == ["test", "(percent)", "50.00", "62.50", "75.00", "100.00", "25.00", "0.00"]
    assert [len(line) for line in lines] == [14 + 6 * 13] * 2
    assert metrics_table({"test (percent)": METRICS}, 92) == metrics_table({"test (percent)": METRICS})


@pytest.mark.parametrize("width", [200, 107, 95, 92, 91, 80, 60, 40, 32])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for rows in (ROWS, {"test (percent)": METRICS}):
        table = metrics_table(rows, width)
        assert max(map(len, table.splitlines())) <= width
        numbers = [word for word in table.split() if word.replace(".", "").isdigit() and "." in word]
        assert numbers == ["50.00", "62.50", "75.00", "100.00", "25.00", "0.00"] * len(rows)


def test_eighty_columns_hold_the_usual_row() -> None:
    assert metrics_table({"test (percent)": METRICS}, 80).count("\n") == 1


def test_a_block_for_each_row() -> None:
    assert metrics_table({"test": {"recall@1": 0.5, "r_precision": 0.25}}, 20) == (
        "test\n  Recall@1      50.00\n  R-Precision   25.00"
    )
