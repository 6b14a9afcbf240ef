"""The processes of a group as each other's peers: who and where they are, whether they live, and what differs."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gcahng.errors import UserError

# Of a process whose connection was lost, the kernel may show for a moment that it still runs.
_SECONDS_TO_VANISH = 2.0
_SHOWN = 3  # of the options that differ
# What gloo, NCCL and torch's stores say when another process is gone or does not answer.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket|NCCL|no route|unreachable|"
    r"op\.preamble|ioexception|connection aborted|aborted (connection|communicator)|communicator was aborted",
    re.IGNORECASE,
)
_NOT_LOST = re.compile(r"invalid (usage|argument)|duplicate gpu|only supported with|out of memory", re.IGNORECASE)


class LostProcess(UserError):
    """Another process of the group has ended, is stopped, or does not answer.

    Attributes:
        said: what the library that lost it said.
    """

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(message)
        self.said = said


class Peer(NamedTuple):
    """A process of a group.

    Attributes:
        rank: its place in the group.
        count: how many there are.
        host: the name of its machine.
        space: what its process number is good in: one start of one machine, and one container of it.
        pid: its number.
        started: when it started, in the machine's own count; a number is given to one process after another.
    """

    rank: int
    count: int
    host: str
    space: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.rank} of {self.count} on {self.host}"

    def state(self) -> str | None:
        """ "runs", "stopped" or "ended"; None where this process cannot know."""
        if not self.space or self.space != _space():
            return None
        found = _stat(self.pid)
        if found is None or found[1] != self.started or found[0] in "ZX":
            return "ended"
        return "stopped" if found[0] in "Tt" else "runs"


def this_process(rank: int, count: int) -> Peer:
    """This process as the others know it."""
    found = _stat(os.getpid())
    return Peer(rank, count, platform.node(), _space() if found else "", os.getpid(), found[1] if found else "")


def lost(peers: Sequence[Peer], said: str) -> LostProcess:
    """The error of a group that has lost a process.

    Args:
        peers: the other processes, as far as they are known.
        said: what the library said.
    """
    until = time.monotonic() + _SECONDS_TO_VANISH
    while True:
        states = [(peer, peer.state()) for peer in peers]
        if found := [(peer, state) for peer, state in states if state in ("ended", "stopped")]:
            peer, state = found[0]
            what = "was killed, or ended without a word" if state == "ended" else "is stopped (SIGSTOP)"
            return LostProcess(f"{peer} {what}", said)
        if time.monotonic() > until or all(state is None for _, state in states):
            break
        time.sleep(0.05)
    among = f" among {', '.join(map(str, peers[:_SHOWN]))}" if len(peers) <= _SHOWN and peers else ""
    return LostProcess(f"another process of the group{among} has ended, is stopped or cannot be reached ({said})", said)


def says_lost(error: RuntimeError) -> str | None:
    """What an error of a collective says of another process that was lost, in one line; None if it is another error."""
    line = " ".join(str(error).split("\n")[0].split())
    return line[:200] if _LOST.search(str(error)) and not _NOT_LOST.search(str(error)) else None


def difference(who: Sequence[Peer], facts: Sequence[Mapping[str, object]]) -> str | None:
    """What the processes do not have in common, in one line; None if nothing.

    Args:
        who: the processes by rank.
        facts: of each of them, by name.
    """
    first = facts[0]
    for peer, other in zip(who, facts, strict=True):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if not names:
            continue
        parts = [
            f"{name} is {_shown(first, name)} in {who[0]} and {_shown(other, name)} in {peer}"
            for name in names[:_SHOWN]
        ]
        more = f", and {len(names) - _SHOWN} more differ" if len(names) > _SHOWN else ""
        return f"{'; '.join(parts)}{more}; it must be the same in all processes"
    return None


def _shown(facts: Mapping[str, object], name: str) -> str:
    if name not in facts:
        return "missing"
    value = facts[name]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


@cache
def _space() -> str:
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc is that of another namespace
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str] | None:
    """State and start of a process of this machine; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), fields[19].decode()
