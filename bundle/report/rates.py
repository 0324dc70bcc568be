"""How often a threshold is exceeded, with intervals: what a page draws as curves, and reads off for a threshold.

Intervals are those of a bootstrap: test cases are drawn with replacement, healthy and anomalous ones apart, and the
95 % interval lies between percentiles of the draws (Efron and Tibshirani, 'An Introduction to the Bootstrap', chapter
13). Where patients are known, they are drawn, with all of their cases.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

DRAWS = 500
PERCENTILES = (2.5, 97.5)
MOST_SAMPLES = 2000  # of each class: more patients share them
MOST_SCORES = 400  # thresholds of cases

Counts = NDArray[np.float64]


def edges_of(threshold: float) -> NDArray[np.float64]:
    """Values between which values of maps are counted: fine around ``threshold``, coarse far beyond it.

    The unit is a third of the threshold: for z-scores about 1.
    """
    unit = threshold / 3 if 0 < threshold < np.inf else 1.0
    return unit * np.concatenate([np.linspace(-5.95, 6, 240), np.geomspace(6, 1000, 60)[1:]])


class Tally:
    """How many values of each sample exceed each edge, without and with lesion. Memory does not grow with pixels.

    Args:
        edges: [K] ascending.
    """

    def __init__(self, edges: NDArray[np.float64]) -> None:
        self.edges = edges
        self.samples: dict[tuple[bool, Hashable], Counts] = {}
        self._slots: dict[tuple[bool, Hashable], int] = {}

    def add(self, label: bool, owner: Hashable, values: NDArray[Any], lesion: NDArray[np.bool_]) -> None:
        """Add the values of one case.

        Args:
            label: whether the case is anomalous.
            owner: whose case it is.
            values: of any shape.
            lesion: the same shape.
        """
        slot = self._slots.setdefault((label, owner), len(self._slots))
        counts = self.samples.setdefault((label, slot % MOST_SAMPLES), np.zeros((2, 1 + len(self.edges))))
        places = np.searchsorted(self.edges, values, side="left")  # how many edges each value exceeds
        for row, chosen in enumerate((~lesion, lesion)):
            counts[row] += np.bincount(places[chosen].ravel(), minlength=counts.shape[1])

    def join(self, other: Tally, rank: int) -> None:
        """Add what another process has counted."""
        for (label, slot), counts in other.samples.items():
            self.samples[label, (rank, slot)] = counts

    def above(self) -> tuple[Counts, Counts, NDArray[np.bool_]]:
        """How many values exceed 0, 1, ... edges or more: [samples, 1 + K] without and with lesion.

        The third are the labels [samples].
        """
        labels = np.array([label for label, _ in self.samples], bool)
        counts = np.stack(list(self.samples.values())) if self.samples else np.zeros((0, 2, 1 + len(self.edges)))
        exceeding = counts[..., ::-1].cumsum(axis=-1)[..., ::-1]
        return exceeding[:, 0], exceeding[:, 1], labels


def tally_of_scores(scores: ArrayLike, labels: ArrayLike, owners: list[Hashable]) -> Tally:
    """That of cases, each with one value: anomalous ones count as lesion."""
    values, anomalous = np.asarray(scores, float), np.asarray(labels, bool)
    different = np.unique(values)
    thinned = different[np.unique(np.linspace(0, len(different) - 1, MOST_SCORES).astype(int))]
    tally = Tally(np.append(np.nextafter(thinned[0], -np.inf), thinned))
    for value, label, owner in zip(values, anomalous, owners, strict=True):
        tally.add(bool(label), owner, np.array([value]), np.array([label]))
    return tally


def curves_of(tally: Tally, threshold: float) -> dict[str, Any] | None:
    """What the page draws of both classes; None where one has no value.

    Args:
        tally: of both.
        threshold: at which Dice and sensitivity are told.

    Returns:
        ``thresholds``, and for each of them ``sensitivity`` and ``false_positive_rate``; ``roc`` and
        ``precision_recall``, as points ``x``, ``y``; ``metrics``, by the ends of their names. All have ``low``
        and ``high``.
    """
    healthy, lesion, labels = tally.above()
    if not (healthy[:, 0].sum() and lesion[:, 0].sum()):
        return None
    draws = _draws(labels)
    false, true = draws @ healthy, draws @ lesion  # [1 + draws, 1 + K]
    with np.errstate(divide="ignore", invalid="ignore"):
        rates, found = false / false[:, :1], true / true[:, :1]
        precision = np.where(true + false > 0, true / (true + false), 1.0)
    place = 1 + int(np.abs(tally.edges - threshold).argmin())
    known = np.isfinite(rates[:, 0]) & np.isfinite(found[:, 0])
    rates, found, precision = rates[known], found[known], precision[known]
    grid = np.unique(np.concatenate([np.linspace(0, 1, 101), np.geomspace(1e-4, 0.1, 30)]))  # curves rise near 0
    roc = np.stack([np.interp(grid, x[::-1], y[::-1]) for x, y in zip(rates, found, strict=True)])
    ranked = np.stack([np.interp(grid, x[::-1], y[::-1]) for x, y in zip(found, precision, strict=True)])
    return {
        "thresholds": _rounded(tally.edges),
        "sensitivity": _banded(found[:, 1:]),
        "false_positive_rate": _banded(rates[:, 1:]),
        "roc": _points(grid, roc),
        "precision_recall": _points(grid, ranked),
        "metrics": {
            "auroc": _interval(np.trapezoid(found[:, ::-1], rates[:, ::-1], axis=1)),
            "ap": _interval((np.diff(found[:, ::-1], axis=1) * precision[:, -2::-1]).sum(axis=1)),
            "fpr_at_95_tpr": _interval(np.array([x[y >= 0.95][-1] for x, y in zip(rates, found, strict=True)])),
            "sensitivity": _interval(found[:, place]),
            "dice": _interval(2 * true[known, place] / (true[known, 0] + (true + false)[known, place])),
        },
    }


def kept_rates(wanted: NDArray[np.float64], thresholds: NDArray[np.float64], tally: Tally) -> list[dict[str, float]]:
    """What share of healthy values exceeds the threshold that was chosen for each wanted rate.

    Args:
        wanted: [n] rates.
        thresholds: [n], chosen on healthy validation data.
        tally: of healthy cases; anomalous ones are left out.

    Returns:
        Points ``wanted``, ``measured``, ``low``, ``high``; none without a healthy value.
    """
    healthy, _, labels = tally.above()
    healthy = healthy[~labels]
    if not healthy.sum():
        return []
    draws = _draws(np.zeros(len(healthy), bool)) @ healthy
    rates = (draws / draws[:, :1])[:, 1:]
    at = np.stack([np.interp(thresholds, tally.edges, one) for one in rates])
    low, high = np.percentile(at[1:], PERCENTILES, axis=0)
    return [
        {"wanted": float(w), "measured": float(m), "low": float(a), "high": float(b)}
        for w, m, a, b in zip(wanted, at[0], low, high, strict=True)
    ]


def share_of(count: int, total: int) -> dict[str, float]:
    """A share with the interval of Clopper and Pearson, as a point of :func:`kept_rates`."""
    interval = binomtest(count, total).proportion_ci()
    return {"measured": count / total, "low": float(interval.low), "high": float(interval.high)}


def _draws(labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How often each sample is in a draw, [1 + draws, samples]: once in the first."""
    random = np.random.default_rng(0)
    counts = np.ones((1 + DRAWS, len(labels)))
    for label in (False, True):
        (rows,) = np.nonzero(labels == label)
        if rows.size:
            counts[1:, rows] = random.multinomial(rows.size, np.full(rows.size, 1 / rows.size), size=DRAWS)
    return counts


def _interval(values: Any) -> dict[str, float]:
    low, high = np.percentile(values[1:], PERCENTILES)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _banded(values: Counts) -> dict[str, list[float]]:
    low, high = np.percentile(values[1:], PERCENTILES, axis=0)
    return {"value": _rounded(values[0]), "low": _rounded(low), "high": _rounded(high)}


def _points(grid: NDArray[np.float64], values: Counts) -> list[dict[str, float]]:
    band = _banded(values)
    return [
        {"x": float(x), "y": y, "low": low, "high": high}
        for x, y, low, high in zip(_rounded(grid), band["value"], band["low"], band["high"], strict=True)
    ]


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
