"""Gaussians of healthy patches: moments over batches, covariances with shrinkage, and what whitens by them."""

from collections.abc import Iterable

import torch
from torch import Tensor

FITTED = ("low_rank", "full")
COVARIANCES = ("isotropic", "diagonal", *FITTED)


def rows(batch: Tensor) -> Tensor:
    """The patches of ``batch`` [B, C, h, w] as rows [B * h * w, C], in double precision."""
    return batch.movedim(1, -1).flatten(0, -2).double()


def moments(batches: Iterable[Tensor], shrinkage: float | None = 0.0) -> tuple[Tensor, Tensor]:
    """Mean [C] and covariance [C, C] of all patches of ``batches`` [B, C, h, w].

    Args:
        batches: of patches.
        shrinkage: see :func:`fit_gaussian`; 0: none.
    """
    return _shrunk(batches, shrinkage)


def fit_gaussian(
    batches: Iterable[Tensor], kind: str, rank: int = 32, shrinkage: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a Gaussian to the patches of ``batches`` [B, C, h, w], in closed form.

    Args:
        batches: healthy residuals.
        kind: ``full``, or ``low_rank``: the leading ``rank`` eigenvectors and one variance for the rest, the maximum
            likelihood solution of probabilistic principal components (Tipping and Bishop, JRSS B 1999).
        rank: of ``low_rank``.
        shrinkage: weight in [0, 1] of a multiple of the identity; None: as Ledoit and Wolf choose it (Journal of
            Multivariate Analysis 88, 2004), so that few images suffice.

    Returns:
        Mean [C]; whitening [C, C], such that ``whitening @ (patch - mean)`` has unit covariance; and the logarithm of
        the determinant of the covariance.
    """
    mean, covariance = _shrunk(batches, shrinkage)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(1e-6 * values.mean().clamp_min(1e-12))
    if kind == "low_rank" and rank < len(values):
        values = values.clone()
        values[: len(values) - rank] = values[: len(values) - rank].mean()
    whitening = (vectors / values.sqrt()) @ vectors.T
    return mean.float(), whitening.float(), values.log().sum().float()


def _shrunk(batches: Iterable[Tensor], shrinkage: float | None) -> tuple[Tensor, Tensor]:
    """Mean and shrunk covariance, from one pass."""
    count, shift = 0, torch.zeros(())
    total, square, weighted, lengths, fourth = (torch.zeros(()) for _ in range(5))
    for batch in batches:
        patches = rows(batch.detach()).cpu()
        if count == 0:
            shift = patches.mean(0)  # near the mean: no digits are lost in differences of large sums
        patches = patches - shift
        length = patches.square().sum(1)
        count += len(patches)
        total = total + patches.sum(0)
        square = square + patches.T @ patches
        weighted = weighted + length @ patches
        lengths = lengths + length.sum()
        fourth = fourth + length.square().sum()
    center = total / count
    covariance = square / count - torch.outer(center, center)
    channels = len(center)
    scale = covariance.trace() / channels
    if shrinkage is None:
        spread = (covariance.square().sum() - channels * scale.square()).clamp_min(1e-30)
        offset = center.square().sum()
        # the sum of the fourth powers of the distances from the center, from what was summed around the shift
        fourth = fourth + 4 * (center @ square @ center) + count * offset**2 + 2 * offset * lengths
        fourth = fourth - 4 * (weighted @ center) - 4 * offset * (total @ center)
        noise = (fourth / count - covariance.square().sum()) / count
        shrinkage = float((noise / spread).clamp(0, 1))
    shrunk = (1 - shrinkage) * covariance + shrinkage * scale * torch.eye(channels, dtype=covariance.dtype)
    return shift + center, shrunk
