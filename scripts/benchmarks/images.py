"""Images for the benchmarks that call the networks themselves, read as the bundle reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from monai.transforms import Compose
from torch import Tensor

from bundle.transforms import LoadCased, OrientSlicesd, ScaleIntensityByModalityd


@cache
def reading() -> Compose:
    """How the bundle reads a case, as in ``configs/inference.json``."""
    return Compose([LoadCased("image"), OrientSlicesd("image"), ScaleIntensityByModalityd("image")])


def load_images(files: Sequence[str], device: str) -> Tensor:
    """Images [B, C, H, W, 1] in [0, 1], all of one size."""
    return torch.stack([reading()({"image": file})["image"].as_tensor() for file in files]).to(device)
