"""Evaluation metrics of anomaly maps, streamed: memory does not grow with the number of pixels.

Every pixel goes into one sorted, sparse histogram (:class:`ScoreHistogram`), from which scikit-learn computes the
pixel metrics with sample weights; the histogram is the only numerical code of our own. Weighing each lesion pixel by
1 / (area of its region) turns the per-region overlap into the recall of a weighted ROC curve, so AUPRO is a partial
area of that curve and stays in [0, 1].

**Accuracy.** Exact while the scores, taken as float32, have at most 2**20 different values: 8-bit maps, ties, narrow
bands far from zero (float32 has only 16384 values between 1000 and 1001). Beyond that, low bits are dropped from all
scores; measured on 1e7 pixels with 0.5 % lesion, the error against scikit-learn on all pixels is below 1e-5 for
uniform, normal, chi-square, Cauchy, log-normal and Pareto scores. The limit is a narrow band amid wide tails: with half
of the scores between 1000 and 1001 and the other half Cauchy, average precision was off by 3e-3. So every result is
checked: a warning names each metric whose guaranteed bound (:meth:`AnomalyMetrics.error_bounds`) exceeds 1e-4.

**Memory.** Between updates at most :data:`MAX_STATE_BYTES` (52 MiB) is held, plus one score and one label per image;
binning and computing need about 250 MiB more for a moment (measured).

**Why not a library.** torchmetrics 1.9 needs scores in [0, 1] (others pass a sigmoid: AUROC off by 0.86 on
chi-square scores), with 1000 thresholds is off by 3e-4 to 2e-2 in average precision and takes 3 s per million pixels.
adeval 1.1 needs the range beforehand, is off by 0.3 in AUROC on Pareto scores, and calls the removed ``numpy.trapz``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.metrics import Metric
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn import metrics as sk

from bundle.errors import BundleError

PIXEL_RANKING = ("pixel_auroc", "pixel_ap", "aupro", "pixel_fpr_at_95_tpr")
PIXEL_THRESHOLD = ("dice", "sensitivity")
IMAGE_RANKING = ("image_auroc", "image_ap")
METRIC_NAMES = (*PIXEL_RANKING, *PIXEL_THRESHOLD, *IMAGE_RANKING)
"""The keys of :meth:`AnomalyMetrics.compute`."""

MAX_BINS = 2**20
MAX_PENDING = 2**21
MAX_STATE_BYTES = 28 * MAX_BINS + 12 * MAX_PENDING
"""The memory bound: 28 bytes per bin, and up to 12 per pixel that waits to be binned."""

ERROR_LIMIT = 1e-4
CURVE_POINTS = 1000
EIGHT_NEIGHBORS = np.ones((3, 3))

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


class ScoreHistogram:
    """A sorted, sparse histogram of float32 scores that adapts its resolution and never exceeds 2**20 bins.

    The bits of a float32, with the sign handled, make an integer *key* of the same order; a bin is a key without its
    ``shift`` low bits. ``shift`` starts at 0 (every float32 value has its own bin) and grows by one, which joins bins
    in pairs, whenever more than :data:`MAX_BINS` are in use. It therefore ends at the smallest value for which the
    bins of all pixels fit, whatever the order of the updates or their split over ranks.

    Attributes:
        shift: dropped low bits; bins are 2**(shift - 23) wide relative to the score, at the worst 2**-11.
        keys: [B], the bins in use, ascending; their order is that of the scores.
        weights: [3, B]: number of healthy pixels, number of lesion pixels, sum of the lesion pixels' region weights.
    """

    def __init__(self) -> None:
        self.shift = 0
        self.keys = np.empty(0, np.uint32)
        self.weights = np.empty((3, 0))

    def add(self, keys: NDArray[np.uint32], weights: NDArray[np.float64], shift: int = 0) -> None:
        """Add ``keys`` [N] that have already lost ``shift`` bits, with ``weights`` [3, N]."""
        while self.shift < shift:
            self._halve()
        keys = np.concatenate([self.keys, keys >> (self.shift - shift)])
        order = np.argsort(keys, kind="stable")
        self._group(keys[order], np.concatenate([self.weights, weights], axis=1)[:, order])
        while self.keys.size > MAX_BINS:
            self._halve()

    def _halve(self) -> None:
        self.shift += 1
        self._group(self.keys >> np.uint32(1), self.weights)

    def _group(self, keys: NDArray[np.uint32], weights: NDArray[np.float64]) -> None:
        """Join equal neighbors of the sorted ``keys``."""
        if keys.size:
            starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
            keys, weights = keys[starts], np.add.reduceat(weights, starts, axis=1)
        self.keys, self.weights = keys, weights


class AnomalyMetrics:
    """Metrics over all pixels and images of a test set, from one pass.

    ======================= ==========================================================================================
    ``pixel_auroc``         area under the ROC curve of all pixels, [0, 1]
    ``pixel_ap``            average precision of all pixels (scikit-learn's step-wise sum), [0, 1]
    ``aupro``               area under mean region overlap over false positive rate up to ``fpr_limit``, divided by
                            it, [0, 1]; regions are 8-connected lesions, the rate is pooled over all healthy pixels
                            (Bergmann et al., *The MVTec Anomaly Detection Dataset*, IJCV 2021)
    ``pixel_fpr_at_95_tpr`` false positive rate at the highest threshold that finds 95 % of lesion pixels, [0, 1]
    ``dice``                2 TP / (2 TP + FP + FN) over all pixels, prediction ``map > threshold``, [0, 1]
    ``sensitivity``         TP / (TP + FN) over all pixels, prediction ``map > threshold``, [0, 1]
    ``image_auroc``         exact area under the ROC curve of the image scores, [0, 1]
    ``image_ap``            exact average precision of the image scores, [0, 1]
    ======================= ==========================================================================================

    Args:
        threshold: in units of the maps, chosen on healthy validation data.
        fpr_limit: in (0, 1], upper end of the false positive rate for ``aupro``.

    Raises:
        BundleError: if the limit is out of range.
    """

    def __init__(self, threshold: float, fpr_limit: float = 0.3) -> None:
        if not 0 < fpr_limit <= 1:
            raise BundleError(f"aupro_fpr_limit is {fpr_limit}: choose a false positive rate in (0, 1], usually 0.3")
        self.threshold = float(threshold)
        self.fpr_limit = float(fpr_limit)
        self.histogram = ScoreHistogram()
        self.true_positive = self.false_positive = self.false_negative = self.regions = 0
        self.image_scores: list[float] = []
        self.image_labels: list[bool] = []
        self._empty_pending()

    def _empty_pending(self) -> None:
        self._healthy: list[NDArray[np.uint32]] = []
        self._lesion: list[NDArray[np.uint32]] = []
        self._region_weight: list[NDArray[np.float64]] = []
        self._pending = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, apart from 16 per image; never above :data:`MAX_STATE_BYTES`."""
        binned: list[NDArray[Any]] = [self.histogram.keys, self.histogram.weights]
        return sum(array.nbytes for array in [*binned, *self._healthy, *self._lesion, *self._region_weight])

    def update(
        self,
        anomaly_map: torch.Tensor | ArrayLike,
        mask: torch.Tensor | ArrayLike | None,
        image_score: torch.Tensor | ArrayLike,
        image_label: torch.Tensor | ArrayLike,
    ) -> None:
        """Add one image, a batch, or one volume; nothing is added if an input is refused.

        Args:
            anomaly_map: [H, W] or [..., H, W] for N images or slices, finite float32 of any scale; higher is more
                anomalous.
            mask: the same shape, bool or 0 and 1; 1 is lesion (see :class:`bundle.transforms.ReadMaskd`). None where
                only the image label is known: no pixel is counted.
            image_score: one finite number per image, or one for all slices of a volume; higher is more anomalous.
            image_label: one bool or 0/1 per image score; 1 is anomalous.

        Raises:
            BundleError: if shapes disagree, scores are not finite, or masks or labels are not 0 and 1.
        """
        if not math.isfinite(self.threshold):
            raise BundleError(f"threshold is {self.threshold}: calibrate one on healthy validation data")
        maps = _array(anomaly_map, torch.float32)
        if maps.ndim < 2:
            raise BundleError(f"anomaly map has shape {maps.shape}: give [H, W] or [..., H, W]")
        labels = _binary(image_label, "image label").ravel()
        scores = _array(image_score, torch.float64).ravel()
        lesion = None if mask is None else _binary(mask, "mask")
        if lesion is not None and maps.shape != lesion.shape:
            raise BundleError(f"anomaly map has shape {maps.shape} but its mask {lesion.shape}: resize one of them")
        maps = maps.reshape(-1, *maps.shape[-2:])
        if len(scores) != len(labels) or len(scores) not in (1, len(maps)):
            raise BundleError(
                f"{len(maps)} anomaly maps came with {len(scores)} image scores and {len(labels)} image labels: "
                "give one of each per map, or one of each for a volume"
            )
        for what, values in (("anomaly map", maps), ("image score", scores)):
            if not np.isfinite(values).all():
                raise BundleError(
                    f"{what} has {np.sum(~np.isfinite(values))} of {values.size} values that are not finite float32, "
                    f"in the batch after image {len(self.image_scores)}: check the model and its input there"
                )
        if lesion is not None:
            for one_map, one_mask in zip(maps, lesion.reshape(maps.shape), strict=True):
                self._add_pixels(one_map, one_mask)
        self.image_scores += scores.tolist()
        self.image_labels += labels.tolist()

    def _add_pixels(self, scores: NDArray[np.float32], lesion: NDArray[np.bool_]) -> None:
        predicted = scores > self.threshold
        hits = int(np.count_nonzero(predicted & lesion))
        self.true_positive += hits
        self.false_positive += int(np.count_nonzero(predicted)) - hits
        self.false_negative += int(np.count_nonzero(lesion)) - hits
        keys = _ordered_keys(scores)
        if lesion.any():
            region_of, regions = ndimage.label(lesion, structure=EIGHT_NEIGHBORS)
            region_of = region_of[lesion]
            self._lesion.append(keys[lesion])
            self._region_weight.append(1 / np.bincount(region_of)[region_of])
            self.regions += regions
        self._healthy.append(keys[~lesion])
        self._pending += keys.size
        if self._pending >= MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Move the waiting pixels into the histogram."""
        if not self._pending:
            return
        shift = self.histogram.shift
        healthy, count = np.unique(np.concatenate(self._healthy) >> shift, return_counts=True)
        self.histogram.add(healthy, np.stack([count, 0.0 * count, 0.0 * count]), shift)
        if self._lesion:
            region_weight = np.concatenate(self._region_weight)
            one = np.ones_like(region_weight)
            self.histogram.add(np.concatenate(self._lesion), np.stack([0 * one, one, region_weight]))
        self._empty_pending()

    def merge(self, other: AnomalyMetrics) -> None:
        """Add all that ``other``, a shard of the same test set, has seen.

        Raises:
            BundleError: if its threshold or FPR limit differs.
        """
        mine, theirs = (self.threshold, self.fpr_limit), (other.threshold, other.fpr_limit)
        if mine != theirs:
            raise BundleError(f"cannot merge metrics of (threshold, fpr_limit) {mine} and {theirs}: use equal ones")
        other.flush()
        self.flush()
        self.histogram.add(other.histogram.keys, other.histogram.weights, other.histogram.shift)
        for name in ("true_positive", "false_positive", "false_negative", "regions", "image_scores", "image_labels"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> dict[str, float | None]:
        """All metrics of :data:`METRIC_NAMES`; None, with a warning that says why, where one is undefined."""
        values: dict[str, float | None] = dict.fromkeys(METRIC_NAMES)
        if self._has_both_classes():
            values.update(self._pixel_ranking())
        healthy, lesion, _ = self.histogram.weights.sum(axis=1)
        if lesion:
            true_positive, errors = self.true_positive, self.false_positive + self.false_negative
            values["dice"] = 2 * true_positive / (2 * true_positive + errors)
            values["sensitivity"] = true_positive / float(lesion)
        anomalous = sum(self.image_labels)
        normal = len(self.image_labels) - anomalous
        if anomalous and normal:
            values["image_auroc"] = float(sk.roc_auc_score(self.image_labels, self.image_scores))
            values["image_ap"] = float(sk.average_precision_score(self.image_labels, self.image_scores))

        pixels = f"{lesion:.0f} lesion and {healthy:.0f} healthy pixels"
        images = f"{anomalous} anomalous and {normal} healthy images"
        for names, seen in (((*PIXEL_RANKING, *PIXEL_THRESHOLD), pixels), (IMAGE_RANKING, images)):
            undefined = [name for name in names if values[name] is None]
            if undefined:
                warnings.warn(f"undefined and left empty (null): {', '.join(undefined)}, from {seen}", stacklevel=2)
        coarse = {name: bound for name, bound in self.error_bounds().items() if bound > ERROR_LIMIT}
        if coarse:
            listing = ", ".join(f"{name} by at most {bound:.0e}" for name, bound in coarse.items())
            warnings.warn(f"many pixels share few histogram bins, so these may be off: {listing}", stacklevel=2)
        return values

    def _pixel_ranking(self) -> dict[str, float]:
        pixels = self._weighted_pixels()
        fpr, tpr = _roc(pixels)
        overlap_fpr, overlap = _roc(self._weighted_pixels(by_region=True))
        inside = overlap_fpr <= self.fpr_limit
        area = sk.auc(
            np.append(overlap_fpr[inside], self.fpr_limit),
            np.append(overlap[inside], np.interp(self.fpr_limit, overlap_fpr, overlap)),
        )
        return {
            "pixel_auroc": float(sk.auc(fpr, tpr)),
            "pixel_ap": float(sk.average_precision_score(**pixels)),
            "aupro": min(float(area) / self.fpr_limit, 1.0),  # the minimum only undoes rounding
            "pixel_fpr_at_95_tpr": float(fpr[np.argmax(tpr >= 0.95)]),
        }

    def _has_both_classes(self) -> bool:
        self.flush()
        return bool(self.histogram.weights.any(axis=1).all())

    def _weighted_pixels(self, by_region: bool = False) -> dict[str, NDArray[Any]]:
        """Each bin as one healthy and one lesion sample with a weight, as scikit-learn's keyword arguments."""
        self.flush()
        keys, (healthy, pixels, region) = self.histogram.keys, self.histogram.weights
        weight = np.concatenate([healthy, region if by_region else pixels])
        label = np.repeat([False, True], keys.size)
        used = weight > 0
        return {"y_true": label[used], "y_score": np.tile(keys, 2)[used], "sample_weight": weight[used]}

    def error_bounds(self) -> dict[str, float]:
        """Guaranteed bounds of the error that binning makes in the four pixel ranking metrics; 0 where it makes none.

        Whatever the order of the pixels inside a bin, the ROC curve passes through the bin's corners, so an area is
        off by at most half of the bin's rectangle, and precision lies between "lesion first" and "healthy first".
        The bounds are loose where many *equal* scores share a bin with a few others: such ties cause no error.
        """
        bounds = dict.fromkeys(PIXEL_RANKING, 0.0)
        if not self._has_both_classes() or self.histogram.shift == 0:
            return bounds
        healthy, lesion, region = self.histogram.weights[:, ::-1]  # from the highest score down
        fpr_step = healthy / healthy.sum()
        bounds["pixel_auroc"] = float(fpr_step @ lesion / lesion.sum() / 2)
        bounds["aupro"] = float(fpr_step @ region / region.sum() / 2 / self.fpr_limit)

        found, false = np.cumsum(lesion), np.cumsum(healthy)
        bounds["pixel_fpr_at_95_tpr"] = float(fpr_step[np.argmax(found >= 0.95 * found[-1])])
        used = lesion > 0
        found, false, lesion, healthy = found[used], false[used], lesion[used], healthy[used]
        precision, lesion_first = found / (found + false), found / (found + false - healthy)
        first_found = found - lesion + 1
        healthy_first = first_found / (first_found + false)
        spread = np.maximum(lesion_first - precision, precision - healthy_first)
        bounds["pixel_ap"] = float(lesion @ spread / lesion.sum())
        return bounds

    def roc_curve(self) -> Curve | None:
        """False and true positive rate of all pixels, [P] each, ascending, P <= 1000; None if undefined."""
        return _thin(*_roc(self._weighted_pixels())) if self._has_both_classes() else None

    def pr_curve(self) -> Curve | None:
        """Recall (ascending) and precision of all pixels, [P] each, P <= 1000; None if undefined."""
        if not self._has_both_classes():
            return None
        precision, recall, _ = sk.precision_recall_curve(**self._weighted_pixels())
        return _thin(recall[::-1], precision[::-1])


class AnomalyMetric(Metric):
    """:class:`AnomalyMetrics` as an ignite metric for a MONAI evaluator, pooled over all ranks.

    All values of :data:`METRIC_NAMES` go into ``engine.state.metrics`` under their own names, so as key metric it is
    attached as ``{"pixel_auroc": AnomalyMetric(...)}`` and as additional metric under any name (MONAI ignores these
    where there is no key metric). Undefined metrics are None there; MLflow refuses to log None.

    Shards may be uneven. A sampler that pads them with repeated images makes those count twice, so use
    ``monai.data.DistributedSampler(even_divisible=False)``.

    Args:
        threshold: see :class:`AnomalyMetrics`; a tensor, such as the detector's buffer, is read when an epoch starts.
        fpr_limit: see :class:`AnomalyMetrics`.
        output_transform: from ``engine.state.output`` to (maps, masks, scores, labels), each a list with one item per
            image or a batched tensor.

    Attributes:
        local: what this rank has seen.
        pooled: what all ranks have seen, once :meth:`compute` has run; for the curves.
    """

    local: AnomalyMetrics
    pooled: AnomalyMetrics | None

    def __init__(
        self,
        threshold: float | torch.Tensor,
        fpr_limit: float = 0.3,
        output_transform: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        self._threshold = threshold
        self._fpr_limit = fpr_limit
        super().__init__(output_transform, skip_unrolling=True, metrics_result_mode="flatten")

    def reset(self) -> None:
        """Forget everything; ignite calls this at the start of each epoch."""
        self.local, self.pooled = self._empty(), None

    def _empty(self) -> AnomalyMetrics:
        return AnomalyMetrics(float(self._threshold), self._fpr_limit)

    def update(self, output: Any) -> None:
        """Add (maps, masks, scores, labels) of one batch; errors as in :meth:`AnomalyMetrics.update`."""
        maps, masks, scores, labels = output
        if not len(maps) == len(masks) == len(scores) == len(labels):
            raise BundleError(
                f"a batch has {len(maps)} maps, {len(masks)} masks, {len(scores)} scores and {len(labels)} labels: "
                "give one of each per image"
            )
        for image in zip(maps, masks, scores, labels, strict=True):
            self.local.update(*image)

    def compute(self) -> dict[str, float | None]:
        """The metrics over all ranks, the same on each; every rank has to call it."""
        self.local.flush()
        self.pooled = self._empty()
        for shard in cast(list[AnomalyMetrics], idist.all_gather(self.local)):
            self.pooled.merge(shard)
        return self.pooled.compute()


def _ordered_keys(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers in the order of the finite ``scores``, equal where these are equal (-0 and 0 too); any shape."""
    bits = (scores + np.float32(0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign)


def _array(values: torch.Tensor | ArrayLike, dtype: torch.dtype | None = None) -> NDArray[Any]:
    return torch.as_tensor(values).detach().to("cpu", dtype).numpy()


def _binary(values: torch.Tensor | ArrayLike, what: str) -> NDArray[np.bool_]:
    array = _array(values)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise BundleError(f"{what} has values other than 0 and 1, up to {array.max()}: apply a mask rule such as '>0'")
    return array.astype(bool)


def _roc(pixels: dict[str, NDArray[Any]]) -> Curve:
    fpr, tpr, _ = sk.roc_curve(**pixels, drop_intermediate=False)
    return fpr, tpr


def _thin(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    """At most 1000 points of a curve, evenly spaced along it, both ends included."""
    if x.size <= CURVE_POINTS:
        return x, y
    length = np.append(0, np.cumsum(np.hypot(np.diff(x), np.diff(y))))
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)))
    return x[kept], y[kept]
