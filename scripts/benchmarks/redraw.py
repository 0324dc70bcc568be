"""Draw the pictures of benchmarks anew from the numbers beside them, and write their pages; nothing is measured.

python -m scripts.benchmarks.redraw [FOLDER...]

Each ``benchmark.json``, ``speed.json``, ``gpu.json`` and ``memory.json`` below the folders (default: ``docs``) gives
the pictures and the page that lie beside it. What is not there is not made. Pages of files that version 0.5 wrote stay
as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from scripts.benchmarks import figures, gpu, memory, report, speed


class Kind(NamedTuple):
    """What is made of a file of numbers: the text of its page, and its pictures by name."""

    page: Callable[[dict[str, Any]], str]
    pictures: dict[str, Callable[[dict[str, Any]], Figure]]


KINDS = {
    "benchmark": Kind(
        lambda results: "\n".join(report.report(results)) + "\n",
        {"benchmark_bars.png": figures.draw_bars, "benchmark_runtime.png": figures.draw_runtime},
    ),
    "speed": Kind(speed.report, {"speed.png": speed.picture}),
    "gpu": Kind(gpu.report, {}),
    "memory": Kind(memory.report, {"memory.png": memory.draw}),
}


def numbers(folders: Sequence[Path]) -> list[Path]:
    """The files of numbers below ``folders``."""
    return sorted(file for folder in folders for file in folder.rglob("*.json") if file.stem in KINDS)


def page_of(file: Path) -> str | None:
    """The page of a file of numbers, without pictures that are not beside it; None if version 0.5 wrote the numbers."""
    results = _read(file)
    if file.stem == "benchmark" and not all("compared" in one for one in results["sets"].values()):
        return None
    page = KINDS[file.stem].page(results)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        if not (file.parent / picture).is_file():
            page = re.sub(rf"!\[[^]]*\]\({re.escape(picture)}\)\n\n", "", page)
    return page


def redraw(file: Path) -> Iterator[Path]:
    """Write the page and the pictures that lie beside a file of numbers; yields what was written."""
    path = file.with_suffix(".md")
    if path.is_file() and (page := page_of(file)) is not None:
        path.write_text(page, encoding="utf-8")
        yield path
    for name, draw in KINDS[file.stem].pictures.items():
        if (file.parent / name).is_file():
            draw(_read(file)).savefig(file.parent / name, dpi=150)
            yield file.parent / name


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.redraw", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("docs")], metavar="FOLDER", help="default: docs")
    for file in numbers(parser.parse_args(arguments).folders):
        for path in redraw(file):
            print(path, flush=True)


if __name__ == "__main__":
    main()
