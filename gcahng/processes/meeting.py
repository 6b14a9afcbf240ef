"""The first thing that the processes of a job do: see that all are there, and that they are of one kind."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from typing import Any

from gcahng.engine.peers import Peer, difference, says_lost, this_process
from gcahng.errors import UserError, UserNote

_NAMED = 5
_SECONDS_TO_READ = 5.0
_SECONDS_TO_NOTE = 10.0


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
    try:
        result = _met(store, rank, count, facts, timeout)
    except RuntimeError as error:  # the store has gone, or cannot be reached
        said = says_lost(error) or " ".join(str(error).split("\n")[0].split())
        raise UserError(f"process {rank} of {count} has lost the others before all had come ({said[:200]})") from None
    if "error" in result:
        raise UserError(result["error"])
    return [Peer(*peer) for peer in result["peers"]]


def _met(store: Any, rank: int, count: int, facts: Mapping[str, object], timeout: float) -> dict[str, Any]:
    """What the first process tells all."""
    store.set(f"here/{rank}", json.dumps([this_process(rank, count), facts], default=str))
    if rank == 0:
        result = _gathered(store, count, timeout)
        store.set("met", json.dumps(result))
        if "error" in result:  # the first process ends, and the store may go with it
            come = [other for other in range(1, count) if store.check([f"here/{other}"])]
            _missing(store, [f"read/{other}" for other in come], _SECONDS_TO_READ)
        return result
    if _missing(store, ["met"], timeout + _margin(timeout)):
        return {"error": f"process 0 of {count} did not come within {timeout:.0f} s; {_look_there(count)}"}
    result = json.loads(store.get("met"))
    if "error" in result:
        store.set(f"read/{rank}", "")
    return result


def _gathered(store: Any, count: int, timeout: float) -> dict[str, Any]:
    """What the first process tells the others: who they all are, or what is wrong."""
    keys = {f"here/{rank}": rank for rank in range(count)}
    missing = _missing(store, list(keys), min(timeout, _SECONDS_TO_NOTE))
    if missing and timeout > _SECONDS_TO_NOTE:
        note = f"waiting up to {timeout:.0f} s for {_listed(missing, keys, count)}; all must call this"
        warnings.warn(f"{note}, unless it is within gcahng.processes.alone()", UserNote, stacklevel=2)
        missing = _missing(store, missing, timeout - _SECONDS_TO_NOTE)
    if missing:
        late = _listed(missing, keys, count)
        return {"error": f"{late} did not come within {timeout:.0f} s; {_look_there(count)}"}
    there = [json.loads(store.get(key)) for key in keys]
    peers = [Peer(*peer) for peer, _ in there]
    if text := difference(peers, [facts for _, facts in there]):
        return {"error": text}
    return {"peers": peers}


def _listed(missing: list[str], keys: Mapping[str, int], count: int) -> str:
    late = [str(keys[key]) for key in missing]
    named = ", ".join(late[:_NAMED]) + (f" and {len(late) - _NAMED} more" if len(late) > _NAMED else "")
    return f"{'process' if len(late) == 1 else 'processes'} {named} of {count}"


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
