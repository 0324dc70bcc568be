"""MONAI transforms: reading a case, intensities to [0, 1], and slices from volumes."""

from bundle.transforms.intensity import (
    HOUNSFIELD_WINDOWS,
    ScaleForegroundPercentiles,
    ScaleHounsfieldWindow,
    ScaleIntensityByModalityd,
)
from bundle.transforms.loading import LoadCased, RequireDicomd
from bundle.transforms.masks import ReadMaskd
from bundle.transforms.slices import ExtractSlicesd, OrientSlicesd

__all__ = [
    "HOUNSFIELD_WINDOWS",
    "ExtractSlicesd",
    "LoadCased",
    "OrientSlicesd",
    "ReadMaskd",
    "RequireDicomd",
    "ScaleForegroundPercentiles",
    "ScaleHounsfieldWindow",
    "ScaleIntensityByModalityd",
]
