"""The groups of cases, and how many of all cases each has."""

from __future__ import annotations

from collections.abc import Sequence

from hostile import arguments, calls, configurations, images, run_files, signals, states, streams, trees, vectors
from hostile.runner import Action

# What a case of the group does, and its weight.
GROUPS: dict[str, tuple[Action, float]] = {
    "arguments": (arguments.case, 30),
    "configurations": (configurations.case, 18),
    "images": (images.case, 16),
    "run_files": (run_files.case, 16),
    "trees": (trees.case, 18),
    "calls": (calls.case, 20),
    "signals": (signals.case, 4),
    "streams": (streams.case, 3),
    "states": (states.case, 12),
    "vectors": (vectors.case, 20),
}
ACTIONS = {name: action for name, (action, _) in GROUPS.items()}


def share(cases: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """Share cases out among groups by their weights, in turn, so that the slow ones are not all at the end."""
    total = sum(GROUPS[name][1] for name in names)
    counts = {name: max(1, round(cases * GROUPS[name][1] / total)) for name in names}
    places = [((number + 0.5) / count, name, number) for name, count in counts.items() for number in range(count)]
    return [(name, number) for _, name, number in sorted(places)]
