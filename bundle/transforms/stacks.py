"""Stacks whose slices stand askew, as those of a tilted gantry: to straight volumes, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKWriter, MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import ensure_tuple_rep

from bundle.dicom.series import is_tilted, tilt_of
from bundle.errors import check_choice
from bundle.limits import MAX_VOXELS, check_limit, check_size

LINEAR, NEAREST = MODES = ("linear", "nearest")


class StraightenStackd(MapTransform, InvertibleTransform):
    """Shift the slices of a sheared stack [C, x, y, slices] within their planes, so that they stand upon each other.

    The affine says whether a stack is sheared: each slice then lies by the same vector beside the one before, as where
    a gantry was tilted. The straight volume has the slices and pixels of the source, and as many rows or columns more
    as the shift needs; around the source it has the lowest value. ITK resamples. The inverse brings an image from the
    straight volume to the slices of the source. What is straight, or has no place, stays as it is.

    Args:
        keys: images as :class:`~bundle.transforms.LoadCased` gives them.
        mode: of each key: ``linear``, or ``nearest`` for masks.
        max_voxels: largest number of voxels of a straight volume; each channel counts.
        allow_missing_keys: do not fail where a case has no such key.

    Raises:
        BundleError: for an unknown mode, or if the straight volume is too large.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mode: str | Sequence[str] = LINEAR,
        max_voxels: int = MAX_VOXELS,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mode = [check_choice("mode", one, MODES) for one in ensure_tuple_rep(mode, len(self.keys))]
        check_limit(max_voxels)
        self.max_voxels = max_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Straighten each key of ``data``."""
        straightened = dict(data)
        for key, mode in self.key_iterator(straightened, self.mode):
            image = straightened[key]
            axis, shape, affine = image.meta.get("slice_axis"), list(image.shape[1:]), image.affine.numpy()
            source = None
            if axis is not None and is_tilted(affine, shape[axis], axis):
                source = {"affine": affine.tolist(), "shape": shape}
                grid, straight = _straight(affine, shape, axis)
                check_size(image.meta["filename_or_obj"], grid, self.max_voxels, image.shape[0])
                image = straightened[key] = _resampled(image, straight, grid, mode)
            self.push_transform(image, extra_info={"source": source})
        return straightened

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring each key of ``data`` to the slices of its source."""
        restored = dict(data)
        for key, mode in self.key_iterator(restored, self.mode):
            source = self.pop_transform(restored[key])["extra_info"]["source"]
            if source is not None:
                restored[key] = _resampled(restored[key], np.array(source["affine"]), source["shape"], mode)
        return restored


def _straight(affine: np.ndarray, shape: Sequence[int], axis: int) -> tuple[list[int], np.ndarray]:
    """Shape and affine of the straight grid with the planes and pixels of a sheared one that holds it whole."""
    straight = affine.copy()
    straight[:3, axis] -= tilt_of(affine, axis)
    # by how many pixels the last slice lies beside the first one
    shift = np.linalg.solve(straight[:3, :3], affine[:3, axis])[:3] * (shape[axis] - 1)
    shift[axis] = 0
    low, high = np.floor(np.minimum(shift, 0)), np.ceil(np.maximum(shift, 0))
    straight[:3, 3] += straight[:3, :3] @ low
    return [side + int(more) for side, more in zip(shape, high - low, strict=True)], straight


def _resampled(image: MetaTensor, affine: np.ndarray, shape: Sequence[int], mode: str) -> MetaTensor:
    """``image`` [C, x, y, z] on another grid; what lies outside of it is the lowest value."""
    import itk

    values = image.as_tensor().cpu().numpy()
    grid = ITKWriter.create_backend_obj(np.empty(shape, np.float32), None, affine)
    kind = itk.LinearInterpolateImageFunction if mode == LINEAR else itk.NearestNeighborInterpolateImageFunction
    channels = []
    for channel in values:
        source = ITKWriter.create_backend_obj(channel, None, image.affine.numpy())
        found = itk.resample_image_filter(
            source,
            use_reference_image=True,
            reference_image=grid,
            interpolator=kind.New(source),
            default_pixel_value=float(values.min()),
        )
        channels.append(torch.from_numpy(itk.array_from_image(found).T.copy()))
    meta = {key: value for key, value in image.meta.items() if key != "affine"}
    return MetaTensor(
        torch.stack(channels), torch.from_numpy(affine), meta, applied_operations=image.applied_operations
    )
