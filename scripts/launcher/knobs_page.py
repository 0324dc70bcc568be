"""The knobs of a command for its help, from the tables of ``docs/knobs.md``, which every copy of the bundle has."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from .bundle_command import ROOT

PAGE, BACKBONES = ROOT / "docs" / "knobs.md", ROOT / "docs" / "backbones.md"
LONGEST = 100  # characters of a line
_INDENT = " " * 6
_MARKER = re.compile(r"<!-- knobs: (\w+) -->")
_CELLS = re.compile(r"(?<!\\)\|")
_WORD = re.compile(r"`([a-z0-9]*[a-z][a-z0-9_]*)`")
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")


class KnobLine(NamedTuple):
    """What the page says of a knob, as plain text.

    Attributes:
        name: of the knob.
        kind: its type, in words.
        default: as the config has it.
        meaning: one or more sentences.
        words: those of default and meaning that are set as code, small letters alone: values, and names of knobs.
    """

    name: str
    kind: str
    default: str
    meaning: str
    words: tuple[str, ...]


def knob_lines(table: str, page: Path = PAGE) -> list[KnobLine]:
    """The lines of one table, by the name in the marker above it."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if (marker := _MARKER.fullmatch(line)) and marker[1] == table:
            break
    found = []
    for line in lines:
        if line.startswith("| `"):
            cells = _CELLS.split(line)[1:5]
            name, kind, default, meaning = map(_plain, cells)
            found.append(KnobLine(name, kind, default, meaning, tuple(_WORD.findall("".join(cells[2:])))))
        elif found:
            break
    return found


def width() -> int:
    """Characters of a line that the terminal shows whole, and a person likes to read."""
    return min(LONGEST, shutil.get_terminal_size().columns - 1)


def knobs_of(tables: Iterable[str], without: Container[str] = (), page: Path = PAGE) -> list[KnobLine]:
    """The knobs in ``tables``; where two tables have a knob, the first one says its default."""
    knobs: dict[str, KnobLine] = {}
    for knob in (knob for table in tables for knob in knob_lines(table, page)):
        if knob.name not in without:
            knobs.setdefault(knob.name, knob)
    return list(knobs.values())


def in_words(knobs: Iterable[KnobLine]) -> str:
    """A text of knobs for a person."""
    return "\n".join(
        f"  --{knob.name}  ({knob.kind}; {knob.default})\n"
        + textwrap.fill(knob.meaning, width(), initial_indent=_INDENT, subsequent_indent=_INDENT)
        for knob in knobs
    )


def backbone_names(page: Path = BACKBONES) -> list[str]:
    """The names in the first table of the page of backbones."""
    rows = page.read_text(encoding="utf-8").split("\n\n| name |")[1].split("\n\n")[0].splitlines()
    return [name for row in rows if row.startswith("| `") for name in _WORD.findall(row.split("|")[1])]


def _plain(cell: str) -> str:
    """A cell of Markdown as a terminal shows it."""
    return _LINK.sub(r"\1", cell).replace("`", "").replace("\\|", "|").strip()
