"""Components of the MONAI bundle ``dinov3_spatial_ar``; importing this package loads nothing heavy."""

NAME = "dinov3_spatial_ar"
__version__ = "0.6.0"
