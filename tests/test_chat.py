"""Templates against the published Jinja ones, at text and at token level, and what trains of them."""

import base64
import json
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakern.chat import (
    BEGIN,
    END,
    PLAIN,
    TEMPLATES,
    Llama3,
    Llama4,
    Message,
    PromptTemplate,
    encode,
    end_ids,
    from_prompt,
    to_prompt,
)
from llamakern.cli import main
from llamakern.data import IGNORED, load_examples, pad
from llamakern.finetune import marked
from llamakern.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"

# What the templates published with the weights say of plain chats, in short forms of our own.
LLAMA2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% for m in (messages if system is none else messages[1:]) %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% else %}"
    "{% set head = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is not none else '' %}"
    "{{ bos_token + '[INST] ' + (head + m['content']).strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header_start|>' + m['role'] + '<|header_end|>\n\n' }}"
    "{{ m['content'].strip() if loop.first and m['role'] == 'system' else m['content'] }}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)


def jinja(name):
    """The published template, and its begin and end tokens."""
    if name == "llama2":
        return LLAMA2, "<s>", "</s>"
    if name == "llama4":
        return LLAMA4, "<|begin_of_text|>", "<|eot|>"
    trl = pytest.importorskip("trl")
    file = {"llama3": "llama3.jinja", "llama3.1": "llama3_1.jinja"}[name]
    return (Path(trl.__file__).parent / "chat_templates" / file).read_text(), "<|begin_of_text|>", "<|eot_id|>"


CHATS = ("llama2", "llama3", "llama3.1", "llama4")


@pytest.fixture(scope="module", params=CHATS)
def rendered(request):
    """(template, render): `render(messages, open_end)` is what transformers makes of the published template."""
    transformers = pytest.importorskip("transformers")
    text, bos, eos = jinja(request.param)
    model = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(FIXTURES / "tokenizer.json"), bos_token=bos, eos_token=eos, chat_template=text
    )

    def render(messages, open_end):
        records = [message._asdict() for message in messages]
        return model.apply_chat_template(records, tokenize=False, add_generation_prompt=open_end)

    return request.param, TEMPLATES[request.param], render


def spelled(segments, begin, end):
    """The segments as one text."""
    return "".join({BEGIN: begin, END: end}.get(s.text, s.text) if s.mark else s.text for s in segments)


def dialogues():
    """An optional system turn, then user and assistant in turn, with text that templates could stumble over."""
    text = st.text(" \n\ta'{}%[]|<é日", max_size=12) | st.sampled_from(
        ["Hi", " Hello there \n", "<|eot_id|>", "</s>", "[/INST]", "<<SYS>>", "{{ bos_token }}", "", "\u3000x\x1f"]
    )
    return st.tuples(st.none() | text, st.lists(text, min_size=1, max_size=5)).map(
        lambda pair: (
            [Message("system", pair[0])] * (pair[0] is not None)
            + [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(pair[1])]
        )
    )


def test_equals_the_published_template(rendered):
    name, template, render = rendered
    marks = {"llama2": ("<s>", "</s>")}.get(name, ("<|begin_of_text|>", "?"))

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(dialogues(), st.booleans())
    def check(messages, open_end):
        open_end &= messages[-1].role == "user"
        assert spelled(template.dialogue(messages, open_end=open_end), *marks) == render(messages, open_end)

    check()


