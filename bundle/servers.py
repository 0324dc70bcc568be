"""What servers on this machine share that only this machine can reach: ports, and an end by Ctrl-C."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

from bundle.errors import BundleError

HOST = "127.0.0.1"
T = TypeVar("T")


def free_ports(**wanted: int) -> dict[str, int]:
    """The wanted ports by name, with a free one for each 0."""
    with ExitStack() as stack:  # all at once, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in wanted]
        for port, probe in zip(wanted.values(), sockets, strict=True):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise BundleError(f"port {port} is in use: give another, or 0 for any free one") from error
        return {name: probe.getsockname()[1] for name, probe in zip(wanted, sockets, strict=True)}


def until_interrupted(server: AbstractContextManager[T], words: Callable[[T], str]) -> None:
    """Run a ``server``, and print ``words`` of it, until Ctrl-C or a signal to end; an error is one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with server as started:
            print(f"{words(started)}\nCtrl-C ends it", flush=True)
            while True:  # a signal that comes just before a pause would be lost in it
                time.sleep(0.5)
    except BundleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
