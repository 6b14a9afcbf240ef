"""What a case works with: its chance, its folder, the good inputs, and commands whose manners are checked."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINE, REFUSED = "fine", "refused"
MOST_CHARACTERS = 6000  # of an error
FAULTS = ("crash", "hang", "traceback", "memory", "manners", "wrong", "half-changed", "half-written")


class Fault(Exception):
    """The library did what it must never do.

    Attributes:
        kind: one of FAULTS.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        assert kind in FAULTS, kind
        self.kind = kind


@dataclass(frozen=True)
class Ran:
    """A command that ended as commands should.

    Attributes:
        status: 0; or 2 for a mistake, 1 for differences that `data verify` found.
        out: what it printed.
        err: what it said on standard error.
    """

    status: int
    out: str
    err: str

    @property
    def verdict(self) -> str:
        return FINE if self.status == 0 else REFUSED


@dataclass
class Case:
    """One case, in a process of its own.

    Attributes:
        chance: its random numbers, which follow from the seed, the group and the number alone.
        world: the folder of good inputs, which no case changes.
        folder: an empty folder of the case, which is the working directory.
        notes: where the harness keeps what it needs to report.
    """

    chance: random.Random
    world: Path
    folder: Path
    notes: Path

    def tell(self, text: str) -> None:
        """Say what is tried. It is reported if the case fails, whichever way it ends."""
        path = self.notes / "what"
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text.replace(str(self.folder), ".")[:600] + "\n")
        if os.stat(path).st_uid == os.getuid():
            path.chmod(0o666)  # the case may drop its rights

    def copy(self, name: str, to: str | None = None) -> Path:
        """A copy of one of the world's good inputs, which the case may damage."""
        source, target = self.world / name, self.folder / (to or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target)
        return target

    def command(self, *arguments: str | Path) -> Ran:
        """Run `gcahng` with these arguments in this process, and check how it ends.

        Raises:
            Fault: it raised, ended with a strange status, or refused in other than one line.
        """
        from gcahng.cli import main

        given = [str(argument) for argument in arguments]
        self.tell(f"gcahng {' '.join(_short(repr(word)) for word in given)}")
        with _captured(self.notes) as read:
            try:
                status = main(given)
            except SystemExit as end:  # --help
                status = end.code if isinstance(end.code, int) else 1
            except BaseException as error:
                raise raised(error) from error
        most = MOST_CHARACTERS + 4 * sum(map(len, given))  # an error may repeat what was given
        return ended(status, *read(), may_be_one=given[:2] == ["data", "verify"], most=most)


def ended(status: int | None, out: str, err: str, may_be_one: bool = False, most: int = MOST_CHARACTERS) -> Ran:
    """A command that has ended.

    Args:
        status, out, err: how it ended, and what it said.
        may_be_one: whether status 1 is an answer, as of `data verify`.
        most: how many characters its error may have.

    Raises:
        Fault: it ended as no command should.
    """
    said = [line for line in err.splitlines() if not _is_note(line)]
    if "Traceback (most recent call last)" in err:
        raise Fault("traceback", _last_lines(err))
    if status == 0 or (status == 1 and may_be_one):
        return Ran(status, out, err)
    if status != 2:
        raise Fault("manners", f"status {status}: {_last_lines(err)}")
    if len(said) != 1 or not said[0].startswith("gcahng: error: "):
        raise Fault("manners", f"status 2 with {len(said)} lines: {_last_lines(err)}")
    if len(said[0]) > most:
        raise Fault("manners", f"an error of {len(said[0])} characters: {said[0][:300]} …")
    return Ran(2, out, err)


def refused(action: Callable[[], Any], also: tuple[type[Exception], ...] = ()) -> bool:
    """Call something of the Python API, and say whether it refused with a UserError (or one of `also`).

    Raises:
        Fault: it raised anything else.
    """
    from gcahng.errors import UserError

    try:
        action()
    except UserError as error:
        text = str(error)
        if not text.strip() or len(text) > MOST_CHARACTERS:
            raise Fault("manners", f"an error of {len(text)} characters: {text[:300]}") from error
        return True
    except also:
        return True
    except Fault:
        raise
    except Exception as error:
        raise raised(error) from error
    return False


def raised(error: BaseException) -> Fault:
    """The fault that an exception is, with the place in the library that it came through last."""
    if isinstance(error, Fault):
        return error
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if f"{os.sep}gcahng{os.sep}" in name:
            place = f" at {name.rsplit(f'{os.sep}gcahng{os.sep}', 1)[1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
    memory = isinstance(error, MemoryError) or "allocate" in text or "bad_alloc" in text
    return Fault("memory" if memory else "traceback", text)


def unchanged(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Check that files are as they were.

    Raises:
        Fault: they are not.
    """
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if different:
        raise Fault("half-changed", f"files changed although it was refused: {', '.join(different[:5])}")


def contents(folder: Path) -> dict[str, bytes]:
    """Every plain file below a folder, by its path; locks, which hold nothing, are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != ".lock"
    }


def no_temporaries(folder: Path) -> None:
    """Check that no half-written file is left.

    Raises:
        Fault: there is one.
    """
    if left := [str(path) for path in folder.rglob("*.tmp")]:
        raise Fault("half-written", f"left behind: {left[0]}")


def _short(text: str) -> str:
    return text if len(text) < 200 else f"{text[:80]}… {len(text)} characters …{text[-60:]}"


def _is_note(line: str) -> bool:
    """Whether a line of standard error is no error: a note, a warning, or an image that is left out."""
    return line.startswith(("gcahng: note: ", "gcahng: warning: ", "left out, ")) or not line.strip()


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])[:700]


@contextmanager
def _captured(notes: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """Standard output and error go to files, below Python too, which the function that is yielded reads."""
    kept = [os.dup(1), os.dup(2)]
    paths = [notes / "out", notes / "err"]
    sys.stdout.flush()
    sys.stderr.flush()
    for number, path in zip((1, 2), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, number)
        os.close(file)

    def read() -> tuple[str, str]:
        return tuple(path.read_text(encoding="utf-8", errors="backslashreplace") for path in paths)  # type: ignore[return-value]

    try:
        yield read
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
