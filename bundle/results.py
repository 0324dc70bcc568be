"""What was found in one case: its map, the scores of its slices, and all that follows from them.

The one form in which results reach files, reports, MONAI Label and MONAI Deploy. Only NumPy is needed here, since the
application on MONAI Deploy takes this module along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bundle.errors import BundleError

OUTLINE = (51, 255, 255)  # color of masks, in RGB: none that a heat map has


@dataclass(frozen=True)
class SliceResult:
    """What was found in one slice.

    Attributes:
        position: among the slices that the network saw.
        index: in the file, along :attr:`RestoredMap.slice_axis`.
        instance: its DICOM InstanceNumber; None where the network saw no slices of files.
        score: standard deviations above the mean of healthy images.
        rank: 1 for the most anomalous slice; those that do not count come last.
        counts: whether it may make the score of the case.
    """

    position: int
    index: int
    instance: int | None
    score: float
    rank: int
    counts: bool


class Unlike(NamedTuple):
    """One reason why a case is unlike the training data, so that its map may mean nothing.

    Attributes:
        kind: ``modality``, ``sequence``, ``contrast``, ``kernel``, ``plane``, ``scheme`` or ``appearance``.
        words: for people.
    """

    kind: str
    words: str


def heat(anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """How anomalous each value is, in [0, 1]: the one color scale of all pictures and heat maps.

    0 is the mean of healthy patches and below, 0.5 the threshold. Each further threshold halves what is left to 1, so
    that one scale serves all cases: healthy ones do not glow, and in a map that is widely high the hottest places can
    still be told apart.

    Args:
        anomaly_map: z-scores among healthy patches, any shape.
        threshold: of the mask. Where it is not above 0, there is only below (0) and above (1).
    """
    if threshold > 0:
        return 1 - np.exp2(-np.maximum(anomaly_map, 0) / threshold)
    return (anomaly_map > threshold) * 1.0


class RestoredMap(NamedTuple):
    """An anomaly map on the axes of its file.

    Attributes:
        values: [x, y, slices] float32.
        slice_axis: of ``values``, the one along which the network saw slices.
        slice_indices: of these slices along that axis, in the order in which the network saw them.
        instances: InstanceNumber of each index of the last axis; empty where files have none.
        affine: [4, 4], from voxels to mm in RAS; None where nobody asks for it.
    """

    values: np.ndarray
    slice_axis: int
    slice_indices: tuple[int, ...]
    instances: tuple[int, ...] = ()
    affine: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class CaseResult:
    """What was found in one case.

    Attributes:
        name: of the case, by which its outputs are called.
        path: of its file, or of the folder of its DICOM series.
        anomaly_map: [1, rows, columns, slices] float32, as the network saw the slices, z-scores among healthy patches.
        slice_scores: [slices], standard deviations above the mean of healthy images.
        slice_counts: [slices] bool, which of them may make the score of the case; at least one.
        threshold: of the map; what exceeds it is the mask.
        image_threshold: of the score.
        on_file: the map on the axes of the file; None where nothing has brought it back.
        unlike: why it is unlike the training data; empty if it is like them; None where the model cannot tell.
        unlikeness: in deviations above healthy slices, the median of the slices that count; not a number where the
            model cannot tell.
        cut_plane: that of the slices that the network saw, where the volume was cut into other ones than the model's on
            request; empty where it was not.
    """

    name: str
    path: str
    anomaly_map: np.ndarray
    slice_scores: np.ndarray
    slice_counts: np.ndarray
    threshold: float = float("inf")
    image_threshold: float = float("inf")
    on_file: RestoredMap | None = None
    unlike: tuple[Unlike, ...] | None = None
    unlikeness: float = float("nan")
    cut_plane: str = ""

    @classmethod
    def from_output(cls, data: Mapping[str, Any], detector: Any = None) -> CaseResult:
        """The result in what an engine, or an inference task of MONAI Label, has after its postprocessing.

        Args:
            data: with ``image`` and ``pred_map`` as the network saw them, ``pred_slice_scores``, ``pred_slice_counts``,
                and, if they are there, ``name``, ``pred_map_restored``, the map on the axes of the file, and
                ``pred_slice_unlikeness``.
            detector: with ``threshold``, ``image_threshold`` and ``case_likeness``; None: there is no threshold.
        """
        seen, restored = data["pred_map"], data.get("pred_map_restored")
        counts = _array(data["pred_slice_counts"]).astype(bool)
        likeness = getattr(detector, "case_likeness", None)
        unlike, unlikeness = None, float("nan")
        if likeness is not None and likeness.knows and "pred_slice_unlikeness" in data:
            unlikeness = float(np.median(_array(data["pred_slice_unlikeness"])[counts]))
            unlike = likeness.reasons(unlikeness, len(counts) > 1, data["image"].meta)
        path = str(seen.meta["filename_or_obj"])
        return cls(
            name=str(data.get("name", path)),
            path=path,
            anomaly_map=_array(seen),
            slice_scores=_array(data["pred_slice_scores"]),
            slice_counts=counts,
            threshold=float("inf") if detector is None else float(detector.threshold),
            image_threshold=float("inf") if detector is None else float(detector.image_threshold),
            on_file=None if restored is None else _on_file(restored, data["image"]),
            unlike=unlike,
            unlikeness=unlikeness,
            cut_plane=str(seen.meta.get("cut_plane", "")),
        )

    @cached_property
    def ranking(self) -> list[int]:
        """Positions of the slices, the most anomalous one first; those that do not count come last."""
        scores, counts = self.slice_scores.tolist(), self.slice_counts.tolist()
        return sorted(range(len(scores)), key=lambda position: (not counts[position], -scores[position]))

    @property
    def worst_position(self) -> int:
        """The position of the most anomalous slice that counts."""
        return self.ranking[0]

    @property
    def score(self) -> float:
        """Of the case: that of its worst slice."""
        return float(self.slice_scores[self.worst_position])

    @property
    def warning(self) -> str:
        """Why the result may mean nothing, in one line; empty if the case is like the training data."""
        return "; ".join(reason.words for reason in self.unlike or ())

    def doubt(self, named: str) -> str:
        """The sentence of a log on a case that is unlike the training data; ``named``: how the log calls it."""
        return f"{named} is unlike the training data, its map may mean nothing: {self.warning}"

    @property
    def restored(self) -> RestoredMap:
        """The map on the axes of the file.

        Raises:
            BundleError: if nothing has brought it back.
        """
        if self.on_file is None:
            raise BundleError(
                f"the map of '{self.path}' is not on the axes of its file: keep Invertd of pred_map_restored in "
                "postprocessing"
            )
        return self.on_file

    @cached_property
    def mask(self) -> np.ndarray:
        """[x, y, slices] bool, where the map exceeds its threshold, on the axes of the file."""
        return self.restored.values > self.threshold

    @property
    def of_dicom(self) -> bool:
        """Whether the file is DICOM, whose images have numbers."""
        return bool(self.restored.instances)

    @property
    def shows_stored_slices(self) -> bool:
        """Whether the network saw the slices of the file, not those of another plane."""
        return self.restored.slice_axis == 2

    @cached_property
    def slices(self) -> list[SliceResult]:
        """Each slice, in the order in which the network saw them."""
        places = self.restored
        instances = places.instances if self.shows_stored_slices else ()
        rank = {position: place for place, position in enumerate(self.ranking, start=1)}
        return [
            SliceResult(
                position, index, instances[index] if instances else None, float(score), rank[position], bool(counts)
            )
            for position, (index, score, counts) in enumerate(
                zip(places.slice_indices, self.slice_scores, self.slice_counts, strict=True)
            )
        ]

    def worst(self, count: int) -> list[SliceResult]:
        """Up to ``count`` slices that count, the most anomalous one first."""
        return [self.slices[position] for position in self.ranking[:count] if self.slice_counts[position]]


def _on_file(restored: Any, image: Any) -> RestoredMap:
    """The map ``restored`` [1, x, y, slices], with the places of the slices of ``image`` by both affines."""
    affine, seen = _array(restored.affine), _array(image.affine)
    into_file = np.linalg.inv(affine)
    # the planes of the file that lie as the slices do; its axes need not, where the gantry was tilted
    normals = into_file[:3, :3] / np.linalg.norm(into_file[:3, :3], axis=1, keepdims=True)
    axis = int(np.abs(normals @ seen[:3, 2]).argmax())
    rows, columns, slices = image.shape[-3:]
    places = (seen @ [(rows - 1) / 2, (columns - 1) / 2, index, 1] for index in range(slices))
    indices = tuple(round(float((into_file @ place)[axis])) for place in places)
    return RestoredMap(_array(restored)[0], axis, indices, tuple(restored.meta.get("instances", ())), affine)


def _array(values: Any) -> np.ndarray:
    """A tensor of any device as an array."""
    return np.asarray(values.detach().cpu().numpy())
