"""Commands on a disk that gets full, and run again with room: the end must be that of an undisturbed run.

``PYTHONPATH=. python tests/disks.py --commands training --kilobytes 4 100 1200 --out FOLDER`` does that with disks of
these sizes, and prints a line for each. A disk is a tmpfs in a namespace of its own (``unshare -rm``). Where there are
no such namespaces, ``--limit file`` sets a limit on the size of each file instead. ``--limit rights`` makes the disk
read-only.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from kills import (
    COMMANDS,
    command,
    content,
    differences,
    ended,
    forked,
    is_about_runs,
    prepare,
    run_undisturbed,
    warm_up,
)

ENOUGH = "size=500m"
ERROR = "error: cannot write '"
FREE_DISK = "free the disk, then run the same command again"
ENDS = {  # of the line of the error, by what is short
    "disk": f"No space left on device): {FREE_DISK}",
    "file": f"File too large): {FREE_DISK}",
    "rights": "mend the folder or its rights, or give another",
}


def has_namespaces():
    """Whether this system lets a user mount a disk of his own."""
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which(words[0])) and not subprocess.run(words, capture_output=True, check=False).returncode


def mount(place, options):
    """Mount a tmpfs at ``place``, or change that which is there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)


def limited(work, limit, kilobytes):
    """``work``, whose files may have so many kilobytes, if ``limit`` is ``file``."""

    def with_limit():
        if limit == "file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, resource.RLIM_INFINITY))
        work()

    return with_limit


def faults(name, place, limit, kilobytes):
    """Run a command on a disk of so many kilobytes, and again with room.

    Returns:
        Whether the first run ended early, what is wrong, in words, and the line by which it ended.
    """
    disk = place / f"{limit}-{kilobytes}-{name}"
    output, log = disk / "output", disk.with_suffix(".log")
    disk.mkdir()
    if limit == "disk":
        mount(disk, f"size={kilobytes}k")
    if limit == "rights":
        mount(disk, ENOUGH)
        output.mkdir()
        mount(disk, "remount,ro")
    status = ended(forked(limited(command(name, place, output, log), limit, kilobytes)))
    text = log.read_text().replace("\r", "\n")
    found = [] if "Traceback" not in text else ["a trace"]
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if status:
        if status != 1 or len(lines) != 1 or not (lines[0].startswith(ERROR) and lines[0].endswith(ENDS[limit])):
            found.append(f"exit status {status} with {lines or text[-500:]}")
    left = [str(path.relative_to(disk)) for path in disk.rglob("*") if path.name.startswith((".partial", ".lock"))]
    found += [f"{path} is left" for path in left]
    whole = place / "whole" / name
    for path in (path for path in output.rglob("*") if path.is_file() and not is_about_runs(path, output)):
        same = whole / path.relative_to(output)
        if path.name != "training_state.pt" and not (same.exists() and content(path) == content(same)):
            found.append(f"{path.relative_to(output)} is no whole result")
    if limit in ("disk", "rights"):
        mount(disk, f"remount,rw,{ENOUGH}")
    again = ended(forked(command(name, place, output, log)))
    found += [f"with room: {log.read_text()[-500:]}"] if again else differences(output, whole)
    return bool(status), found, lines[-1] if lines else ""


def main():
    """Fill disks as wanted; exit status 1 if any end differed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, required=True)
    parser.add_argument("--kilobytes", nargs="+", type=int, default=[0], help="of the disk, or of a file at most")
    parser.add_argument("--limit", choices=("disk", "file", "rights"), default="disk")
    parser.add_argument("--out", type=Path, required=True, help="may hold the data of an earlier call")
    chosen = parser.parse_args()
    if chosen.limit != "file" and "IN_NAMESPACE" not in os.environ:
        os.environ["IN_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    place = chosen.out.resolve()
    warm_up()
    if not place.exists():
        place.mkdir(parents=True)
        prepare(place)
    for name in ("training", *chosen.commands):  # others take its model
        if not (place / "whole" / name).exists():
            run_undisturbed(name, place)
    done = ended_early = wrong = 0
    for name in chosen.commands:
        for kilobytes in chosen.kilobytes:
            was_short, found, line = faults(name, place, chosen.limit, kilobytes)
            done, ended_early, wrong = done + 1, ended_early + was_short, wrong + bool(found)
            print(f"{name} {kilobytes} kB: {found or 'as undisturbed'} [{line}]", flush=True)
    print(f"{done} runs, {ended_early} ended early, {wrong} with another end")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
