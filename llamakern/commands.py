"""What the verbs of the command line do: each takes the parsed arguments, works and prints."""

import json
import shutil
from pathlib import Path

import torch

from llamakern import distributed, generation, peft, runs, settings
from llamakern import finetune as job
from llamakern.data import PromptTemplate
from llamakern.files import folder_size
from llamakern.model import Llama
from llamakern.peft.files import read_prompt
from llamakern.stream import TextStream
from llamakern.tokenizer import PATTERNS, load_tokenizer

SAMPLE = (
    "Once upon a time there was a small house at the edge of a forest. Every morning the woman who lived there opened "
    "the window, looked at the sky and said what the weather would be. She was seldom wrong."
)


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
    names = settings.names(job.FinetuneConfig)
    for flag in arguments.rest:
        if flag.startswith("--"):
            settings.known(flag[2:].partition("=")[0].replace("-", "_"), names)
    file = words.pop(0) if words and "=" not in words[0] else None
    flags = [f"{name}={getattr(arguments, name)}" for name in names if hasattr(arguments, name)]
    config = settings.build(job.FinetuneConfig, file, words + flags)
    if arguments.print_settings:
        for name in names:
            print(f"{name}: {getattr(config, name)}")
    elif arguments.dry_run:
        job.dry_run(config)
    else:
        result = job.finetune(config)["result"]
        if distributed.is_main():
            print(json.dumps(result, indent=2))
            print(f"adapter: {Path(config.out) / 'adapter'}")


def generate(arguments) -> None:
    prompt = read_prompt(arguments.adapter) if arguments.adapter else None
    if arguments.input and not prompt:
        raise ValueError("generate: input must go with an adapter that has a prompt template, got none")
    tokenizer = load_tokenizer(job.source_path(arguments.tokenizer or arguments.base))
    model, text = load_base(arguments), arguments.prompt
    ends, stop = end_ids(tokenizer.eos_id, model.config.eos_id), arguments.stop or ()
    if arguments.adapter:
        peft.load(model, arguments.adapter)
    if prompt:
        text = PromptTemplate(**prompt["template"]).prompt(arguments.prompt, arguments.input)
        ends = end_ids(prompt["end_token"])
    stream = TextStream(tokenizer, ends=ends, stop=stop, write=lambda text: print(text, end="", flush=True))
    generation.generate(
        model,
        torch.tensor([tokenizer.encode(text)]),
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


def end_ids(*ids: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """One id, several or none, as configurations name them."""
    lists = [list(i) if isinstance(i, list | tuple) else [i] for i in ids if i is not None]
    return tuple(dict.fromkeys(sum(lists, [])))


def quantize(arguments) -> None:
    check_out(arguments)
    model = Llama.from_pretrained(arguments.base, quantize="nf4", quantize_head=arguments.head)
    model.save_pretrained(arguments.out)
    copy_tokenizer(arguments.base, arguments.out)
    print(f"{arguments.out}: {folder_size(arguments.out) / 2**20:,.1f} MB")


def merge(arguments) -> None:
    check_out(arguments)
    arguments.dtype = None
    model = peft.load(load_base(arguments), arguments.adapter).eval()
    tokens = torch.tensor([load_tokenizer(job.source_path(arguments.base)).encode(arguments.text)])
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
    for name, value in runs.environment().items():
        print(f"{name:<14}{'-' if value is None else value}")


def load_base(arguments) -> Llama:
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    return Llama.from_pretrained(arguments.base, quantize=arguments.quantize, dtype=dtype)


def check_out(arguments) -> None:
    """What is read must not be overwritten."""
    if Path(arguments.out).resolve() == Path(arguments.base).resolve():
        raise ValueError(f"{arguments.verb}: out must be another folder than base, got {arguments.out}")


def copy_tokenizer(base: str, out: str) -> None:
    """A folder that is written from another keeps its tokenizer."""
    folder = job.source_path(base)
    for pattern in (*PATTERNS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        for file in folder.glob(pattern) if folder.is_dir() else ():
            shutil.copyfile(file, Path(out) / file.name)
