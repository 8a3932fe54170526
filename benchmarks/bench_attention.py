"""Attention: `llamakern bench attention`. Shapes and rivals stand in llamakern/bench/attention.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
