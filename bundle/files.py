"""Files: which are images, which belong to one source, what they hold; and writing that leaves no half of a file."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from bundle.errors import BundleError, shown
from bundle.processes import has_ended, process_name

PARTIAL = ".partial-"  # begins the name of what is being written
DAY = 24 * 3600.0  # seconds
ARTIFACTS = "mlruns"  # MLflow's folder beside its database: many files, and none of ours
FREE_DISK = "free the disk, then run the same command again"
_MIDDLE = 2**12  # bytes, a block of most disks
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota or a limit of file size is reached
_FORMER_PARTIAL = re.compile(r".+\.\d+\.partial|embeddings-\w{8}")  # names of versions before 0.6
FLAT_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".mha", ".mhd")  # NRRD and MetaImage
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SUFFIXES = (*VOLUME_SUFFIXES, *FLAT_SUFFIXES, *DICOM_SUFFIXES)
LOCAL = "LOCAL"  # by which a MetaImage says that its voxels follow its header
_DATA_FILE = re.compile(rb"^ElementDataFile[ \t]*=[ \t]*([^/\\%:\x00-\x1f]+?)[ \t]*\r?$", re.MULTILINE)
_LONGEST_HEADER = 2**20  # bytes
# how cells begin that spreadsheets take for formulas, or that are marked as text already
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")

Source: TypeAlias = str | os.PathLike | Sequence[str]
"""A file, a folder with one DICOM series, or the files of one."""


def is_flat(path: str | os.PathLike) -> bool:
    """Whether the file is a picture without geometry (PNG, JPEG, BMP, TIFF)."""
    return str(path).lower().endswith(FLAT_SUFFIXES)


def parts_of(source: Source) -> Sequence[str | os.PathLike]:
    """The file or folder, or the files, that a source is given by."""
    return [source] if isinstance(source, (str, os.PathLike)) else source


def files_of(source: Source) -> list[Path]:
    """The files of a source, those of a folder in order of name; a file that is missing is among them."""
    if not isinstance(source, (str, os.PathLike)):
        return [Path(file) for file in source]
    path, beside = Path(source), data_of(source)
    return (
        sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path, *filter(None, [beside])]
    )


def data_of(header: str | os.PathLike) -> Path | None:
    """The file beside the ``header`` of a MetaImage (``.mhd``) that holds its voxels; None: there is no such file."""
    path = Path(header)
    if path.suffix.lower() != ".mhd" or not path.is_file():
        return None
    with path.open("rb") as stream:
        found = _DATA_FILE.search(stream.read(_LONGEST_HEADER))
    name = os.fsdecode(found[1]) if found else LOCAL
    return None if name.upper() == LOCAL or name.startswith("LIST") else path.parent / name


def state_of(source: Source) -> list[tuple[int, int] | None]:
    """Size and time of the last change of each file of a source, by which another content shows; None: it is gone."""
    states: list[tuple[int, int] | None] = []
    for file in (*parts_of(source), *filter(None, map(data_of, parts_of(source)))):
        try:
            status = os.stat(file)
            states.append((status.st_size, status.st_mtime_ns))
        except OSError:
            states.append(None)
    return states


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is UTF-8, so that tables, logs and pictures can show it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


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


def equal_across(files: Sequence[Path], groups: Sequence[Hashable]) -> list[list[int]]:
    """Which files equal a file of another group byte by byte.

    Little is read of most files: only those of one size are compared, by a few bytes from their middle, and only those
    in which these agree are hashed. Files that are empty or missing equal none.

    Args:
        files: paths.
        groups: of each file, the group that it belongs to.

    Returns:
        Indices of equal files, at least two of different groups in each list.
    """
    found = [list(range(len(files)))]
    for sign in (_size_of, _middle_of, file_sha256):
        alike: dict[Any, list[int]] = defaultdict(list)
        for number, same in enumerate(found):
            for index in same:
                with suppress(OSError):
                    alike[number, sign(files[index])].append(index)
        found = [same for same in alike.values() if len({groups[index] for index in same}) > 1]
    return found


def _size_of(file: Path) -> int:
    if size := file.stat().st_size:
        return size
    raise OSError(f"'{file}' is empty")


def _middle_of(file: Path) -> bytes:
    """A few bytes in which files of one kind and size differ; their ends are often alike."""
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - _MIDDLE) // 2)
        return stream.read(_MIDDLE)


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
        folders[:] = [name for name in folders if name not in left and name != ARTIFACTS]
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
def writing(place: Path) -> Iterator[None]:
    """Say in one line why ``place`` cannot be written, and what helps.

    Raises:
        BundleError: if the system refuses to write, as with a full disk.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        inner = error.filename and PARTIAL not in str(error.filename) and Path(str(error.filename)) != place
        where = f": '{error.filename}'" if inner else ""
        remedy = FREE_DISK if error.errno in _NO_ROOM else "mend the folder or its rights, or give another"
        raise BundleError(f"cannot write '{place}' ({reason}{where}): {remedy}") from error


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path of the same name to write to: the file appears at ``path`` when the block ends well, or not at all.

    A link at ``path`` is replaced, not followed.

    Raises:
        BundleError: if the system refuses to write, as with a full disk.
    """
    target = Path(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=partial_prefix()) as workspace:
            partial = Path(workspace, target.name)
            yield partial
            os.replace(partial, target)


@contextmanager
def whole_files(
    folder: str | os.PathLike, stale: Iterable[str] = (), within: str | os.PathLike | None = None
) -> Iterator[Path]:
    """A new folder to write to: the files in it appear in ``folder`` when the block ends well, or not at all.

    They move in order of name, each at once, into subfolders that may be there and hold other files. Links in their
    places are replaced, not followed.

    Args:
        folder: where they belong; made if it is missing.
        stale: files below ``folder``, or subfolders with all that is in them, that belong to the same set and vanish if
            they are not written anew.
        within: the folder of all results, below which ``folder`` lies; None: it is ``folder``.

    Raises:
        BundleError: if the system refuses to write, as with a full disk, or a folder below ``within`` is a link.
    """
    target = Path(folder)
    root = target if within is None else Path(within)
    refuse_links(root, target.relative_to(root))
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=partial_prefix()) as fresh:
            yield Path(fresh)
            written = files_below(Path(fresh))
            for path in written:
                refuse_links(target, path.parent)
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                if (target / path).is_dir() and not (target / path).is_symlink():
                    raise IsADirectoryError(errno.EISDIR, "there is a folder of this name", str(target / path))
            for path in written:
                os.replace(Path(fresh, path), target / path)
        for path in {old for name in stale for old in _files_at(target, name)}.difference(written):
            refuse_links(target, path.parent)
            (target / path).unlink(missing_ok=True)
            _remove_empty((target / path).parent, target)


def refuse_links(root: Path, folder: Path) -> None:
    """Refuse to write to ``folder``, a path below ``root``, through a link; ``root`` itself may be one.

    Raises:
        BundleError: with the first link.
    """
    place = root
    for part in folder.parts:
        place /= part
        if place.is_symlink():
            raise BundleError(
                f"'{place}' is a link to '{os.readlink(place)}', and results are not written through links: remove it, "
                "or give another --output_dir"
            )


def files_below(folder: Path) -> list[Path]:
    """All files below ``folder``, by their paths below it, in order of name."""
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())


def _files_at(folder: Path, name: str) -> list[Path]:
    """The file ``name`` in ``folder``, or all files of the subfolder ``name``, as paths below ``folder``."""
    place = folder / name
    is_folder = place.is_dir() and not place.is_symlink()
    return [Path(name, path) for path in files_below(place)] if is_folder else [Path(name)]


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove ``folder``, and what it lies in up to ``top``, while nothing is in them."""
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def write_csv(path: str | os.PathLike, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows under a header line, at once or not at all.

    A text that a spreadsheet would take for a formula gets an apostrophe before it, as OWASP advises.
    So does one that begins with an apostrophe, so that a reader may take the first one away. Numbers stay numbers.
    """
    with (
        whole_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)


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
