"""Processes that are killed without warning."""

import os
import signal
import time
import traceback


def forked(work):
    """The id of a process that does ``work``, a copy of this one."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def killed_in(work, after=0.0, once=None, limit=120.0):
    """Do ``work`` in a copy of this process, and kill that ``after`` so many seconds.

    Args:
        work: without arguments.
        after: seconds.
        once: what must be true before the time begins to count.
        limit: seconds to wait for that.

    Returns:
        Whether it was at work until then.
    """
    child = forked(work)
    deadline = time.monotonic() + limit
    while once is not None and not once() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
