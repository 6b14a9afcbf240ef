"""The watch of a process whose store does not answer."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from gcahng.engine.peers import Peer, this_process
from gcahng.errors import UserError
from gcahng.evaluation.embed import EmbedOptions
from gcahng.evaluation.embed_parts import embed_in_parts
from gcahng.processes import Processes, group, watch
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


def test_a_signal_that_is_passed_on_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = watch.Watch(dist.HashStore(), [this_process(0, 1)], 0, 600.0)
    made._note([signal.SIGTERM, signal.SIGTERM])
    made._note([signal.SIGTERM])
    assert made._signals == [signal.SIGTERM]
    made._note([signal.SIGINT])
    assert made._signals == [signal.SIGTERM, signal.SIGINT]
    monkeypatch.setattr(watch, "ECHO", 0.0)
    made._note([signal.SIGINT])
    assert made._signals[1:] == [signal.SIGINT, signal.SIGINT]


@pytest.mark.parametrize("grace", [60.0, 0.0])
def test_sigterm_waits_for_the_message_and_then_acts_as_before(grace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_GRACE", grace)
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    own = signal.getsignal(signal.SIGTERM)
    try:
        watch._spare(own)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == ([] if grace else [signal.SIGTERM])
        assert (signal.getsignal(signal.SIGTERM) is own) == (not grace)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_process_of_several_may_work_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "launched", lambda: group.Launch(1, 2))
    with group.alone(), run_processes(timeout=1.0) as processes:
        assert processes.count == 1 and processes.ranks is None


def test_several_processes_that_embed_each_need_a_gpu_of_their_own() -> None:
    """All of them would take the one that is named."""

    job = SimpleNamespace(
        items=SimpleNamespace(names=["a"]),
        out="x.npy",
        identity=SimpleNamespace(fingerprint="0" * 12),
        options=EmbedOptions(device="cuda:0"),
    )
    processes = Processes()
    processes.count = 2
    with pytest.raises(UserError, match="device is 'cuda:0'; each of 2 processes takes a GPU of its own: give cuda"):
        embed_in_parts(job, processes)  # type: ignore[arg-type]
