"""tiktoken's ranks: the published patterns, marks and cuts, against tiktoken itself and against tokenizers' BPE."""

import base64
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakern.tokenizer import load_tokenizer
from llamakern.tokenizer_tiktoken import FAMILIES, LONGEST_RUN, LONGEST_TEXT, stretches

FIXTURES = Path(__file__).parent / "fixtures"

# As published, in one piece.
PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama4": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Ids behind the last rank, as in the published tokenizer.json of LLaMA 3.1 and 4.
MARKS = {
    "llama3": {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|reserved_special_token_1|>": 3,
        "<|finetune_right_pad_id|>": 4, "<|reserved_special_token_2|>": 5, "<|start_header_id|>": 6,
        "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
        "<|reserved_special_token_3|>": 11, "<|reserved_special_token_247|>": 255,
    },
    "llama4": {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|fim_suffix|>": 4, "<|header_start|>": 5, "<|header_end|>": 6,
        "<|eom|>": 7, "<|eot|>": 8, "<|step|>": 9, "<|python_start|>": 16, "<|finetune_right_pad|>": 18,
        "<|text_post_train_reserved_special_token_68|>": 79, "<|image_start|>": 80, "<|image|>": 90, "<|patch|>": 92,
        "<|vision_reserved_special_token_1047|>": 1133, "<|reasoning_thinking_end|>": 1143,
        "<|reserved_special_token_0|>": 1144, "<|reserved_special_token_903|>": 2047,
    },
}  # fmt: skip
N_MARKS = {"llama3": 256, "llama4": 2048}


def train_ranks(text, n):
    """Byte-pair ranks: the commonest neighbours join, until there are n pieces."""
    words = [[bytes([b]) for b in word.encode()] for word in text.replace(" ", "\0 ").split("\0")]
    pieces = [bytes([b]) for b in range(256)]
    while len(pieces) < n:
        counts = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        a, b = max(counts, key=lambda pair: (counts[pair], pair))
        pieces.append(a + b)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return pieces


def write_ranks(path, pieces):
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces)))
    return path


TEXT = """It's the theory that they're there; we'll see, I'd say. The others THEY'VE seen 1234567 things at 3.14!
  indented   code: if (x != y) { return http://a.b/c//d; }\r\n\n\nÉtude für Žofie, naïve café, 日本語のテキスト,
привет мир, ☕️. camelCase HTTPServer iPhone ǅungla ʰaspirated áccent\t\ttabs """


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A small tokenizer.model of each family, and the file."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    pieces = [*train_ranks(TEXT, 400), b" " * 2, b" " * 4, b"\n\n", b"aa", b"a" * 4]
    write_ranks(path, list(dict.fromkeys(pieces)))
    return request.param, path, load_tokenizer(path, family=request.param)


def texts():
    """Text where the patterns have something to decide."""
    letters = "aábZǅʰ日й́ 's'T1٣½ \t\n\r\u2028\u00a0_/!☕\U0001f600"
    return st.one_of(st.text(letters, max_size=60), st.text(max_size=40))


def test_equals_tiktoken(made):
    family, path, ours = made
    pieces = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    theirs = tiktoken.Encoding(
        "own", pat_str=PATTERNS[family], special_tokens={}, mergeable_ranks={p: i for i, p in enumerate(pieces)}
    )

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(texts())
    def check(text):
        assert ours.encode(text, bos=False) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text, eos=True)) == text

    check()
    assert ours.encode(TEXT, bos=False) == theirs.encode_ordinary(TEXT)
    assert len(ours.encode(TEXT)) < len(TEXT.encode()) / 1.5


