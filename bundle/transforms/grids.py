"""The grid on which anomaly maps and true masks are compared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bundle.errors import BundleError


class ToEvaluationGridd(Transform):
    """Add ``metric_map`` and ``metric_mask``: map and mask on the grid on which pixels are counted.

    Without a ``size`` they are ``pred_map`` and ``mask`` as they are. With a ``size`` every slice is squashed to a
    square. The map comes straight from ``pred_patch_map`` [1, h, w, slices], bilinear between patch centers. The mask
    [1, rows, columns, slices] of 0 and 1 takes the pixel whose center is nearest, as PIL does. A case without ``mask``
    gets no ``metric_mask``.

    Size 240 via 448 is the paper's protocol, pixel for pixel: its authors resize masks to 448 with PIL, and these to
    240 with torch, which rounds positions down.

    Args:
        size: side of the square in pixels; None: maps and masks keep the size of the image.
        via: side in pixels that masks are brought to before; None: no detour. Not used without a ``size``.

    Raises:
        BundleError: if a side is not a whole number above 0.
    """

    def __init__(self, size: int | None = None, via: int | None = None) -> None:
        self.size = _side("evaluation_size", size)
        self.via = _side("mask_via", via)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add ``metric_map``, and ``metric_mask`` where there is a mask."""
        case = dict(data)
        if self.size is None:
            case["metric_map"] = case["pred_map"]
            return case | ({"metric_mask": case["mask"]} if "mask" in case else {})
        case["metric_map"] = _interpolated(case["pred_patch_map"], self.size, mode="bilinear", align_corners=False)
        if "mask" in case:
            mask = _nearest_centers(case["mask"].numpy()[0], self.via or self.size)
            case["metric_mask"] = _interpolated(mask, self.size, mode="nearest")
        return case


def _side(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise BundleError(f"{name} is {value!r}: give a whole number of pixels such as 240, or null")
    return value


def _nearest_centers(mask: NDArray[Any], side: int) -> Tensor:
    """``mask`` [rows, columns, slices] of 0 and 1 as [1, side, side, slices], uint8."""
    slices = np.moveaxis(mask, -1, 0).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.NEAREST)) for one in slices]
    return torch.from_numpy(np.stack(resized, axis=-1)[None])


def _interpolated(stack: Tensor, side: int, **how: Any) -> Tensor:
    """``stack`` [1, h, w, slices] as [1, side, side, slices]."""
    return F.interpolate(stack.movedim(-1, 0), (side, side), **how).movedim(0, -1)
