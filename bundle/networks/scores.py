"""From residuals to scores that mean something: how surprising a patch, and an image, is among healthy ones.

::

    residual [B, C, h, w] -> mean over near patches -> whiten -> squared length -> logarithm
                          -> deviations above the healthy patches at the same position [B, h, w]
                          -> quantiles of a normal -> one score an image [B]
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, check, check_choice
from bundle.networks.gaussian import FITTED, fit_gaussian

SCALES = ("log_radius", "squared_error")
IMAGE_SCORES = ("top_patches", "adjusted")
TOP_SHARE = 0.01  # of the foreground patches, the most anomalous ones, whose mean is the image score
LARGEST_POOLING = 32  # patches
PRIOR_IMAGES = (100.0, 30.0, 10.0, 3.0)  # how many images the moments of all patches may count for at a position
USUAL_PRIOR = 10.0
FOLDS = 5  # of the training images, to choose among them
LOWEST = -6.0  # z: the value outside the foreground, and the least inside
TAIL = 3.0  # z, up to which quantiles are matched
SMALLEST_STEP = 1e-3  # between quantiles of scores of deviation 1: equal ones must not make a slope infinite
PATCHES_OF_A_QUANTILE = 10  # at least beyond it, for it to be known

logger = logging.getLogger(__name__)


class Healthy(NamedTuple):
    """Residuals of healthy images, one batch of them."""

    residual: Tensor
    """[B, C, h, w]."""
    inside: Tensor
    """[B, h, w] bool, which patches are foreground."""


class PatchScore(nn.Module):
    """How surprising a residual is, in standard deviations above the mean of healthy patches ('z').

    The residuals of a lesion point the same way in neighboring patches, those of healthy tissue do not: their weighted
    mean over a few patches, with a covariance of its own, tells them apart better than each alone. The logarithm of its
    Mahalanobis length is closer to normal than the length, with a mean and deviation that depend on the position: at
    the rim of an organ healthy images differ more.

    The moments at a position are a mixture of those of the foreground patches there and at near positions, and of those
    of all foreground patches, which count for as many images as ``per_position`` says.

    Args:
        channels: C of the residuals.
        grid: height and width of the map, in patches.
        fit: kind, rank and shrinkage of the covariance, see :class:`~bundle.networks.density.SpatialARDensity`.
        scale: ``log_radius``, or ``squared_error``, without a logarithm as in the paper.
        pooling: deviation of the Gaussian weights of the mean, in patches; 0: each patch alone.
        per_position: true: compare with healthy patches at the same position, for images that are about aligned; false:
            with all healthy patches; ``auto``: as healthy training images that were left out are likeliest.
        smoothing: deviation of the Gaussian weights of near positions in the moments, in patches; 0: each alone.
        what: is scored, for the log.

    Raises:
        BundleError: for an unknown scale, a negative pooling or smoothing, or another word than ``auto``.
    """

    weights: Tensor
    smoothing_weights: Tensor
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
        per_position: bool | Literal["auto"] = "auto",
        smoothing: float = 0.75,
        what: str = "patches",
    ) -> None:
        super().__init__()
        check_choice("score_scale", scale, SCALES)
        for name, width in {"residual_pooling": pooling, "position_smoothing": smoothing}.items():
            remedy = f"give 0 for none, or a number of patches such as 1.0, up to {LARGEST_POOLING}"
            check(0 <= width <= LARGEST_POOLING, name, width, remedy)
        check(per_position in (True, False, "auto"), "per_position", per_position, "give auto, true or false")
        self.takes_logarithm = scale == "log_radius"
        self.per_position = per_position
        self.what = what
        self.whitens = fit["kind"] in FITTED
        self.fit_options = fit
        self.register_buffer("weights", _gaussian_weights(pooling), persistent=False)
        self.register_buffer("smoothing_weights", _gaussian_weights(smoothing), persistent=False)
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
        square = self.mean_square(residual)
        return torch.log(square.clamp_min(1e-12)) if self.takes_logarithm else square

    @torch.jit.export
    def mean_square(self, residual: Tensor) -> Tensor:
        """The mean square of the pooled and whitened residual, [B, C, h, w] to [B, h, w]."""
        pooled = weighted_mean(residual.float(), self.weights)
        if self.whitens:
            # double, which no automatic cast to 16 bits touches: a covariance has small eigenvalues
            centered = (pooled - self.mean[:, None, None]).double().flatten(2)
            whitened = torch.matmul(self.whitening.double(), centered)
            return whitened.square().mean(dim=1).float().view(pooled.shape[0], pooled.shape[2], pooled.shape[3])
        return pooled.square().mean(dim=1)

    @torch.jit.ignore
    def negative_log_likelihood(self, residual: Tensor) -> Tensor:
        """Of every pooled residual, Gaussian with the fitted covariance, in nats, [B, C, h, w] to [B, h, w]."""
        channels = residual.shape[1]
        log_determinant = -2 * torch.linalg.slogdet(self.whitening.double()).logabsdet.float()
        constant = channels * math.log(2 * math.pi) + log_determinant
        return 0.5 * (channels * self.mean_square(residual) + constant)

    @torch.jit.ignore
    @torch.no_grad()
    def fit_covariance(self, healthy: Iterable[Healthy]) -> None:
        """Fit the covariance of pooled residuals, if it is one that is fitted, to healthy training images."""
        if self.whitens:
            pooled = (weighted_mean(batch.residual.float(), self.weights) for batch in healthy)
            mean, whitening, _ = fit_gaussian(pooled, **self.fit_options)
            self.mean.copy_(mean)
            self.whitening.copy_(whitening)

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, healthy: Iterable[Healthy]) -> None:
        """Fit covariance and moments to the residuals of healthy training images, iterated twice."""
        self.fit_covariance(healthy)
        self.healthy_mean.zero_()
        self.healthy_std.fill_(1)
        scored = [(self.surprise(batch.residual).double().cpu(), batch.inside.cpu()) for batch in healthy]
        surprise, inside = (torch.cat(values) for values in zip(*scored, strict=True))
        mean, deviation = self._moments(surprise, inside, self._choose_prior(surprise, inside))
        self.position_mean.copy_(mean)
        self.position_std.copy_(deviation)

    def _choose_prior(self, surprise: Tensor, inside: Tensor) -> float:
        """For how many images the moments of all patches count, infinite where positions mean nothing.

        Each fold of images that follow each other is judged by the moments of the others: slices of a patient do.
        """
        if self.per_position != "auto":
            return USUAL_PRIOR if self.per_position else math.inf
        candidates = (math.inf, *PRIOR_IMAGES)  # of equal ones the simplest
        folds = torch.arange(len(surprise)) * FOLDS // max(FOLDS, len(surprise))
        nats = dict.fromkeys(candidates, 0.0)
        for fold in folds.unique():
            out = folds == fold
            if not out.all() and inside[out].any():
                for prior in candidates:
                    mean, deviation = self._moments(surprise[~out], inside[~out], prior)
                    z = (surprise[out] - mean) / deviation
                    cost = 0.5 * z.square() + deviation.log().expand_as(z)
                    nats[prior] += float(cost[inside[out]].sum() / inside.sum())
        best = min(candidates, key=lambda prior: nats[prior])
        gain = nats[math.inf] - min(nats[prior] for prior in PRIOR_IMAGES)
        found = f"by position, all of them count for {best:g} images" if best < math.inf else "all alike"
        logger.info(
            f"{self.what} are compared {found}: positions make left-out healthy ones likelier by {gain:.3f} nats each"
        )
        return best

    def _moments(self, surprise: Tensor, inside: Tensor, prior: float) -> tuple[Tensor, Tensor]:
        """Mean and deviation [h, w] at every position, of foreground patches."""
        weight = inside.double() if inside.any() else torch.ones_like(surprise)
        count = weight.sum()
        mean = (weight * surprise).sum() / count
        variance = (weight * (surprise - mean).square()).sum() / count
        if math.isinf(prior):
            return mean.expand(surprise.shape[1:]), variance.clamp_min(1e-12).sqrt().expand(surprise.shape[1:])
        centered = surprise - mean
        near = torch.stack([weight, weight * centered, weight * centered.square()]).sum(1)[None]
        images, total, square = weighted_mean(near, self.smoothing_weights.double().cpu())[0]
        offset = total / (images + prior)
        # the variance of a mixture: within each part, and between their means
        within = (square + prior * variance) / (images + prior)
        return mean + offset, (within - offset.square()).clamp_min(1e-12).sqrt()

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, healthy: Iterable[Healthy]) -> None:
        """Make the foreground patches of healthy validation images have mean 0 and deviation 1."""
        self.healthy_mean.zero_()
        self.healthy_std.fill_(1)
        scores = torch.cat([self(batch.residual)[batch.inside].double().cpu() for batch in healthy])
        self.healthy_mean.copy_(scores.mean())
        if len(scores) > 1:
            self.healthy_std.copy_(scores.std().clamp_min(1e-12))


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of ``values`` [B, C, h, w] over near patches, with the outer product of ``weights`` [2 r + 1]."""
    size = weights.shape[0]
    reach = size // 2
    if reach == 0:
        return values
    padded = F.pad(values, [reach, reach, reach, reach], mode="replicate")
    height, width = values.shape[2], values.shape[3]
    rows = padded[:, :, 0:height] * weights[0]
    for step in range(1, size):
        rows = rows + padded[:, :, step : step + height] * weights[step]
    mean = rows[:, :, :, 0:width] * weights[0]
    for step in range(1, size):
        mean = mean + rows[:, :, :, step : step + width] * weights[step]
    return mean


