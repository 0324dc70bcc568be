"""From a case to its anomaly map: a flat image at once, a volume slice by slice."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor


class SliceBatchInferer(Inferer):
    """Runs the detector over images [B, C, H, W], or over the slices of volumes [B, C, H, W, slices], in batches.

    Args:
        batch_size: slices in one forward pass.
        detailed: return a dictionary with ``map`` as below, ``slice_scores`` [B, slices], ``worst_slice`` [B], the most
            anomalous one, and its ``score`` [B], instead of the map alone.
        min_foreground: share of pixels above 0 that a slice must have to count as the worst, as in training; where no
            slice has it, all count.
        raw: squared errors instead of deviations above healthy patches.
    """

    def __init__(
        self, batch_size: int = 16, detailed: bool = False, min_foreground: float = 0.0, raw: bool = False
    ) -> None:
        self.batch_size = batch_size
        self.detailed = detailed
        self.min_foreground = min_foreground
        self.raw = raw

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """The map of the detector ``network``, [B, 1, H, W] or [B, 1, H, W, slices], on the grid of ``inputs``."""
        images = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        stacks = images if images.ndim == 5 else images[..., None]
        slices = stacks.movedim(-1, 1).flatten(0, 1)
        detections = [network.detect(batch, self.raw) for batch in slices.split(self.batch_size)]
        maps = torch.cat([detection.anomaly_map for detection in detections])
        anomaly_map = maps.unflatten(0, (len(stacks), -1)).movedim(1, -1).view(*images.shape[:1], 1, *images.shape[2:])
        if isinstance(inputs, MetaTensor):
            anomaly_map = MetaTensor(anomaly_map, meta=inputs.meta, applied_operations=inputs.applied_operations)
        if not self.detailed:
            return anomaly_map
        slice_scores = torch.cat([detection.image_score for detection in detections]).view(len(stacks), -1)
        counts = ((slices > 0).float().mean(dim=(1, 2, 3)) >= self.min_foreground).view_as(slice_scores)
        counts = counts | ~counts.any(dim=1, keepdim=True)
        worst = slice_scores.masked_fill(~counts, -torch.inf).max(dim=1)
        return {"map": anomaly_map, "slice_scores": slice_scores, "worst_slice": worst.indices, "score": worst.values}
