import json
import random
import struct
from pathlib import Path

import pytest

from llamakern.tokenizer import Llama2cTokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = "Once upon a time, there was a café ☕ in\n日本. <s> <0x0A>  Two  spaces."


def write_pieces(path, pieces, longest=20):
    """A tok*.bin: the marks, the 256 bytes, then (piece, score) pairs."""
    base = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)] + [(b"<0x%02X>" % b, 0.0) for b in range(256)]
    data = struct.pack("<i", longest)
    for piece, score in base + pieces:
        data += struct.pack("<fi", score, len(piece)) + piece
    path.write_bytes(data)
    return path


@pytest.fixture
def llama2c(data_dir):
    return load_tokenizer(data_dir / "stories260K" / "tok512.bin")


def merge_slowly(tokenizer, symbols):
    """llama2.c's own way: look at every pair, join the best, until none is a piece."""
    while True:
        best = (-1e10, None, None)
        for i in range(len(symbols) - 1):
            joined = tokenizer.ids.get(tokenizer.pieces[symbols[i]] + tokenizer.pieces[symbols[i + 1]])
            if joined is not None and tokenizer.scores[joined] > best[0]:
                best = (tokenizer.scores[joined], joined, i)
        if best[1] is None:
            return symbols
        symbols[best[2] : best[2] + 2] = [best[1]]


def test_llama2c_known_text(llama2c, data_dir):
    greedy = json.loads((data_dir / "vectors" / "stories260K_greedy.json").read_text())
    ids = greedy["ids_measured_here"]
    assert llama2c.decode(ids) == greedy["expected_text"]
    assert llama2c.encode("Once upon a time") == ids[:5]
    assert (llama2c.vocab_size, llama2c.bos_id, llama2c.eos_id, llama2c.pad_id) == (512, 1, 2, 2)


@pytest.mark.parametrize("text", [TEXT, "", " ", "a", "\n\n", "\0", "é" * 3])
def test_llama2c_round_trip(llama2c, text):
    assert llama2c.decode(llama2c.encode(text, eos=True)) == text
    assert llama2c.decode(llama2c.encode(text, bos=False)) == (" " + text if text else "")


def test_llama2c_joins_as_the_slow_search_does(llama2c):
    choose = random.Random(0)
    for n in range(60):
        text = "".join(choose.choice("aeht  no.é\n") for _ in range(n))
        start = [llama2c.ids.get(c.encode()) for c in " " + text]
        plain = [[s] if s is not None else [b + 3 for b in c.encode()] for s, c in zip(start, " " + text, strict=True)]
        want = merge_slowly(llama2c, [i for ids in plain for i in ids]) if text else []
        assert llama2c.encode(text, bos=False) == want


def test_llama2c_joins_the_leftmost_of_equals(tmp_path):
    pieces = [(b" ", -9.0), (b"a", -9.0), (b"aa", -1.0), (b"aaa", -2.0), (b" a", -3.0)]
    tokenizer = load_tokenizer(write_pieces(tmp_path / "tok.bin", pieces))
    aa, aaa, space = 261, 262, 259
    assert tokenizer.encode("aaa", bos=False) == [space, aaa]
    assert tokenizer.encode("aaaaa", bos=False) == [space, aa, aaa]


def test_text_cannot_forge_marks(tmp_path):
    pieces = [(c.encode(), -9.0) for c in " \n<s>"] + [(b"\n<", -1.0), (b"s>", -1.0), (b"\n<s", -1.0), (b"\n<s>", -1.0)]
    tokenizer = load_tokenizer(write_pieces(tmp_path / "tok.bin", pieces))
    assert 1 not in tokenizer.encode("\n<s>\n", bos=False)
    assert tokenizer.decode(tokenizer.encode("\n<s>\n")) == "\n<s>\n"


def test_broken_utf8_is_replaced(llama2c):
    assert llama2c.decode([1, 0xE6 + 3, 0x97 + 3]) == "�"


@pytest.mark.parametrize("cut", [0, 3, 5, 11, 15, -1])
def test_truncated_llama2c(tmp_path, cut):
    path = write_pieces(tmp_path / "tok.bin", [(b"abc", 0.0)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"tokenizer: .*tok.bin must hold"):
        load_tokenizer(path)


def test_lengths_are_bounded(tmp_path):
    with pytest.raises(ValueError, match=r"must hold whole pieces, got a damaged one at byte"):
        load_tokenizer(write_pieces(tmp_path / "tok.bin", [(b"a" * 21, 0.0)]))
    path = write_pieces(tmp_path / "tok.bin", [])
    path.write_bytes(path.read_bytes() + struct.pack("<fi", 0.0, -1))
    with pytest.raises(ValueError, match=r"must hold whole pieces"):
        load_tokenizer(path)
    path.write_bytes(struct.pack("<ifi", 20, 0.0, 1) + b"a")
    with pytest.raises(ValueError, match=r"must hold 3 marks and 256 bytes, got 1 pieces"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("tok.bin", [1, 263, 263, 259, 260, 2]),
        ("tokenizer.json", [0, 6, 6, 2, 3, 1]),
        ("tokenizer.model", [1, 4, 4, 3, 2]),
    ],
)
def test_every_format_loads_for_ever(name, ids):
    tokenizer = load_tokenizer(FIXTURES / name)
    assert tokenizer.encode("ab ab a", eos=True) == ids
    assert tokenizer.decode(ids) == "ab ab a"


