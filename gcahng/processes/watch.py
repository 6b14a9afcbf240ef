"""Each process of a job watches the others, so that one that is killed, stopped or fails ends the whole job.

A process that computes with others waits for them inside gloo or NCCL, where Python runs no signal handler and raises
nothing. So a thread of its own looks after them. It writes a sign of life to the store by which the processes met,
reads those of the others, and asks the system after those on the same machine. When one is lost it ends this process,
if the main thread does not come out by itself, and one process of the job tells why.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from gcahng.engine.peers import LostProcess, Peer
from gcahng.streams import print_line

FAILED = "failed"  # the key of what ended the job: the first process that writes it tells
_DONE = b"done"
_ALL = 16  # processes that all watch each other; of more, each watches the next one
_GRACE = 5.0  # seconds for the main thread to come out of a collective whose process is lost
ECHO = 0.25  # seconds within which the same signal again is the first one, which something has passed on
_IMPATIENT = 5.0  # seconds without a sign of life after a signal that is to end the run


class Watch:
    """Watches the other processes while it is entered.

    Args:
        store: by which the processes met; each of them has its own connection to it.
        peers: all processes, by rank.
        rank: of this one.
        timeout: seconds without a sign of life after which a process counts as lost.

    Attributes:
        timeout: the same; it may change.
        way_back: says how the run can be continued, for the message.
    """

    def __init__(self, store: Any, peers: list[Peer], rank: int, timeout: float) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store
        self._first_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._peers, self._rank, self.timeout = peers, rank, timeout
        self.way_back: Callable[[], str] = str
        self._over, self._lock = threading.Event(), threading.RLock()
        self._count = 0
        self._signals: list[int] = []
        self._signalled = 0.0
        self._heard = {peer.rank: (b"", time.monotonic()) for peer in self._watched()}
        self._looked = time.monotonic()
        self._ending = self._told_here = False
        self._other = ""  # what another process told
        self._killed_for_memory = _oom_kills()
        self._before: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._run, name="gcahng watch", daemon=True)

    @staticmethod
    def prepare(store: Any, rank: int) -> None:
        """Make the keys that a watch reads; called before the processes meet."""
        store.set(f"beat/{rank}", "0")
        if rank == 0:
            store.set(FAILED, "")

    def __enter__(self) -> Watch:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._has_handlers = threading.current_thread() is threading.main_thread()
        if self._has_handlers:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
            self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._wake()
        self._thread.join(_GRACE)
        if self._has_handlers:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if kind is not None and self._told_here:
                _spare(self._before[signal.SIGTERM])
        if not self._thread.is_alive():
            for end in (self._reader, self._writer):
                end.close()
        with suppress(RuntimeError):
            self._say_done(wait=kind is None or (self._told_here and self._first_has_store))

    def fail(self, text: str) -> bool:
        """Write down what ends the job.

        Args:
            text: the message.

        Returns:
            Whether this process is the one that tells; another may have been first.
        """
        self._ending = True
        own = json.dumps({"rank": self._rank, "text": text})
        with suppress(RuntimeError):
            with self._locked():
                first = self._reach().compare_set(FAILED, "", own)
            self._told_here = json.loads(first)["rank"] == self._rank
            return self._told_here
        self._told_here = not self.failed()  # nobody hears of it
        return self._told_here

    def failed(self) -> str:
        """What ended the job, as another process has it; "" if nothing is known of."""
        with suppress(RuntimeError):
            with self._locked():
                found = self._reach().get(FAILED)
            if found:
                record = json.loads(found)
                self._other = "" if record["rank"] == self._rank else record["text"]
        return self._other  # the store may be gone by now

    def explain(self, error: LostProcess) -> LostProcess | None:
        """What to tell of a process that a collective has lost.

        Returns:
            The error; None if another process tells.
        """
        self._ending = True
        until = time.monotonic() + 2 * self._beat() + 1
        before = self._beats()
        named = self._named()
        while named is None and not self.failed() and time.monotonic() < until:
            time.sleep(0.05)
            named = self._named()
        if named is None and not self.failed():
            after = self._beats()
            silent = [p for p in self._others() if after and before.get(p.rank) == after[p.rank] != _DONE]
            if silent:
                named = f"{silent[0]} gives no sign of life"
            elif "timed out" in error.said.lower():
                named = (
                    f"all processes live, but not all came within {self.timeout:.0f} s to the point where "
                    f"{self._peers[self._rank]} is"
                )
        text = self._with_way_back(error.text if named is None else named)
        if not self.fail(text):
            return None
        self._end_stopped()
        return LostProcess(text, error.said)

    def _with_way_back(self, text: str) -> str:
        way = self.way_back()
        return f"{text}; {way}" if way else text

    def _named(self) -> str | None:
        """What has become of a process of this machine; None if all of them run."""
        for peer in self._others():
            state = peer.state()
            if state == "ended" and self._beats([peer]).get(peer.rank) != _DONE:
                memory = _oom_kills()
                if memory > self._killed_for_memory:
                    return f"{peer} was killed because memory ran out"
                return f"{peer} was killed, or ended without a word"
            if state == "stopped":
                return f"{peer} is stopped (SIGSTOP)"
        return None

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                if (found := self._look()) is not None:
                    self._end(*found)
                self._sleep()
        except RuntimeError:  # the store has gone, and with it torchrun or the first process
            if not self._over.wait(_GRACE):
                here = self._named() or "the connection to torchrun, or to the first process, was lost"
                self._end(here, 2)

    def _look(self) -> tuple[str, int] | None:
        """Give a sign of life and look for those of the others; the message and the exit status if the job is over."""
        now = time.monotonic()
        late = now - self._looked - self._beat()
        if late > self._beat():  # this process was stopped itself, or the store was slow
            self._heard = {rank: (beat, min(now, since + late)) for rank, (beat, since) in self._heard.items()}
        self._looked = now
        ended = [peer for peer in self._watched() if peer.state() == "ended"]
        self._count += 1
        with self._locked():
            self._reach().set(f"beat/{self._rank}", str(self._count))
        if text := self.failed():
            return text, 2
        beats = self._beats(self._watched())
        limit = min(self.timeout, _IMPATIENT) if self._signals else self.timeout
        status = 128 + self._signals[0] if self._signals else 2
        if len(self._signals) > 1:
            return "interrupted", status
        for peer in self._watched():
            before, since = self._heard[peer.rank]
            beat = beats.get(peer.rank, before)
            if beat != before:
                self._heard[peer.rank] = beat, now
            elif beat == _DONE:
                continue
            elif now - since > limit:
                stopped = (
                    "is stopped (SIGSTOP)" if peer.state() == "stopped" else "may be stopped, or cannot be reached"
                )
                return f"{peer} has given no sign of life for {now - since:.0f} s and {stopped}", status
            if peer in ended and beat != _DONE:
                return self._named() or f"{peer} has ended", 2
        return None

    def _end(self, text: str, status: int) -> None:
        """End this process, unless the main thread comes out of what it does by itself."""
        another_tells = text == self.failed()
        if not another_tells:
            text = self._with_way_back(f"interrupted; {text}" if self._signals and text != "interrupted" else text)
        tells = not another_tells and self.fail(text)
        signalled = bool(self._signals)
        if self._over.wait(1.0 if signalled else _GRACE):
            return
        if tells:
            print_line(f"error: {text}" if status == 2 else text)
        self._end_stopped()
        os._exit(status)

    def _end_stopped(self) -> None:
        """End the processes of this machine that are stopped: they would hold their memory until somebody does."""
        for peer in self._others():
            if peer.state() == "stopped":
                with suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)

    def _sleep(self) -> None:
        ready, _, _ = select.select([self._reader], [], [], self._beat())
        if ready:
            with suppress(OSError):
                self._note([n for n in self._reader.recv(64) if n in (signal.SIGINT, signal.SIGTERM)])

    def _note(self, numbers: list[int]) -> None:
        """Note signals, but not the same one again within `ECHO` seconds."""
        now = time.monotonic()
        for number in numbers:
            if self._signals[-1:] != [number] or now - self._signalled >= ECHO:
                self._signals.append(number)
                self._signalled = now

    def _wake(self) -> None:
        with suppress(OSError):
            self._writer.send(b"\0")

    def _beat(self) -> float:
        return min(1.0, self.timeout / 5)

    def _others(self) -> list[Peer]:
        return [peer for peer in self._peers if peer.rank != self._rank]

    def _watched(self) -> list[Peer]:
        """The processes whose signs of life this one reads."""
        if len(self._peers) <= _ALL:
            return self._others()
        return [self._peers[(self._rank + 1) % len(self._peers)]]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A context in which no other thread asks the store; one whose question is not answered keeps the lock.

        Raises:
            RuntimeError: the store does not answer.
        """
        if not self._lock.acquire(timeout=_GRACE):
            raise RuntimeError("the store does not answer")
        try:
            yield
        finally:
            self._lock.release()

    def _reach(self) -> Any:
        """The store. Without torchrun it goes with the first process, and torch would write pages to the log."""
        if self._first_has_store and self._rank and self._peers[0].state() == "ended":
            raise RuntimeError("the store has gone with the first process")
        return self._store

    def _beats(self, peers: list[Peer] | None = None) -> dict[int, bytes]:
        """The last sign of life of each process; {} where the store has gone with the first process."""
        peers = self._others() if peers is None else peers
        with suppress(RuntimeError), self._locked():
            values = self._reach().multi_get([f"beat/{peer.rank}" for peer in peers])
            return {peer.rank: value for peer, value in zip(peers, values, strict=True)}
        return {}

    def _say_done(self, wait: bool) -> None:
        """Tell the others that this process has nothing more to do; `wait`: until they have, too, because the store
        may go with the first process."""
        with self._locked():
            self._reach().set(f"beat/{self._rank}", _DONE)
        until = time.monotonic() + _GRACE
        while wait and self._rank == 0 and time.monotonic() < until and {*self._beats().values()} != {_DONE}:
            time.sleep(0.01)

    # -- signals, in the main thread

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """A signal outside of the training steps. torchrun sends one to all when one of its processes has ended."""
        if self._ending and number == signal.SIGTERM:  # this process ends already, and may have to tell why
            return
        signal.signal(number, self._before[number])
        if number == signal.SIGTERM and (text := self._named()) is not None:
            raise LostProcess(text)
        if callable(self._before[number]):
            self._before[number](number, frame)
        elif self._before[number] == signal.SIG_DFL:
            os.kill(os.getpid(), number)


def _spare(before: Any) -> None:
    """Let SIGTERM wait for `_GRACE` seconds: torchrun sends one when another process has ended, which must not cut off
    the message of this one. After that it acts as before, if a script has caught the error and goes on.

    Args:
        before: SIGTERM's handler.
    """
    until = time.monotonic() + _GRACE

    def spare(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= until:
            signal.signal(number, before)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, spare)


def _oom_kills() -> int:
    """How many processes this machine has killed for want of memory since it started."""
    with suppress(OSError, ValueError, IndexError), open("/proc/vmstat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    return 0
