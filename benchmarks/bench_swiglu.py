"""SwiGLU: `llamakern bench swiglu`. Shapes and rivals stand in llamakern/bench/swiglu.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "swiglu", *sys.argv[1:]]))
