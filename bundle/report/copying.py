"""Reports that are there: find them, open them, and copy one without names, or with fewer pictures."""

from __future__ import annotations

import json
import os
import re
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bundle.errors import BundleError
from bundle.files import whole_file
from bundle.report.collecting import FORMAT, MEGABYTE, SUFFIX
from bundle.report.page import page_of
from bundle.report.pictures import Ranked

_BLOCK = r'<script type="application/json" id="{}_data">(.*?)</script>'
_DATA_URI = re.compile(r"(data:image/(png|webp);base64,[A-Za-z0-9+/=]+)?")


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid")
    slice: int
    image: str
    map: str
    truth: str


class _Pictures(BaseModel):
    model_config = ConfigDict(extra="forbid")
    start: int
    edges: str
    millimeters: float
    frames: list[_Frame]


def reports_in(places: Sequence[str | os.PathLike]) -> list[Path]:
    """The reports in folders of results, and those that are named, the latest first.

    Raises:
        BundleError: if there is none in a place.
    """
    found: list[Path] = []
    for place in map(Path, places):
        here = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place] if place.is_file() else []
        if not here:
            raise BundleError(
                f"no report at '{place}': give the output_dir of a command that ran with a report_limit_mb above 0"
            )
        found += here
    return sorted(found, key=lambda file: -file.stat().st_mtime)


def show_reports(places: Sequence[str | os.PathLike], open_browser: bool = True) -> None:
    """Print where reports are, and open them."""
    for file in reports_in(places):
        record, pictures = read_report(file)
        size, cases = file.stat().st_size / MEGABYTE, len(record["cases"]) + record["left_out"]
        address = file.resolve().as_uri()
        print(f"{address}  {record['made']}, {cases} cases, {len(pictures)} with pictures, {size:.1f} MB")
        if open_browser:
            webbrowser.open(address)


def copy_report(source: Path, target: Path, limit_mb: float, hide_names: bool = False) -> None:
    """Write the page anew, from the data in it.

    Args:
        source: the report.
        target: the copy; a file there that is no report stays.
        limit_mb: its size; pictures that would exceed it are left out.
        hide_names: call cases by numbers, in the order of their scores, and leave out the names of files and folders.

    Raises:
        BundleError: if ``source`` is no report, or ``target`` something else.
    """
    if target.exists():
        read_report(target)
    record, pictures = read_report(source)
    try:
        page = _page(*(_without_names(record, pictures) if hide_names else (record, pictures)), limit_mb * MEGABYTE)
    except BundleError:
        raise
    except Exception as error:  # whatever another hand has written there
        raise _no_report(source, error) from error
    with whole_file(target) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(f"the copy is {target.resolve()} ({len(page.encode()) / MEGABYTE:.1f} MB)")


def read_report(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a report tells, and its pictures by the name of the case, as data: nothing in it is run.

    Raises:
        BundleError: if it is no report, or of another version.
    """
    try:
        text = file.read_text(encoding="utf-8")
        record, pictures = (_block(name, text) for name in ("record", "pictures"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, not {FORMAT}")
        for shown in pictures.values():
            for frame in _Pictures.model_validate(shown, strict=True).frames:
                if not all(_DATA_URI.fullmatch(uri) for uri in (frame.image, frame.map, frame.truth)):
                    raise ValueError("a picture that is none")
        return record, pictures
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
        raise _no_report(file, error) from error


def _no_report(file: Path, error: Exception) -> BundleError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BundleError(f"'{file}' is no report of this version ({reason}): run the command again")


def _page(record: dict[str, Any], pictures: dict[str, Any], limit: float) -> str:
    scores = {case["name"]: case["score"] for case in record["cases"]}
    ranked = [Ranked(scores.get(name, 0.0), name, shown) for name, shown in pictures.items()]
    shown = [one._replace(pictures=_worst_alone(one.pictures)) for one in ranked]
    return page_of(record, shown, [one for one in ranked if len(one.pictures["frames"]) > 1], limit)


def _block(name: str, text: str) -> dict[str, Any]:
    found = re.search(_BLOCK.format(name), text, re.DOTALL)
    if found is None:
        raise ValueError(f"it has no {name}")
    return dict(json.loads(found[1]))


def _worst_alone(pictures: dict[str, Any]) -> dict[str, Any]:
    return pictures | {"start": 0, "frames": [pictures["frames"][pictures["start"]]]}


def _without_names(record: dict[str, Any], pictures: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same, with numbers for names, and nothing that holds a path."""
    numbers = {case["name"]: f"case {number:04d}" for number, case in enumerate(record["cases"], start=1)}
    kind = "synthetic data" if record["data"]["is_synthetic"] else "data"
    clean = {
        **record,
        "cases": [case | {"name": numbers[case["name"]], "files": []} for case in record["cases"]],
        "data": record["data"] | {"name": kind, "words": kind},
        "facts": {name: value for name, value in record["facts"].items() if name not in ("data", "model file")},
        "settings": {name: value for name, value in record["settings"].items() if not _has_path(value)},
    }
    return clean, {numbers[name]: shown for name, shown in pictures.items() if name in numbers}


def _has_path(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_path, value))
    return isinstance(value, str) and ("/" in value or "\\" in value or "." in value)
