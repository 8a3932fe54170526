"""Atomic files and folders: a failure half way leaves what was there."""

import pytest

from llamakern.files import atomic_file, atomic_folder, sha256, write_json


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "n": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_keeps_the_old_folder(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "x").write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "run" / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_sha256_sees_names_and_content(tmp_path):
    for folder, name, content in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    a, b, c, d = (sha256(tmp_path / folder) for folder in "abcd")
    assert a == b and len({a, c, d}) == 3
