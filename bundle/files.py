"""Files: which are images, which belong to one source, what they hold; and writing that leaves no half of a file."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from bundle.processes import has_ended, process_name

PARTIAL = ".partial-"  # begins the name of what is being written
DAY = 24 * 3600.0  # seconds
_FORMER_PARTIAL = re.compile(r".+\.\d+\.partial|embeddings-\w{8}")  # names of versions before 0.6
FLAT_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SUFFIXES = (*NIFTI_SUFFIXES, *FLAT_SUFFIXES, *DICOM_SUFFIXES)

Source: TypeAlias = str | os.PathLike | Sequence[str]
"""A file, a folder with one DICOM series, or the files of one."""


def is_flat(path: str | os.PathLike) -> bool:
    """Whether the file is a picture without geometry (PNG, JPEG, BMP, TIFF)."""
    return str(path).lower().endswith(FLAT_SUFFIXES)


def files_of(source: Source) -> list[Path]:
    """The files of a source, those of a folder in order of name; a file that is missing is among them."""
    if not isinstance(source, (str, os.PathLike)):
        return [Path(file) for file in source]
    path = Path(source)
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file, as other programs give it."""
    status = os.stat(path)
    return _file_digest(str(path), status.st_ino, status.st_size, status.st_mtime_ns).hex()


def content_key(source: Source) -> str:
    """What tells the content of a source from others: SHA-256 (hex) over the hashes of its files, in order of name.

    A process reads a file once for it, and again only if the file has changed.
    """
    digest = hashlib.sha256()
    for part in files_of(source):
        digest.update(bytes.fromhex(file_sha256(part)))
    return digest.hexdigest()


@cache
def _file_digest(path: str, inode: int, size: int, changed: int) -> bytes:
    """SHA-256 of the file at ``path``; what follows it tells one state of the file from another."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def partial_prefix() -> str:
    """What the name of a file or folder begins with while this process writes it."""
    return f"{PARTIAL}{process_name()}-"


def remove_leftovers(folder: str | os.PathLike) -> int:
    """Remove what processes that have ended, killed, left half written in ``folder`` and below; links stay as they are.

    What bears no name of a process, as earlier versions wrote it, or that of a process of another machine, is removed
    when it has not been touched for a day.

    Returns:
        How many files and folders were removed.
    """
    removed = 0
    for place, folders, files in os.walk(str(folder)):
        left = [name for name in (*folders, *files) if _is_leftover(Path(place, name))]
        for name in left:
            path = Path(place, name)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        removed += len(left)
        folders[:] = [name for name in folders if name not in left and name != "mlruns"]  # many, and none of ours
    return removed


def _is_leftover(path: Path) -> bool:
    if not (path.name.startswith(PARTIAL) or _FORMER_PARTIAL.fullmatch(path.name)) or path.is_symlink():
        return False
    ended = has_ended("-".join(path.name.removeprefix(PARTIAL).split("-")[:3]))
    try:
        return time.time() - path.stat().st_mtime > DAY if ended is None else ended
    except OSError:  # it has just vanished
        return False


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path of the same name to write to: the file appears at ``path`` when the block ends well, or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=partial_prefix()) as workspace:
        partial = Path(workspace, target.name)
        yield partial
        os.replace(partial, target)


@contextmanager
def whole_files(folder: str | os.PathLike, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder to write to: files and folders in it appear in ``folder`` when the block ends well, or not at all.

    They move in order of name, each at once.

    Args:
        folder: where they belong; made if it is missing.
        stale: names in ``folder`` that belong to the same set, and vanish if they are not written anew.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=partial_prefix()) as workspace:
        fresh, old = Path(workspace, "new"), Path(workspace, "old")
        fresh.mkdir()
        old.mkdir()
        yield fresh
        written = {item.name: item for item in sorted(fresh.iterdir())}
        for name in dict.fromkeys([*stale, *written]):
            place = target / name
            if place.exists() and (name not in written or place.is_dir()):  # a file is replaced without a gap
                os.replace(place, old / name)
        for name, item in written.items():
            os.replace(item, target / name)


def write_csv(path: str | os.PathLike, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows under a header line, at once or not at all."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: str | os.PathLike, content: Any, indent: int = 2, sort_keys: bool = False) -> None:
    """Write JSON, at once or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n", encoding="utf-8")
