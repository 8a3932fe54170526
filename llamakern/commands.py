"""What the verbs of the command line do: each takes the parsed arguments, works and prints."""

import json
import shutil
from itertools import chain
from pathlib import Path

import torch

from llamakern import chat, distributed, generation, peft, runs, settings
from llamakern import finetune as job
from llamakern.files import folder_size, write_json
from llamakern.model import Llama
from llamakern.peft.files import PROMPT, read_prompt
from llamakern.stream import TextStream
from llamakern.tokenizer import PATTERNS, load_tokenizer

SAMPLE = (
    "Once upon a time there was a small house at the edge of a forest. Every morning the woman who lived there opened "
    "the window, looked at the sky and said what the weather would be. She was seldom wrong."
)

FINETUNE_FLAGS = ("dry_run", "reproduce", "print_settings")  # beside the settings


def demo(arguments) -> None:
    from llamakern.demo import run

    run(arguments.out, minutes=arguments.minutes)


def finetune(arguments) -> None:
    words = [*arguments.settings, *arguments.rest]
    if arguments.reproduce:
        if words:
            raise ValueError(f"finetune: reproduce must stand alone, got {words[0]}")
        same = job.reproduce(arguments.reproduce)["hashes"]["adapter"]
        if distributed.is_main():
            print(f"the adapter is the same: {same}")
        return
    config = read_settings(arguments, job.FinetuneConfig, FINETUNE_FLAGS)
    if arguments.print_settings:
        for name in settings.names(job.FinetuneConfig):
            print(f"{name}: {getattr(config, name)}")
    elif arguments.dry_run:
        job.dry_run(config)
    else:
        result = job.finetune(config)["result"]
        if distributed.is_main():
            print(json.dumps(result, indent=2))
            print(f"adapter: {Path(config.out) / 'adapter'}")


def read_settings(arguments, kind: type, others: tuple[str, ...] = ()):
    """The settings of a verb: its YAML file, key=value words and flags."""
    names, words = settings.names(kind), [*arguments.settings, *arguments.rest]
    for flag in arguments.rest:
        if flag.startswith("--"):
            settings.known(flag[2:].partition("=")[0].replace("-", "_"), [*names, *others])
    file = words.pop(0) if words and "=" not in words[0] else None
    flags = [f"{name}={getattr(arguments, name)}" for name in names if hasattr(arguments, name)]
    return settings.build(kind, file, words + flags)


def compare(arguments) -> None:
    from llamakern import sweep
    from llamakern.sweep_table import markdown

    config = read_settings(arguments, sweep.CompareConfig)
    report = sweep.compare(config)
    print(f"\n{markdown(report)}\n{config.out}: compare.md, .csv, .tex, .json, .png, references.bib")


def generate(arguments) -> None:
    template, ends = prompt_template(arguments)
    tokenizer = job.find_tokenizer(arguments.tokenizer, arguments.base)
    if template:
        segments = template.question(arguments.prompt, arguments.input, arguments.system)
        tokens, _ = chat.encode(segments, tokenizer)
    else:
        tokens = tokenizer.encode(arguments.prompt)
    model, stop = load_base(arguments), arguments.stop or ()
    if ends is None:
        own = chat.end_ids(template, tokenizer) if template else tokenizer.eos_id
        ends = end_ids(own, model.config.eos_id)
    if arguments.adapter:
        load_adapter(model, arguments)
    stream = TextStream(tokenizer, ends=ends, stop=stop, write=lambda text: print(text, end="", flush=True))
    generation.generate(
        model,
        torch.tensor([tokens]),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        eos_id=ends or None,
        stop=stop or None,
        tokenizer=tokenizer,
        on_token=stream,
    )
    stream.close()
    print()


def prompt_template(arguments) -> tuple[chat.Template | None, tuple[int, ...] | None]:
    """The template of --chat, or that of the adapter or merged model with its end ids; None for what there is not."""
    prompt = read_prompt(arguments.adapter or job.source_path(arguments.base))
    if prompt and arguments.chat:
        raise ValueError(f"generate: chat must be left out where prompt.json names a template, got {arguments.chat}")
    if prompt:
        return chat.from_prompt(prompt)
    if arguments.chat:
        return chat.TEMPLATES[arguments.chat], None
    if arguments.input or arguments.system:
        raise ValueError("generate: input and system must go with a prompt template, got no --chat and no prompt.json")
    return None, None


def end_ids(*ids: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """One id, several or none, as configurations name them."""
    lists = (i if isinstance(i, list | tuple) else [i] for i in ids if i is not None)
    return tuple(dict.fromkeys(chain.from_iterable(lists)))


def quantize(arguments) -> None:
    check_out(arguments)
    knobs = {"quantize_head": arguments.head, "double_quant": arguments.double_quant}
    model = Llama.from_pretrained(arguments.base, quantize="nf4", **knobs)
    model.save_pretrained(arguments.out)
    copy_tokenizer(arguments.base, arguments.out)
    print(f"{arguments.out}: {folder_size(arguments.out) / 2**20:,.1f} MB")


def merge(arguments) -> None:
    check_out(arguments)
    arguments.dtype = None
    model = load_adapter(load_base(arguments), arguments)
    tokens = torch.tensor([load_tokenizer(job.source_path(arguments.base)).encode(arguments.text)])
    report = peft.merge_report(model, tokens, to=arguments.to)
    model.save_pretrained(arguments.out)
    copy_tokenizer(arguments.base, arguments.out)
    if (prompt := read_prompt(arguments.adapter)) is not None:
        write_json(Path(arguments.out) / PROMPT, prompt)
    print(f"{report}\n{arguments.out}: {folder_size(arguments.out) / 2**20:,.1f} MB")


def bench(arguments) -> None:
    from llamakern.bench.run import run

    run(arguments)


def info(arguments) -> None:
    for name, value in runs.environment().items():
        print(f"{name:<14}{'-' if value is None else value}")


def load_base(arguments) -> Llama:
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    knobs = {"quantize": arguments.quantize, "double_quant": arguments.double_quant}
    return Llama.from_pretrained(arguments.base, dtype=dtype, **knobs)


def load_adapter(model: Llama, arguments) -> Llama:
    for name in (arguments.method or "").split(","):
        if name:
            peft.find_method(name)  # of one from outside: runs its file
    return peft.load(model, arguments.adapter)


def check_out(arguments) -> None:
    """What is read must not be overwritten."""
    if Path(arguments.out).resolve() == Path(arguments.base).resolve():
        raise ValueError(f"{arguments.verb}: out must be another folder than base, got {arguments.out}")


def copy_tokenizer(base: str, out: str) -> None:
    """A folder that is written from another keeps its tokenizer."""
    folder = job.base_folder(base)
    for pattern in (*PATTERNS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        for file in folder.glob(pattern):
            shutil.copyfile(file, Path(out) / file.name)
