"""Atomic files and folders: a failure half way leaves what was there."""

import pytest

from llamakern.files import atomic_file, atomic_folder, sha256, write_json


class Half(Exception):
    pass


def fail_within(context, write):
    with context as temporary:
        write(temporary)
        raise Half


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    with pytest.raises(Half):
        fail_within(atomic_file(path), lambda temporary: temporary.write_text("half"))
    assert path.read_text() == '{\n  "n": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_keeps_the_old_folder(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "x").write_text(content)
    with pytest.raises(Half):
        fail_within(atomic_folder(tmp_path / "run"), lambda folder: (folder / "x").write_text("half"))
    assert (tmp_path / "run" / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def write_x(path, content):
    with atomic_folder(path) as folder:
        (folder / "x").write_text(content)


def test_a_linked_folder_is_replaced_where_it_stands(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for content in ("one", "two"):
        write_x(f"{tmp_path}/link/", content)
        assert (tmp_path / "real" / "x").read_text() == content
    assert (tmp_path / "link").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"files: path must be a folder, got the file .*mine"):
        write_x(tmp_path / "mine", "x")
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("path", [".", "", "..", "../inner"])
def test_the_working_folder_stays(tmp_path, monkeypatch, path):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(ValueError, match="files: path must not be the working folder or one above it, got /"):
        write_x(path, "x")
    assert (tmp_path / "inner").is_dir()


def test_sha256_sees_names_and_content(tmp_path):
    for folder, name, content in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    a, b, c, d = (sha256(tmp_path / folder) for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
