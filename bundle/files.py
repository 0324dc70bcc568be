"""Files: which are images, which belong to one source, what they hold; and writing that leaves no half of a file."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from bundle.errors import BundleError, shown

FLAT_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SUFFIXES = (*NIFTI_SUFFIXES, *FLAT_SUFFIXES, *DICOM_SUFFIXES)
# how cells begin that spreadsheets take for formulas, or that are marked as text already
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")

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


def check_hash(path: str | os.PathLike, expected: str | None, knob: str) -> None:
    """Refuse the file at ``path`` if it has another SHA-256 than ``expected``; None: any will do.

    Raises:
        BundleError: with both, naming the ``knob`` that says what is expected.
    """
    if expected is None:
        return
    found = file_sha256(path)
    if found != expected.lower():
        raise BundleError(
            f"'{path}' has SHA-256 {found}, but {knob} is {shown(expected)}: get it anew, or correct the hash"
        )


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


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to: the file appears at ``path`` at once when the block ends well, or not at all.

    The path ends in ``.partial``, so a writer that goes by the suffix must be told the format. Links are replaced, not
    followed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o666))  # a link that lies in wait there is not followed
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_files(
    folder: str | os.PathLike, stale: Iterable[str] = (), within: str | os.PathLike | None = None
) -> Iterator[Path]:
    """A new folder to write to: files and folders in it appear in ``folder`` when the block ends well, or not at all.

    They move in order of name, each at once. Links in their places are replaced, not followed.

    Args:
        folder: where they belong; made if it is missing.
        stale: names in ``folder`` that belong to the same set, and vanish if they are not written anew.
        within: the folder of all results, below which ``folder`` lies; None: it is ``folder``.

    Raises:
        BundleError: if a folder between the two is a link.
    """
    target = Path(folder)
    if within is not None:
        _refuse_links(target, Path(within))
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as workspace:
        fresh, old = Path(workspace, "new"), Path(workspace, "old")
        fresh.mkdir()
        old.mkdir()
        yield fresh
        written = {item.name: item for item in sorted(fresh.iterdir())}
        for name in dict.fromkeys([*stale, *written]):
            place = target / name
            # a file is replaced without a gap
            if os.path.lexists(place) and (name not in written or place.is_dir() or place.is_symlink()):
                os.replace(place, old / name)
        for name, item in written.items():
            os.replace(item, target / name)


def _refuse_links(folder: Path, root: Path) -> None:
    """Refuse to write to ``folder`` through a link below ``root``, which itself may be one.

    Raises:
        BundleError: with the first link.
    """
    path = root
    for part in folder.relative_to(root).parts:
        path /= part
        if path.is_symlink():
            raise BundleError(
                f"'{path}' is a link to '{os.readlink(path)}', and results are not written through links: remove it, "
                "or give another --output_dir"
            )


def write_csv(path: str | os.PathLike, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows under a header line, at once or not at all.

    A text that a spreadsheet would take for a formula gets an apostrophe before it, as OWASP advises;
    :func:`read_csv` takes it away. Numbers stay numbers.
    """
    with (
        whole_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows that :func:`write_csv` was given, as text."""
    with open(path, newline="", encoding="utf-8") as stream:
        return [{name: value.removeprefix("'") for name, value in row.items()} for row in csv.DictReader(stream)]


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) and not _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_json(path: str | os.PathLike, content: Any, indent: int = 2, sort_keys: bool = False) -> None:
    """Write JSON, at once or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n", encoding="utf-8")
