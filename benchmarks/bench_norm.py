"""RMSNorm: `llamakern bench norm`. Shapes and rivals stand in llamakern/bench/norm.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "norm", *sys.argv[1:]]))
