"""The table of `llamakern compare`: Markdown, CSV, LaTeX, a plot and the references."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from llamakern.files import atomic_file

REFERENCES = {
    "lora": ("hu2021lora", "Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685"),
    "qlora": ("dettmers2023qlora", "Dettmers et al.", "QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"),
    "adapter": (
        "zhang2023adapter", "Zhang et al.",
        "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", "2303.16199",
    ),
    "adapter_v2": (
        "gao2023adapter", "Gao et al.", "LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model", "2304.15010",
    ),
    "excitor": (
        "zou2024excitor", "Zou et al.",
        "LLaMA-Excitor: General Instruction Tuning via Indirect Feature Interaction", "2404.00913",
    ),
    "prompt": (
        "lester2021prompt", "Lester et al.", "The Power of Scale for Parameter-Efficient Prompt Tuning", "2104.08691",
    ),
    "base": (
        "touvron2023llama", "Touvron et al.", "LLaMA: Open and Efficient Foundation Language Models", "2302.13971",
    ),
}  # fmt: skip


def columns(report: dict) -> dict[str, Callable[[dict], str]]:
    """What each column shows of a row."""
    own = report["base"]["own_loss"]
    seeds = report["budget"]["seeds"]
    return {
        "method": lambda r: r["method"],
        "trainable": lambda r: f"{r['trainable']:,}",
        "lr": lambda r: f"{r['lr']:g}",
        "tries": lambda r: str(r["tries"]),
        f"test loss (± over {seeds} seeds)": lambda r: spread(r["test_loss"], r["test_spread"]),
        "forgetting": lambda r: f"{r['own_loss'] - own:+.4f}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
        "peak MB": lambda r: f"{r['peak_memory_mb']:,.0f}",
        "file KB": lambda r: f"{r['checkpoint_bytes'] / 1000:,.0f}",
    }


def spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def cells(report: dict) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the rows: the base first, then the methods by their loss, the failed ones last."""
    shown = columns(report)
    rows = [["base", "0", "", "", f"{report['base']['test_loss']:.4f}", "+0.0000", "", "", ""]]
    whole = sorted((r for r in report["rows"] if "failed" not in r), key=lambda r: r["test_loss"])
    rows += [[show(r) for show in shown.values()] for r in whole]
    for r in (r for r in report["rows"] if "failed" in r):
        rows.append([r["method"], "", "", str(r["tries"]), "failed", *[""] * (len(shown) - 5)])
    return list(shown), rows


def markdown(report: dict) -> str:
    """The table, what it was made under, what Excitor's paper leaves open, and the references."""
    names, rows = cells(report)
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]

    def line(row: list[str]) -> str:
        padded = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    lines = [line(names), rule, *map(line, rows), "", *notes(report)]
    lines += ["", "References:", "", *(f"- {a}: {t}. arXiv {n}." for _, a, t, n in references(report))]
    return "\n".join(lines) + "\n"


def notes(report: dict) -> list[str]:
    budget = report["budget"]
    trained = next((r["tokens"] for r in report["rows"] if "failed" not in r), 0)
    lines = [
        f"Every run trained {budget['steps']} steps, {trained:,} tokens. Each method tried the learning "
        f"rates {', '.join(f'{lr:g}' for lr in budget['lrs'])} with one seed; the best on validation was run with "
        f"{budget['seeds']} seeds and judged on test. Forgetting: the rise of the loss on text that the base itself "
        "has drawn."
    ]
    for r in report["rows"]:
        for kind, choices in r.get("open_choices", {}).items():
            settings = ", ".join(f"{name}={value}" for name, value in choices.items())
            lines += ["", f"{r['method']}: the paper of {kind} leaves open, and here was {settings}."]
    for r in report["rows"]:
        if "failed" not in r and r["seeds"] < budget["seeds"]:
            lost = budget["seeds"] - r["seeds"]
            lines += ["", f"{r['method']}: {lost} of {budget['seeds']} seeds failed and do not count in its row."]
        if "failed" in r:
            lines += ["", f"{r['method']} failed: {r['failed']}"]
    return lines


def references(report: dict) -> list[tuple[str, str, str, str]]:
    kinds = [kind for r in report["rows"] for kind in r.get("kinds", [])]
    return [REFERENCES[kind] for kind in dict.fromkeys(["base", *kinds]) if kind in REFERENCES]


def comma_separated(report: dict) -> str:
    """Numbers as they were measured, one row a method."""
    keys = [
        "method", "trainable", "lr", "tries", "seeds", "validation_loss", "test_loss", "test_spread", "own_loss",
        "tokens", "tokens_per_s", "peak_memory_mb", "checkpoint_bytes", "failed",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([{"method": "base", **report["base"]}, *report["rows"]])
    return text.getvalue()


def latex(report: dict) -> str:
    """A booktabs table that cites references.bib."""
    names, rows = cells(report)
    keys = {r["method"]: [REFERENCES[k][0] for k in r.get("kinds", []) if k in REFERENCES] for r in report["rows"]}
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, names)) + r" \\", r"\midrule"]
    for row in rows:
        cite = rf"~\cite{{{','.join(keys[row[0]])}}}" if keys.get(row[0]) else ""
        lines.append(" & ".join([escaped(row[0]) + cite, *map(escaped, row[1:])]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("±", r"$\pm$").replace("%", r"\%")


def bibtex(report: dict) -> str:
    entries = [
        f"@misc{{{key},\n  author = {{{authors.replace(' et al.', ' and others')}}},\n  title = {{{{{title}}}}},\n"
        f"  year = {{20{number[:2]}}},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}\n"
        for key, authors, title, number in references(report)
    ]
    return "\n".join(entries)


def write_tables(report: dict, out: Path) -> bool:
    """compare.md, .csv, .tex, references.bib, and compare.png unless matplotlib is absent: then False."""
    texts = {"compare.md": markdown, "compare.csv": comma_separated, "compare.tex": latex, "references.bib": bibtex}
    for name, text in texts.items():
        with atomic_file(out / name) as temporary:
            temporary.write_text(text(report), encoding="utf-8")
    return plot(report, out / "compare.png")


def plot(report: dict, path: Path) -> bool:
    """Test loss over trainable parameters, with its spread, beside forgetting."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = [r for r in report["rows"] if "failed" not in r]
    for r in rows:
        left.errorbar(r["trainable"], r["test_loss"], yerr=r["test_spread"] or 0, fmt="o", label=r["method"])
        right.plot(r["own_loss"] - report["base"]["own_loss"], r["test_loss"], "o", label=r["method"])
    left.axhline(report["base"]["test_loss"], color="gray", linewidth=1, label="base")
    left.set(xscale="log", xlabel="trainable parameters", ylabel="test loss (nats per token)")
    right.set(xlabel="forgetting (nats per token of the base's own text)", ylabel="test loss (nats per token)")
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return True
