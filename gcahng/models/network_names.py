"""What a name that is no network's was probably meant to be."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from gcahng.errors import UserError
from gcahng.extras import require


def meant(name: str, built_in: Sequence[str]) -> str:
    """What must stand in place of an unknown name, with the names that are near it.

    Args:
        name: of which nothing before a colon names a library.
        built_in: the names that need no library's list.
    """
    known = f"it must be {', '.join(built_in)}, or timm:NAME"
    bare = name.replace("/", ":").rpartition(":")[2]  # the hub writes timm/NAME
    plain = {other.rpartition(":")[2]: other for other in built_in}
    if bare in plain:
        return f"did you mean {plain[bare]}? {known}"
    if close := get_close_matches(name, built_in, n=1, cutoff=0.7):
        return f"did you mean {close[0]}? {known}"
    near = [plain[other] for other in get_close_matches(bare.lower(), plain, n=1, cutoff=0.8)]
    try:
        require("timm", extra="train", purpose="names are looked up")
        near += _near_timm(bare)
    except UserError:
        pass
    return f"did you mean {' or '.join(near[:3])}? {known}" if near else known


def check_timm_name(name: str) -> None:
    """See that timm has a network, with its weights where the name has a tag.

    Args:
        name: after "timm:".

    Raises:
        UserError: it has not; names those that are near.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = _near_timm(name.rpartition("/")[2])
        hint = f"did you mean {' or '.join(near)}?" if near else "timm has no such network"
        raise UserError(f"backbone.name is 'timm:{name}'; {hint}")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        near = [f"timm:{other}" for other in get_close_matches(name, tagged, n=2, cutoff=0.8)]
        others = ", ".join(f"timm:{other}" for other in tagged)
        meant_one = f"did you mean {' or '.join(near)}? " if near else ""
        hint = f"{meant_one}its weights are {others}" if tagged else "it has no weights"
        raise UserError(f"backbone.name is 'timm:{name}'; {hint}")


def _near_timm(name: str) -> list[str]:
    """Names of timm's networks that are near `name`, the nearest first, with its tag where that is one of theirs."""
    import timm

    architecture, _, tag = name.lower().replace("-", "_").replace(" ", "_").partition(".")
    models = timm.list_models()
    same = [other for other in models if other.replace("_", "") == architecture.replace("_", "")]
    architecture = same[0] if len(same) == 1 else architecture
    if architecture in models:
        tagged = f"{architecture}.{tag}"
        return [f"timm:{tagged if tag and tagged in timm.list_pretrained(f'{architecture}.*') else architecture}"]
    return [f"timm:{other}" for other in get_close_matches(architecture, models, n=3, cutoff=0.6)]
