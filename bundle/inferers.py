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
from bundle.errors import BundleError
from bundle.networks.detector import Detection
from bundle.transforms.slices import MIN_FOREGROUND, WHOLE, SliceChoice


class SliceBatchInferer(Inferer):
    """Runs the detector over images [B, C, H, W], or over the slices of volumes [B, C, H, W, slices], in batches.

    Args:
        batch_size: slices in one forward pass.
        detailed: return a dictionary with ``map`` as below, ``patch_map`` [B, 1, h, w, slices], ``slice_scores`` and
            ``slice_counts`` [B, slices], ``worst_slice`` [B], the most anomalous one that counts, and its ``score``
            [B], instead of the map alone.
        slice_range, min_foreground: which slices count, as in training, see
            :class:`~bundle.transforms.SliceChoice`; where none does, all count.
        raw: squared errors instead of deviations above healthy patches.
        compute: device and precision; None: where the inputs are, in 32 bits.
    """

    def __init__(
        self,
        batch_size: int = 8,
        detailed: bool = False,
        slice_range: Sequence[float] = WHOLE,
        min_foreground: float = MIN_FOREGROUND,
        raw: bool = False,
        compute: Compute | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.detailed = detailed
        self.choose = SliceChoice(slice_range, min_foreground)
        self.raw = raw
        self.compute = compute

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """The map of the detector ``network``, [B, 1, H, W] or [B, 1, H, W, slices], on the grid of ``inputs``."""
        images = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        stacks = images if images.ndim == 5 else images[..., None]
        slices = stacks.movedim(-1, 1).flatten(0, 1)
        found = [self.detect(batch, network) for batch in slices.split(self.batch_size)]
        patch_maps = torch.cat([detection.patch_map for detection in found]).unflatten(0, (len(stacks), -1))
        scores = torch.cat([detection.image_score for detection in found]).view(len(stacks), -1)
        studies = [self.join(*study) for study in zip(stacks, patch_maps, scores, strict=True)]
        joined = {key: torch.stack([study[key] for study in studies]) for key in studies[0]}
        joined["map"] = joined["map"].view(*images.shape[:1], 1, *images.shape[2:])
        if isinstance(inputs, MetaTensor):
            joined["map"] = MetaTensor(joined["map"], meta=inputs.meta, applied_operations=inputs.applied_operations)
        return joined if self.detailed else joined["map"]

    @torch.inference_mode()
    def detect(self, slices: Tensor, network: Any) -> Detection:
        """What the detector ``network`` says of one batch of ``slices`` [B, C, H, W].

        Raises:
            BundleError: if it is not finite.
        """
        with self.compute.autocast() if self.compute else nullcontext():
            found = network.detect(slices, self.raw)
        if not torch.isfinite(found.patch_map).all():
            precision = self.compute.precision if self.compute else "fp32"
            raise BundleError(f"the anomaly map is not finite in {precision}: give --precision bf16 or fp32")
        return found

    def join(self, stack: Tensor, patch_maps: Tensor, slice_scores: Tensor) -> dict[str, Tensor]:
        """One study from its slices.

        Args:
            stack: [C, H, W, slices] in [0, 1].
            patch_maps: [slices, h, w].
            slice_scores: [slices].

        Returns:
            ``map`` [1, H, W, slices], ``patch_map`` [1, h, w, slices], ``slice_scores`` [slices], ``slice_counts``
            [slices] (whether they do, for the score of the study), ``worst_slice`` and ``score``.
        """
        maps = F.interpolate(patch_maps[:, None], stack.shape[1:3], mode="bilinear", align_corners=False)
        counting = self.choose(stack) or range(stack.shape[-1])
        worst = max(counting, key=slice_scores.tolist().__getitem__)
        return {
            "map": maps.movedim(0, -1),
            "patch_map": patch_maps.movedim(0, -1)[None],
            "slice_scores": slice_scores,
            "slice_counts": torch.tensor([index in counting for index in range(len(slice_scores))]),
            "worst_slice": torch.tensor(worst, device=slice_scores.device),
            "score": slice_scores[worst],
        }


def detect_slices(engine: Engine, batch: list[Slice]) -> list[dict[str, Any]]:
    """One iteration of an evaluator over :class:`~bundle.data.SliceBatches`: `iteration_update`.

    Afterwards ``engine.state.batch`` and the output are lists of the cases that this batch has completed, often one,
    sometimes none or many, with what the inferer (:class:`SliceBatchInferer`) found in ``pred``.
    """
    evaluator: Any = engine
    with evaluator.mode(evaluator.network):
        found = evaluator.inferer.detect(torch.stack([one.image for one in batch]), evaluator.network)
    evaluator.fire_event(IterationEvents.FORWARD_COMPLETED)
    completed = []
    for one, patch_map, score in zip(batch, found.patch_map.cpu(), found.image_score.cpu(), strict=True):
        one.study.results.append((patch_map, score))
        if one.study.complete:
            completed.append(one.study)
    evaluator.state.batch = [dict(study.item) for study in completed]
    evaluator.state.output = [_output(study.item, study.results, evaluator.inferer) for study in completed]
    evaluator.fire_event(IterationEvents.MODEL_COMPLETED)
    return evaluator.state.output


def _output(case: dict[str, Any], results: list[tuple[Tensor, Tensor]], inferer: SliceBatchInferer) -> dict[str, Any]:
    image: MetaTensor = case[CommonKeys.IMAGE]
    patch_maps, scores = (torch.stack(values) for values in zip(*results, strict=True))
    found: dict[str, Any] = inferer.join(image.as_tensor(), patch_maps, scores)
    found["map"] = MetaTensor(found["map"], meta=image.meta, applied_operations=image.applied_operations)
    output = {CommonKeys.IMAGE: image, CommonKeys.PRED: found}
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
