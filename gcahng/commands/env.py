"""gcahng env"""

from __future__ import annotations

import json

from gcahng.commands.arguments import Parser


def run(arguments: list[str]) -> int:
    """Print what a bug report needs: versions, machine, native libraries with their build, and what runs here."""
    parser = Parser(prog="gcahng env", description=run.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    wants_json = parser.parse_args(arguments).json
    from gcahng import env

    print(json.dumps(env.collect(), indent=1) if wants_json else env.report())
    return 0
