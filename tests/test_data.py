"""Records to examples to batches: what trains, what is cut, what is packed, and every message about bad input."""

import json
from dataclasses import dataclass

import pytest
import torch

from llamakern.config import LlamaConfig
from llamakern.data import (
    IGNORED,
    PLAIN,
    Example,
    PromptTemplate,
    check_examples,
    drop_masked,
    epoch_batches,
    load_examples,
    pack,
    pad,
    split,
)
from llamakern.model import Llama


@dataclass
class Letters:
    """One token a character."""

    bos_id: int = 1
    eos_id: int = 2
    vocab_size: int = 200

    def encode(self, text, bos=True, eos=False):
        return [1] * bos + [3 + ord(c) % 190 for c in text] + [2] * eos


def load(records, **knobs):
    return load_examples(records, Letters(), **{"max_len": 64, "template": PLAIN} | knobs)


def spelled(example: Example) -> str:
    """The example with its trained letters in capitals, ^ for the begin token and $ for the end token."""
    letters = {1: "^", 2: "$"} | {3 + ord(c) % 190: c for c in "abcdefghijklmnopqrstuvwxyz\n "}
    text = [letters[t] for t in example.tokens]
    return "".join(c.upper() if trained else c for c, trained in zip(text, example.trained, strict=True))


