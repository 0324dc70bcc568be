"""Whether an image is like those that were learned from: a map of anything else means nothing.

embeddings, brightness -> means over the foreground -> distance from healthy training slices
patch map -> median over the foreground                                      the larger of both
-> one number a slice, in deviations above healthy ones -> median over the slices of a volume -> threshold for cases
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bundle.learned import Learned, read_summary
from bundle.networks.gaussian import moments
from bundle.networks.scores import check_rate, conformal_threshold, largest_of_each, rate_interval
from bundle.results import Unlike

DIRECTIONS = 32  # principal ones, each with a variance of its own; the others share one
OF_BRIGHTNESS = 3  # statistics beside the mean embedding
SMALLEST_DEVIATION = 1e-2  # of a statistic over images: standardized embeddings have 1 over patches
KEPT = 256  # quantiles of healthy validation cases, to tell a drift
PATCH_RATES = 97  # shares of healthy validation patches, for each of which a model keeps what exceeds it
FEWEST_CASES = 20  # in which a drift is looked for
DRIFT_LEVEL = 0.01  # of the test of a drift

logger = logging.getLogger(__name__)


class SliceLikeness(nn.Module):
    """How far a slice is from what was learned from: its 'unlikeness', in deviations above healthy validation slices.

    The larger of two:

    - The logarithm of the Mahalanobis distance from healthy training slices, of the mean embedding over the foreground,
      mean and deviation of its brightness, and its share. A lesion moves these means little; another contrast, noise
      or another organ moves all of them. The covariance is shrunk as Ledoit and Wolf do, and has few directions, so
      that 50 slices suffice.
    - The median of the patch map over the foreground. A lesion leaves it, an image that stands upside down does not.

    Args:
        channels: C of the embeddings.
    """

    center: Tensor
    scale: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    healthy_mean: Tensor
    healthy_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        statistics = channels + OF_BRIGHTNESS
        count = min(DIRECTIONS, statistics)
        self.register_buffer("center", torch.zeros(statistics))
        self.register_buffer("scale", torch.ones(statistics))
        self.register_buffer("directions", torch.zeros(statistics, count))
        self.register_buffer("variances", torch.ones(count))
        self.register_buffer("rest", torch.ones(()))
        self.register_buffer("healthy_mean", torch.zeros(2))
        self.register_buffer("healthy_std", torch.ones(2))

    def forward(self, embeddings: Tensor, brightness: Tensor, inside: Tensor, median: Tensor) -> Tensor:
        """The unlikeness [B] of slices.

        Args:
            embeddings: [B, C, h, w], standardized.
            brightness: [B, h, w], mean intensity of each patch.
            inside: [B, h, w] bool, which patches are foreground.
            median: [B], of the patch map over the foreground.
        """
        return self.combined(self.distance(self.statistics(embeddings, brightness, inside)), median)

    @torch.jit.export
    def statistics(self, embeddings: Tensor, brightness: Tensor, inside: Tensor) -> Tensor:
        """Mean embedding, mean and deviation of brightness, and share of the foreground, [B, C + 3]."""
        weights = inside.float()
        weights = weights / weights.sum(dim=[1, 2], keepdim=True).clamp_min(1.0)
        mean = (embeddings.float() * weights.unsqueeze(1)).sum(dim=[2, 3])
        bright = brightness.float()
        level = (bright * weights).sum(dim=[1, 2])
        spread = ((bright - level[:, None, None]).square() * weights).sum(dim=[1, 2]).sqrt()
        share = inside.float().mean(dim=[1, 2])
        return torch.cat([mean, torch.stack([level, spread, share], dim=1)], dim=1)

    @torch.jit.export
    def distance(self, statistics: Tensor) -> Tensor:
        """The logarithm of the Mahalanobis distance of ``statistics`` [B, C + 3], [B]."""
        # in double, which no automatic cast to 16 bits touches
        centered = ((statistics - self.center) / self.scale).double()
        leading = torch.matmul(centered, self.directions.double())
        left = (centered.square().sum(dim=1) - leading.square().sum(dim=1)).clamp_min(0.0)
        square = (leading.square() / self.variances).sum(dim=1) + left / self.rest
        return (0.5 * torch.log((square / centered.shape[1]).clamp_min(1e-12))).float()

    @torch.jit.export
    def combined(self, distance: Tensor, median: Tensor) -> Tensor:
        """The larger of both, [B] each, in deviations above healthy slices."""
        mean, deviation = self.healthy_mean, self.healthy_std
        return torch.maximum((distance - mean[0]) / deviation[0], (median - mean[1]) / deviation[1])

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, statistics: Tensor) -> None:
        """Fit the distance to ``statistics`` [slices, C + 3] of healthy training slices."""
        values = statistics.double().cpu()
        center, scale = values.mean(0), values.std(0, correction=0).clamp_min(SMALLEST_DEVIATION)
        covariance = moments([((values - center) / scale)[..., None, None]], shrinkage=None)[1]
        variances, vectors = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(1e-6)
        count = len(self.variances)
        self.center.copy_(center)
        self.scale.copy_(scale)
        self.directions.copy_(vectors[:, -count:])
        self.variances.copy_(variances[-count:])
        self.rest.copy_(variances[:-count].mean() if count < len(variances) else variances[0])

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, distances: Tensor, medians: Tensor) -> Tensor:
        """Make both have mean 0 and deviation 1 over healthy validation slices; returns their unlikeness [slices]."""
        both = torch.stack([distances, medians]).double().cpu()
        self.healthy_mean.copy_(both.mean(1))
        self.healthy_std.copy_(both.std(1, correction=0).clamp_min(SMALLEST_DEVIATION))
        device = self.healthy_mean.device
        return self.combined(distances.to(device), medians.to(device)).cpu()


class CaseLikeness(nn.Module):
    """Compares a case with what was learned from, and a run with healthy validation cases. Both are told in words.

    Before :meth:`calibrate` nothing is compared.
    """

    picture_threshold: Tensor
    volume_threshold: Tensor
    unlike_rate: Tensor
    healthy_scores: Tensor
    healthy_unlikeness: Tensor
    healthy_patches: Tensor
    summary: Tensor

    __jit_unused_properties__ = ("knows", "learned")

    def __init__(self) -> None:
        super().__init__()
        for name in ("picture_threshold", "volume_threshold"):
            self.register_buffer(name, torch.full((), float("inf")))
        self.register_buffer("unlike_rate", torch.zeros((), dtype=torch.float64))
        self.register_buffer("healthy_scores", torch.zeros(KEPT))
        self.register_buffer("healthy_unlikeness", torch.zeros(KEPT))
        self.register_buffer("healthy_patches", torch.zeros(PATCH_RATES))
        self.register_buffer("summary", torch.zeros(0, dtype=torch.uint8))

    @property
    def knows(self) -> bool:
        """Whether the model keeps a summary of what it was learned from."""
        return self.summary.numel() > 0

    @property
    def learned(self) -> Learned:
        """The summary; empty where the model keeps none."""
        return read_summary(self.summary) if self.knows else Learned({}, 0, False)

    def reasons(self, unlikeness: float, is_volume: bool, meta: Mapping[str, Any]) -> tuple[Unlike, ...]:
        """Why a case is unlike the training data, in words; none if it is like them.

        Args:
            unlikeness: of the case.
            is_volume: whether it has several slices.
            meta: of its image, see :func:`~bundle.dicom.words.facts_of`.
        """
        threshold = float(self.volume_threshold if is_volume else self.picture_threshold)
        return self.learned.reasons(unlikeness, threshold, meta)

    def drift(self, scores: Sequence[float], unlikeness: Sequence[float]) -> str:
        """Whether cases differ from healthy validation cases as a whole, in words; nothing where they do not.

        Two tests of Kolmogorov and Smirnov at half of :data:`DRIFT_LEVEL` each. Validation counts as many times as it
        has patients. Fewer than :data:`FEWEST_CASES` cases are not compared.

        Args:
            scores: of the cases.
            unlikeness: of the cases.
        """
        if not self.knows or len(scores) < FEWEST_CASES:
            return ""
        from scipy.stats import ks_2samp, kstwo  # slow, and not needed to run a network

        patients = self.learned.patients
        found = []
        for what, values, healthy in (
            ("scores", scores, self.healthy_scores),
            ("looks", unlikeness, self.healthy_unlikeness),
        ):
            known = healthy.cpu().numpy()
            statistic = float(ks_2samp(values, known).statistic)
            independent = max(1, round(patients * len(values) / (patients + len(values))))
            chance = float(kstwo.sf(statistic, independent))
            if chance < DRIFT_LEVEL / 2:
                way = "higher" if np.median(values) > np.median(known) else "lower"
                found.append(f"{what} {way} than in healthy validation (p {chance:.1g})")
        return "; ".join(found)

    @torch.no_grad()
    def calibrate(
        self,
        unlikeness: Tensor,
        scores: Tensor,
        patients: Sequence[int],
        volumes: Sequence[Sequence[int]],
        unlike_rate: float,
    ) -> None:
        """Set thresholds, and keep the values of healthy validation cases.

        Args:
            unlikeness: [slices] of healthy validation slices.
            scores: [slices], their image scores.
            patients: of each slice, as numbers from 0. A patient counts once, by the largest value of its cases.
            volumes: the slices of each volume; all others are pictures.
            unlike_rate: wanted share of healthy cases that are called unlike, in (0, 1).
        """
        check_rate("unlike_rate", unlike_rate)
        of_cases, case_scores = unlikeness.clone(), scores.clone()
        kept = torch.ones(len(unlikeness)) > 0
        for slices in volumes:
            indices = list(slices)
            of_cases[indices] = unlikeness[indices].quantile(0.5)
            case_scores[indices] = scores[indices].max()
            kept[indices[1:]] = False
        self.picture_threshold.fill_(careful_threshold(largest_of_each(unlikeness, patients), unlike_rate))
        self.volume_threshold.fill_(careful_threshold(largest_of_each(of_cases, patients), unlike_rate))
        self.unlike_rate.fill_(unlike_rate)
        self.healthy_scores.copy_(_quantiles(case_scores[kept]))
        self.healthy_unlikeness.copy_(_quantiles(of_cases[kept]))

    @torch.no_grad()
    def keep_patches(self, scores: Tensor) -> None:
        """Keep what shares :func:`patch_rates` of healthy validation patches exceed; ``scores`` of any shape."""
        ordered = scores.flatten().double().sort(descending=True).values
        places = (patch_rates() * len(ordered)).long().clamp_max(len(ordered) - 1)
        self.healthy_patches.copy_(ordered[places])

    def remember(self, learned: Learned) -> None:
        """Keep the summary ``learned``."""
        self.summary = torch.tensor(list(json.dumps(learned._asdict(), sort_keys=True).encode()), dtype=torch.uint8)

    def promise(self) -> str:
        """What the threshold holds with as many validation patients as there are, in one line."""
        patients, rate = self.learned.patients, float(self.unlike_rate)
        threshold = float(self.volume_threshold if self.learned.of_volumes else self.picture_threshold)
        said = (
            f"a case is called unlike the training data above {threshold:.3g}: wanted rate {rate:g} of healthy ones; "
        )
        if enough_for(patients, rate):
            low, high = rate_interval(patients, rate)
            return (
                said + f"with {patients} validation patients the true rate lies between {low:.2g} and {high:.2g} (90 %)"
            )
        if patients < 2:
            return said + "one validation patient cannot tell it: give more healthy validation images"
        return said + (
            f"{patients} validation patients are too few to show it ({math.ceil(1 / rate - 1)} would): it rests on a "
            "normal distribution of their values"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "summary")
        if stored is not None:
            read_summary(stored)
            self.summary = torch.zeros_like(stored)  # its length is that of what is stored
        state_dict.setdefault(prefix + "healthy_patches", torch.zeros(PATCH_RATES))  # which earlier models do not keep
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def patch_rates() -> Tensor:
    """Shares from 1e-4 to 1, evenly in their logarithm, [:data:`PATCH_RATES`] float64."""
    return torch.logspace(-4, 0, PATCH_RATES, dtype=torch.float64)


def enough_for(patients: int, rate: float) -> bool:
    """Whether so many patients can show a false positive rate by their ranks alone."""
    return patients + 1 >= 1 / rate - 1e-9


def careful_threshold(healthy: Tensor, rate: float) -> float:
    """The threshold that a new healthy value exceeds with at most the probability ``rate``, with few values as well.

    With 1 / rate - 1 values or more that of :func:`~bundle.networks.scores.conformal_threshold`. Fewer cannot show such
    a rate. Then it is the prediction limit of a normal distribution with their mean and deviation, or the largest of
    them, if that is larger. One value alone has no deviation: the threshold is infinite.

    Args:
        healthy: [patients].
        rate: in (0, 1).
    """
    count = len(healthy)
    if count < 2:
        return math.inf
    if enough_for(count, rate):
        return conformal_threshold(healthy, rate, "cases")
    from scipy.stats import t

    values = healthy.double()
    limit = values.mean() + float(t.ppf(1 - rate, count - 1)) * values.std() * math.sqrt(1 + 1 / count)
    return float(torch.maximum(limit, values.max()))


def _quantiles(values: Tensor) -> Tensor:
    """:data:`KEPT` quantiles of ``values`` [n]: the values themselves, again and again, where there are fewer."""
    ordered = values.double().sort().values
    return ordered[((torch.arange(KEPT) + 0.5) * len(ordered) / KEPT).long()]
