"""From slices to anomaly maps: in an evaluator that fills batches across cases, or over whole volumes at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SimpleInferer
from monai.utils import CommonKeys
from torch import Tensor
from torch.nn import functional as F

from bundle.compute import Compute
from bundle.data.stream import Slice
from bundle.errors import BundleError, check
from bundle.networks.detector import Detection, Detector
from bundle.reading import MIN_FOREGROUND, WHOLE, SliceChoice
from bundle.transforms.slices import slice_spacing


class SliceBatchInferer(Inferer):
    """Runs the detector over images [B, C, H, W], or over the slices of volumes [B, C, H, W, slices], in batches.

    Args:
        batch_size: slices in one forward pass.
        slice_range, min_foreground: which slices count, as in training, see
            :class:`~bundle.reading.SliceChoice`; where none does, all count.
        raw: squared errors instead of z-scores.
        compute: device and precision; None: where the inputs are, in 32 bits.
    """

    def __init__(
        self,
        batch_size: int = 8,
        slice_range: Sequence[float] = WHOLE,
        min_foreground: float = MIN_FOREGROUND,
        raw: bool = False,
        compute: Compute | None = None,
    ) -> None:
        check(batch_size >= 1, "batch_size", batch_size, "give at least 1")
        self.batch_size = batch_size
        self.choose = SliceChoice(slice_range, min_foreground)
        self.raw = raw
        self.compute = compute

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What the detector ``network`` finds in images or volumes, one by one.

        Returns:
            ``map`` [B, 1, H, W] or [B, 1, H, W, slices], on the grid of ``inputs``, ``slice_scores``, ``slice_counts``
            and ``slice_unlikeness`` [B, slices], see :meth:`join`.
        """
        images = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        stacks = images if images.ndim == 5 else images[..., None]
        slices = stacks.movedim(-1, 1).flatten(0, 1)
        detections = [self.detect(batch, network) for batch in slices.split(self.batch_size)]
        patch_maps, scores, unlikeness = (
            torch.cat([getattr(detection, name) for detection in detections]).unflatten(0, (len(stacks), -1))
            for name in ("patch_map", "image_score", "unlikeness")
        )
        spacing = slice_spacing(inputs) if isinstance(inputs, MetaTensor) else 0.0
        parts = zip(stacks, patch_maps, scores, unlikeness, strict=True)
        cases = [self.join(*part, network, spacing) for part in parts]
        joined = {key: torch.stack([case[key] for case in cases]) for key in cases[0]}
        joined["map"] = joined["map"].view(*images.shape[:1], 1, *images.shape[2:])
        if isinstance(inputs, MetaTensor):
            joined["map"] = MetaTensor(joined["map"], meta=inputs.meta, applied_operations=inputs.applied_operations)
        return joined

    @torch.inference_mode()
    def detect(self, slices: Tensor, network: Any) -> Detection:
        """What the detector ``network`` says of one batch of ``slices`` [B, C, H, W].

        Raises:
            BundleError: if it is not finite.
        """
        with self.compute.autocast() if self.compute else nullcontext():
            detection: Detection = network.detect(slices, self.raw)
        if not torch.isfinite(detection.patch_map).all():
            precision = self.compute.precision if self.compute else "fp32"
            raise BundleError(f"the anomaly map is not finite in {precision}: give --precision bf16 or fp32")
        return detection

    @torch.inference_mode()
    def join(
        self,
        stack: Tensor,
        patch_maps: Tensor,
        slice_scores: Tensor,
        slice_unlikeness: Tensor,
        network: Detector,
        spacing: float = 0.0,
    ) -> dict[str, Tensor]:
        """One case from its slices, which the ``network`` pools.

        Args:
            stack: [C, H, W, slices] in [0, 1].
            patch_maps: [slices, h, w], of each slice alone.
            slice_scores: [slices], of each slice alone.
            slice_unlikeness: [slices], of each slice.
            network: the detector that gave them.
            spacing: of the slices, in mm; 0 where it is not known: then each stays alone.

        Returns:
            ``map`` [1, H, W, slices], ``patch_map`` [1, h, w, slices], ``slice_scores`` [slices], ``slice_counts``
            [slices] bool, whether each may make the score of the case, and ``slice_unlikeness`` [slices]:
            :class:`~bundle.results.CaseResult` tells what follows.
        """
        counting = self.choose(stack) or range(stack.shape[-1])
        counts = torch.tensor([index in counting for index in range(len(slice_scores))])
        if not self.raw:
            patch_maps, slice_scores = network.slice_pooling(patch_maps, slice_scores, spacing, counts)
        maps = F.interpolate(patch_maps[:, None], stack.shape[1:3], mode="bilinear", align_corners=False)
        return {
            "map": maps.movedim(0, -1),
            "patch_map": patch_maps.movedim(0, -1)[None],
            "slice_scores": slice_scores,
            "slice_counts": counts,
            "slice_unlikeness": slice_unlikeness,
        }


def detect_slices(engine: Engine, batch: list[Slice]) -> list[dict[str, Any]]:
    """One iteration of an evaluator over :class:`~bundle.data.SliceBatches`: `iteration_update`.

    Afterwards ``engine.state.slices`` is the number of slices in this batch. ``engine.state.batch`` and the output are
    lists of the cases that it has completed, often one, sometimes none or many, with what the inferer
    (:class:`SliceBatchInferer`) joins of them in ``pred``.
    """
    evaluator: Any = engine
    with evaluator.mode(evaluator.network):
        detection = evaluator.inferer.detect(torch.stack([image for image, _ in batch]), evaluator.network)
    evaluator.fire_event(IterationEvents.FORWARD_COMPLETED)
    completed = []
    found = (detection.patch_map.cpu(), detection.image_score.cpu(), detection.unlikeness.cpu())
    for (_, case), *values in zip(batch, *found, strict=True):
        case.done.append(values)
        if case.complete:
            completed.append(case)
    evaluator.state.slices = len(batch)
    evaluator.state.batch = [dict(case.item) for case in completed]
    evaluator.state.output = [_output(case.item, case.done, evaluator) for case in completed]
    evaluator.fire_event(IterationEvents.MODEL_COMPLETED)
    return evaluator.state.output


def _output(case: dict[str, Any], slices: list[list[Tensor]], evaluator: Any) -> dict[str, Any]:
    image: MetaTensor = case[CommonKeys.IMAGE]
    found = (torch.stack(values) for values in zip(*slices, strict=True))
    joined = evaluator.inferer.join(image.as_tensor(), *found, evaluator.network, slice_spacing(image))
    joined["map"] = MetaTensor(joined["map"], meta=image.meta, applied_operations=image.applied_operations)
    output: dict[str, Any] = {CommonKeys.IMAGE: image, CommonKeys.PRED: joined}
    return output | ({CommonKeys.LABEL: case[CommonKeys.LABEL]} if CommonKeys.LABEL in case else {})


class TrainingInferer(SimpleInferer):
    """The forward pass of training, in the precision that ``compute`` trains in."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """The prediction of ``network`` for ``inputs``, in float32."""
        with self.compute.training_autocast():
            return super().__call__(inputs, network, *args, **kwargs).float()
