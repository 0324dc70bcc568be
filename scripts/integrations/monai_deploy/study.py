"""The detector that ``model.ts`` holds: of a whole stack of slices, in TorchScript, which needs no Python package."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.networks import AnomalyDetector
from bundle.reading import SliceChoice


class StudyDetector(nn.Module):
    """An :class:`~bundle.networks.AnomalyDetector` of volumes, scriptable.

    Gives what :class:`~bundle.inferers.SliceBatchInferer` gives, and the mask.

    Args:
        detector: trained.
        slice_range, min_foreground: which slices count, see :class:`~bundle.reading.SliceChoice`.
        batch_size: slices in one forward pass.
    """

    def __init__(
        self, detector: AnomalyDetector, slice_range: Sequence[float], min_foreground: float, batch_size: int = 8
    ) -> None:
        super().__init__()
        SliceChoice(slice_range, min_foreground)  # refuses what is out of range
        self.detector = detector
        self.first, self.last = map(float, slice_range)
        self.min_foreground = float(min_foreground)
        self.batch_size = batch_size

    def forward(self, image: Tensor, spacing: float = 0.0) -> dict[str, Tensor]:
        """What is found in one study.

        Args:
            image: [1, C, rows, columns, slices] in [0, 1], as the preprocessing gives it.
            spacing: of the slices, in mm; 0 where it is not known: then each is scored alone.

        Returns:
            On the CPU ``map`` [1, rows, columns, slices] float, ``mask`` of that shape uint8 (0, 1), ``slice_scores``
            [1, 1, 1, slices] float, ``slice_counts`` of that shape uint8 (1 for slices that make the score), ``score``
            [], that of the worst of them, and ``unlikeness`` [], see :class:`~bundle.networks.likeness.CaseLikeness`.
        """
        stack = image[0]
        maps: list[Tensor] = []
        scores: list[Tensor] = []
        unlikeness: list[Tensor] = []
        for slices in stack.movedim(-1, 0).split(self.batch_size):
            found = self.detector.detect(slices)
            maps.append(found.patch_map.cpu())
            scores.append(found.image_score.cpu())
            unlikeness.append(found.unlikeness.cpu())
        counting = self.counting(stack)
        patch_maps, slice_scores = self.detector.slice_pooling(torch.cat(maps), torch.cat(scores), spacing, counting)
        size = [stack.shape[1], stack.shape[2]]
        anomaly_map = F.interpolate(patch_maps.unsqueeze(1), size, mode="bilinear", align_corners=False).movedim(0, -1)
        return {
            "map": anomaly_map,
            "mask": (anomaly_map > self.detector.threshold.cpu()).to(torch.uint8),
            "slice_scores": slice_scores.view(1, 1, 1, -1),
            "slice_counts": counting.to(torch.uint8).view(1, 1, 1, -1),
            "score": slice_scores[counting].max(),
            "unlikeness": torch.quantile(torch.cat(unlikeness)[counting], 0.5),
        }

    def counting(self, stack: Tensor) -> Tensor:
        """Which slices of ``stack`` [C, rows, columns, slices] make its score, [slices] bool; all where none would."""
        last = stack.shape[-1] - 1
        index = torch.arange(last + 1)
        inside = (index >= round(self.first * last)) & (index <= round(self.last * last))
        foreground = (stack > 0).float().mean(dim=[0, 1, 2]).cpu()
        chosen = inside & (foreground >= self.min_foreground)
        return chosen if chosen.any() else torch.ones_like(chosen)
