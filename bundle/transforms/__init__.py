"""MONAI transforms: reading a case, intensities to [0, 1], slices from volumes, and the grid of an evaluation."""

from bundle.transforms.grids import ToEvaluationGridd
from bundle.transforms.intensity import (
    HOUNSFIELD_WINDOWS,
    ScaleForegroundPercentiles,
    ScaleHounsfieldWindow,
    ScaleIntensityByModalityd,
)
from bundle.transforms.loading import LoadCased, RequireDicomd
from bundle.transforms.masks import ReadMaskd
from bundle.transforms.slices import ExtractSlicesd, OrientSlicesd
from bundle.transforms.stacks import StraightenStackd

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
    "StraightenStackd",
    "ToEvaluationGridd",
]
