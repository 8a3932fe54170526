"""Linear cross-entropy: `llamakern bench loss`. Shapes and rivals stand in llamakern/bench/loss.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "loss", *sys.argv[1:]]))
