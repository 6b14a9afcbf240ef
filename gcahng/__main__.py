"""python -m gcahng is the command line."""

import sys

from gcahng.cli import main

if __name__ == "__main__":
    sys.exit(main())