def _gaussian_weights(deviation: float) -> Tensor:
    """The weights of a mean over patches up to two deviations away, [2 r + 1]."""
    reach = math.ceil(2 * deviation)
    distance = torch.arange(-reach, reach + 1) / max(deviation, 1e-6)
    weights = torch.exp(-0.5 * distance.square())
    return weights / weights.sum()


class NormalScale(nn.Module):
    """Brings scores to a scale on which healthy foreground patches are as rare as under a normal distribution.

    Piecewise linear between quantiles of healthy validation patches: 2 is exceeded by 2.3 % of them, 3 by 0.13 %, not
    by ten times as many. Beyond the last quantile that the patches can tell it goes on as from 1 to that quantile.
    """

    levels: Tensor
    knots: Tensor
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("levels", torch.arange(-TAIL, TAIL + 0.25, 0.5), persistent=False)
        self.register_buffer("knots", self.levels.clone())
        self.register_buffer("slopes", torch.ones(len(self.levels) + 1))

    @torch.jit.ignore
    def reset(self) -> None:
        """Change nothing, until it is fitted."""
        self.knots.copy_(self.levels)
        self.slopes.fill_(1)

    def forward(self, scores: Tensor) -> Tensor:
        """The z-scores of ``scores`` [B, h, w]."""
        first, widths = self.knots[0], self.knots[1:] - self.knots[:-1]
        steps = torch.minimum((scores.unsqueeze(-1) - self.knots[:-1]).clamp_min(0.0), widths)
        below = self.slopes[0] * (scores - first).clamp_max(0.0)
        above = self.slopes[-1] * (scores - self.knots[-1]).clamp_min(0.0)
        return self.levels[0] + below + (steps * self.slopes[1:-1]).sum(dim=-1) + above

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, scores: Tensor) -> None:
        """Fit the quantiles to the scores of healthy foreground patches, of any shape."""
        ordered = scores.flatten().double().cpu().sort().values
        levels = self.levels.double().cpu()
        share = torch.special.ndtr(levels)
        known = len(ordered) * torch.minimum(share, 1 - share) >= PATCHES_OF_A_QUANTILE
        if not (known[_at(levels, -1.0)] and known[_at(levels, 1.0)]):
            return
        places = (share * len(ordered)).long().clamp(0, len(ordered) - 1)
        knots = ordered[places]
        low, high = int(known.nonzero()[0]), int(known.nonzero()[-1])
        least = torch.tensor(SMALLEST_STEP, dtype=torch.float64)
        above, below = (
            (levels[a] - levels[b]) / (knots[a] - knots[b]).clamp_min(least)
            for a, b in ((high, min(high - 1, _at(levels, 1.0))), (max(low + 1, _at(levels, -1.0)), low))
        )
        knots[high:] = knots[high] + (levels[high:] - levels[high]) / above
        knots[: low + 1] = knots[low] + (levels[: low + 1] - levels[low]) / below
        for index in range(1, len(knots)):
            knots[index] = torch.maximum(knots[index], knots[index - 1] + least)
        slopes = (levels[1:] - levels[:-1]) / (knots[1:] - knots[:-1])
        self.knots.copy_(knots)
        self.slopes.copy_(torch.cat([below[None], slopes, above[None]]))


