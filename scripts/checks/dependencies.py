"""Whether a dependency has a known hole, by pip-audit.

python -m scripts.checks.dependencies --audit PROGRAM --packages FOLDER

The exit code is 1 if there is one. Where the database cannot be reached nothing is known: that is said in one line, and
the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.errors import one_line

TIMEOUT = 600  # seconds


def audited(program: Path, packages: Path) -> list[dict[str, Any]]:
    """What pip-audit knows of each dependency that it could look up; none where the database cannot be reached."""
    command = [
        str(program),
        "--progress-spinner",
        "off",
        "--skip-editable",
        "--format",
        "json",
        "--path",
        str(packages),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        found = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
        return []
    return [one for one in found if "skip_reason" not in one]


def holes(dependencies: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each known hole."""
    return [
        one_line(f"{one['name']} {one['version']}: {hole['id']}, cured in {', '.join(hole['fix_versions']) or 'none'}")
        for one in dependencies
        for hole in one["vulns"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.checks.dependencies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--audit", type=Path, required=True, metavar="PROGRAM", help="pip-audit")
    parser.add_argument("--packages", type=Path, required=True, metavar="FOLDER", help="site-packages to look at")
    given = parser.parse_args(arguments)
    known = audited(given.audit, given.packages)
    if not known:
        print("dependencies are not audited: the database of known holes cannot be reached")
        return 0
    found = holes(known)
    print("\n".join([*found, f"{len(found)} known holes in {len(known)} dependencies that were looked up"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
