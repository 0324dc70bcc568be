"""``python APPLICATION -i STUDY -o RESULTS -m model.ts``."""

import os
import resource
import sys

STACK = 32 * 2**20  # bytes that Holoscan asks for


def prepare() -> None:
    """Give Holoscan the stack that it asks for, and silence what no user can act on; ``HOLOSCAN_LOG_LEVEL`` wins."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY and soft < STACK and (hard == resource.RLIM_INFINITY or hard >= STACK):
        resource.setrlimit(resource.RLIMIT_STACK, (STACK, hard))
    os.environ.setdefault("HOLOSCAN_LOG_LEVEL", "OFF")


if __name__ == "__main__":
    prepare()
    from app import start  # Holoscan reads its settings when it is imported

    sys.exit(start(sys.argv))
