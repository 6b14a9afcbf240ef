"""The first thing that the processes of a job do: see that all are there, and that they are of one kind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from gcahng.engine.peers import Peer, difference, this_process
from gcahng.errors import UserError

_NAMED = 5


def meet(store: Any, rank: int, count: int, facts: Mapping[str, object], timeout: float) -> list[Peer]:
    """Wait for all processes.

    Nothing of torch.distributed but its store is used, because processes of two kinds may not be able to talk at all.

    Args:
        store: of torch.distributed, with a prefix that is these processes' own.
        rank: of this process.
        count: of processes.
        facts: what must be the same in all processes, by name.
        timeout: seconds for all to come.

    Returns:
        The processes by rank.

    Raises:
        UserError: some have not come, or something differs. All processes that have come raise it.
    """
    store.set(f"here/{rank}", json.dumps([this_process(rank, count), facts], default=str))
    if rank == 0:
        store.set("met", json.dumps(_gathered(store, count, timeout)))
    elif _missing(store, ["met"], timeout + _margin(timeout)):
        raise UserError(f"process 0 of {count} did not come within {timeout:.0f} s; {_look_there(count)}")
    result = json.loads(store.get("met"))
    if "error" in result:
        raise UserError(result["error"])
    return [Peer(*peer) for peer in result["peers"]]


def _gathered(store: Any, count: int, timeout: float) -> dict[str, Any]:
    """What the first process tells the others: who they all are, or what is wrong."""
    keys = {f"here/{rank}": rank for rank in range(count)}
    if missing := _missing(store, list(keys), timeout):
        late = [str(keys[key]) for key in missing]
        named = ", ".join(late[:_NAMED]) + (f" and {len(late) - _NAMED} more" if len(late) > _NAMED else "")
        some = "process" if len(late) == 1 else "processes"
        return {"error": f"{some} {named} of {count} did not come within {timeout:.0f} s; {_look_there(count)}"}
    there = [json.loads(store.get(key)) for key in keys]
    peers = [Peer(*peer) for peer, _ in there]
    if text := difference(peers, [facts for _, facts in there]):
        return {"error": text}
    return {"peers": peers}


def _look_there(count: int) -> str:
    return f"WORLD_SIZE is {count}: so many processes must be started, and all reach MASTER_ADDR"


def _margin(timeout: float) -> float:
    return max(5.0, timeout / 10)


def _missing(store: Any, keys: list[str], timeout: float) -> list[str]:
    """The keys that have not come in time. The store's own wait would write to the log when time is up."""
    until, pause = time.monotonic() + timeout, 0.01
    while keys:
        keys = [key for key in keys if not store.check([key])]
        if not keys or time.monotonic() > until:
            break
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)
    return keys
