"""How a file becomes the slices that the networks see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bundle.errors import check_choice
from bundle.transforms.intensity import SCHEMES
from bundle.transforms.loading import check_channel
from bundle.transforms.slices import ACQUIRED, MIN_FOREGROUND, PLANES, WHOLE, SliceChoice


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The settings of a model that decide what it sees of a file; the transforms of this package follow them.

    Args:
        channel: see :class:`~bundle.transforms.LoadCased`.
        intensity: see :class:`~bundle.transforms.ScaleIntensityByModalityd`.
        slice_plane: see :class:`~bundle.transforms.OrientSlicesd`.
        slice_range, min_foreground: see :class:`~bundle.transforms.slices.SliceChoice`.

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
