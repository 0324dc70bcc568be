"""How sure a number is, given that the test images are a sample: a paired bootstrap over them.

Test images are drawn with replacement, healthy and anomalous ones apart, so many of each as there are; where it is
known who is on them, patients are drawn, with all of their images. All methods see the same draws. Within a draw the
seeds of a method are averaged. The 95 % interval lies between the 2.5th and the 97.5th percentile of the draws. Source:
Efron and Tibshirani, 'An Introduction to the Bootstrap', chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BundleError
from scripts.benchmarks.common import METRICS
from scripts.benchmarks.tables import ImageTables, patient_of

DRAWS = 1000
CHUNK = 250  # draws whose curves are in memory together
PERCENTILES = (2.5, 97.5)

Values = dict[str, NDArray[np.float64]]


def compare(
    methods: Mapping[str, Sequence[Path]],
    reference: str,
    part: str = "report",
    draws: int = DRAWS,
    patient_pattern: str | None = None,
) -> dict[str, Any]:
    """The metrics of all methods on a part of the test split, and what each is ahead of the reference.

    Args:
        methods: by name, the file of :class:`~scripts.benchmarks.tables.ImageTables` of each seed.
        reference: the method that the others are compared with; if it is absent, nothing is compared.
        part: of the test split, see :func:`~scripts.benchmarks.tables.part_of`.
        draws: of the bootstrap.
        patient_pattern: see :func:`~scripts.benchmarks.tables.patient_of`.

    Returns:
        ``images``, how many are healthy and anomalous; ``rows``, by method and metric: ``seeds``, the value of each;
        ``interval``, the limits of their mean; ``difference``, what it is ahead of the reference, and the limits of
        that. All are shares, and None where a class is missing; the reference has no difference.

    Raises:
        BundleError: if a file is missing, or the methods were tested on different images.
    """
    drawn: dict[str, list[Values]] = {}
    first: ImageTables | None = None
    for method, path in [(method, path) for method, paths in methods.items() for path in paths]:
        tables = ImageTables.read(path).part(part, patient_pattern)
        first = first or tables
        if not np.array_equal(tables.names, first.names):
            raise BundleError(f"'{path}' is of other test images than those before it: measure its cell again")
        patients = [patient_of(name, patient_pattern) for name in tables.names]
        drawn.setdefault(method, []).append(_in_chunks(tables, draw(tables.labels, draws, patients)))
    rows = {
        method: {metric: _row(seeds, drawn.get(reference, []), metric) for metric in METRICS}
        for method, seeds in drawn.items()
    }
    healthy, anomalous = (0 if first is None else int(np.sum(first.labels == label)) for label in (False, True))
    return {"images": {"healthy": healthy, "anomalous": anomalous}, "rows": rows}


def draw(labels: NDArray[np.bool_], draws: int, patients: Sequence[str] | None = None) -> NDArray[np.float32]:
    """How often each of N images is in a test set, [1 + draws, N]: once in the first; then as it is drawn.

    Args:
        labels: [N], True is anomalous.
        draws: of the bootstrap, always the same ones.
        patients: [N], who is on each image; None: each is another one. They are drawn with replacement, as many healthy
            ones as there are, and as many who have an anomalous image.
    """
    random = np.random.default_rng(0)
    _, unit = np.unique(np.arange(len(labels)) if patients is None else np.array(patients, str), return_inverse=True)
    anomalous = np.bincount(unit, labels) > 0
    counts = np.ones((1 + draws, len(anomalous)), np.float32)
    for label in (False, True):
        (rows,) = np.nonzero(anomalous == label)
        if rows.size:
            counts[1:, rows] = random.multinomial(rows.size, np.full(rows.size, 1 / rows.size), size=draws)
    return counts[:, unit]


def evaluate(tables: ImageTables, weights: NDArray[np.float32]) -> Values:
    """The metrics of test sets that hold each image as often as ``weights`` [D, N] say.

    Returns:
        By metric, [D]; not a number where a class is missing.
    """
    healthy = weights @ tables.healthy
    pixels = _ranked(healthy, weights @ tables.lesion, tables.tied)
    regions = _ranked(healthy, weights @ tables.overlap, tables.tied)
    order = np.argsort(tables.scores, kind="stable")
    scores, labels = tables.scores[order], tables.labels[order]
    starts = np.flatnonzero(np.diff(scores, prepend=np.nan))  # equal scores share a bin
    images = _ranked(
        np.add.reduceat(weights[:, order] * ~labels, starts, axis=1),
        np.add.reduceat(weights[:, order] * labels, starts, axis=1),
        np.ones(starts.size, bool),
    )
    return {
        "pixel_auroc": _area_up_to(1.0, *pixels[:2]),
        "pixel_ap": pixels[2],
        "aupro": _area_up_to(float(tables.fpr_limit), *regions[:2]),
        "image_auroc": _area_up_to(1.0, *images[:2]),
        "image_ap": images[2],
    }


def _in_chunks(tables: ImageTables, weights: NDArray[np.float32]) -> Values:
    """:func:`evaluate`, without the curves of all draws in memory."""
    chunks = [evaluate(tables, weights[start : start + CHUNK]) for start in range(0, len(weights), CHUNK)]
    return {metric: np.concatenate([chunk[metric] for chunk in chunks]) for metric in METRICS}


def _ranked(healthy: NDArray[Any], lesion: NDArray[Any], tied: NDArray[np.bool_]) -> tuple[NDArray[np.float64], ...]:
    """False and true positive rates [D, K + 1] of bins [D, K] that ascend with the score, and average precision [D].

    Within a bin precision is that of its middle, where its pixels are tied that of its end, as scikit-learn has it.
    """
    healthy, lesion = healthy[:, ::-1].astype(np.float64), lesion[:, ::-1].astype(np.float64)
    false, found = (np.pad(one.cumsum(axis=1), [(0, 0), (1, 0)]) for one in (healthy, lesion))
    share = np.where(tied[::-1], 0.0, 0.5)
    with np.errstate(invalid="ignore", divide="ignore"):  # a class that is missing
        at = found[:, 1:] - share * lesion
        precision = np.where(lesion > 0, at / (at + false[:, 1:] - share * healthy), 0)
        average = (lesion * precision).sum(axis=1) / found[:, -1]
        return false / false[:, -1:], found / found[:, -1:], np.where(false[:, -1] > 0, average, np.nan)


def _area_up_to(limit: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area under each curve up to ``limit`` of x, divided by it, [D, P] to [D]; not a number without a curve."""
    step, rise = np.diff(x, axis=1), np.diff(y, axis=1)
    share = np.clip((limit - x[:, :-1]) / np.where(step > 0, step, 1), 0, 1)  # of the step that is below the limit
    area = (share * step * (y[:, :-1] + 0.5 * share * rise)).sum(axis=1) / limit
    return np.where(np.isnan(x[:, -1] + y[:, -1]), np.nan, area)


def _row(seeds: list[Values], against: list[Values], metric: str) -> dict[str, Any]:
    """What :func:`compare` says of a metric, from its values on the whole part and then on each draw."""
    mean = np.mean([one[metric] for one in seeds], axis=0)
    row: dict[str, Any] = {"seeds": [_finite(one[metric][0]) for one in seeds], "interval": _limits(mean[1:])}
    ahead = mean - np.mean([one[metric] for one in against], axis=0) if against and against is not seeds else mean[:0]
    limits = _limits(ahead[1:])
    return {**row, "difference": [float(ahead[0]), *limits] if limits else None}


def _limits(values: NDArray[np.float64]) -> list[float] | None:
    """The 95 % interval of the draws in which the metric is defined; None if there are none."""
    known = values[np.isfinite(values)]
    return [float(limit) for limit in np.percentile(known, PERCENTILES)] if known.size else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
