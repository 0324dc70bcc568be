"""``dinov3_spatial_ar completion bash``: what a shell needs to complete purposes, knobs, their choices, and files."""

from __future__ import annotations

import argparse
from collections.abc import Container

from .knobs_page import KnobLine, backbone_names

SHELLS = ("bash", "zsh", "fish")
FILES = ("data", "checkpoint", "config", "weights", "exported")
FOLDERS = ("results",)  # beside all knobs whose names end in _dir


def completing(parser: argparse.ArgumentParser, shell: str) -> str:
    """The text that a shell reads to complete the command line of ``parser``; it starts no Python.

    Args:
        parser: of the command, with all knobs as its options.
        shell: one of :data:`SHELLS`.
    """
    import shtab  # help needs none

    for action in (action for one in _all_parsers(parser) for action in one._actions):
        if action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest.endswith("_dir") or action.dest in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def choices(knob: KnobLine, without: Container[str]) -> list[str]:
    """The values of a knob that its line on the page of knobs names; none where it takes any number or text.

    Args:
        knob: its line.
        without: words that are no values, such as the names of other knobs.
    """
    kinds = knob.kind.split(" or ")
    found = ["true", "false"] if "true" in kinds else []
    if knob.name == "backbone":
        found += ["auto", *backbone_names()]
    elif "text" in kinds:
        found += [word for word in knob.words if word not in without and word != "null"]
    found += [kind for kind in ("auto", "all") if kind in kinds]
    return list(dict.fromkeys([*found, "null"] if found and "null" in kinds else found))


def _all_parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(one for action in below for one in action.choices.values())]
