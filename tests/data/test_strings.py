"""Strings are the sequence of strings that they were made from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gcahng.data import strings
from gcahng.data.strings import Strings

TEXTS = ["a.png", "", "é/ü.jpg", "e\u0301", "日本/画像.png", "bad\udcff.png", "\ud83d", "tab\t", "x" * 500, "", "z"]


@pytest.fixture(params=[1, 3, 1 << 14])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strings, "_AT_ONCE", request.param)


def test_it_is_the_sequence(at_once: None) -> None:
    kept = Strings(TEXTS)
    assert list(kept) == TEXTS and [kept[i] for i in range(len(TEXTS))] == TEXTS and len(kept) == len(TEXTS)
    assert kept[-1] == "z" and kept[2:9:3] == tuple(TEXTS[2:9:3]) and kept[5:2] == ()
    assert kept.index("tab\t") == 7 and "" in kept and "b" not in kept and list(reversed(kept)) == TEXTS[::-1]
    for index in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            kept[index]
    assert list(Strings()) == [] and list(Strings([""])) == [""] and not Strings()


def test_equality() -> None:
    kept = Strings(TEXTS)
    assert kept == Strings(TEXTS) == TEXTS and kept == tuple(TEXTS)
    assert kept != Strings(TEXTS[:-1]) and kept != Strings(["a", "b"]) and Strings(["ab", "c"]) != Strings(["a", "bc"])
    assert kept != TEXTS[:-1] and Strings(["a"]) != "a" and kept != 3
    assert repr(kept) == "Strings('a.png', '', 'é/ü.jpg', … 11 in all)" and repr(Strings(["a"])) == "Strings('a')"


@pytest.mark.parametrize("chosen", [[], [0], [10, 0, 0, 8, 4], list(range(11)), [1, 9]])
def test_taking_some(chosen: list[int], at_once: None) -> None:
    taken = Strings(TEXTS).take(torch.tensor(chosen, dtype=torch.int64))
    assert list(taken) == [TEXTS[i] for i in chosen] and taken == Strings(TEXTS[i] for i in chosen)


def test_copies() -> None:
    kept = Strings(TEXTS)
    assert copy.deepcopy(kept) == kept == pickle.loads(pickle.dumps(kept))
    assert Strings(["abc", "de"]).nbytes == 5 + 3 * 8