def test_equals_the_converted_tokenizer_json(made, tmp_path):
    """transformers' converter writes the same ranks as a tokenizer.json; read back, it gives the same ids."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    family, path, ours = made
    marks = sorted(ours.marks, key=ours.marks.get)
    converter = convert.TikTokenConverter(str(path), pattern=PATTERNS[family], extra_special_tokens=marks)
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    theirs = load_tokenizer(tmp_path / "tokenizer.json")
    assert theirs.marks == ours.marks
    assert (theirs.bos_id, theirs.eos_id, theirs.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.one_of(texts(), st.sampled_from(marks)))
    def check(text):
        ids = ours.encode(text, eos=True)
        assert theirs.encode(text, eos=True) == ids
        assert theirs.decode(ids) == ours.decode(ids)

    check()


def test_marks_are_those_published(made):
    family, _, tokenizer = made
    n = tokenizer.n_ranks
    assert {name: i - n for name, i in tokenizer.marks.items() if name in MARKS[family]} == MARKS[family]
    assert sorted(tokenizer.marks.values()) == list(range(n, n + N_MARKS[family]))
    assert tokenizer.vocab_size == n + N_MARKS[family]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (n, n + 1)
    assert tokenizer.pad_id == n + {"llama3": 4, "llama4": 18}[family]


def test_text_cannot_forge_marks(made):
    _, _, tokenizer = made
    for mark in ("<|begin_of_text|>", "<|eot_id|>", "<|eot|>", "<|image|>"):
        ids = tokenizer.encode(mark, bos=False)
        assert max(ids) < tokenizer.n_ranks
        assert tokenizer.decode(ids) == mark


def test_decoding_leaves_out_what_is_no_text(made):
    _, _, tokenizer = made
    n = tokenizer.n_ranks
    assert tokenizer.decode([n, ord("h"), ord("i"), n + 9, tokenizer.vocab_size, 10**12]) == "hi"
    assert tokenizer.decode([0xE6, 0x97]) == "�"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="tokenizer: ids must be at least 0, got -1"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match="tokenizer: text must be Unicode, got"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("family", FAMILIES)
def test_family_by_the_number_of_ranks(tmp_path, family):
    n = FAMILIES[family].n_ranks
    pieces = [bytes([b]) for b in range(256)] + [i.to_bytes(3, "big") for i in range(n - 256)]
    tokenizer = load_tokenizer(write_ranks(tmp_path / "tokenizer.model", pieces))
    assert tokenizer.vocab_size == {"llama3": 128_256, "llama4": 202_048}[family]
    end, i = {"llama3": ("<|eot_id|>", 128_009), "llama4": ("<|eot|>", 200_008)}[family]
    assert tokenizer.marks[end] == i


def test_the_format_loads_for_ever():
    tokenizer = load_tokenizer(FIXTURES / "tiktoken.model", family="llama3")
    assert tokenizer.encode("the other", eos=True) == [259, 258, 32, 111, 258, 114, 260]


def cut_slowly(text):
    """LLaMA's own rule, character by character: a run's 25,001st character begins a new stretch."""
    found = []
    for i in range(0, len(text), LONGEST_TEXT):
        part, start, run = text[i : i + LONGEST_TEXT], 0, 0
        for j, char in enumerate(part):
            run = run + 1 if j and char.isspace() == part[j - 1].isspace() else 1
            if run > LONGEST_RUN:
                found.append(part[start:j])
                start, run = j, 1
        found.append(part[start:])
    return found


@pytest.mark.parametrize(
    "text",
    ["", "a", " \x1f", "a" * 24_999, "a" * 25_000, "a" * 25_001, "a" * 25_000 + " b", "a " * 30_000, " " * 60_000,
     "ab \n" * 10 + "é" * 75_001, "x" * 20_000 + "\u3000" * 50_001 + "y" * 10_000, "a" * 399_999 + " " * 30_000,
     " a" * 400_001],
    ids=lambda text: f"{text[:2]!r}x{len(text)}",
)  # fmt: skip
def test_stretches_are_cut_where_llama_cuts(text):
    assert list(stretches(text)) == cut_slowly(text)


@pytest.mark.parametrize("text", ["a" * 500_000, " " * 1_000_000, "\n" * 300_000, "é" * 300_000, "ab" * 200_000, "A"])
def test_long_runs_do_not_hang(made, text):
    _, _, tokenizer = made
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 10


BYTES = [bytes([b]) for b in range(256)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\n!!!! 1\n", r"line 2 of .*tokenizer.model must be base64 and a rank, got b'!!!! 1'"),
        (b"YQ== 0\nYWI 1\n", "line 2 of .* must be base64 and a rank"),
        (b"YQ== 0\n\nYg== 1\n", "line 2 of .* must be base64 and a rank, got b''"),
        (b"YQ== 0\nYg== 2\n", r"line 2 of .* must be a new piece of rank 1, got b'Yg== 2'"),
        (b"YQ== 0\nYQ== 1\n", r"line 2 of .* must be a new piece of rank 1, got b'YQ== 1'"),
        (b"YQ== 0\nYg== " + b"9" * 5000, "line 2 of .* must be base64 and a rank"),
        (b"YQ== 0\nYg== 1", "must hold every byte as a piece, got none for 0"),
    ],
)
def test_damaged_ranks(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path, family="llama3")


def test_family_must_be_known(tmp_path):
    path = write_ranks(tmp_path / "tokenizer.model", BYTES)
    with pytest.raises(ValueError, match=r"family of .* given, one of llama3 \(128000 ranks\), .* got 256 ranks"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"tokenizer: family must be one of .*, got 'llama5'"):
        load_tokenizer(path, family="llama5")
