"""Environments of other programs: made once, found again, and never half."""

import os
import re
import subprocess
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from bundle.errors import BundleError
from scripts.integrations import environments
from scripts.integrations.environments import environment

HOST = "127.0.0.1"


def make_wheel(folder, name):
    """A package with one empty module, in a folder of an index."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@contextmanager
def package_index(folder, wait=lambda: None):
    """The wheels of ``folder`` by HTTP, each when ``wait()`` has returned, and which of them were fetched."""
    fetched = set()

    class Index(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith(".whl"):
                fetched.add(self.path.rpartition("/")[2])
                wait()
            super().do_GET()

        def end_headers(self):
            self.send_header("Cache-Control", "max-age=600")
            super().end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer((HOST, 0), partial(Index, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{server.server_port}/simple", fetched
        server.shutdown()


@pytest.fixture(autouse=True)
def _settings(tmp_path, monkeypatch):
    """No settings but those of a test, and nothing fetched yet."""
    for variable in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def requirements(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# nothing but Python\n")
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


def test_the_reason_is_kept(requirements, tmp_path):
    requirements.write_text(f"--no-index\n--find-links {tmp_path}\nno_such_package\n")
    with pytest.raises(BundleError, match=r"\(error: .* no-such-package was not found in the provided"):
        environment(requirements, tmp_path / "base", "tool")


def test_what_is_done_is_told_while_an_environment_is_made(requirements, tmp_path, monkeypatch):
    said, was_told = [], Event()

    def tell(line, flush):
        said.append(line)
        if line.startswith("  "):
            was_told.set()

    monkeypatch.setattr(environments, "TELL_SECONDS", 0.02)
    monkeypatch.setattr(environments, "print", tell, raising=False)
    make_wheel(tmp_path / "index" / "simple" / "slow", "slow")
    with package_index(tmp_path / "index", lambda: was_told.wait(60)) as (url, _):
        requirements.write_text(f"--index-url {url}\nslow\n")
        environment(requirements, tmp_path / "base", "tool")
    first, *told, last = said
    assert first.startswith("making the environment") and re.fullmatch(r"made in 0:\d\d:\d\d", last)
    assert told and all(re.match(r"  0:\d\d:\d\d  \S", line) and len(line) <= 100 for line in told)


def test_environments_share_their_downloads(requirements, tmp_path):
    make_wheel(tmp_path / "index" / "simple" / "shared", "shared")
    with package_index(tmp_path / "index") as (url, fetched):
        for name, expected in (("one", {"shared-1.0-py3-none-any.whl"}), ("other", set())):
            fetched.clear()
            requirements.write_text(f"# {name}\n--index-url {url}\nshared\n")
            environment(requirements, tmp_path / "base", name)
            assert fetched == expected


@pytest.mark.parametrize("of", ["file", "variable"])
def test_packages_come_from_where_pip_is_told_to_take_them(requirements, tmp_path, monkeypatch, of):
    make_wheel(tmp_path / "index" / "simple" / "own", "own")
    requirements.write_text("own\n")
    with package_index(tmp_path / "index") as (url, fetched):
        (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {url if of == 'file' else 'http://127.0.0.1:9'}\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
        if of == "variable":
            monkeypatch.setenv("PIP_INDEX_URL", url)
        environment(requirements, tmp_path / "base", "tool")
    assert fetched == {"own-1.0-py3-none-any.whl"}


def test_a_missing_requirements_file_is_said(tmp_path):
    with pytest.raises(BundleError, match="no requirements at"):
        environment(tmp_path / "nowhere.txt", tmp_path / "base", "tool")
