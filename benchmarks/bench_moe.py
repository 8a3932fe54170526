"""Mixture of experts: `llamakern bench moe`. Shapes and rivals stand in llamakern/bench/moe.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "moe", *sys.argv[1:]]))
