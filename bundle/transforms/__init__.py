"""MONAI transforms: reading a case, intensities to [0, 1], slices from volumes, and the grid of an evaluation."""

from bundle.reading import HOUNSFIELD_WINDOWS
from bundle.transforms.grids import ToEvaluationGridd
from bundle.transforms.intensity import (
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
