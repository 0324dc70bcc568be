"""What inference leaves for each input: files of several formats, and lines in tables of scores."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import ignite.distributed as idist
from ignite.engine import Engine, Events

from bundle.distributed import gather
from bundle.errors import BundleError, check_choice
from bundle.files import whole_files, write_csv
from bundle.networks.detector import Detector
from bundle.provenance import data_words
from bundle.results import CaseResult
from bundle.tracking import Tracker
from bundle.writers import WRITERS, OutputSettings, Writer

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


class DetectionSaver:
    """A handler of the inference engine that writes what it found.

    For an input ``NAME`` each of ``writers`` that applies leaves files ``NAME_...``. They take the place of all that an
    earlier run has left, whole or not at all. At the end each of ``tables`` that has lines is written: ``scores.csv``
    has one for each input, ``slice_scores.csv`` one for each slice of a volume.

    Args:
        output_dir: the folder; subfolders of the input are kept.
        detector: with the threshold of its checkpoint.
        dataset_dir: for the words about the data.
        tracker: its run opens with the first result and keeps ``scores.csv``.
        model_file: of the detector; DICOM objects tell its hash.
        preprocessing: of the images, invertible; needed for DICOM objects.
        write_dicom: write DICOM objects; cases must have passed :class:`~bundle.transforms.RequireDicomd`.
        worst_slices: how many slices ``scores.csv`` and the DICOM report name.
        segment_unlike: write the DICOM segmentation of a case that is unlike the training data, too.
        on_error: ``raise``, or ``skip``: warn of results that cannot be written, count them, and go on.
        writers: the formats.
        tables: the tables, that of all inputs first.

    Raises:
        BundleError: if no slice is to be named, or DICOM objects are wanted without ``preprocessing``.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        detector: Detector,
        dataset_dir: str | os.PathLike,
        tracker: Tracker,
        model_file: str | os.PathLike = "",
        preprocessing: Any = None,
        write_dicom: bool = False,
        worst_slices: int = 3,
        segment_unlike: bool = False,
        on_error: str = "raise",
        writers: Sequence[type[Writer]] = WRITERS,
        tables: Sequence[type[Table]] = (ScoreTable, SliceTable),
    ) -> None:
        if worst_slices < 1:
            raise BundleError(f"worst_slices is {worst_slices}: give at least 1")
        if write_dicom and preprocessing is None:
            raise BundleError("write_dicom is true, but preprocessing is missing: give DetectionSaver both")
        self.output_dir = Path(output_dir)
        self.tracker = tracker
        self.skips = check_choice("on_error", on_error, ("raise", "skip")) == "skip"
        self.skipped = 0
        self.settings = OutputSettings(
            detector, data_words(dataset_dir), model_file, preprocessing, write_dicom, worst_slices, segment_unlike
        )
        self.writers = [writer(self.settings) for writer in writers]
        self.tables = [table(self.settings) for table in tables]

    def attach(self, engine: Engine) -> None:
        """Register with the inference engine."""
        engine.add_event_handler(Events.STARTED, self.tell_what_is_unknown)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.save_batch)
        engine.add_event_handler(Events.COMPLETED, self.save_tables)

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
                logger.warning(f"skipped: {error}")
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
            logger.warning(f"'{result.name}' is unlike the training data, its map may mean nothing: {result.warning}")
        target = self.output_dir / result.name
        owned = [f"{target.name}{suffix}" for writer in self.writers for suffix in writer.suffixes]
        with whole_files(target.parent, stale=owned) as folder:
            for writer in self.writers:
                if writer.applies(result):
                    writer.write(folder / target.name, result, data["image"])
        for table in self.tables:
            table.add(result)

    def save_tables(self) -> None:
        """Write the tables, of all processes, in the first one."""
        rows = [table.gathered() for table in self.tables]
        inputs, skipped = len(rows[0]), sum(gather(self.skipped))
        if idist.get_rank() > 0:
            return
        if skipped:
            logger.warning(f"skipped {skipped} of {skipped + inputs} inputs whose results cannot be written")
        if not inputs:
            raise BundleError(f"no result of {skipped} inputs could be written: see above")
        for table, lines in zip(self.tables, rows, strict=True):
            if lines:
                write_csv(self.output_dir / table.file, lines, table.columns)
        scores = self.output_dir / self.tables[0].file
        highest = max(row["score"] for row in rows[0])
        self.tracker.log({"inputs": inputs, "highest_score": highest}, {"report": [scores]})
        print(f"{inputs} inputs: maps, masks, overlays and {scores.name} are in {self.output_dir.resolve()}")
