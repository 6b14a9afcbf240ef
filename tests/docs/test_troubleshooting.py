"""The messages that the page on troubleshooting quotes are messages of the code."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from doc_pages import ROOT, prose

PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"


def quoted() -> list[str]:
    """The messages in the first column of the page's tables."""
    return [quote for _, quote in re.findall(r"^\| (`+)(.+?)\1 \|", prose(PAGE), re.MULTILINE)]


@cache
def messages() -> frozenset[str]:
    """Every text in the code, with … for what differs from case to case."""
    found = set()
    for path in [*sorted((ROOT / "gcahng").rglob("*.py")), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                found.add(re.sub(f"{GAP}+", GAP, "".join(parts)))
    return frozenset(found)


@pytest.mark.parametrize("quote", quoted())
def test_a_quoted_message_is_one_of_the_code(quote: str) -> None:
    assert quote in messages()


def test_there_are_messages() -> None:
    assert len(quoted()) >= 25
    assert "no torch in this environment" not in messages()  # a part of a message is none