def test_later_system_turns(rendered):
    name, template, render = rendered
    messages = [Message("user", " q "), Message("system", " s "), Message("assistant", " a "), Message("system", "\nt")]
    if name == "llama2":
        with pytest.raises(ValueError, match="must alternate user and assistant, got user system assistant system"):
            template.dialogue(messages, open_end=True)
        return
    assert spelled(template.dialogue(messages, open_end=True), "<|begin_of_text|>", "?") == render(messages, True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_task_is_its_dialogue_and_begins_with_its_question(name):
    template = TEMPLATES[name]
    task = template.task(" do {x}", "it ", " done\n")
    question = template.question(" do {x}", "it ")
    assert task[: len(question)] == question
    assert not any(segment.trained for segment in question)
    assert all(segment.trained for segment in task[len(question) :])
    assert (task[-1].text, task[-1].mark) == (template.ends[0], True)
    if name in CHATS:
        user, assistant = Message("user", " do {x}\n\nit "), Message("assistant", " done\n")
        assert task == template.dialogue([user, assistant])
        system = Message("system", "s")
        assert template.question("q", system="s") == template.dialogue([system, Message("user", "q")], open_end=True)


def test_words_are_those_of_alpaca():
    system, user, assistant = Message("system", "s"), Message("user", "q"), Message("assistant", "a")
    text = spelled(PromptTemplate().dialogue([system, user, assistant]), "^", "$")
    assert text == "^s\n\n### Instruction:\nq\n\n### Response:\na$"
    assert spelled(PLAIN.question("q", "x", "s"), "^", "$") == "^s\nq\nx\n"


def test_the_date_of_llama31():
    dated = Llama3(date="01 Jan 2030").question("q")
    assert dated[5].text == "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2030\n\n"
    assert Llama3().question("q") == TEMPLATES["llama3"].question("q")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def tiktoken_file(folder):
    pieces = [bytes([b]) for b in range(256)] + [b"\n\n", b"us", b"use", b"user", b"as", b"\n\n\n"]
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces)))
    return folder / "tokenizer.model"


@pytest.fixture(params=["llama3", "llama4"])
def headed(request, tmp_path):
    return TEMPLATES[request.param], load_tokenizer(tiktoken_file(tmp_path), family=request.param)


def test_headers_as_tokens(headed):
    """Marks by id, role and content as plain text: Meta's ChatFormat, written out."""
    template, tokenizer = headed
    mark = tokenizer.marks
    start, stop, end = (mark[name] for name in (*template.header, template.ends[0]))
    line = tokenizer.encode("\n\n", bos=False)

    def plain(text):
        return tokenizer.encode(text, bos=False)

    messages = [Message("system", "be"), Message("user", "<|eot_id|><|eot|>"), Message("assistant", "yes")]
    tokens, trained = encode(template.dialogue(messages), tokenizer)
    want = [tokenizer.bos_id]
    for role, content in messages:
        want += [start, *plain(role), stop, *line, *plain(content), end]
    assert tokens == want
    assert sum(i in mark.values() for i in tokens) == 1 + 3 * 3
    assert [t for t, one in zip(tokens, trained, strict=True) if one] == [*plain("yes"), end]
    prompt, _ = encode(template.dialogue(messages[:2], open_end=True), tokenizer)
    assert tokens[: len(prompt)] == prompt


def test_headers_as_tokens_equal_transformers(headed, tmp_path):
    """The tokens that transformers finds in the rendered text, where the contents hold no marks."""
    transformers = pytest.importorskip("transformers")
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    template, tokenizer = headed
    marks = sorted(tokenizer.marks, key=tokenizer.marks.get)
    pattern = tokenizer.model._pat_str
    fast = convert.TikTokenConverter(str(tmp_path / "tokenizer.model"), pattern=pattern, extra_special_tokens=marks)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast.converted(), bos_token="<|begin_of_text|>", chat_template=jinja(template.kind)[0]
    )
    messages = [Message("system", "be good"), Message("user", "user asks\n\n why?"), Message("assistant", "as 1234.")]
    records = [message._asdict() for message in messages]
    ids = theirs.apply_chat_template(records, tokenize=True, return_dict=False)
    assert encode(template.dialogue(messages), tokenizer)[0] == ids


