"""gcahng env"""

from __future__ import annotations

from gcahng.commands.arguments import Parser


def run(arguments: list[str]) -> int:
    """Print versions, native libraries and the implementations that are available here."""
    Parser(prog="gcahng env", description=run.__doc__).parse_args(arguments)
    from gcahng.env import report

    print(report())
    return 0
