"""NF4 linears: `llamakern bench nf4`. Shapes and rivals stand in llamakern/bench/nf4.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "nf4", *sys.argv[1:]]))
