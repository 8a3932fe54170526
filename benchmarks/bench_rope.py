"""RoPE: `llamakern bench rope`. Shapes and rivals stand in llamakern/bench/rope.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "rope", *sys.argv[1:]]))
