"""The command line: `llamakern <verb>`, the same as `python -m llamakern <verb>`."""

import argparse
import json
import sys
from pathlib import Path

from llamakern.gate import GateError

MISTAKES = (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError, GateError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. A mistake of the user ends as one line on stderr and code 1."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb != "finetune":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        arguments.run(arguments)
    except MISTAKES as error:
        print(f"llamakern {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" if arguments.verb == "finetune" else ""
        print(f"\nstopped{hint}", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamakern", description="LLaMA kernels, fine-tuning and generation.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    def verb(name, run, about, example):
        made = verbs.add_parser(
            name, help=about, description=about, epilog=f"example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    p = verb("demo", demo, "Train, quantise, fine-tune and generate on this machine, in minutes.", "llamakern demo")
    p.add_argument("--out", default="runs/demo", help="folder for everything it makes (%(default)s)")
    p.add_argument("--minutes", type=float, default=1.0, help="of pre-training (%(default)s)")

    p = verb(
        "finetune", finetune, "Fine-tune a model on instructions.",
        "llamakern finetune --base path/to/llama --data tasks.jsonl --method qlora lr=2e-4\n"
        "  llamakern finetune run.yaml rank=8 --dry-run",
    )  # fmt: skip
    p.add_argument("settings", nargs="*", metavar="config.yaml key=value", help="settings; they work as flags too:")
    add_settings(p)
    p.add_argument("--dry-run", action="store_true", help="train nothing; show data, memory and time")
    p.add_argument("--reproduce", metavar="run.json", help="run it again; fail unless the adapter comes out the same")
    p.add_argument("--print-settings", action="store_true", help="show every setting and its value")

    p = verb(
        "generate", generate, "Continue a text, or answer an instruction with an adapter.",
        'llamakern generate path/to/llama --adapter runs/finetune/adapter --prompt "Name three fruits."',
    )  # fmt: skip
    p.add_argument("base", help="folder of the model")
    p.add_argument("--adapter", help="folder of an adapter; its prompt template is applied")
    p.add_argument("--prompt", required=True, help="the text, or with an adapter the instruction")
    p.add_argument("--input", default="", help="with an adapter, the instruction's input")
    p.add_argument("--tokenizer", help="file or folder; by default the base's")
    p.add_argument("--quantize", choices=["nf4"], help="quantise the base while loading")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the dense weights; by default as stored")
    p.add_argument("--max-new-tokens", type=int, default=200, help="(%(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", help="end at this text; may be given again")

    p = verb("quantize", quantize, "Write a model's linears as NF4.", "llamakern quantize path/to/llama llama-nf4")
    p.add_argument("base", help="folder of the model")
    p.add_argument("out", help="folder to write")
    p.add_argument("--head", action="store_true", help="quantise lm_head too")
    p.add_argument("--double-quant", action="store_true", help="quantise the scales too: 4.13 bits a weight, not 4.5")

    p = verb(
        "merge", merge, "Merge an adapter into its base and say what that changes.",
        "llamakern merge path/to/llama runs/finetune/adapter merged --to bfloat16",
    )  # fmt: skip
    p.add_argument("base", help="folder of the model")
    p.add_argument("adapter", help="folder of the adapter")
    p.add_argument("out", help="folder to write")
    p.add_argument("--quantize", choices=["nf4"], help="the base is quantised while loading, as it was for qlora")
    p.add_argument("--to", choices=["float32", "bfloat16", "nf4"], help="form of the result; by default dense")
    p.add_argument("--text", default=SAMPLE, help="sample on which the change of the logits is measured")

    verb("info", info, "Versions and machine: paste it into a bug report.", "llamakern info")
    return parser


SAMPLE = (
    "Once upon a time there was a small house at the edge of a forest. Every morning the woman who lived there opened "
    "the window, looked at the sky and said what the weather would be. She was seldom wrong."
)


def demo(arguments) -> None:
    from llamakern.demo import run

    run(arguments.out, minutes=arguments.minutes)


def finetune(arguments) -> None:
    from llamakern import settings
    from llamakern.finetune import FinetuneConfig, dry_run, reproduce
    from llamakern.finetune import finetune as run

    if arguments.reproduce:
        if arguments.settings or arguments.rest:
            raise ValueError(f"finetune: reproduce must stand alone, got {[*arguments.settings, *arguments.rest][0]}")
        print(f"the adapter is the same: {reproduce(arguments.reproduce)['hashes']['adapter']}")
        return
    for flag in arguments.rest:
        if flag.startswith("--"):
            settings.known(flag[2:].partition("=")[0].replace("-", "_"), settings.names(FinetuneConfig))
    words = [*arguments.settings, *arguments.rest]
    file = words.pop(0) if words and "=" not in words[0] else None
    flags = [
        f"{name}={getattr(arguments, name)}" for name in settings.names(FinetuneConfig) if hasattr(arguments, name)
    ]
    config = settings.build(FinetuneConfig, file, words + flags)
    if arguments.print_settings:
        for name in settings.names(FinetuneConfig):
            print(f"{name}: {getattr(config, name)}")
    elif arguments.dry_run:
        dry_run(config)
    else:
        result = run(config)["result"]
        print(json.dumps(result, indent=2))
        print(f"adapter: {Path(config.out) / 'adapter'}")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag; a flag that is not given leaves no trace."""
    import dataclasses

    from llamakern.finetune import FinetuneConfig

    for field in dataclasses.fields(FinetuneConfig):
        default = "" if field.default is dataclasses.MISSING else f"({field.default})"
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar="", help=default.replace("%", "%%"))


def generate(arguments) -> None:
    import llamakern.generation
    from llamakern import peft
    from llamakern.data import PromptTemplate
    from llamakern.finetune import source_path
    from llamakern.peft.files import read_prompt
    from llamakern.tokenizer import load_tokenizer

    prompt = read_prompt(arguments.adapter) if arguments.adapter else None
    if arguments.input and not prompt:
        raise ValueError("generate: input must go with an adapter that has a prompt template, got none")
    tokenizer = load_tokenizer(source_path(arguments.tokenizer or arguments.base))
    model, text, end = load_base(arguments), arguments.prompt, tokenizer.eos_id
    if arguments.adapter:
        peft.load(model, arguments.adapter)
    if prompt:
        text = PromptTemplate(**prompt["template"]).prompt(arguments.prompt, arguments.input)
        end = prompt["end_token"]
    printer = Stream(tokenizer, end)
    llamakern.generation.generate(
        model,
        torch_row(tokenizer.encode(text)),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        eos_id=end,
        stop=arguments.stop,
        tokenizer=tokenizer,
        on_token=printer,
    )
    print()


class Stream:
    """Prints text as it grows. A character that is still incomplete waits for its next token."""

    def __init__(self, tokenizer, end: int | None):
        self.tokenizer, self.end, self.ids, self.shown = tokenizer, end, [], ""

    def __call__(self, ids: list[int | None]) -> None:
        if ids[0] is None or ids[0] == self.end:
            return
        self.ids.append(ids[0])
        text = self.tokenizer.decode(self.ids)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def quantize(arguments) -> None:
    from llamakern.files import folder_size
    from llamakern.model import Llama

    check_out(arguments)
    how = {"quantize": "nf4", "quantize_head": arguments.head, "double_quant": arguments.double_quant}
    model = Llama.from_pretrained(arguments.base, **how)
    model.save_pretrained(arguments.out)
    copy_tokenizer(arguments.base, arguments.out)
    print(f"{arguments.out}: {folder_size(arguments.out) / 2**20:,.1f} MB")


def merge(arguments) -> None:
    import torch

    from llamakern import peft
    from llamakern.finetune import source_path
    from llamakern.tokenizer import load_tokenizer

    check_out(arguments)
    arguments.dtype = None
    model = peft.load(load_base(arguments), arguments.adapter).eval()
    tokens = torch_row(load_tokenizer(source_path(arguments.base)).encode(arguments.text))
    with torch.no_grad():
        before = model(tokens)
        after = peft.merge(model, to=arguments.to)(tokens)
    model.save_pretrained(arguments.out)
    copy_tokenizer(arguments.base, arguments.out)
    change = peft.logit_change(before, after)
    print(
        f"{arguments.out}: merging changed the logits of {tokens.numel()} tokens by at most {change['max']:.3g}, "
        f"{change['mean']:.3g} in the mean; the likeliest token stayed the same for {change['same_token']:.1%}"
    )


def info(arguments) -> None:
    from llamakern.runs import environment

    for name, value in environment().items():
        print(f"{name:<14}{'-' if value is None else value}")


def load_base(arguments):
    import torch

    from llamakern.model import Llama

    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    return Llama.from_pretrained(arguments.base, quantize=arguments.quantize, dtype=dtype)


def torch_row(ids: list[int]):
    import torch

    return torch.tensor([ids])


def check_out(arguments) -> None:
    """What is read must not be overwritten."""
    if Path(arguments.out).resolve() == Path(arguments.base).resolve():
        raise ValueError(f"{arguments.verb}: out must be another folder than base, got {arguments.out}")


def copy_tokenizer(base: str, out: str) -> None:
    """A folder that is written from another keeps its tokenizer."""
    import shutil

    from llamakern.finetune import source_path
    from llamakern.tokenizer import PATTERNS

    folder = source_path(base)
    for pattern in (*PATTERNS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        for file in folder.glob(pattern) if folder.is_dir() else ():
            shutil.copyfile(file, Path(out) / file.name)


if __name__ == "__main__":
    sys.exit(main())
