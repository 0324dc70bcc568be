"""What is finer than a patch: details of the feature network, compared with what the context of a patch foretells.

A lesion may be thinner than a patch. A stage of finer stride sees it, at the cost of one matrix product: details are
regressed on the prediction of the patch embedding, which has not seen the patch itself, and what is left is scored as
the residual of an embedding is.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.networks.gaussian import rows
from bundle.networks.scores import Healthy, PatchScore

RIDGE = 1e-3  # of the mean variance of a predicted channel


class Detailed(NamedTuple):
    """Details of healthy images, one batch of them."""

    details: Tensor
    """[B, D * f * f, h, w], space to depth."""
    prediction: Tensor
    """[B, C, h, w], of the standardized patch embeddings."""
    inside: Tensor
    """[B, h * f, w * f] bool, which cells are foreground."""


class DetailScore(nn.Module):
    """How surprising the details of an image are, given the prediction of its patch embeddings.

    Args:
        channels: D of the details.
        factor: f, cells along a side of a patch.
        context: C, channels of the prediction.
        grid: height and width of the prediction, in patches.
        score: arguments of :class:`~bundle.networks.scores.PatchScore`, with widths in cells.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, factor: int, context: int, grid: list[int], score: dict[str, Any]) -> None:
        super().__init__()
        self.factor = factor
        self.patch_score = PatchScore(channels, [side * factor for side in grid], **score)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("weight", torch.zeros(channels, context))
        self.register_buffer("bias", torch.zeros(channels))

    def forward(self, details: Tensor, prediction: Tensor) -> Tensor:
        """The z-scores [B, h * f, w * f] of ``details`` [B, D * f * f, h, w] given ``prediction`` [B, C, h, w]."""
        return self.patch_score(self.residual(details, prediction))

    @torch.jit.export
    def residual(self, details: Tensor, prediction: Tensor) -> Tensor:
        """What the prediction does not foretell of the standardized details, [B, D, h * f, w * f]."""
        cells = (F.pixel_shuffle(details.float(), self.factor) - self.mean[:, None, None]) / self.std[:, None, None]
        height, width = prediction.shape[2], prediction.shape[3]
        # in double, which no automatic cast to 16 bits touches
        foretold = torch.matmul(self.weight.double(), prediction.double().flatten(2)) + self.bias[:, None].double()
        foretold = foretold.float().view(prediction.shape[0], self.weight.shape[0], height, width)
        size = [height * self.factor, width * self.factor]
        return cells - F.interpolate(foretold, size, mode="bilinear", align_corners=False)

    @torch.jit.ignore
    @torch.no_grad()
    def set_standardization(self, mean: Tensor, deviation: Tensor) -> None:
        """Take ``mean`` and ``deviation`` [D * f * f] of every packed channel over healthy training patches."""
        means, variances = (values.double().view(len(self.mean), -1) for values in (mean, deviation.double().square()))
        variance = variances.mean(1) + means.var(1, unbiased=False)
        self.mean.copy_(means.mean(1))
        self.std.copy_(variance.sqrt().clamp_min(1e-3 * float(variance.sqrt().mean().clamp_min(1e-12))))

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, healthy: Iterable[Detailed]) -> None:
        """Fit regression, covariance and moments to healthy training images, iterated three times."""
        self._regress(healthy)
        self.patch_score.fit(self._residuals(healthy))

    @torch.jit.ignore
    def calibrate(self, healthy: Iterable[Detailed]) -> None:
        """Make the foreground cells of healthy validation images have mean 0 and deviation 1."""
        self.patch_score.calibrate(self._residuals(healthy))

    def _regress(self, healthy: Iterable[Detailed]) -> None:
        """Ridge regression of the details, averaged over each patch, on the prediction."""
        device = self.weight.device
        square, product = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        for batch in healthy:
            cells = F.pixel_shuffle(batch.details.float(), self.factor)
            target = (F.avg_pool2d(cells, self.factor) - self.mean[:, None, None]) / self.std[:, None, None]
            known = F.pad(rows(batch.prediction), [0, 1], value=1.0)
            square, product = square + known.T @ known, product + known.T @ rows(target)
        strength = (RIDGE * square.diagonal()[:-1].mean()).clamp_min(RIDGE)  # a prediction of zero has no variance
        ridge = strength * torch.ones(len(square), dtype=torch.float64, device=device)
        ridge[-1] = 0
        solution = torch.linalg.solve(square + ridge.diag(), product)
        self.weight.copy_(solution[:-1].T)
        self.bias.copy_(solution[-1])

    def _residuals(self, healthy: Iterable[Detailed]) -> Iterable[Healthy]:
        return _Residuals(self, healthy)


class _Residuals(Iterable[Healthy]):
    """The residuals of each batch, anew with every iteration."""

    def __init__(self, score: DetailScore, healthy: Iterable[Detailed]) -> None:
        self.score = score
        self.healthy = healthy

    def __iter__(self) -> Any:
        for batch in self.healthy:
            yield Healthy(self.score.residual(batch.details, batch.prediction), batch.inside)
