"""The knobs of a command for its help, from the tables of ``docs/knobs.md``, which every copy of the bundle has."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from .bundle_command import ROOT

PAGE = ROOT / "docs" / "knobs.md"
LONGEST = 100  # characters of a line
_INDENT = " " * 6
_MARKER = re.compile(r"<!-- knobs: (\w+) -->")
_CELLS = re.compile(r"(?<!\\)\|")
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")


class KnobLine(NamedTuple):
    """What the page says of a knob, as plain text."""

    name: str
    kind: str
    default: str
    meaning: str


def knob_lines(table: str, page: Path = PAGE) -> list[KnobLine]:
    """The lines of one table, by the name in the marker above it."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if (marker := _MARKER.fullmatch(line)) and marker[1] == table:
            break
    found = []
    for line in lines:
        if line.startswith("| `"):
            found.append(KnobLine(*(_plain(cell) for cell in _CELLS.split(line)[1:5])))
        elif found:
            break
    return found


def width() -> int:
    """Characters of a line that the terminal shows whole, and a person likes to read."""
    return min(LONGEST, shutil.get_terminal_size().columns - 1)


def in_words(tables: Iterable[str], without: Container[str] = (), page: Path = PAGE) -> str:
    """A text of the knobs in ``tables``; where two tables have a knob, the first one says its default."""
    knobs: dict[str, KnobLine] = {}
    for knob in (knob for table in tables for knob in knob_lines(table, page)):
        if knob.name not in without:
            knobs.setdefault(knob.name, knob)
    return "\n".join(
        f"  --{knob.name}  ({knob.kind}; {knob.default})\n"
        + textwrap.fill(knob.meaning, width(), initial_indent=_INDENT, subsequent_indent=_INDENT)
        for knob in knobs.values()
    )


def _plain(cell: str) -> str:
    """A cell of Markdown as a terminal shows it."""
    return _LINK.sub(r"\1", cell).replace("`", "").replace("\\|", "|").strip()
