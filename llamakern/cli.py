"""The command line: `llamakern <verb>`, the same as `python -m llamakern <verb>`. What the verbs do: commands.py."""

import argparse
import dataclasses
import difflib
import sys

from llamakern import commands
from llamakern.bench.run import add_arguments as add_bench_arguments
from llamakern.chat import TEMPLATES
from llamakern.finetune import DTYPES, FinetuneConfig
from llamakern.gate import GateError
from llamakern.peft.merge import FORMS, SHORT
from llamakern.sweep import CompareConfig

MISTAKES = (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError, GateError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. A mistake of the user ends as one line on stderr and code 1."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb not in ("finetune", "compare"):
        parser.error(f"unknown arguments: {' '.join(rest)}{suggestion(rest[0], arguments)}")
    arguments.rest = rest
    try:
        arguments.run(arguments)
    except MISTAKES as error:
        print(f"llamakern {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = (
            "; the same command goes on from the last checkpoint" if arguments.verb in ("finetune", "compare") else ""
        )
        print(f"\nstopped{hint}", file=sys.stderr)
        return 130
    return 0


def suggestion(flag: str, arguments: argparse.Namespace) -> str:
    """The verb's flag that is nearest to one that it does not know."""
    flags = ["--" + name.replace("_", "-") for name in vars(arguments)]
    nearest = difflib.get_close_matches(flag.partition("=")[0], flags, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamakern", description="LLaMA kernels, fine-tuning and generation.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, (about, example, add_arguments) in VERBS.items():
        verb = verbs.add_parser(
            name, help=about, description=about, epilog=f"example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        verb.set_defaults(run=getattr(commands, name))
        add_arguments(verb)
    return parser


def demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", default="runs/demo", help="folder for everything it makes (%(default)s)")
    p.add_argument("--minutes", type=float, default=1.0, help="of pre-training (%(default)s)")


def finetune(p: argparse.ArgumentParser) -> None:
    add_settings(p, FinetuneConfig)
    p.add_argument("--dry-run", action="store_true", help="train nothing; show data, memory and time")
    p.add_argument("--reproduce", metavar="run.json", help="run it again; fail unless the adapter comes out the same")
    p.add_argument("--print-settings", action="store_true", help="show every setting and its value")


def add_settings(p: argparse.ArgumentParser, kind: type) -> None:
    p.add_argument("settings", nargs="*", metavar="config.yaml key=value", help="settings; they work as flags too:")
    for field in dataclasses.fields(kind):  # a flag that is not given leaves no trace
        default = "" if field.default is dataclasses.MISSING else f"({field.default})"
        flag = "--" + field.name.replace("_", "-")
        p.add_argument(flag, default=argparse.SUPPRESS, metavar="", help=default.replace("%", "%%"))


def generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("base", help="folder of the model")
    p.add_argument("--adapter", help="folder of an adapter; its prompt template is applied")
    p.add_argument("--method", help="file.py:Class of the adapter's method, if that is one from outside")
    p.add_argument("--chat", choices=TEMPLATES, help="prompt template, for a model that was trained with it")
    p.add_argument("--prompt", required=True, help="the text, or with a template the instruction")
    p.add_argument("--input", default="", help="with a template, the instruction's input")
    p.add_argument("--system", help="with a template, the system's turn")
    p.add_argument("--tokenizer", help="file or folder; by default the base's")
    p.add_argument("--quantize", choices=["nf4"], help="quantise the base while loading")
    p.add_argument("--double-quant", action="store_true", help="with --quantize, quantise the scales too")
    p.add_argument("--dtype", choices=DTYPES, help="of the dense weights; by default as stored")
    p.add_argument("--max-new-tokens", type=int, default=200, help="(%(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    p.add_argument("--top-k", type=int, help="draw among so many of the likeliest tokens")
    p.add_argument("--top-p", type=float, help="draw among the likeliest that together have this probability")
    p.add_argument("--min-p", type=float, help="draw among those of at least this times the greatest probability")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens used before")
    p.add_argument("--seed", type=int, help="the same seed draws the same tokens")
    p.add_argument("--stop", action="append", help="end before this text; may be given again")


def quantize(p: argparse.ArgumentParser) -> None:
    p.add_argument("base", help="folder of the model")
    p.add_argument("out", help="folder to write")
    p.add_argument("--head", action="store_true", help="quantise lm_head too")
    p.add_argument("--double-quant", action="store_true", help="quantise the scales too: 4.13 bits a weight, not 4.5")


def merge(p: argparse.ArgumentParser) -> None:
    p.add_argument("base", help="folder of the model")
    p.add_argument("adapter", help="folder of the adapter")
    p.add_argument("--method", help="file.py:Class of the adapter's method, if that is one from outside")
    p.add_argument("out", help="folder to write")
    p.add_argument("--quantize", choices=["nf4"], help="the base is quantised while loading, as it was for qlora")
    p.add_argument("--double-quant", action="store_true", help="with --quantize, the scales too, as it was for qlora")
    p.add_argument("--to", choices=[*FORMS, *SHORT], help="form of the result; by default dense")
    p.add_argument("--text", default=commands.SAMPLE, help="sample on which the change of the logits is measured")


def compare(p: argparse.ArgumentParser) -> None:
    add_settings(p, CompareConfig)


def bench(p: argparse.ArgumentParser) -> None:
    add_bench_arguments(p)


def info(p: argparse.ArgumentParser) -> None:
    """It takes none."""


VERBS = {
    "demo": ("Train, quantise, fine-tune and generate on this machine, in minutes.", "llamakern demo", demo),
    "finetune": (
        "Fine-tune a model on instructions.",
        "llamakern finetune --base path/to/llama --data tasks.jsonl --method qlora lr=2e-4\n"
        "  llamakern finetune run.yaml rank=8 --dry-run",
        finetune,
    ),
    "generate": (
        "Continue a text, or answer an instruction with an adapter or a chat model.",
        'llamakern generate path/to/llama --adapter runs/finetune/adapter --prompt "Name three fruits."\n'
        '  llamakern generate path/to/llama-instruct --chat llama3 --prompt "Name three fruits."',
        generate,
    ),
    "quantize": ("Write a model's linears as NF4.", "llamakern quantize path/to/llama llama-nf4", quantize),
    "merge": (
        "Merge an adapter into its base and say what that changes.",
        "llamakern merge path/to/llama runs/finetune/adapter merged --to bfloat16",
        merge,
    ),
    "compare": (
        "Compare methods at an equal token budget: learning rates by validation, results on test.",
        "llamakern compare --base path/to/llama --data tasks.jsonl --methods lora,excitor,lora+adapter tokens=200000",
        compare,
    ),
    "bench": (
        "Race the ops against the best that others offer, beside the machine's own limits.",
        "llamakern bench nf4_linear --shape M=16,N=4096,K=4096\n"
        "  llamakern bench --json results --plot\n"
        "  llamakern bench step --preset llama3-8b --method qlora --layers 2 --tokens 512",
        bench,
    ),
    "info": ("Versions and machine: paste it into a bug report.", "llamakern info", info),
}

if __name__ == "__main__":
    sys.exit(main())
