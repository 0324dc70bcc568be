"""From volumes to the slices that the networks see, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Transform
from monai.utils import ensure_tuple

from bundle.dicom.series import SIDE_TOLERANCE
from bundle.errors import BundleError, check_choice
from bundle.planes import PLANES
from bundle.reading import ACQUIRED, MIN_FOREGROUND, WHOLE, SliceChoice
from bundle.transforms.axes import inverse_of, turn_to, turned

ISOTROPIC = 2.0  # times the shortest side of a voxel: in a 3D acquisition no side is longer
OF_ONE_PLANE = 0.8  # cosine between stacks: slices that are tilted more, by 37 degrees, are of no anatomical plane

# the plane of slices, by the direction along which they are stacked
_STACKED = {
    **dict.fromkeys("SI", PLANES["axial"]),
    **dict.fromkeys("AP", PLANES["coronal"]),
    **dict.fromkeys("LR", PLANES["sagittal"]),
}
_NAMES = {directions: name for name, directions in PLANES.items()}


class OrientSlicesd(MapTransform, InvertibleTransform):
    """Turn [C, x, y, z] to [C, rows, columns, slices] of an anatomical plane, in radiological display order.

    A volume is flipped and permuted by its affine, so that the same anatomy looks the same from every file; nothing is
    resampled. Rows of a picture run down, columns to the right. The inverse restores the axes of the file.

    The ``meta`` tells of images with a place, in ``words``, the ``plane`` of their slices, and, where it is not that of
    the model but a ``cut_plane`` on request, that one.

    Args:
        keys: images as :class:`~bundle.transforms.LoadCased` gives them.
        plane: of the model: ``acquired`` (that of the slices as they were acquired, by the ``slice_axis`` of the
            image), ``axial``, ``coronal`` or ``sagittal``.
        cut_plane: the plane on request: ``axial``, ``coronal`` or ``sagittal``. What was acquired in another one must
            be a 3D acquisition: no side of a voxel is longer than :data:`ISOTROPIC` times another. None: that of the
            model.

    Raises:
        BundleError: for an unknown plane, with the closest name; for a single slice of another plane; with a
            ``cut_plane``, for an image without a place, and for thick slices of another plane.
    """

    def __init__(
        self,
        keys: KeysCollection,
        plane: str = ACQUIRED,
        allow_missing_keys: bool = False,
        cut_plane: str | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.plane = check_choice("slice_plane", plane, (ACQUIRED, *PLANES))
        self.cut_plane = None if cut_plane is None else check_choice("cut_plane", cut_plane, PLANES)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Orient each key of ``data``."""
        oriented = dict(data)
        for key in self.key_iterator(oriented):
            image = oriented[key]
            own = "".join(nib.orientations.aff2axcodes(image.affine))
            target = self._target(image, own)
            turn = turn_to(image.affine, target)
            oriented[key] = turned(image, turn)
            if image.meta.get("slice_axis") is not None:
                self._tell(oriented[key], target, _acquired(image, own))
            self.push_transform(oriented[key], extra_info={"turn": turn.tolist()})
        return oriented

    def _target(self, image: MetaTensor, own: str) -> str:
        acquired = _acquired(image, own)
        if self.cut_plane is not None:
            return self._requested(image, acquired, self.cut_plane)
        if self.plane == ACQUIRED or image.meta.get("slice_axis") is None:
            return acquired
        if image.shape[-1] == 1 and acquired != PLANES[self.plane]:
            raise BundleError(
                f"'{image.meta.get('filename_or_obj')}' is a single slice of another plane than slice_plane "
                f"'{self.plane}': give a volume, or slice_plane '{ACQUIRED}'"
            )
        return PLANES[self.plane]

    @staticmethod
    def _requested(image: MetaTensor, acquired: str, plane: str) -> str:
        """The directions of ``plane``, if ``image`` has slices of it or is a 3D acquisition."""
        place = image.meta.get("filename_or_obj")
        if image.meta.get("slice_axis") is None:
            raise BundleError(f"'{place}' has no place in a patient and cannot be cut: leave cut_plane off for it")
        if acquired == PLANES[plane]:
            return acquired
        if image.shape[-1] == 1:
            raise BundleError(f"'{place}' is a single {_NAMES[acquired]} slice: leave cut_plane off for it")
        sides = image.affine[:3, :3].norm(dim=0)
        if sides.max() > ISOTROPIC * (1 + SIDE_TOLERANCE) * sides.min():
            told = " x ".join(f"{float(side):.3g}" for side in sides)
            raise BundleError(
                f"'{place}' has {_NAMES[acquired]} slices and voxels of {told} mm, too long to cut it into {plane} "
                f"ones: give a 3D acquisition, in which no side is longer than {ISOTROPIC:g} times another, or leave "
                "cut_plane off"
            )
        return PLANES[plane]

    def _tell(self, image: MetaTensor, target: str, acquired: str) -> None:
        """Note the plane of the slices of an oriented ``image`` with a place."""
        stacked = image.affine[:3, 2] / image.affine[:3, 2].norm()
        told = [_NAMES[target]] if stacked.abs().max() >= OF_ONE_PLANE else []
        image.meta["words"] = {**image.meta.get("words", {}), "plane": told}
        if target != (acquired if self.plane == ACQUIRED else PLANES[self.plane]):
            image.meta["cut_plane"] = self.cut_plane

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give each key of ``data`` the axes that its file has."""
        restored = dict(data)
        for key in self.key_iterator(restored):
            applied = self.pop_transform(restored[key])
            restored[key] = turned(restored[key], inverse_of(np.array(applied["extra_info"]["turn"])))
        return restored


def _acquired(image: MetaTensor, own: str) -> str:
    """The directions of rows, columns and slices as they were acquired, of an ``image`` with the axes ``own``."""
    axis = image.meta.get("slice_axis")
    return _STACKED[own[2 if axis is None else axis]]


class ExtractSlicesd(Transform):
    """Cut [C, rows, columns, slices] into a list of slices [C, rows, columns], each a case of its own.

    Every slice carries in its ``meta`` the ``slice_index``, the ``affine`` of its own pixels (of [row, column, 0] to
    mm) and the ``spacing`` (row, column, slice) in mm.

    Args:
        keys: ``image`` and whatever shares its grid; the filters look at the first key.
        slice_range, min_foreground: see :class:`~bundle.reading.SliceChoice`.

    Raises:
        BundleError: if a share is out of range, or no slice of a volume is left.
    """

    def __init__(
        self, keys: KeysCollection, slice_range: Sequence[float] = WHOLE, min_foreground: float = MIN_FOREGROUND
    ) -> None:
        self.keys = ensure_tuple(keys)
        self.choose = SliceChoice(slice_range, min_foreground)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """The slices of ``data`` that pass the filters."""
        chosen = self.choose(data[self.keys[0]])
        if not chosen:
            raise BundleError(
                f"'{data.get('name', 'a volume')}' has no slice with a foreground share of at least "
                f"{self.choose.min_foreground} in slice_range: lower min_foreground, widen slice_range, or check the "
                "intensity scheme"
            )
        present = [key for key in self.keys if key in data]
        return [{**data, **{key: _slice(data[key], index) for key in present}} for index in chosen]


def slice_spacing(image: MetaTensor) -> float:
    """Millimeters from a slice of ``image``, a stack or one slice of it, to the next; 0 where nobody knows."""
    placed = image.meta.get("slice_axis") is not None
    return float(image.affine[..., :3, 2].norm()) if placed else 0.0


def _slice(stack: MetaTensor, index: int) -> MetaTensor:
    affine = stack.affine.clone()
    affine[:3, 3] += index * affine[:3, 2]
    meta = {key: value for key, value in stack.meta.items() if key != "affine"}
    spacing = affine[:3, :3].norm(dim=0).tolist()
    return MetaTensor(stack.as_tensor()[..., index], affine, {**meta, "slice_index": index, "spacing": spacing})
