"""Flips and permutations of the spatial axes of [C, x, y, z], exactly invertible, with the affine."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform


def turn_to(affine: torch.Tensor, axcodes: str) -> np.ndarray:
    """The turn [3, 2] (where each axis goes, and its sign, as nibabel writes it) to ``axcodes``, as ``"PLS"``."""
    return ornt_transform(io_orientation(affine.numpy()), axcodes2ornt(axcodes))


def turn_between(affine: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """The turn that gives an image with ``affine`` the directions of one with the ``other`` affine."""
    return ornt_transform(io_orientation(affine.numpy()), io_orientation(other.numpy()))


def inverse_of(turn: np.ndarray) -> np.ndarray:
    """The turn back."""
    inverse = np.empty_like(turn)
    for axis, (to, sign) in enumerate(turn):
        inverse[int(to)] = (axis, sign)
    return inverse


def turned(image: MetaTensor, turn: np.ndarray) -> MetaTensor:
    """``image`` [C, x, y, z] with its axes flipped and permuted; every voxel stays where its affine says."""
    flips = [axis + 1 for axis in range(3) if turn[axis, 1] < 0]
    order = np.argsort(turn[:, 0])
    values = image.as_tensor().flip(flips).permute(0, *(int(axis) + 1 for axis in order))
    affine = image.affine @ torch.as_tensor(inv_ornt_aff(turn, image.shape[1:]), dtype=image.affine.dtype)
    meta = {key: value for key, value in image.meta.items() if key != "affine"}
    return MetaTensor(values, affine, meta, applied_operations=image.applied_operations)