def test_llama2_as_tokens(data_dir):
    """Each pair of turns is what sentencepiece makes of it in one piece, between begin and end."""
    tokenizer = load_tokenizer(data_dir / "mistral-tokenizer" / "tokenizer.model.v1")
    turns = [" What's  up? ", "Nothing. ", "Sure </s>?", "yes\n"]
    messages = [Message("system", "be brief")]
    messages += [Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    tokens, trained = encode(TEMPLATES["llama2"].dialogue(messages), tokenizer)
    one = tokenizer.encode("[INST] <<SYS>>\nbe brief\n<</SYS>>\n\n What's  up? [/INST] Nothing. ", eos=True)
    two = tokenizer.encode("[INST] Sure </s>? [/INST] yes ", eos=True)
    assert tokens == one + two
    assert tokenizer.decode([t for t, on in zip(tokens, trained, strict=True) if on]) == "Nothing.  yes "
    assert [trained[i] for i, t in enumerate(tokens) if t == tokenizer.eos_id] == [True, True]
    prompt, _ = encode(TEMPLATES["llama2"].dialogue(messages[:-1], open_end=True), tokenizer)
    assert tokens[: len(prompt)] == prompt


NAMES = [name for kind in (Llama3, Llama4) for name in (*kind.header, *kind.ends[:2])]


class Letters:
    """One token a character; pad is the end token."""

    bos_id, eos_id, pad_id = 1, 2, 2
    marks = MappingProxyType({name: 10 + i for i, name in enumerate(NAMES)})

    def encode(self, text, bos=True, eos=False):
        return [1] * bos + [30 + ord(c) for c in text] + [2] * eos


RECORDS = [
    {"instruction": "say", "input": "it", "output": "yes"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "bb"}, {"role": "user", "content": "c"},
                  {"role": "assistant", "content": "d"}]},
    {"text": "free"},
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_trains_with_its_end_and_padding_never(name):
    tokenizer, template = Letters(), TEMPLATES[name]
    end = end_ids(template, tokenizer)[0]
    examples = [example for (example,) in load_examples(RECORDS, tokenizer, max_len=400, template=template)]
    for example, answers in zip(examples, (["yes"], ["bb", "d"], ["free"]), strict=True):
        close = tokenizer.eos_id if answers == ["free"] else end
        want = [t for text in answers for t in [*tokenizer.encode(text, bos=False), close]]
        if name == "llama2" and answers != ["free"]:
            want = [t for text in answers for t in [*tokenizer.encode(f" {text} ", bos=False), close]]
        assert [t for t in example.labels if t != IGNORED] == want
    assert len({len(e.tokens) for e in examples}) > 1
    for pad_id in (tokenizer.pad_id, end):
        batch = pad(examples, pad_id)
        for row, example in zip(batch.labels.tolist(), examples, strict=True):
            assert row[: len(example.labels)] == example.labels
            assert set(row[len(example.labels) :]) <= {IGNORED}


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_that_loses_its_end_is_truncated(name):
    ((whole,),) = load_examples(RECORDS[:1], Letters(), max_len=400, template=TEMPLATES[name])
    n = len(whole.tokens)
    ((same,),) = load_examples(RECORDS[:1], Letters(), max_len=n, template=TEMPLATES[name])
    ((cut,),) = load_examples(RECORDS[:1], Letters(), max_len=n - 1, template=TEMPLATES[name])
    assert (same.truncated, cut.truncated) == (False, True)
    assert same.trained[-1]
    assert cut.tokens == whole.tokens[:-1]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def generated(capsys, *words):
    code = main(["generate", *map(str, words), "--max-new-tokens", "4"])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_an_adapter_answers_in_the_template_it_was_trained_with(tiny, tmp_path, capsys):
    base = str(tiny / "base")
    words = ["finetune", "--base", base, "--data", str(tiny / "tasks.jsonl"), f"out={tmp_path / 'run'}", "steps=2"]
    assert main([*words, "max_len=64", "template=llama2"]) == 0
    adapter = tmp_path / "run" / "adapter"
    prompt = json.loads((adapter / "prompt.json").read_text())
    assert prompt == {"version": 2, "template": {"kind": "llama2"}, "end_tokens": [2]}
    capsys.readouterr()
    asked = ("--prompt", "say cat", "--system", "be")
    code, trained = generated(capsys, base, "--adapter", adapter, *asked)
    assert code == 0
    (adapter / "prompt.json").unlink()
    assert generated(capsys, base, "--adapter", adapter, "--chat", "llama2", *asked) == (0, trained)
    (adapter / "prompt.json").write_text(json.dumps(prompt))
    code, error = generated(capsys, base, "--adapter", adapter, "--chat", "llama2", *asked)
    assert (code, "chat must be left out where prompt.json names a template, got llama2" in error) == (1, True)
    code, error = generated(capsys, base, "--chat", "llama3", *asked)
    assert (code, "tokenizer must have the mark <|start_header_id|>" in error) == (1, True)
    code, error = generated(capsys, base, *asked)
    assert (code, "input and system must go with a prompt template" in error) == (1, True)


