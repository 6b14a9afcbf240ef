"""Optional dependencies: an error of one line where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from gcahng.errors import UserError


def require(*modules: str, extra: str, purpose: str) -> None:
    """Check that top-level modules are installed, without importing them.

    Args:
        modules: their names.
        extra: the extra of gcahng that brings them.
        purpose: what they are needed for, as the error begins.

    Raises:
        UserError: names what is missing, what it is for and the extra of gcahng that brings it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(f'{purpose}: {", ".join(missing)} is not installed; pip install "gcahng[{extra}]" brings it')
