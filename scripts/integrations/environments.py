"""A virtual environment per requirements file, for what does not fit into that of the bundle; made once and reused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from threading import Thread

from filelock import FileLock

from bundle import NAME
from bundle.errors import BundleError

_COMPLETE = "complete"  # the file that an environment has from the moment on when nothing is missing
TELL_SECONDS = 10.0  # between two lines of progress
_INSTALLING = "Installing collected packages: "  # of pip, before it names all of them
_WIDTH = 80


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
    calls at the same time one makes it and the others wait. Environments share downloads by pip's cache.

    Args:
        requirements: as ``pip install -r`` takes it.
        base: folder of all environments.
        name: of this one.

    Raises:
        BundleError: if the file is missing, or pip cannot install what it lists.
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
            _run([sys.executable, "-m", "venv", str(folder)], folder)
            _run([str(python), "-m", "pip", "install", "-r", str(requirements.absolute())], folder)
            (folder / _COMPLETE).touch()
            print(f"made in {_since(began)}", flush=True)
    return python


def _run(command: list[str], folder: Path) -> None:
    """One step of making ``folder``, which vanishes if it fails; what it is at is told every few seconds."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    began = time.monotonic()
    said: list[str] = []
    with subprocess.Popen(
        command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        reader = Thread(target=_keep_lines, args=(process.stdout, said), daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(TELL_SECONDS)
                if reader.is_alive() and said:
                    print(f"  {_since(began)}  {_at(said[-1], folder)}", flush=True)
        except BaseException:  # the one who waited has gone
            process.kill()
            raise
    if process.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        lines = said or [f"exit code {process.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise BundleError(f"cannot make the environment '{folder}' ({reason}): check network and disk, and run again")


def _since(began: float) -> timedelta:
    return timedelta(seconds=int(time.monotonic() - began))


def _keep_lines(stream: Iterable[str], said: list[str]) -> None:
    for line in stream:
        if line.strip():
            said.append(line.strip())


def _at(line: str, folder: Path) -> str:
    """What pip is at by its last ``line``, in a few words; what it installs it names once, and all together."""
    if line.startswith(_INSTALLING):
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        installed = sorted(site.glob("*.dist-info/INSTALLER"), key=lambda file: file.stat().st_mtime)
        newest = installed[-1].parent.name.removesuffix(".dist-info")
        return f"Installing {line.count(',') + 1} packages, {newest} is done"
    words = line.partition(" (from ")[0].split()
    return shorten(" ".join(word.rsplit("/", 1)[-1] for word in words), _WIDTH, placeholder=" ...")