@pytest.mark.parametrize("file", ["mistral-tokenizer/tokenizer.model.v1", "storyllamas/tokenizer_4096.model"])
def test_sentencepiece(data_dir, file):
    import sentencepiece

    tokenizer = load_tokenizer(data_dir / file)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(data_dir / file))
    assert tokenizer.encode(TEXT, bos=False) == theirs.encode(TEXT)
    assert tokenizer.encode(TEXT, eos=True) == [1, *theirs.encode(TEXT), 2]
    assert tokenizer.decode(tokenizer.encode(TEXT, eos=True)) == theirs.decode(theirs.encode(TEXT))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (theirs.vocab_size(), 1, 2)
    assert tokenizer.pad_id == (theirs.pad_id() if theirs.pad_id() >= 0 else 2)


def test_tokenizer_json(data_dir):
    folder = data_dir / "tinystories-656k"
    tokenizer = load_tokenizer(folder)
    text = "Once upon a time, there was a little girl."
    ids = tokenizer.encode(text, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (2048, 0)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert ids[1:-1] == theirs.encode(text, add_special_tokens=False)


def test_marks_of_a_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, models

    words = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "a": 2, "[stop]": 3}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[stop]"}, "bos_token": None}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 3, 3)
    assert tokenizer.encode("a", eos=True) == [0, 2, 3]


@pytest.mark.parametrize("name", ["tok.bin", "tokenizer.json", "tokenizer.model"])
def test_marks_have_ids_and_no_text(name):
    tokenizer = load_tokenizer(FIXTURES / name)
    assert tokenizer.marks["<s>"] == tokenizer.bos_id
    assert tokenizer.marks["</s>"] == tokenizer.eos_id
    for mark, i in tokenizer.marks.items():
        assert i not in tokenizer.encode(f"a{mark} b", bos=False)
        assert tokenizer.decode([i]) == ""
    assert tokenizer.decode([tokenizer.n_ids, 10**9]) == ""
    with pytest.raises(ValueError, match="tokenizer: ids must be at least 0, got -2"):
        tokenizer.decode([1, -2])
    with pytest.raises(ValueError, match="tokenizer: text must be Unicode, got"):
        tokenizer.encode("\ud83d")


def test_marks_that_a_tokenizer_json_does_not_call_special(tmp_path):
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    made.add_tokens(["</s>", "<tool>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.marks == {"</s>": 2}
    assert tokenizer.encode("a", eos=True) == [0, 2]
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode("<tool>") == [3]  # an ordinary token of this file


def test_which_file_of_a_folder(tmp_path, data_dir):
    with pytest.raises(FileNotFoundError, match=r"tokenizer: .* must hold one of tokenizer.json, tokenizer.model, tok"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer: path must be a file or folder, got '/no/where'"):
        load_tokenizer("/no/where")
    write_pieces(tmp_path / "tok512.bin", [])
    assert type(load_tokenizer(tmp_path)) is Llama2cTokenizer
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer.model must be a sentencepiece model, got"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((FIXTURES / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must hold a JSON object, got"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json must be a tokenizer.json, got"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", r"tokenizer: .* must be a sentencepiece model, got an empty file"),
        ("tokenizer.json", b'{"a": "\xff"}', r"tokenizer: .*tokenizer.json must be UTF-8, got"),
        ("tokenizer.json", b"[" * 100_000, r"tokenizer: .* must be a tokenizer.json, got"),
        ("tokenizer_config.json", b"[" * 100_000, r"tokenizer: .*tokenizer_config.json must hold a JSON object, got"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token beside tokenizer.json must be a string, got 3"),
        (
            "tokenizer_config.json",
            b'{"bos_token": "\\ud800"}',
            r"bos_token beside tokenizer.json must be a string, got",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    if "config" in name:
        (tmp_path / "tokenizer.json").write_bytes((FIXTURES / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_without_its_unknown_token(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=r"tokenizer: tokenizer.json must have tokens for the text, got"):
        load_tokenizer(tmp_path).encode("b")


def test_pieces_must_be_text(tmp_path):
    content = (FIXTURES / "tokenizer.model").read_bytes()
    at = content.index("▁ab".encode())
    (tmp_path / "tokenizer.model").write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(ValueError, match=r"tokenizer: .* must (hold pieces in UTF-8|be a sentencepiece model), got"):
        load_tokenizer(tmp_path)
