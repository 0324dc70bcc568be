"""How a file becomes the slices that the networks see: the settings, without the transforms that follow them.

A model holds these settings, so that this module needs no more than torch: :mod:`bundle.transforms` needs MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from bundle.errors import BundleError, check_choice
from bundle.planes import PLANES

HOUNSFIELD_WINDOWS = {
    # name: (lowest, highest) in HU, the usual presets of CT viewers
    "ct_soft_tissue": (-160.0, 240.0),
    "ct_lung": (-1350.0, 150.0),
    "ct_bone": (-450.0, 1050.0),
    "ct_brain": (0.0, 80.0),
    "ct_liver": (-45.0, 105.0),
    "ct_mediastinum": (-125.0, 225.0),
}
SCHEMES = ("auto", "mr", "8bit", *HOUNSFIELD_WINDOWS)
ACQUIRED = "acquired"
WHOLE = (0.0, 1.0)  # the range of all slices
MIN_FOREGROUND = 0.05


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The settings of a model that decide what it sees of a file; :mod:`bundle.transforms` follows them.

    Args:
        channel: see :class:`~bundle.transforms.LoadCased`.
        intensity: see :class:`~bundle.transforms.ScaleIntensityByModalityd`.
        slice_plane: see :class:`~bundle.transforms.OrientSlicesd`.
        slice_range, min_foreground: see :class:`SliceChoice`.

    Raises:
        BundleError: for an unknown name, or a number out of range.
    """

    channel: int | None = None
    intensity: str = "auto"
    slice_plane: str = ACQUIRED
    slice_range: Sequence[float] = WHOLE
    min_foreground: float = MIN_FOREGROUND

    def __post_init__(self) -> None:
        check_channel(self.channel)
        check_choice("intensity", self.intensity, SCHEMES)
        check_choice("slice_plane", self.slice_plane, (ACQUIRED, *PLANES))
        SliceChoice(self.slice_range, self.min_foreground)

    def describe(self) -> dict[str, Any]:
        """The settings that it uses: a model that leaves the channel open takes any."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_channel(channel: int | None) -> None:
    """Refuse what is no volume of a 4D file.

    Raises:
        BundleError: if it is no number from 0, nor None.
    """
    if channel is not None and (not isinstance(channel, int) or channel < 0):
        raise BundleError(f"channel is {channel!r}: give the volume of a 4D file, a number from 0, or null")


class SliceChoice:
    """Which slices of a volume are looked at: those that training learns from, and no others make a study's score.

    Args:
        slice_range: shares of the stack, in [0, 1], where the range begins and ends.
        min_foreground: share of pixels above 0, in [0, 1], that a slice must have.

    Raises:
        BundleError: if a share is out of range.
    """

    def __init__(self, slice_range: Sequence[float] = WHOLE, min_foreground: float = MIN_FOREGROUND) -> None:
        pair = isinstance(slice_range, Sequence) and len(slice_range) == 2
        if not pair or not 0 <= slice_range[0] < slice_range[1] <= 1:
            raise BundleError(f"slice_range is {slice_range}: give [first, last] with 0 <= first < last <= 1")
        if not 0 <= min_foreground <= 1:
            raise BundleError(f"min_foreground must be in [0, 1], got {min_foreground}: try {MIN_FOREGROUND}")
        self.first, self.last = slice_range
        self.min_foreground = min_foreground

    def __call__(self, stack: Tensor) -> list[int]:
        """Indices into ``stack`` [C, rows, columns, slices], maybe none; the only slice of a picture is always one."""
        depth = stack.shape[-1]
        inside = range(round(self.first * (depth - 1)), round(self.last * (depth - 1)) + 1)
        return [i for i in inside if depth == 1 or (stack[..., i] > 0).float().mean() >= self.min_foreground]
