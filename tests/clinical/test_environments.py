"""Environments of other programs: made once, found again, and never half."""

import re
import subprocess
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from bundle.errors import BundleError
from scripts.integrations import environments
from scripts.integrations.environments import environment

HOST = "127.0.0.1"


def make_wheel(folder, name, modules=1, needs=()):
    """A package of empty modules, each of which pip compiles; it installs first what the package needs."""
    folder.mkdir(parents=True, exist_ok=True)
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        for number in range(modules):
            wheel.writestr(f"{name}/module{number}.py", "")
        header = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            "Version: 1.0",
            *(f"Requires-Dist: {need}" for need in needs),
        ]
        wheel.writestr(f"{info}/METADATA", "\n".join(header))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return file


@contextmanager
def package_index(folder):
    """The wheels of ``folder`` by HTTP, and which of them were fetched."""
    fetched = []

    class Index(SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("Cache-Control", "max-age=600")
            super().end_headers()

        def log_message(self, format, *arguments):
            fetched.extend(re.findall(r"GET /simple/\w+/(\S+whl)", str(arguments[0])))

    with ThreadingHTTPServer((HOST, 0), partial(Index, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{server.server_port}/simple", fetched
        server.shutdown()


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


def test_the_reason_of_pip_is_kept(requirements, tmp_path):
    requirements.write_text(f"--no-index\n--find-links {tmp_path}\nno_such_package\n")
    with pytest.raises(BundleError, match=r"\(ERROR: No matching distribution found for no_such_package"):
        environment(requirements, tmp_path / "base", "tool")


def test_what_is_done_is_told_while_an_environment_is_made(requirements, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(environments, "TELL_SECONDS", 0.02)
    make_wheel(tmp_path / "wheels", "small")
    large = make_wheel(tmp_path / "wheels", "large", modules=400, needs=["small"])
    requirements.write_text(f"--no-index\n--find-links {large.parent}\n{large}\n")
    environment(requirements, tmp_path / "base", "tool")
    first, *told, last = capfd.readouterr().out.splitlines()
    assert first.startswith("making the environment") and re.fullmatch(r"made in 0:\d\d:\d\d", last)
    assert all(re.match(r"  0:\d\d:\d\d  \S", line) and len(line) <= 100 for line in told)
    assert any(line.endswith("  Installing 2 packages, small-1.0 is done") for line in told)
    assert str(tmp_path) not in "".join(told)


def test_environments_share_their_downloads(requirements, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    make_wheel(tmp_path / "index" / "simple" / "shared", "shared")
    with package_index(tmp_path / "index") as (url, fetched):
        for name in ("one", "other"):
            requirements.write_text(f"# {name}\n--index-url {url}\n--trusted-host {HOST}\nshared\n")
            environment(requirements, tmp_path / "base", name)
    assert fetched == ["shared-1.0-py3-none-any.whl"]


def test_a_missing_requirements_file_is_said(tmp_path):
    with pytest.raises(BundleError, match="no requirements at"):
        environment(tmp_path / "nowhere.txt", tmp_path / "base", "tool")
