"""From residuals to scores that mean something: how surprising a patch, and an image, is among healthy ones.

residual [B, C, h, w] -> mean over near patches -> whiten -> squared length -> logarithm -> deviations above the healthy
patches at the same position [B, h, w] -> one score an image [B]
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, check, check_choice
from bundle.networks.gaussian import FITTED, fit_gaussian

SCALES = ("log_radius", "squared_error")
IMAGE_SCORES = ("adjusted", "top_patches")
TOP_SHARE = 0.01  # of the patches, the most anomalous ones, whose mean the image score starts from
LARGEST_POOLING = 32  # patches
PRIOR_IMAGES = 10.0  # how many images the pooled moments count for beside those of one position

logger = logging.getLogger(__name__)


class PatchScore(nn.Module):
    """How surprising a residual is, in standard deviations above the mean of healthy patches ('z').

    The residuals of a lesion point the same way in neighboring patches, those of healthy tissue do not: their weighted
    mean over a few patches, with a covariance of its own, tells them apart better than each alone. The logarithm of its
    Mahalanobis length is close to normal, with a mean and deviation that depend on the position: at the rim of an
    organ healthy images differ more. (An elliptical density with a log-normal radius.)

    Args:
        channels: C of the residuals.
        grid: height and width of the map, in patches.
        fit: kind, rank and shrinkage of the covariance, see :class:`~bundle.networks.density.SpatialARDensity`.
        scale: ``log_radius``, or ``squared_error``, without a logarithm as in the paper.
        pooling: deviation of the Gaussian weights of the mean, in patches; 0: each patch alone.
        per_position: compare with healthy patches at the same position, for images that are about aligned; else with
            all healthy patches.

    Raises:
        BundleError: for an unknown scale, or a negative pooling.
    """

    weights: Tensor
    mean: Tensor
    whitening: Tensor
    position_mean: Tensor
    position_std: Tensor
    healthy_mean: Tensor
    healthy_std: Tensor

    def __init__(
        self,
        channels: int,
        grid: list[int],
        fit: dict[str, Any],
        scale: str = "log_radius",
        pooling: float = 1.0,
        per_position: bool = True,
    ) -> None:
        super().__init__()
        check_choice("score_scale", scale, SCALES)
        check(
            0 <= pooling <= LARGEST_POOLING,
            "residual_pooling",
            pooling,
            f"give 0 for none, or a number of patches such as 1.0, up to {LARGEST_POOLING}",
        )
        self.takes_logarithm = scale == "log_radius"
        self.per_position = per_position
        self.whitens = fit["kind"] in FITTED
        self.fit_options = fit
        self.reach = math.ceil(2 * pooling)
        distance = torch.arange(-self.reach, self.reach + 1) / max(pooling, 1e-6)
        weights = torch.exp(-0.5 * distance.square())
        self.register_buffer("weights", weights / weights.sum(), persistent=False)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("whitening", torch.eye(channels if self.whitens else 1))
        self.register_buffer("position_mean", torch.zeros(grid))
        self.register_buffer("position_std", torch.ones(grid))
        self.register_buffer("healthy_mean", torch.zeros(()))
        self.register_buffer("healthy_std", torch.ones(()))

    def forward(self, residual: Tensor) -> Tensor:
        """The z-scores [B, h, w] of ``residual`` [B, C, h, w]."""
        z = (self.surprise(residual) - self.position_mean) / self.position_std
        return (z - self.healthy_mean) / self.healthy_std

    @torch.jit.export
    def surprise(self, residual: Tensor) -> Tensor:
        """The logarithm, or the value, of the mean square of the whitened residual, [B, C, h, w] to [B, h, w]."""
        pooled = self.pool(residual)
        if self.whitens:
            # double, which no automatic cast to 16 bits touches: a covariance has small eigenvalues
            centered = (pooled - self.mean[:, None, None]).double().flatten(2)
            whitened = torch.matmul(self.whitening.double(), centered)
            square = whitened.square().mean(dim=1).float().view(pooled.shape[0], pooled.shape[2], pooled.shape[3])
        else:
            square = pooled.float().square().mean(dim=1)
        return torch.log(square.clamp_min(1e-12)) if self.takes_logarithm else square

    @torch.jit.export
    def pool(self, residual: Tensor) -> Tensor:
        """The mean of ``residual`` [B, C, h, w] over near patches, with Gaussian weights, in 32 bits."""
        residual = residual.float()
        if self.reach == 0:
            return residual
        size = 2 * self.reach + 1
        padded = F.pad(residual, [self.reach, self.reach, self.reach, self.reach], mode="replicate")
        height, width = residual.shape[2], residual.shape[3]
        rows = padded[:, :, 0:height] * self.weights[0]
        for step in range(1, size):
            rows = rows + padded[:, :, step : step + height] * self.weights[step]
        pooled = rows[:, :, :, 0:width] * self.weights[0]
        for step in range(1, size):
            pooled = pooled + rows[:, :, :, step : step + width] * self.weights[step]
        return pooled

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, residuals: Iterable[Tensor]) -> Tensor:
        """Fit covariance and moments to the residuals of healthy training images.

        Args:
            residuals: batches of [B, C, h, w], iterated twice.

        Returns:
            Their z-scores, [images, h, w].
        """
        if self.whitens:
            pooled = (self.pool(batch) for batch in residuals)
            mean, whitening, _ = fit_gaussian(pooled, **self.fit_options)
            self.mean.copy_(mean)
            self.whitening.copy_(whitening)
        surprise = torch.cat([self.surprise(batch).double().cpu() for batch in residuals])
        share = len(surprise) / (len(surprise) + PRIOR_IMAGES) if self.per_position else 0.0
        mean = share * surprise.mean(0) + (1 - share) * surprise.mean()
        pooled_variance = surprise.var(unbiased=False).clamp_min(1e-12)
        deviation = (share * surprise.var(0, unbiased=False) + (1 - share) * pooled_variance).sqrt()
        self.position_mean.copy_(mean)
        self.position_std.copy_(deviation)
        return ((surprise - mean) / deviation).float()

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, residuals: Iterable[Tensor]) -> Tensor:
        """Make healthy validation patches have mean 0 and deviation 1; returns their z-scores [images, h, w]."""
        self.healthy_mean.zero_()
        self.healthy_std.fill_(1)
        scores = torch.cat([self(batch).cpu() for batch in residuals])
        self.healthy_mean.copy_(scores.double().mean())
        self.healthy_std.copy_(scores.double().std().clamp_min(1e-12))
        return (scores - self.healthy_mean.cpu()) / self.healthy_std.cpu()


class ImageScore(nn.Module):
    """One score of an image from the z-scores of its patches, in deviations above healthy images.

    ``adjusted``: the mean of the top 1 % of patches follows noise, contrast and slice position, which move all patches
    of an image. Median and lower spread (median less tenth percentile) of the same patches tell how much, and a lesion
    of a small part of the image hardly moves them. What they explain by linear regression over healthy images is taken
    away.

    Args:
        kind: ``adjusted``, or ``top_patches``: the mean of the top 1 % as it is.

    Raises:
        BundleError: for an unknown kind.
    """

    coefficients: Tensor
    healthy_mean: Tensor
    healthy_std: Tensor

    def __init__(self, kind: str = "adjusted") -> None:
        super().__init__()
        check_choice("image_score", kind, IMAGE_SCORES)
        self.adjusts = kind == "adjusted"
        self.top_share = TOP_SHARE
        self.register_buffer("coefficients", torch.zeros(2))
        self.register_buffer("healthy_mean", torch.zeros(()))
        self.register_buffer("healthy_std", torch.ones(()))

    def forward(self, patch_map: Tensor) -> Tensor:
        """The scores [B] of ``patch_map`` [B, h, w]."""
        top, covariates = self.statistics(patch_map)
        if self.adjusts:
            top = top - (covariates * self.coefficients).sum(dim=1)
        return (top - self.healthy_mean) / self.healthy_std

    @torch.jit.export
    def statistics(self, patch_map: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the top patches [B], and median and lower spread of all [B, 2]."""
        patches = patch_map.flatten(1)
        count = patches.shape[1]
        ordered = patches.topk(count, dim=1).values
        top = ordered[:, : max(1, int(self.top_share * count + 0.5))].mean(dim=1)
        median, low = ordered[:, count // 2], ordered[:, int(0.9 * (count - 1))]
        return top, torch.stack([median, median - low], dim=1)

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, patch_maps: Tensor) -> None:
        """Fit what the covariates explain to z-scores [images, h, w] of healthy training images."""
        top, covariates = (values.double().cpu() for values in self.statistics(patch_maps))
        centered = covariates - covariates.mean(0)
        # as if some images had shown that nothing depends on them: few images change little
        ridge = PRIOR_IMAGES * torch.diag(centered.square().mean(0) + 1e-12)
        products = centered.T @ (top - top.mean())
        self.coefficients.copy_(torch.linalg.solve(centered.T @ centered + ridge, products))

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, patch_maps: Tensor) -> Tensor:
        """Make healthy validation images have mean 0 and deviation 1; returns their scores [images]."""
        self.healthy_mean.zero_()
        self.healthy_std.fill_(1)
        scores = self(patch_maps.to(self.coefficients.device)).double().cpu()
        self.healthy_mean.copy_(scores.mean())
        if len(scores) > 1:
            self.healthy_std.copy_(scores.std().clamp_min(1e-12))
        return (scores - scores.mean()) / self.healthy_std.double().cpu()


