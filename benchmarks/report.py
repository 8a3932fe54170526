"""Result files to Markdown: `python benchmarks/report.py benchmarks/results/MACHINE [--highlights | --trainer]`.

The README's tables are the outputs with --highlights and with --trainer; a test holds them together.
"""

import argparse
import json
from pathlib import Path

HIGHLIGHTS = [
    ("attention", "llama3-8b T=2048 bfloat16 forward"),
    ("attention", "llama3-8b T=2048 bfloat16 backward"),
    ("attention", "llama3-8b T=2048 float32 forward"),
    ("attention", "llama3-8b T=2048 float32 backward"),
    ("attention", "llama3-8b S=8192 bfloat16 decode"),
    ("nf4", "mlp 11008x4096 M=1 bfloat16"),
    ("nf4", "mlp 11008x4096 M=64 bfloat16"),
    ("nf4", "mlp 11008x4096 M=512 bfloat16"),
    ("nf4", "mlp 11008x4096 M=512 dx bfloat16"),
    ("lora", "dense M=512 bfloat16"),
    ("lora", "dense M=512 bfloat16 training"),
    ("lora", "nf4 M=512 bfloat16 training"),
    ("loss", "C=4096 V=32000 M=1024 bfloat16 loss, dh"),
    ("loss", "C=4096 V=32000 M=1024 bfloat16 loss, dh, dw"),
    ("norm", "llama-7b M=512 bfloat16 +residual"),
    ("swiglu", "llama-7b M=512 bfloat16"),
    ("rope", "llama3-8b T=2048 bfloat16"),
]


def line(room: str, row: dict) -> str:
    (_, ours), *rivals = row["ms"].items()
    against = ", ".join(f"{name} {ms:.3g} ms ({ms / ours:.2f}x)" for name, ms in rivals)
    rate = f"{row['flops'] / ours / 1e6:.0f} GFLOP/s" if row["flops"] else f"{row['bytes'] / ours / 1e6:.1f} GB/s"
    return f"| {room} | {row['shape']} | {ours:.3g} ms | {against} | {rate} |"


def report(folder: Path, highlights: bool = False) -> str:
    """The table of a folder of result files, or the chosen rows of it."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    m = next(iter(results.values()))["machine"]
    lines = [
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, {m['date']}.",
        "",
        "| room | shape | ours | the others, and how many times as long they take | ours reaches |",
        "|---|---|---|---|---|",
    ]
    for room, result in results.items():
        for row in result["rows"]:
            if not highlights or (room, row["shape"]) in HIGHLIGHTS:
                lines.append(line(room, row))
    return "\n".join(lines)


def trainer(folder: Path) -> str:
    """The table of bench_transformers.py: one line for each contestant, the first of them ours."""
    result = json.loads((folder / "transformers.json").read_text())
    m, (row,) = result["machine"], result["rows"]
    ours = next(iter(row["ms"].values()))
    lines = [
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, {m['date']}: {row['shape']}.",
        "",
        "| | a step | as long as patched | tokens/s | peak memory | loss, first step to last |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in row["runs"].items():
        losses = f"{run['losses'][0]:.4f} to {run['losses'][-1]:.4f}"
        speed = f"{run['ms']:,.0f} ms | {run['ms'] / ours:.2f}x | {run['tokens_per_s']:,.0f}"
        lines.append(f"| {name} | {speed} | {run['memory_mb']:,.0f} MB | {losses} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--highlights", action="store_true")
    parser.add_argument("--trainer", action="store_true")
    arguments = parser.parse_args()
    print(trainer(arguments.folder) if arguments.trainer else report(arguments.folder, arguments.highlights))


if __name__ == "__main__":
    main()
