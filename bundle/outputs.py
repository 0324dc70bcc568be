"""What inference leaves for each input: files of several formats, and lines in tables of scores."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import ignite.distributed as idist
from ignite.engine import Engine, Events

from bundle.data.cases import Case, find_images
from bundle.dicom.selection import SeriesRule
from bundle.distributed import gather
from bundle.errors import BundleError, check_choice
from bundle.files import files_below, whole_files, write_csv, writing
from bundle.manifest import FILE, OF_RUN, Manifest
from bundle.networks.detector import Detector
from bundle.provenance import data_words
from bundle.report import Report
from bundle.results import CaseResult
from bundle.tracking import Tracker
from bundle.writers import NIFTI, OUTPUT_FORMATS, WRITERS, OutputSettings, Writer

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Table(ABC):
    """One table of results, which grows with each of them and is written at the end.

    Args:
        settings: of the run.
    """

    file: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    order: ClassVar[tuple[str, ...]]
    """Columns by which rows are sorted."""

    def __init__(self, settings: OutputSettings) -> None:
        self.settings = settings
        self.rows: list[Row] = []

    @abstractmethod
    def rows_of(self, result: CaseResult) -> list[Row]:
        """What one result adds to the table."""

    def add(self, result: CaseResult) -> None:
        """Add the rows of ``result``."""
        self.rows += self.rows_of(result)

    def gathered(self) -> list[Row]:
        """The rows of all processes, in order; every process has to call it."""
        return sorted(chain(*gather(self.rows)), key=itemgetter(*self.order))


class ScoreTable(Table):
    """A line for each input, which says of all together whether they drift from healthy validation cases."""

    file = "scores.csv"
    columns = (
        "name",
        "image",
        "score",
        "worst_slices",
        "worst_instances",
        "max",
        "anomalous_share",
        "threshold",
        "image_threshold",
        "cut_plane",
        "in_distribution",
        "unlike",
        "drift",
        "model",
        "data",
    )
    order = ("name",)

    def rows_of(self, result: CaseResult) -> list[Row]:
        """The line of ``result``."""
        worst = result.worst(self.settings.worst_slices)
        return [
            {
                "name": result.name,
                "image": result.path,
                "score": result.score,
                "worst_slices": " ".join(str(named.index) for named in worst),
                "worst_instances": " ".join(str(named.instance) for named in worst if named.instance is not None),
                "max": float(result.restored.values.max()),
                "anomalous_share": float(result.mask.mean()),
                "threshold": result.threshold,
                "image_threshold": result.image_threshold,
                "cut_plane": result.cut_plane,
                "in_distribution": None if result.unlike is None else int(not result.unlike),
                "unlike": result.warning,
                "model": self.settings.model,
                "data": self.settings.data,
            }
        ]

    def __init__(self, settings: OutputSettings) -> None:
        super().__init__(settings)
        self.of_kind: list[tuple[float, float]] = []  # score and unlikeness

    def add(self, result: CaseResult) -> None:
        """Add the row of ``result``, and what a drift is looked for in, if it is of the kind of validation cases."""
        super().add(result)
        of_volumes = self.settings.detector.case_likeness.learned.of_volumes
        if result.unlike is not None and (len(result.slice_counts) > 1) == of_volumes:
            self.of_kind.append((result.score, result.unlikeness))

    def gathered(self) -> list[Row]:
        """The rows of all processes, in order, with the drift."""
        values = list(chain(*gather(self.of_kind)))
        scores, unlikeness = zip(*values, strict=True) if values else ((), ())
        drift = self.settings.detector.case_likeness.drift(scores, unlikeness)
        if drift and idist.get_rank() == 0:
            logger.warning(f"the cases of this run drift, or many of them are anomalous: {drift}")
        return [row | {"drift": drift} for row in super().gathered()]


class SliceTable(Table):
    """A line for each slice of a volume."""

    file = "slice_scores.csv"
    columns = ("name", "slice", "instance", "score", "rank", "counts")
    order = ("name", "slice")

    def rows_of(self, result: CaseResult) -> list[Row]:
        """The lines of ``result``; none of a single slice."""
        if len(result.slices) == 1:
            return []
        return [
            {
                "name": result.name,
                "slice": one.index,
                "instance": one.instance,
                "score": one.score,
                "rank": one.rank,
                "counts": int(one.counts),
            }
            for one in result.slices
        ]


TABLES: tuple[type[Table], ...] = (ScoreTable, SliceTable)


def find_inputs(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    follow_links: bool = False,
    series: SeriesRule | None = None,
    writers: Sequence[type[Writer]] = WRITERS,
    tables: Sequence[type[Table]] = TABLES,
) -> list[Case]:
    """What there is to infer on, if its results can be written without harm to other files; nothing is read but names.

    Results of earlier runs are no inputs, wherever ``output_dir`` lies.

    Args:
        dataset_dir: see :func:`bundle.data.find_images`.
        output_dir: the folder of the results, which may be missing.
        follow_links, series: see :func:`bundle.data.find_images`.
        writers: the formats that may be written.
        tables: the tables.

    Raises:
        BundleError: if there is no image, a link leads out of ``dataset_dir``, an image lies in ``output_dir``, or
            where a result may be written stands what no earlier run has left there.
    """
    manifest = Manifest(output_dir)
    cases = find_images(dataset_dir, follow_links, manifest, series)
    names = {case["name"] for case in cases}
    suffixes = [suffix for writer in writers for suffix in writer.suffixes]
    _check_places(manifest, names, suffixes, {FILE, *(table.file for table in tables)})
    return cases


def _check_places(manifest: Manifest, names: Collection[str], suffixes: Sequence[str], tables: set[str]) -> None:
    """Refuse results that would stand in the way of others, or that something else stands in the way of."""

    @cache
    def listed(folder: Path) -> set[str]:
        with writing(folder):
            return set(os.listdir(folder)) if os.path.lexists(folder) else set()

    for place in {str(parent) for name in names for parent in PurePosixPath(name).parents}:
        if place in tables or any(place.endswith(s) and place.removesuffix(s) in names for s in suffixes if "." in s):
            raise BundleError(
                f"a result would be called '{place}', as is a folder with images: rename the folder, or infer it alone"
            )
    for file in tables - {FILE}:
        manifest.check_owned(file)
    for name in names:
        place, _, last = name.rpartition("/")
        there = listed(manifest.folder / place)
        for suffix in suffixes:
            if f"{last}{suffix}" in there:
                manifest.check_owned(f"{name}{suffix}")


class DetectionSaver:
    """A handler of the inference engine that writes what it found.

    For an input ``NAME`` each of ``writers`` that applies leaves files ``NAME_...``, whole or not at all. They take the
    place of those that an earlier run has left for ``NAME``, as :class:`bundle.manifest.Manifest` knows; no other file
    is replaced or removed. At the end each of ``tables`` that has lines is written: ``scores.csv`` has one for each
    input, ``slice_scores.csv`` one for each slice of a volume.

    Args:
        output_dir: the folder; subfolders of the input are kept.
        detector: with the threshold of its checkpoint.
        dataset_dir: for the words about the data.
        tracker: its run opens with the first result and keeps ``scores.csv``.
        report: of the run, written at its end beside the tables; None: none is made.
        model_file: of the detector; DICOM objects tell its hash.
        preprocessing: of the images, invertible; needed for DICOM objects.
        write_dicom: write DICOM objects, ``auto``: of DICOM images alone, else cases must have passed
            :class:`~bundle.transforms.RequireDicomd`.
        worst_slices: how many slices ``scores.csv`` and the DICOM report name.
        segment_unlike: write the DICOM segmentation of a case that is unlike the training data, too.
        output_format: of maps and masks of volumes: ``nifti``, or ``input``: that of a NRRD or MetaImage input, and
            NIfTI for others.
        on_error: ``raise``, or ``skip``: warn of results that cannot be written, count them, and go on.
        writers: the formats.
        tables: the tables, that of all inputs first.

    Raises:
        BundleError: if no slice is to be named, the format is unknown, or DICOM objects are wanted without
            ``preprocessing``.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        detector: Detector,
        dataset_dir: str | os.PathLike,
        tracker: Tracker,
        report: Report | None = None,
        model_file: str | os.PathLike = "",
        preprocessing: Any = None,
        write_dicom: bool | Literal["auto"] = False,
        worst_slices: int = 3,
        segment_unlike: bool = False,
        output_format: str = NIFTI,
        on_error: str = "raise",
        writers: Sequence[type[Writer]] = WRITERS,
        tables: Sequence[type[Table]] = TABLES,
    ) -> None:
        if worst_slices < 1:
            raise BundleError(f"worst_slices is {worst_slices}: give at least 1")
        if write_dicom and preprocessing is None:
            raise BundleError(f"write_dicom is {write_dicom}, but preprocessing is missing: give DetectionSaver both")
        self.output_dir = Path(output_dir)
        self.manifest = Manifest(output_dir, idist.get_rank())
        self.tracker = tracker
        self.report = report if report is not None and report.is_wanted else None
        self.skips = check_choice("on_error", on_error, ("raise", "skip")) == "skip"
        self.skipped = 0
        self.settings = OutputSettings(
            detector,
            data_words(dataset_dir),
            model_file,
            preprocessing,
            write_dicom,
            worst_slices,
            segment_unlike,
            check_choice("output_format", output_format, OUTPUT_FORMATS),
        )
        self.writers = [writer(self.settings) for writer in writers]
        self.tables = [table(self.settings) for table in tables]

    def attach(self, engine: Engine) -> None:
        """Register with the inference engine."""
        engine.add_event_handler(Events.STARTED, self.check_tables)
        engine.add_event_handler(Events.STARTED, self.tell_what_is_unknown)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.save_batch)
        engine.add_event_handler(Events.COMPLETED, self.save_tables)

    def check_tables(self) -> None:
        """Refuse, before any work, to replace tables or a report that are no results."""
        for file in self._of_run():
            self.manifest.check_owned(file)

    def _of_run(self) -> list[str]:
        """The names of the files that belong to no single input."""
        return [table.file for table in self.tables] + ([self.report.file.name] if self.report else [])

    def tell_what_is_unknown(self) -> None:
        """Say once that a model cannot tell what is unlike its training data."""
        if not self.settings.detector.case_likeness.knows and idist.get_rank() == 0:
            logger.info(
                "the model keeps no summary of its training data, so no input is compared with them: train anew"
            )

    def save_batch(self, engine: Engine) -> None:
        """Write the files of the current batch."""
        state: Any = engine.state
        for case, output in zip(state.batch, state.output, strict=True):
            try:
                self.save({**case, **output})
            except BundleError as error:
                if not self.skips:
                    raise
                logger.warning(f"skipped '{case['name']}': {error}")
                self.skipped += 1
        if self.tables[0].rows:
            self.tracker.start()  # only now: the first result need not wait until MLflow has its database

    def save(self, data: Row) -> None:
        """Write the files of one case.

        Args:
            data: see :meth:`bundle.results.CaseResult.from_output`.
        """
        result = CaseResult.from_output(data, self.settings.detector)
        if result.unlike:
            logger.warning(result.doubt(f"'{result.name}'"))
        target = self.output_dir / result.name
        place, left = PurePosixPath(result.name).parent, self._left(result.name)
        stale = [str(PurePosixPath(file).relative_to(place)) for file in left]
        with whole_files(target.parent, stale, within=self.output_dir) as fresh:
            for writer in self.writers:
                if writer.applies(result):
                    writer.write(fresh / target.name, result, data["image"])
            files = {str(place / path) for path in files_below(fresh)}
            self.manifest.claim(result.name, result.path, files)
        self.manifest.settle(result.name, left - files)
        for table in self.tables:
            table.add(result)
        if self.report is not None:
            self.report.add_case(result, data, files=files)

    def _left(self, name: str) -> set[str]:
        """What an earlier run has left for the result ``name`` in the formats of this one."""
        places = [f"{name}{suffix}" for writer in self.writers for suffix in writer.suffixes]
        folders = tuple(f"{place}/" for place in places)
        return {file for file in self.manifest.files_of(name) if file in places or file.startswith(folders)}

    def save_tables(self) -> None:
        """Write the tables, of all processes, in the first one."""
        rows = [table.gathered() for table in self.tables]
        inputs, skipped, shares = len(rows[0]), sum(gather(self.skipped)), gather(self.manifest.mine)
        if self.report is not None:
            self.report.join()
        if idist.get_rank() > 0:
            return
        if skipped:
            logger.warning(f"skipped {skipped} of {skipped + inputs} inputs whose results cannot be written")
        if not inputs:
            raise BundleError("there is no result of any input: see above, and check the files and the disk")
        files = {table.file: lines for table, lines in zip(self.tables, rows, strict=True) if lines}
        written = {*files, *([self.report.file.name] if self.report else [])}
        stale = {file for file in self._of_run() if file in self.manifest.files_of(OF_RUN)} - written
        self.manifest.claim(OF_RUN, "", written)
        for table in self.tables:
            if table.file in files:
                write_csv(self.output_dir / table.file, files[table.file], table.columns)
        for file in stale:
            (self.output_dir / file).unlink(missing_ok=True)
        self.manifest.settle(OF_RUN, stale)
        self.manifest.write(shares)
        if self.report is not None:
            self.report.write()
        scores = self.output_dir / self.tables[0].file
        highest = max(row["score"] for row in rows[0])
        self.tracker.describe(
            f"{self.settings.model}: {inputs} inputs, highest score {highest:.3g} "
            f"(threshold of images {float(self.settings.detector.image_threshold):.3g})"
        )
        self.tracker.log({"inputs": inputs, "highest_score": highest}, {"report": [scores]})
        print(f"{inputs} inputs: maps, masks, overlays and {scores.name} are in {self.output_dir.resolve()}")