DIALOGUE = [("system", "z"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize(
    ("record", "want"),
    [
        ({"instruction": "say", "output": "yes"}, ["^say\nYES$"]),
        ({"instruction": "say", "input": "it", "output": "yes"}, ["^say\nit\nYES$"]),
        ({"instruction": "say", "input": None, "output": "yes"}, ["^say\nYES$"]),
        ({"text": "once"}, ["^ONCE$"]),
        (
            {"messages": [{"role": role, "content": content} for role, content in DIALOGUE]},
            ["^z\na\nB$c\nD$"],
        ),
        (
            {"instruction": "i", "instances": [{"input": "", "output": "x"}, {"input": "n", "output": "y"}]},
            ["^i\nX$", "^i\nn\nY$"],
        ),
    ],
)  # fmt: skip
def test_only_answers_and_their_end_train(record, want):
    (examples,) = load([record])
    assert [spelled(e) for e in examples] == want


def test_labels_are_the_next_tokens():
    ((example,),) = load([{"instruction": "ab", "output": "c"}])
    assert len(example.inputs) == len(example.labels) == len(example.tokens) - 1
    assert example.labels == [IGNORED] * 3 + example.tokens[-2:]
    assert example.labels[-1] == 2


def test_cutting_is_counted_and_a_lost_answer_is_an_error():
    records = [{"instruction": "a" * 5, "output": "b"}, {"instruction": "a" * 5, "output": "b" * 9}]
    (whole,), (cut,) = load(records, max_len=12)
    assert not whole.truncated
    assert cut.truncated
    assert not cut.masked
    assert len(cut.tokens) == 12
    assert cut.tokens[-1] != 2
    ((lost,),) = load(records[1:], max_len=6)
    assert lost.masked
    message = r"every example must keep an answer within max_len, got 1 fully masked \(record 0\); raise max_len, "
    with pytest.raises(ValueError, match=message):
        check_examples([whole, lost])
    assert drop_masked([[whole, lost], [lost]]) == [[whole]]


def test_template_keeps_braces_of_the_values():
    assert PromptTemplate().prompt("{input} {x}", "{instruction}").count("{") == 3
    assert PLAIN.prompt("f{input}", "{instruction}") == "f{input}\n{instruction}\n"


def test_json_jsonl_and_memory_read_the_same(tmp_path):
    records = [{"instruction": "a", "output": "b"}, {"text": "c"}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps(r) for r in records) + "\n")
    tokens = [[e.tokens for e in r] for r in load(records)]
    assert tokens == [[e.tokens for e in r] for r in load(tmp_path / "x.json")]
    assert tokens == [[e.tokens for e in r] for r in load(tmp_path / "x.jsonl")]


def test_fields_rename():
    ((example,),) = load([{"q": "a", "a": "b"}], fields={"instruction": "q", "output": "a"})
    assert spelled(example) == "^a\nB$"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": 1}', r"data: line 2 of x.jsonl must have .* got keys \['txt'\]"),
        ('{"text": "a"}\n\n{"instruction": "x"}', r"data: line 3 of x.jsonl must have .* got keys \['instruction'\]"),
        ('{"text": "a"}\n{"text"', "data: line 2 of x.jsonl must be JSON, got"),
        ("[1]", "data: record 0 of x.jsonl must be a JSON object, got int"),
        ('{"text": 3}', "data: line 1 of x.jsonl: text must be a string, got int"),
        ('{"instruction": "a", "output": null}', "data: line 1 of x.jsonl: output must be a string, got NoneType"),
        ('{"messages": [{"role": "robot"}]}', r"messages\[0\] must have role system, user or assistant, got 'robot'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages must hold an assistant's turn, got none"),
        ("\n", "data: source must hold at least one record, got none"),
        ('{"instruction": "a", "instances": ["b"]}', r"instances must be a list of JSON objects, got \['b'\]"),
        ('{"text": "a"}\n{"instruction": "a", "instances": []}', "data: line 2 of x.jsonl: instances must be a list"),
        ('{"text": "\xe9"}', r"data: .*x\.jsonl must be UTF-8, got"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.jsonl")


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: path must be a \.json or \.jsonl file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"data: fields must rename some of .*, got 'question'"):
        load([{"text": "a"}], fields={"question": "q"})
    with pytest.raises(ValueError, match=r"eval_fraction must be in \[0, 1\), got 1"):
        split([], 1, 0)


def test_split_keeps_records_whole_and_follows_the_seed():
    records = load([{"instruction": "i", "instances": [{"output": "x"}, {"output": "y"}]}] * 10)
    records = [[e._replace(where=str(i)) for e in record] for i, record in enumerate(records)]
    train, held = split(records, 0.3, seed=1)
    assert len(train) == 14
    assert len(held) == 6
    assert not {e.where for e in train} & {e.where for e in held}
    assert split(records, 0.3, seed=1) == (train, held) != split(records, 0.3, seed=2)
    assert split(records, 0.0, seed=1)[1] == []


def examples(*lengths):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    return [Example(row, [False] + [True] * (len(row) - 1), False, "") for row in rows]


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_holds_every_example_once(packing):
    data = examples(*range(2, 40))
    knobs = {"batch_size": 2, "max_len": 40, "packing": packing, "seed": 3}
    first, again, second = (epoch_batches(data, epoch=e, **knobs) for e in (0, 0, 1))
    assert first == again != second
    assert sorted(i for b in second for i in b) == list(range(38))
    assert all(len(b) <= 2 for b in first) or packing
    assert all(sum(len(data[i].inputs) for i in b) <= 80 for b in first)


def test_packed_is_each_alone():
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=97)
    model = Llama(config)
    data = examples(7, 12, 2, 9)
    packed, padded = pack(data, 40, pad_id=0), pad(data, pad_id=0)
    assert packed.tokens.shape == (1, 40)
    assert padded.tokens.shape == (4, 11)
    assert packed.cu_seqlens.tolist() == [0, 6, 17, 18, 26, 40]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist()[:8] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert packed.n_trained == padded.n_trained == packed.n_tokens == padded.n_tokens == 26
    with torch.no_grad():
        one = model.loss(*packed[:2], positions=packed.positions, cu_seqlens=packed.cu_seqlens, reduction="sum")
        two = model.loss(*padded[:2], reduction="sum")
        alone = sum(model.loss(*pad([e], 0)[:2], reduction="sum") for e in data)
    torch.testing.assert_close(one, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(two, alone, rtol=1e-5, atol=0)
