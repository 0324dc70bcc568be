"""What each test image contributes to the metrics, in a small file: the material of a bootstrap over test images.

A configuration puts :class:`TabledMetric` in the place of the bundle's metric. It gives the same numbers, and writes
for each image how many of its healthy and anomalous pixels lie in each of a thousand bins of the score.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import numpy as np
from ignite.engine import Engine
from numpy.typing import NDArray

from bundle.errors import BundleError, check_choice
from bundle.metrics import AnomalyMetric, AnomalyMetrics, ScoreHistogram

BINS = 1000
PARTS = ("report", "development", "all")


@dataclass(frozen=True)
class ImageTables:
    """What N test images contribute; a volume counts as one image. Bins ascend with the score.

    Attributes:
        names: [N] of the images, unique.
        labels: [N] bool, True is anomalous.
        scores: [N] of the images.
        healthy: [N, K] healthy pixels in each bin; K is 0 where no image has a mask.
        lesion: [N, K] lesion pixels.
        overlap: [N, K] the same, each pixel weighted by 1 / (area of its region).
        tied: [K] bool, whether all pixels of the bin have the same score.
        fpr_limit: upper end of the false positive rate for AUPRO.
    """

    names: NDArray[np.str_]
    labels: NDArray[np.bool_]
    scores: NDArray[np.float64]
    healthy: NDArray[np.float32]
    lesion: NDArray[np.float32]
    overlap: NDArray[np.float32]
    tied: NDArray[np.bool_]
    fpr_limit: float | NDArray[np.float64]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            BundleError: if there is no such file.
        """
        try:
            with np.load(path) as stored:
                return cls(**{one.name: stored[one.name] for one in fields(cls)})
        except OSError as error:
            raise BundleError(f"cannot read '{path}' ({error}): measure the cell again") from error

    def write(self, path: Path) -> None:
        """Write a compressed file."""
        with path.open("wb") as file:
            arrays: dict[str, Any] = {one.name: np.asarray(getattr(self, one.name)) for one in fields(self)}
            np.savez_compressed(file, **arrays)

    def part(self, name: str, patient_pattern: str | None = None) -> Self:
        """The images of a part of the test split, see :func:`part_of`, in the order of their names.

        Args:
            name: one of :data:`PARTS`.
            patient_pattern: see :func:`patient_of`; all images of a patient are in the same part.

        Raises:
            BundleError: if there is no such part.
        """
        check_choice("part", name, PARTS)
        order = np.argsort(self.names, kind="stable")
        patients = [patient_of(image, patient_pattern) for image in self.names[order]]
        chosen = order[np.array([name in ("all", part_of(patient)) for patient in patients], bool)]
        rows = ("names", "labels", "scores", "healthy", "lesion", "overlap")
        return replace(self, **{row: getattr(self, row)[chosen] for row in rows})


def part_of(name: str) -> str:
    """The half of a test split that an image belongs to: ``development``, by which choices are made, or ``report``.

    It follows from the stem of its file alone, so that it is the same in every copy of a data set.

    Args:
        name: of the image, as the bundle gives it: its path without suffix.
    """
    digest = hashlib.sha256(PurePosixPath(name).name.encode()).digest()
    return "report" if digest[-1] % 2 else "development"


def patient_of(name: str, pattern: str | None = None) -> str:
    """Who is on an image: what the first group of the regular expression, or all of it, finds in the name.

    The image stands for itself where there is no ``pattern``, or the pattern finds nothing.
    """
    found = re.search(pattern, name) if pattern else None
    return (found.group(1) if found.re.groups else found.group()) if found else name


class TabledMetric(AnomalyMetric):
    """The bundle's metric that also writes :class:`ImageTables`, in one process.

    The bins are known only when all pixels were seen. Until then the histogram of each image, with every value of its
    map, waits in a temporary file beside the tables, so that the memory of the process does not grow.

    Args:
        path: of the tables.
        settings: see :class:`~bundle.metrics.AnomalyMetric`.
    """

    def __init__(self, path: str | os.PathLike, **settings: Any) -> None:
        self.path = Path(path)
        super().__init__(**settings)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.waiting: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)
        self.names: list[str] = []

    def iteration_completed(self, engine: Engine) -> None:
        """Add a batch, with the names of its images."""
        super().iteration_completed(engine)
        batch: Any = engine.state.batch
        self.names += [case["name"] for case in batch]

    def update(self, output: Any) -> None:
        """Add (maps, masks, scores, labels) of one batch."""
        super().update(output)
        for image in zip(*output, strict=True):
            one = self._empty()
            one.update(*image)
            one.flush()
            np.save(self.waiting, one.histogram.keys)
            np.save(self.waiting, one.histogram.weights.astype(np.float32))

    def compute(self) -> dict[str, float | None]:
        """The metrics; the tables are written."""
        values = super().compute()
        assert self.pooled is not None
        self._tables(self.pooled).write(self.path)
        return values

    def _tables(self, pooled: AnomalyMetrics) -> ImageTables:
        edges, tied = choose_bins(pooled.histogram)
        counts = np.zeros((3, len(self.names), len(edges)), np.float32)
        self.waiting.seek(0)
        for index in range(len(self.names)):
            keys, weights = np.load(self.waiting), np.load(self.waiting)
            bins = np.searchsorted(edges, keys >> pooled.histogram.shift, side="right") - 1
            for count, weight in zip(counts[:, index], weights, strict=True):
                count += np.bincount(bins, weight, len(edges))
        return ImageTables(
            np.array(self.names),
            np.array(pooled.image_labels, bool),
            np.array(pooled.image_scores),
            counts[0],
            counts[1],
            counts[2],
            tied,
            pooled.fpr_limit,
        )


def choose_bins(histogram: ScoreHistogram, bins: int = BINS) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """About ``bins`` bins of the score, fine where precision and the beginning of the ROC curve are decided.

    From the highest score down, each bin holds about the same share of lesion pixels and of the logarithm of the number
    of healthy pixels, together.

    Returns:
        The lowest key of each bin, ascending; and whether it is the only one, so that the pixels of the bin are tied.
    """
    healthy, lesion, _ = histogram.weights[:, ::-1].cumsum(axis=1)[:, ::-1]
    progress = lesion / lesion.max(initial=1) + np.log1p(healthy) / np.log1p(healthy.max(initial=1))
    number = np.floor(progress * bins / 2)
    starts = np.flatnonzero(np.diff(number, prepend=np.inf))
    return histogram.keys[starts], np.diff(starts, append=number.size) == 1