def check_rate(name: str, rate: float) -> float:
    """``rate``, if it is in (0, 1).

    Raises:
        BundleError: if it is not.
    """
    if not 0 < rate < 1:
        raise BundleError(f"{name} must be in (0, 1), got {rate}: try 0.01")
    return rate


def largest_of_each(scores: Tensor, cases: Sequence[int]) -> Tensor:
    """The largest of the ``scores`` [slices] of each case or patient, as a study is scored by its worst slice."""
    groups = torch.as_tensor(cases, device=scores.device)
    found = scores.new_full((int(groups.max()) + 1,), -torch.inf).scatter_reduce(0, groups, scores, "amax")
    return found[torch.isfinite(found)]


def conformal_threshold(healthy: Tensor, false_positive_rate: float, what: str) -> float:
    """The threshold that a new healthy score exceeds with at most this probability.

    The k-th smallest of n healthy scores with k = ceil((n + 1) (1 - rate)): the bound holds for every n, if the new
    score and the healthy ones are exchangeable (Vovk et al., *Algorithmic Learning in a Random World*, 2005; split
    conformal prediction). It is one on average over sets of n scores; :func:`rate_interval` says what one set may have.
    With n < 1 / rate - 1 no threshold has it; then it is the largest score, with a warning.

    Patches of one image are not exchangeable with those of another. If whole images are, of K of them with as many
    patches each, a random patch of a new image exceeds the threshold with a probability below rate + 1 / (K + 1): the
    patches of all K + 1 images exceed their own quantile at the rate, and K / (K + 1) of them set this one.

    Args:
        healthy: scores of healthy validation data, of any shape.
        false_positive_rate: in (0, 1).
        what: of which the scores are, for the warning.

    Raises:
        BundleError: if the rate is not in (0, 1), or there is no score.
    """
    check_rate(f"the false positive rate of {what}", false_positive_rate)
    ordered = healthy.flatten().double().sort().values
    if len(ordered) == 0:
        raise BundleError("no healthy validation image to calibrate on: add some to the valid/good folder")
    rank = _rank(len(ordered), false_positive_rate)
    if rank > len(ordered):
        logger.warning(
            f"{len(ordered)} scores of healthy validation {what} can't promise a false positive rate of "
            f"{false_positive_rate}, only {1 / (len(ordered) + 1):.3g}: the threshold is the largest of them; give more"
        )
    return float(ordered[min(rank, len(ordered)) - 1])


def rate_interval(count: int, false_positive_rate: float, coverage: float = 0.9) -> tuple[float, float]:
    """Where the true false positive rate of a :func:`conformal_threshold` lies, for one set of healthy scores.

    The share of new healthy scores above the k-th smallest of n has the distribution Beta(n + 1 - k, k), whatever that
    of the scores is, if they are independent and have no ties (Vovk, *Conditional validity of inductive conformal
    predictors*, Machine Learning 92, 2013). So n is the number of patients, each with one score. Patches of an image
    depend on each other in a way that is not known, so their threshold has no such interval.

    Args:
        count: n, at least 1.
        false_positive_rate: the wanted one, in (0, 1).
        coverage: probability of the interval, with as much on either side.

    Returns:
        Lower and upper end, in (0, 1).
    """
    rank = min(_rank(count, false_positive_rate), count)
    low, high = beta.interval(coverage, count + 1 - rank, rank)
    return float(low), float(high)


def _rank(count: int, false_positive_rate: float) -> int:
    """Which of ``count`` scores in ascending order, from 1, the threshold is; none if it is larger than ``count``."""
    return math.ceil((count + 1) * (1 - false_positive_rate) - 1e-9)
