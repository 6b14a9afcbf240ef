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


def faiss_missing() -> str | None:
    """Why faiss cannot be used, in one line with the remedy, or None. Imports it.

    faiss-cpu and faiss-gpu install into the same folder. Removing one takes files of the other, and what is left
    imports, if at all, as an empty package.
    """
    try:
        if find_spec("faiss") is None:
            return 'faiss is not installed; pip install "gcahng[faiss-cpu]" or "gcahng[faiss-gpu]" brings it'
        import faiss

        faiss.IndexFlatL2  # noqa: B018
    except (ImportError, AttributeError, OSError) as error:
        return (
            f"faiss is installed but does not work ({' '.join(str(error).split())}); if faiss-cpu and faiss-gpu were "
            "both installed, removing one has broken the other: pip uninstall -y faiss-cpu faiss-gpu, then install one"
        )
    return None


def require_faiss(purpose: str) -> None:
    """Check that faiss is installed and works.

    Args:
        purpose: what it is needed for, as the error begins.

    Raises:
        UserError: it is not, or does not.
    """
    if reason := faiss_missing():
        raise UserError(f"{purpose}: {reason}")
