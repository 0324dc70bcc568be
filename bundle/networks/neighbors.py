"""The slices of a volume together: a lesion goes on in the next slice, noise does not.

::

    patch maps [slices, h, w] -> weighted sum over near slices -> divided by its deviation in healthy volumes
                              -> quantiles of a normal -> patch maps and image scores [slices]
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bundle.errors import check
from bundle.networks.scores import LOWEST, ImageScore, NormalScale

LARGEST_WIDTH = 100.0  # mm
REACH = 2.0  # deviations of the weights, up to which slices are neighbors
LENGTHS = tuple(0.25 * 2**step for step in range(11))  # mm, over which healthy slices may be alike
FITTED_SLICES = 500  # at most, so that the fit takes bounded time

logger = logging.getLogger(__name__)


class Volume(NamedTuple):
    """What is known of the slices of one healthy volume."""

    patch_maps: Tensor
    """[slices, h, w], z-scores of each slice alone."""
    positions: Tensor
    """[slices], in mm along their normal."""


class PlacedSlices(NamedTuple):
    """The slices of one volume in a set of slices."""

    slices: list[int]
    """Their indices in the set."""
    positions: list[float]
    """Of each, in mm along their normal."""


class SlicePooling(nn.Module):
    """Pools the z-scores of each slice with those of near slices of its volume.

    The weights are Gaussian in millimeters. Only foreground patches of slices that count are neighbors. At the ends of
    a volume, and beside background, there are fewer. Background stays lowest.

    Healthy slices are alike, too: z-scores d mm apart correlate as exp(-d / length), with the length of highest
    likelihood on healthy volumes. The sum is divided by the deviation that follows from weights and correlation. So it
    has the same scale with many neighbors, few or none.

    Where no healthy volume was there to :meth:`calibrate` on, and for single slices, nothing is changed.

    Args:
        width: deviation of the weights, in mm; 0: each slice alone.
        image_score: see :class:`~bundle.networks.scores.ImageScore`.
        score_scale: see :class:`~bundle.networks.scores.PatchScore`; squared errors are not brought to quantiles.

    Raises:
        BundleError: if the width is out of range.
    """

    length: Tensor

    def __init__(self, width: float = 0.0, image_score: str = "top_patches", score_scale: str = "log_radius") -> None:
        super().__init__()
        remedy = f"give 0 for none, or millimeters such as 6.0, up to {LARGEST_WIDTH:g}"
        check(0 <= width <= LARGEST_WIDTH, "slice_pooling", width, remedy)
        self.width = float(width)
        self.reach = REACH
        self.lowest = LOWEST
        self.matches_quantiles = score_scale == "log_radius"
        self.normal_scale = NormalScale()
        self.image_score = ImageScore(image_score)
        self.register_buffer("length", torch.zeros(()))

    def forward(
        self, patch_maps: Tensor, image_scores: Tensor, spacing: float, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Patch maps [slices, h, w] and image scores [slices] of a volume.

        Args:
            patch_maps: [slices, h, w] z-scores of each slice alone, lowest in the background.
            image_scores: [slices] of each slice alone.
            spacing: of the slices, in mm; 0 where it is not known.
            counts: [slices] bool, which slices may be neighbors of others.
        """
        if not (self.width > 0 and spacing > 0 and bool(self.length > 0) and int(counts.sum()) > 1):
            return patch_maps, image_scores
        device = self.length.device
        positions = spacing * torch.arange(patch_maps.shape[0], device=device)
        pooled = self.pool(patch_maps.to(device), positions, counts.to(device))
        scores = self.image_score(pooled, pooled > self.lowest)
        return pooled.to(patch_maps.device), scores.to(image_scores.device)

    @torch.jit.export
    def pool(self, patch_maps: Tensor, positions: Tensor, counts: Tensor) -> Tensor:
        """The z-scores [slices, h, w] of slices at ``positions`` [slices] in mm, see :meth:`forward`."""
        pooled: list[Tensor] = []
        for index in range(patch_maps.shape[0]):
            z = self.pool_one(patch_maps, positions, counts, index)
            inside = patch_maps[index : index + 1] > self.lowest
            pooled.append(torch.where(inside, z, torch.full_like(z, self.lowest)))
        return torch.cat(pooled)

    @torch.jit.export
    def pool_one(self, patch_maps: Tensor, positions: Tensor, counts: Tensor, index: int) -> Tensor:
        """The pooled z-scores [1, h, w] of one slice, wherever it has a foreground."""
        total, variance = self.sums(patch_maps, positions, counts, index, self.length.unsqueeze(0))
        z = total / variance.sqrt()
        if self.matches_quantiles:
            z = self.normal_scale(z)
        return z.clamp_min(self.lowest)

    @torch.jit.export
    def sums(
        self, patch_maps: Tensor, positions: Tensor, counts: Tensor, index: int, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum [h, w] of the z-scores near slice ``index``, and its variance in healthy volumes.

        The variance [lengths, h, w] is that of slices which are alike over each of the ``lengths`` [lengths] in mm.
        """
        distance = (positions - positions[index]).abs()
        near = (distance <= self.reach * self.width) & counts
        near[index] = True
        weights = torch.exp(-0.5 * (distance[near] / self.width).square())
        z, apart = patch_maps[near], (positions[near].unsqueeze(1) - positions[near]).abs()
        weights = weights[:, None, None] * (z > self.lowest)
        correlation = torch.exp(-apart / lengths[:, None, None])
        # in double, which no automatic cast to 16 bits touches
        alike = torch.matmul(correlation.double(), weights.double().flatten(1)).view([-1] + list(weights.shape))
        variance = (weights * alike).sum(dim=1).float()
        return (weights * z).sum(dim=0), variance.clamp_min(1e-12)

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, volumes: Sequence[Volume], image_score: ImageScore) -> list[tuple[Tensor, Tensor]]:
        """Make pooled foreground patches, and image scores, of healthy volumes as rare as those of a normal.

        Args:
            volumes: healthy validation volumes of two or more slices, all of which count.
            image_score: of slices alone; what it knows of covariates is taken over.

        Returns:
            Pooled patch maps [slices, h, w] and image scores [slices] of each volume, on the CPU.
        """
        self.normal_scale.reset()
        device = self.length.device
        volumes = [Volume(*(part.to(device) for part in volume)) for volume in volumes]
        self.length.fill_(self._likeliest_length(volumes))
        if self.matches_quantiles:
            maps = self._pooled(volumes)
            self.normal_scale.fit(maps[maps > self.lowest])
        maps = self._pooled(volumes)
        self.image_score.load_state_dict(image_score.state_dict())
        scores = self.image_score.calibrate(maps, maps > self.lowest)
        counts = [len(volume.positions) for volume in volumes]
        logger.info(
            f"slices of {len(volumes)} healthy volumes are pooled over {self.width:g} mm: they are alike over "
            f"{float(self.length):g} mm"
        )
        return list(zip(maps.cpu().split(counts), scores.split(counts), strict=True))

    def _pooled(self, volumes: Sequence[Volume]) -> Tensor:
        return torch.cat([self.pool(*volume, torch.ones_like(volume.positions) > 0) for volume in volumes])

    def _likeliest_length(self, volumes: Sequence[Volume]) -> float:
        """The length over which healthy slices are alike, in mm: that of the likeliest pooled z-scores."""
        places = [(volume, index) for volume in volumes for index in range(len(volume.positions))]
        lengths = torch.tensor(LENGTHS, device=self.length.device)
        nats = torch.zeros(len(LENGTHS), dtype=torch.float64)
        for volume, index in places[:: -(-len(places) // FITTED_SLICES)]:
            inside = volume.patch_maps[index] > self.lowest
            everyone = torch.ones_like(volume.positions) > 0
            total, variance = self.sums(*volume, everyone, index, lengths)
            cost = 0.5 * (total.square() / variance + variance.log())
            nats += cost[:, inside].double().sum(dim=1).cpu()
        return LENGTHS[int(nats.argmin())]
