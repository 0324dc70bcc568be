"""Which process this is, and whether another one has ended: to tell remains from work in progress."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from pathlib import Path

NAME = r"([0-9a-f]{8})-(\d+)-(\d+)"
"""Of a process: its machine, its number there, and when it began, so that a number that is used again is no other's."""


def process_name(pid: int | None = None) -> str:
    """A text, fit for a file name, that names a process of this machine among those of all machines and times.

    Args:
        pid: of the process; None: this one.
    """
    pid = os.getpid() if pid is None else pid
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{machine}-{pid}-{_begin(pid)}"


def has_ended(name: str) -> bool | None:
    """Whether the process of this ``name`` has ended; None: nobody here knows, as it is of another machine."""
    found = re.fullmatch(NAME, name)
    if found is None or found[1] != process_name()[:8]:
        return None
    pid = int(found[2])
    return not _is_alive(pid) or process_name(pid) != name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _begin(pid: int) -> int:
    """When the process began, in the kernel's ticks; 0 where nobody tells."""
    try:
        # the name of the program, in parentheses, may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
