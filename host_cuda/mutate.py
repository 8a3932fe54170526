"""Leaves out one synchronisation after another and asks whether the checks, or the command itself, notice.

    python3 mutate.py [--only REGEX] COMMAND...

COMMAND is any program that runs kernels under the harness and fails when something is wrong: a test. It is run once to
find every place that synchronises, then once for each place with that one left out; nothing is compiled. A place that
nobody misses is either needless or tested too little. The exit status tells whether there is one.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def run(command, **settings):
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)


def places(command):
    """Each place that synchronises: what, at which lines, and the addresses of its copies (unrolled, instantiated)."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "places"
        result = run(command, HOST_CUDA_SYNC_LIST=str(listed))
        if result.returncode:
            sys.exit(f"without any change, {' '.join(command)} fails:\n{result.stdout}{result.stderr}")
        found = {}
        for row in listed.read_text().splitlines():
            address, what, lines = row.split("\t")
            found.setdefault((what, lines), set()).add(address)
    return found


def verdict(result):
    if result.returncode == 0:
        return None
    report = re.search(
        r"(?m)(race|unwritten|too early|out of bounds|misaligned|deadlock|misuse|divergent warp) in \S+",
        result.stdout + result.stderr,
    )
    return report[0] if report else "wrong result"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression on the place's lines")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    missed = 0
    for (what, lines), addresses in sorted(places(args.command).items(), key=lambda place: place[0][::-1]):
        if not re.search(args.only, lines):
            continue
        seen = verdict(run(args.command, HOST_CUDA_LEAVE_OUT=",".join(addresses)))
        missed += seen is None
        print(f"{what:16} {lines:70} {seen or 'NOT NOTICED'}", flush=True)
    print(f"{missed} not noticed")
    return missed != 0


if __name__ == "__main__":
    sys.exit(main())
