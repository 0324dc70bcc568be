"""A virtual environment per requirements file, for what does not fit into that of the bundle; made once and reused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from bundle import NAME
from bundle.errors import BundleError

_COMPLETE = "complete"  # the file that an environment has from the moment on when nothing is missing


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
    calls at the same time one makes it and the others wait.

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
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)], folder)
            _run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements.absolute())], folder)
            (folder / _COMPLETE).touch()
    return python


def _run(command: list[str], folder: Path) -> None:
    """One step of making ``folder``, which vanishes if it fails."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise BundleError(f"cannot make the environment '{folder}' ({reason}): check network and disk, and run again")
