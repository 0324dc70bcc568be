import hashlib
import json
import os
import subprocess
import sys

import pytest

from bundle.files import content_key, whole_file, whole_files, write_csv, write_json

HEAVY = {"torch", "monai", "pydicom", "nibabel", "numpy", "matplotlib"}


@pytest.fixture
def hashed(monkeypatch):
    """The files whose content is hashed, in order."""
    names = []
    digest = hashlib.file_digest

    def counted(stream, algorithm):
        names.append(os.path.basename(stream.name))
        return digest(stream, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


@pytest.mark.parametrize("module", ["bundle.files", "scripts.integrations.environments", "scripts.benchmarks.common"])
def test_the_ground_floor_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_a_file_is_hashed_once(tmp_path, hashed):
    (tmp_path / "a.png").write_bytes(b"a")
    assert content_key(tmp_path / "a.png") == content_key([str(tmp_path / "a.png")])
    assert hashed == ["a.png"]


def test_a_file_that_has_changed_is_hashed_again(tmp_path, hashed):
    (tmp_path / "a.png").write_bytes(b"a")
    before = content_key(tmp_path / "a.png")
    write_json(tmp_path / "a.png", "b")
    assert content_key(tmp_path / "a.png") != before
    assert hashed == ["a.png", "a.png"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with pytest.raises(KeyboardInterrupt), whole_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not list(file.parent.iterdir())
    with whole_file(file) as partial:
        partial.write_text("whole")
        assert not file.exists()
    assert [item.name for item in file.parent.iterdir()] == ["a.txt"]
    assert file.read_text() == "whole"


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_set_of_files_appears_together_and_replaces_what_is_stale(tmp_path):
    for name in ("x_map.nii.gz", "x_mask.png", "y_mask.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "x_overlay").mkdir()
    (tmp_path / "x_overlay" / "1.png").write_text("old")
    with whole_files(tmp_path, ["x_map.nii.gz", "x_mask.png", "x_overlay"]) as fresh:
        (fresh / "x_mask.png").write_text("new")
        (fresh / "x_overlay").mkdir()
        (fresh / "x_overlay" / "2.png").write_text("new")
        assert (tmp_path / "x_mask.png").read_text() == "old"
    assert {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == {
        "x_mask.png": "new",
        "y_mask.png": "old",
        "2.png": "new",
    }


def test_a_set_that_is_interrupted_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path, ["a"]) as fresh:
        (fresh / "a").write_text("new")
        raise KeyboardInterrupt
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_table_has_a_header_and_a_line_a_row(tmp_path):
    write_csv(tmp_path / "new" / "a.csv", [{"name": "a, b", "score": 1.5}], ["name", "score"])
    assert (tmp_path / "new" / "a.csv").read_text().splitlines() == ["name,score", '"a, b",1.5']