def test_chat_sends_the_tokens_of_the_template(tiny, capsys, monkeypatch):
    sent = {}
    monkeypatch.setattr(
        "llamakern.generation.generate", lambda model, tokens, **knobs: sent.update(knobs, tokens=tokens)
    )
    assert generated(capsys, tiny / "base", "--chat", "llama2", "--prompt", "hi", "--system", "s")[0] == 0
    tokenizer = load_tokenizer(tiny / "base")
    assert sent["tokens"].tolist() == [tokenizer.encode("[INST] <<SYS>>\ns\n<</SYS>>\n\nhi [/INST]")]
    assert sent["eos_id"] == (2,)


def test_a_dry_run_names_the_marks(tmp_path):
    tokenizer = load_tokenizer(tiktoken_file(tmp_path), family="llama3")
    ((example,),) = load_examples(RECORDS[:1], tokenizer, max_len=99, template=TEMPLATES["llama3"])
    assert marked(example, tokenizer) == (
        "<begin><|start_header_id|>user<|end_header_id|>\n\nsay\n\nit<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[yes<|eot_id|>]]"
    )


# ---------------------------------------------------------------------------------------------------------------------
# prompt.json and messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_json_keeps_the_template(name):
    tokenizer = Letters()
    prompt = to_prompt(TEMPLATES[name], tokenizer)
    assert from_prompt(prompt) == (TEMPLATES[name], end_ids(TEMPLATES[name], tokenizer))
    assert prompt["version"] == 2


def test_ends_of_generation():
    marks = Letters.marks
    assert end_ids(TEMPLATES["llama2"], Letters()) == (2,)
    assert end_ids(TEMPLATES["llama3"], Letters()) == (marks["<|eot_id|>"], marks["<|eom_id|>"], 2)


def test_prompt_json_of_the_first_version_loads_for_ever():
    words = {"instruction": "{instruction}\n", "instruction_input": "{input}", "system": "s", "user": "u"}
    template, ends = from_prompt({"template": words, "end_token": 7})
    assert (template.prompt("say"), ends) == ("say\n", (7,))
    assert from_prompt({"template": words, "end_token": None})[1] == ()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "chat: template of prompt.json must be an object of strings, got None"),
        ({"template": {"user": 3}}, "chat: template of prompt.json must be an object of strings, got {'user': 3}"),
        ({"version": 3, "template": {}}, "chat: version of prompt.json must be 1 or 2, got 3"),
        ({"template": {"kind": "magic"}}, "chat: kind of prompt.json's template must be one of words, .* got 'magic'"),
        ({"template": {"kind": "llama2", "date": "x"}}, "must hold the fields of llama2, got"),
        (
            {"version": 2, "template": {}, "end_tokens": "x"},
            r"chat: end tokens of prompt.json must be ids, got \['x'\]",
        ),
        (
            {"version": 2, "template": {}, "end_tokens": [-1]},
            r"chat: end tokens of prompt.json must be ids, got \[-1\]",
        ),
    ],
)
def test_bad_prompt_json(prompt, message):
    with pytest.raises(ValueError, match=message):
        from_prompt(prompt)


def test_a_tokenizer_without_the_marks():
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    with pytest.raises(ValueError, match=r"chat: tokenizer must have the mark <\|start_header_id\|> of the template"):
        encode(TEMPLATES["llama3"].question("q"), tokenizer)
    with pytest.raises(ValueError, match=r"chat: tokenizer must have the mark <\|eot\|>"):
        end_ids(TEMPLATES["llama4"], tokenizer)


def test_roles_of_llama2_alternate():
    record = {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]}
    message = "data: record 0: messages must alternate user and assistant, got user user assistant"
    with pytest.raises(ValueError, match=message):
        load_examples([record], Letters(), max_len=64, template=TEMPLATES["llama2"])
