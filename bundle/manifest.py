"""Which files of an output folder are results of inference, and of which input: what a run may replace."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bundle.errors import BundleError
from bundle.files import ARTIFACTS, write_json, writing

FILE = "results.json"
JOURNALS = "results-*.jsonl"
OF_RUN = ""  # the name of what belongs to no input: tables
FIGURES = ("test_examples.png", "test_curves.png")  # of an evaluation
SCORES = "test_scores.csv"  # which an evaluation writes before them


class Entry(NamedTuple):
    """The files of one result.

    Attributes:
        source: path of the input.
        files: paths below the output folder, with ``/``.
    """

    source: str
    files: frozenset[str]


class Manifest:
    """The results in an output folder, by name, from ``results.json``.

    That file is written whole at the end of a run. Until then each process adds a line to a journal of its own,
    ``results-PROCESS.jsonl``, before the files of a result appear. So the files of a run that was killed are known as
    well: the two name every result that is there, and perhaps some that are not.

    Args:
        folder: the output folder, which may be missing.
        process: number of this process among those that work together.

    Raises:
        BundleError: if ``results.json`` is not of this bundle, or damaged.
    """

    def __init__(self, folder: str | os.PathLike, process: int = 0) -> None:
        self.folder = Path(folder)
        self.journal = self.folder / JOURNALS.replace("*", str(process))
        self.entries = _read(self.folder / FILE)
        for journal in sorted(self.folder.glob(JOURNALS)):
            for name, entry in _read_journal(journal):
                self.entries[name] = Entry(entry.source, entry.files | self.files_of(name))
        self.mine: dict[str, Entry] = {}
        self.files = {file for entry in self.entries.values() for file in entry.files}
        self._real = os.path.realpath(self.folder)
        self._figures = FIGURES if (self.folder / SCORES).exists() else ()

    def __contains__(self, file: str) -> bool:
        """Whether the file of this real path is a result of an earlier run, or a copy of one that MLflow keeps."""
        if not file.startswith(f"{self._real}{os.sep}"):
            return False
        below = PurePosixPath(os.path.relpath(file, self._real))
        return str(below) in self.files or str(below) in self._figures or below.parts[0] == ARTIFACTS

    def refuse_inputs(self, files: Iterable[str | os.PathLike]) -> None:
        """Refuse to write results beside inputs, which they may overwrite.

        Args:
            files: the inputs.

        Raises:
            BundleError: with the first that lies in the folder, or below it.
        """
        real_folder = cache(os.path.realpath)
        for file in files:
            if os.path.commonpath([real_folder(os.path.dirname(file)), self._real]) == self._real:
                raise BundleError(
                    f"'{file}' lies in output_dir '{self.folder}', where results may overwrite it: give an "
                    "--output_dir without images"
                )

    def files_of(self, name: str) -> frozenset[str]:
        """The files of the result ``name``; none of one that is unknown."""
        return self.entries[name].files if name in self.entries else frozenset()

    def check_owned(self, file: str) -> None:
        """Refuse to write where something stands that is no result.

        Raises:
            BundleError: if there is such a file.
        """
        place = self.folder / file
        if file not in self.files and os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
            raise BundleError(
                f"'{place}' is in the place of a result, but '{FILE}' names no such result: move it, or give another "
                "--output_dir"
            )

    def claim(self, name: str, source: str, files: Collection[str]) -> None:
        """Note that ``files`` are about to be written for the result ``name`` of the input ``source``.

        Raises:
            BundleError: if one is there and no result, or it cannot be noted.
        """
        for file in files:
            self.check_owned(file)
        line = json.dumps({"name": name, "input": source, "files": sorted(files)})
        with writing(self.journal):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.journal.open("a", encoding="utf-8") as stream:
                stream.write(f"\n{line}")  # ends a line that could not be finished
        self.entries[name] = self.mine[name] = Entry(source, self.files_of(name).union(files))
        self.files.update(files)

    def settle(self, name: str, removed: Collection[str] = ()) -> None:
        """Note that ``removed``, of the files of ``name``, are gone."""
        entry = self.entries[name]
        self.entries[name] = self.mine[name] = Entry(entry.source, entry.files.difference(removed))

    def write(self, of_all_processes: Iterable[Mapping[str, Entry]]) -> None:
        """Write ``results.json`` with what the processes of this run claimed and settled, and remove the journals."""
        for share in of_all_processes:
            self.entries.update(share)
        known = {name: entry for name, entry in sorted(self.entries.items()) if entry.files}
        tables = known.pop(OF_RUN, None)
        results = {name: {"input": entry.source, "files": sorted(entry.files)} for name, entry in known.items()}
        write_json(self.folder / FILE, {"tables": sorted(tables.files) if tables else [], "results": results}, indent=1)
        for journal in self.folder.glob(JOURNALS):
            journal.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Entry]:
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tables = {OF_RUN: _entry({"input": "", "files": content["tables"]})} if content["tables"] else {}
        return tables | {str(name): _entry(entry) for name, entry in content["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"'{path}' is no list of results of this bundle ({type(error).__name__}): give another --output_dir, or "
            "move the file"
        ) from error


def _read_journal(path: Path) -> Iterable[tuple[str, Entry]]:
    """The lines that are whole: where one is not, the process ended before it wrote the files."""
    for line in path.read_bytes().splitlines():
        try:
            content = json.loads(line)
            yield str(content["name"]), _entry(content)
        except (ValueError, KeyError, TypeError):
            continue


def _entry(content: Any) -> Entry:
    files = [str(PurePosixPath(file)) for file in content["files"]]
    if any(PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts for file in files):
        raise ValueError("a path that leads out of the folder")
    return Entry(str(content["input"]), frozenset(files))