def _at(levels: Tensor, level: float) -> int:
    return int((levels - level).abs().argmin())


class ImageScore(nn.Module):
    """One score of an image from the z-scores of its foreground patches, in deviations above healthy images.

    ``top_patches``: the mean of the top 1 %. A share, not a number: it does not grow with the organ or the grid.

    ``adjusted``: noise, contrast and slice position move all patches of an image. Median and lower spread (median less
    tenth percentile) of the same patches tell how much. What they explain of the top by linear regression over healthy
    images is taken away. It takes hundreds of images, and a lesion of a tenth of the image moves what is taken away.

    Args:
        kind: ``top_patches`` or ``adjusted``.

    Raises:
        BundleError: for an unknown kind.
    """

    coefficients: Tensor
    healthy_mean: Tensor
    healthy_std: Tensor

    def __init__(self, kind: str = "top_patches") -> None:
        super().__init__()
        check_choice("image_score", kind, IMAGE_SCORES)
        self.adjusts = kind == "adjusted"
        self.top_share = TOP_SHARE
        self.register_buffer("coefficients", torch.zeros(2))
        self.register_buffer("healthy_mean", torch.zeros(()))
        self.register_buffer("healthy_std", torch.ones(()))

    def forward(self, patch_map: Tensor, inside: Tensor) -> Tensor:
        """The scores [B] of ``patch_map`` [B, h, w], whose foreground patches are ``inside`` [B, h, w]."""
        top, covariates = self.statistics(patch_map, inside)
        if self.adjusts:
            top = top - (covariates * self.coefficients).sum(dim=1)
        return (top - self.healthy_mean) / self.healthy_std

    @torch.jit.export
    def statistics(self, patch_map: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the top foreground patches [B], and median and lower spread of all of them [B, 2].

        An image without foreground has the values that its map has everywhere.
        """
        patches = patch_map.flatten(1)
        total = patches.shape[1]
        last = patches.amin(dim=1, keepdim=True) - 1.0  # below all others: background comes last
        ordered = torch.where(inside.flatten(1), patches, last).topk(total, dim=1).values
        count = inside.flatten(1).sum(dim=1, keepdim=True)
        ordered = torch.where(count > 0, ordered, last + 1.0)
        count = torch.where(count > 0, count, torch.full_like(count, total))
        taken = torch.floor(self.top_share * count + 0.5).clamp_min(1.0)
        ranks = torch.arange(total, device=patches.device).unsqueeze(0)
        top = torch.where(ranks < taken, ordered, torch.zeros_like(ordered)).sum(dim=1) / taken.squeeze(1)
        median = ordered.gather(1, torch.div(count, 2, rounding_mode="floor")).squeeze(1)
        low = ordered.gather(1, torch.floor(0.9 * (count - 1)).long()).squeeze(1)
        return top, torch.stack([median, median - low], dim=1)

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, patch_maps: Tensor, inside: Tensor) -> None:
        """Fit what the covariates explain to z-scores [images, h, w] of healthy training images."""
        top, covariates = (values.double().cpu() for values in self.statistics(patch_maps, inside))
        centered = covariates - covariates.mean(0)
        # as if some images had shown that nothing depends on them: few images change little
        ridge = USUAL_PRIOR * torch.diag(centered.square().mean(0) + 1e-12)
        products = centered.T @ (top - top.mean())
        self.coefficients.copy_(torch.linalg.solve(centered.T @ centered + ridge, products))

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, patch_maps: Tensor, inside: Tensor) -> Tensor:
        """Make healthy validation images have mean 0 and deviation 1; returns their scores [images]."""
        device = self.coefficients.device
        self.healthy_mean.zero_()
        self.healthy_std.fill_(1)
        scores = self(patch_maps.to(device), inside.to(device)).double().cpu()
        shown = scores[inside.flatten(1).any(dim=1).cpu()]  # images without foreground have the lowest score
        self.healthy_mean.copy_(shown.mean())
        if len(shown) > 1:
            self.healthy_std.copy_(shown.std().clamp_min(1e-12))
        return (scores - shown.mean()) / self.healthy_std.double().cpu()


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
    from scipy.stats import beta  # slow, and not needed to run a network

    rank = min(_rank(count, false_positive_rate), count)
    low, high = beta.interval(coverage, count + 1 - rank, rank)
    return float(low), float(high)


def _rank(count: int, false_positive_rate: float) -> int:
    """Which of ``count`` scores in ascending order, from 1, the threshold is; none if it is larger than ``count``."""
    return math.ceil((count + 1) * (1 - false_positive_rate) - 1e-9)
