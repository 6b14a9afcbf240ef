"""argparse with the command line's manners: a mistake is a `UserError`, one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from gcahng.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that raises `UserError` instead of printing its usage."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
