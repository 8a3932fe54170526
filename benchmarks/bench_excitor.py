"""Excitor's keys: `llamakern bench excitor`. Shapes and rivals stand in llamakern/bench/excitor.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "excitor", *sys.argv[1:]]))
