"""Fill the tables of ``docs/knobs.md``: names, types and defaults come from the configs, meanings are written by hand.

    python -m scripts.docs.knobs   # at the root of the repository

A line ``<!-- knobs: NAME -->`` says which table follows it, see :data:`TABLES`. A new knob appears with an empty
meaning, to be written into the page; one that is gone disappears.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from bundle.command_line import MODEL, find_knob, read_config
from bundle.errors import BundleError
from bundle.knobs import SYNTAX, Knob, words

PAGE = Path("docs/knobs.md")
TRAIN, INFER = "configs/train.json", "configs/inference.json"
PLAIN = {
    "auto",
    "all",
    "true",
    "false",
    "a whole number",
    "a number",
    "text",
    "null",
    "device",
}  # kinds that a person can type
PLAIN |= {f"a list of {kind}" for kind in ("whole numbers", "numbers", "text")}
MADE = Knob(str)  # what is known of an item that the config makes, for nothing that tells its type
HEADER = ("| knob | type | default | meaning |", "| --- | --- | --- | --- |")
_MARKER = re.compile(r"<!-- knobs: (\w+) -->")
_CELLS = re.compile(r"(?<!\\)\|")
_PATH = re.compile(r"\$?@(\w+) \+ '([^']*)'")


def knobs_in(*files: str) -> dict[str, Knob]:
    """The knobs of a command, by name, without the settings of the model.

    Args:
        files: its configs, from the working folder.
    """
    config = read_config(list(files))
    return {name: knob for name in config if name != MODEL and (knob := _typable(name, config)) is not None}


def settings() -> dict[str, Knob]:
    """The settings of the model, by name."""
    config = read_config([TRAIN])
    return {name: find_knob(name, config) for name in config[MODEL]}


def shared() -> dict[str, Knob]:
    """What training and inference both have."""
    of_inference = knobs_in(INFER)
    return {name: knob for name, knob in knobs_in(TRAIN).items() if name in of_inference}


def only(config: str, without: str) -> dict[str, Knob]:
    """What one config has, and the other has not."""
    others = knobs_in(without)
    return {name: knob for name, knob in knobs_in(config).items() if name not in others}


def overlaid(base: str, overlay: str) -> dict[str, Knob]:
    """What an overlay adds to the config below it, or gives another default."""
    own = ConfigParser.load_config_file(overlay)
    return {name: knob for name, knob in knobs_in(base, overlay).items() if name in own}


TABLES: dict[str, Callable[[], dict[str, Knob]]] = {
    "model": settings,
    "every": shared,
    "training": lambda: only(TRAIN, INFER),
    "evaluating": lambda: overlaid(TRAIN, "configs/evaluate.json"),
    "inferring": lambda: only(INFER, TRAIN),
    "examine": lambda: overlaid(INFER, "configs/examine.json"),
    "exporting": lambda: overlaid(INFER, "configs/export.json"),
    "exported": lambda: overlaid(INFER, "configs/exported.json"),
}


def filled(page: str) -> str:
    """The text of the page with its tables made anew; meanings stay."""
    lines, result = page.splitlines(), []
    while lines:
        result.append(lines.pop(0))
        if not (marker := _MARKER.fullmatch(result[-1])):
            continue
        old: list[str] = []
        while lines and (lines[0].startswith("|") or (not lines[0] and not old)):
            old += [line for line in [lines.pop(0)] if line]
        result += ["", *table(TABLES[marker[1]](), meanings(old))]
    return "\n".join(result) + "\n"


def table(knobs: dict[str, Knob], meaning: dict[str, str]) -> list[str]:
    """The lines of a table."""
    rows = [
        f"| `{name}` | {words(knob.kind)} | {default_words(knob.default)} | {meaning.get(name, '')} |"
        for name, knob in knobs.items()
    ]
    return [*HEADER, *rows]


def meanings(rows: list[str]) -> dict[str, str]:
    """What the rows of a table say in their last column, by the knob in their first one."""
    cells = [[cell.strip() for cell in _CELLS.split(row)] for row in rows[len(HEADER) :]]
    return {row[1].strip("`"): row[-2] for row in cells}


def default_words(default: Any) -> str:
    """A default for a reader: a value as JSON, a path with the names of the knobs that it begins with."""
    if isinstance(default, dict):
        return "computed"
    if isinstance(default, str):
        path = _PATH.sub(r"\1\2", default)
        return f"`{path}`"
    return f"`{json.dumps(default)}`"


def _typable(name: str, config: dict[str, Any]) -> Knob | None:
    """The knob that an item of a config is; None if a person gives no value for it."""
    value = config[name]
    steps = isinstance(value, list) and any(isinstance(item, dict) or str(item).startswith(SYNTAX) for item in value)
    if steps or str(value).startswith("@"):
        return None
    try:
        knob = find_knob(name, config)
    except BundleError:  # nothing takes it in this command
        return None
    return knob if set(words(knob.kind).split(" or ")) <= PLAIN and knob != MADE else None


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
