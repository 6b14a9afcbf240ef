"""The watch of a process whose store does not answer."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from gcahng.engine.peers import Peer, this_process
from gcahng.errors import UserError
from gcahng.processes import group, watch
from gcahng.processes.group import OtherProcessFailed, run_processes


class Silent:
    """A store that takes a question and does not answer it before it is let go."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()

    def set(self, key: str, value: object) -> None:
        self.asked.set()
        self.let_go.wait(60)

    def compare_set(self, key: str, old: str, new: str) -> str:
        raise AssertionError("two threads ask the store at once")

    get = multi_get = compare_set


def test_a_process_can_fail_while_the_store_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_GRACE", 0.1)
    store, peers = Silent(), [this_process(0, 2), Peer(1, 2, "elsewhere", "", 1, "")]
    made = watch.Watch(store, peers, 0, 600.0)
    asking = threading.Thread(target=made._say_done, args=(False,), daemon=True)
    asking.start()
    assert store.asked.wait(60)
    told = []
    failing = threading.Thread(target=lambda: told.append(made.fail("this")), daemon=True)
    failing.start()
    failing.join(30)
    store.let_go.set()
    assert told == [True]
    asking.join(30)
    assert not asking.is_alive()


def test_a_process_that_cannot_make_its_group_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is this one, too: the store is that of one process."""
    store = dist.HashStore()
    monkeypatch.setattr(group.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(group, "launched", lambda: group.Launch(0, 2))
    monkeypatch.setattr(group, "meet", lambda *_: [this_process(0, 2), Peer(1, 2, "elsewhere", "", 1, "")])
    told: list[str] = []
    monkeypatch.setattr(group.Watch, "fail", lambda self, text: told.append(text) or True)
    monkeypatch.setattr(group.Watch, "_say_done", lambda self, wait: None)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no interface")

    monkeypatch.setattr(group.dist, "init_process_group", fail)
    with pytest.raises(ValueError, match="no interface") as raised, run_processes():
        pass
    assert not isinstance(raised.value, (UserError, OtherProcessFailed))
    assert len(told) == 1 and told[0].endswith("failed: no interface") and told[0].startswith("process 0 of 2 on ")
