"""One command at a time writes into a folder: a lock that dies with its process, and the remains of killed ones."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import ignite.distributed as idist

from bundle.errors import BundleError, shown
from bundle.files import is_text, remove_leftovers, writing

FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a file system that has none

_held: dict[Path, int] = {}  # descriptors of the locks of this process, by folder
_made: list[Path] = []  # folders that were made for a lock

logger = logging.getLogger(__name__)


def lock_folder(folder: str | os.PathLike) -> None:
    """Make ``folder`` that of this process until it ends, and remove what killed commands have left half written there.

    Of processes that work together the first one holds the lock. A process may ask again for what it holds. The lock
    is one of the system on a file in the folder, which tells who holds it: it vanishes with the process, however that
    ends. Where the file system has no locks, a warning says so.

    Raises:
        BundleError: if another command holds the lock, nothing can be written there, or its name is no UTF-8.
    """
    place = Path(folder).resolve()
    if idist.get_rank() > 0 or place in _held:
        return
    if not is_text(place):
        raise BundleError(f"the name of the folder {str(place)!a} is no UTF-8: give another --output_dir")
    try:
        _make(place)
        descriptor = _locked(place / FILE)
    except BlockingIOError:
        raise BundleError(
            f"output_dir '{place}' is in use by {_holder(place / FILE)}: wait for its end, or give another --output_dir"
        ) from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            logger.warning(f"the file system of '{place}' has no locks: run one command at a time there")
            return
        with writing(place):
            raise
    _held[place] = descriptor
    removed = remove_leftovers(place)
    if removed:
        logger.info(f"removed {removed} half-written files or folders of killed commands from '{place}'")


def holds_lock(folder: str | os.PathLike) -> bool:
    """Whether this process holds the lock of ``folder``."""
    return Path(folder).resolve() in _held


def unlock_folders() -> None:
    """Give back every lock of this process, and remove the folders that were made for one if nothing came into them."""
    for place in list(_held):
        descriptor = _held.pop(place)
        (place / FILE).unlink(missing_ok=True)  # while it is ours
        os.close(descriptor)
    while _made:
        with suppress(OSError):  # something is in it
            _made.pop().rmdir()


def _make(folder: Path) -> None:
    """Make ``folder``, and what it lies in, and note what was made."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _made.extend(reversed(missing))


def _locked(file: Path) -> int:
    """The descriptor of ``file``, made if it is missing, with a lock and a note of who holds it.

    Raises:
        BlockingIOError: if another process holds the lock.
        OSError: if the file cannot be written, or there are no locks.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                try:
                    os.write(descriptor, json.dumps(_this_command()).encode())
                except OSError:  # as with a full disk
                    file.unlink()
                    raise
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our two steps


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _this_command() -> dict[str, str | int]:
    return {
        "command": shlex.join(sys.argv[1:]),
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _holder(file: Path) -> str:
    """Who holds the lock, in words."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        return f"{shown(note['command'])} (process {note['process']} on {note['host']}, since {note['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only begun
        return "another command"


def _forget() -> None:
    """In a child that shares our descriptors: else a worker that outlives its killed parent would keep the lock."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _made.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(unlock_folders)
