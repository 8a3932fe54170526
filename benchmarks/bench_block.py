"""A decoder block: `llamakern bench block`. Shapes and rivals stand in llamakern/bench/block.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "block", *sys.argv[1:]]))
