"""A virtual environment per requirements file, for what does not fit into that of the bundle; made once and reused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from threading import Thread

from filelock import FileLock
from uv import find_uv_bin

from bundle import NAME
from bundle.errors import BundleError

_COMPLETE = "complete"  # the file that an environment has from the moment on when nothing is missing
TELL_SECONDS = 10.0  # between two lines of progress
_WIDTH = 80
_LONGEST_REASON = 300
# where packages come from, as users or their hospital have set it for pip; uv knows these by the same names
_SETTINGS_OF_PIP = ("index-url", "extra-index-url", "find-links", "constraint", "trusted-host")
_VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "timeout": "UV_HTTP_TIMEOUT"}


def cache_folder() -> Path:
    """Where what is fetched belongs if the user does not say: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME


def default_base() -> Path:
    """Where environments belong if the user does not say."""
    return cache_folder() / "environments"


def environment(requirements: Path, base: Path, name: str) -> Path:
    """The Python of a virtual environment that holds what ``requirements`` lists.

    Its folder is called after ``name`` and the hash of the requirements and of this Python's version: what has changed
    is made anew beside the old. A crash leaves an environment without its mark, which the next call starts over; of
    calls at the same time one makes it and the others wait. uv installs, by the settings of pip: environments share
    downloads by its cache, and where file systems allow it the installed files, too.

    Args:
        requirements: as ``pip install -r`` takes it.
        base: folder of all environments.
        name: of this one.

    Raises:
        BundleError: if the file is missing, or what it lists cannot be installed.
    """
    if not requirements.is_file():
        raise BundleError(f"no requirements at '{requirements}': check the path")
    recipe = requirements.read_bytes() + f"\nPython {sys.version_info.major}.{sys.version_info.minor}".encode()
    folder = base.absolute() / f"{name}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not ((folder / _COMPLETE).is_file() and python.exists()):
            print(f"making the environment '{folder}', once: some gigabytes, some minutes", flush=True)
            began = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            options, variables = options_of_pip()
            _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder, {})
            install = [find_uv_bin(), "pip", "install", "--python", str(python), "--index-strategy=unsafe-best-match"]
            _run([*install, *options, "-r", str(requirements.absolute())], folder, variables)
            (folder / _COMPLETE).touch()
            print(f"made in {_since(began)}", flush=True)
    return python


def options_of_pip() -> tuple[list[str], dict[str, str]]:
    """What the files and variables of pip say of where packages come from, as options and variables for uv."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    pairs = [line.partition("=")[::2] for line in sorted(told.splitlines(), key=lambda line: line.startswith(":env:"))]
    settings = {name.rpartition(".")[2]: str(literal_eval(value)) for name, value in pairs if value}
    options = [f"--{name}={one}" for name in _SETTINGS_OF_PIP for one in settings.get(name, "").split()]
    return options, {_VARIABLES[name]: settings[name] for name in _VARIABLES.keys() & settings.keys()}


def _run(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    """One step of making ``folder``, which vanishes if it fails; what it is at is told every few seconds."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    began = time.monotonic()
    said: list[str] = []
    with subprocess.Popen(
        command,
        env=variables | clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        reader = Thread(target=_keep_lines, args=(process.stdout, said), daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(TELL_SECONDS)
                if reader.is_alive() and said:
                    print(f"  {_since(began)}  {shorten(said[-1], _WIDTH, placeholder=' ...')}", flush=True)
        except BaseException:  # the one who waited has gone
            process.kill()
            raise
    if process.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        reason = _reason(said) or f"exit code {process.returncode}"
        raise BundleError(f"cannot make the environment '{folder}' ({reason}): check network and disk, and run again")


def _since(began: float) -> timedelta:
    return timedelta(seconds=int(time.monotonic() - began))


def _keep_lines(stream: Iterable[str], said: list[str]) -> None:
    for line in stream:
        if line.strip():
            said.append(line.strip())


def _reason(said: list[str]) -> str:
    """What uv says of an error, from the line that names it on, in one line."""
    first = next((index for index, line in enumerate(said) if line.startswith("error:")), 0)
    return shorten(" ".join(said[first:]), _LONGEST_REASON, placeholder=" ...")
