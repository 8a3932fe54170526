"""Scale and shift: `llamakern bench scale`. Shapes and rivals stand in llamakern/bench/scale.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "scale", *sys.argv[1:]]))
