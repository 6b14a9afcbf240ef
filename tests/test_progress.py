"""The progress bar of commands: on a terminal's standard error, and silent elsewhere."""

from __future__ import annotations

import io

import pytest

from gcahng.commands.progress_bar import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("unit", "amount"), [("count", "30/40"), ("bytes", "30/40 bytes")])
def test_on_a_terminal(
    unit: str, amount: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress_bar("embedding", unit=unit) as bar:
        bar(10, 40)
        bar(30, 40)
    assert "embedding" in screen.getvalue() and amount in screen.getvalue() and "left" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_elsewhere_it_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("embedding") as bar:
        bar(10, 40)
    assert capsys.readouterr() == ("", "")
