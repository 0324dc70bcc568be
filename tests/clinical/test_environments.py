"""Environments of other programs: made once, found again, and never half."""

import subprocess

import pytest

from bundle.errors import BundleError
from scripts.integrations.environments import environment


@pytest.fixture
def requirements(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# nothing but pip\n")
    return file


def test_an_environment_is_made_once_and_found_again(requirements, tmp_path):
    python = environment(requirements, tmp_path / "base", "tool")
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    assert prefix.stdout.strip() == str(python.parents[1])
    note = python.parents[1] / "note"
    note.touch()
    assert environment(requirements, tmp_path / "base", "tool") == python
    assert note.exists()


def test_what_a_crash_left_is_made_anew(requirements, tmp_path):
    python = environment(requirements, tmp_path / "base", "tool")
    (python.parents[1] / "complete").unlink()
    note = python.parents[1] / "note"
    note.touch()
    assert environment(requirements, tmp_path / "base", "tool") == python
    assert python.exists() and not note.exists()


def test_other_requirements_have_an_environment_of_their_own(requirements, tmp_path):
    first = environment(requirements, tmp_path / "base", "tool")
    requirements.write_text("# other\n")
    assert environment(requirements, tmp_path / "base", "tool") != first
    assert first.exists()


def test_what_cannot_be_installed_is_said_in_one_line_and_leaves_nothing(requirements, tmp_path):
    requirements.write_text(f"{tmp_path / 'nowhere'}.whl\n")
    with pytest.raises(BundleError, match="cannot make the environment") as caught:
        environment(requirements, tmp_path / "base", "tool")
    assert "nowhere.whl" in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "base").iterdir() if path.is_dir()]


def test_a_missing_requirements_file_is_said(tmp_path):
    with pytest.raises(BundleError, match="no requirements at"):
        environment(tmp_path / "nowhere.txt", tmp_path / "base", "tool")
