"""LoRA: `llamakern bench lora`. Shapes and rivals stand in llamakern/bench/lora.py."""

import sys

from llamakern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "lora", *sys.argv[1:]]))
