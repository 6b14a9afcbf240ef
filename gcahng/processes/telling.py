"""How an error of one process ends all processes of a job, and one of them says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from gcahng.engine.peers import LostProcess
from gcahng.errors import UserError
from gcahng.processes.watch import Watch

_Error = TypeVar("_Error", bound=BaseException)


class OtherProcessFailed(UserError):
    """Another process of the run failed and reports its error; this process only ends."""


@contextmanager
def telling(here: object, watch: Watch) -> Iterator[None]:
    """A context in which an error of this process, or the loss of another, ends all, and one of them tells why."""
    try:
        yield
    except LostProcess as error:
        told = watch.explain(error)
        raise (OtherProcessFailed(error.text) if told is None else told) from None
    except (OtherProcessFailed, SystemExit):  # the latter after --help, in all
        raise
    except BaseException as error:
        if is_of_all(error):
            raise
        if not watch.fail(f"{here} failed: {error}"):
            raise OtherProcessFailed(f"another process failed before {here}") from error
        error.where = str(here)  # type: ignore[attr-defined]
        raise


def of_all(error: _Error) -> _Error:
    """The error, marked as one that all processes know of."""
    error.of_all = True  # type: ignore[attr-defined]
    return error


def is_of_all(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of what it comes from."""
    while error is not None:
        if getattr(error, "of_all", False):
            return True
        error = error.__cause__
    return False
