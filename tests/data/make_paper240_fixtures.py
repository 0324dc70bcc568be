"""Make ``tests/data/golden/paper240_masks.npz``: true masks, and what the paper's evaluation makes of them.

The authors open a mask with PIL as gray, resize it with torchvision (nearest, 448x448), make a tensor of it, and bring
that to 240x240 with ``torch.nn.functional.interpolate`` (nearest); what is above 0 is lesion. Here are the same calls
with their values left as they are, so that any rule can be applied. Made with torch 2.14.1, torchvision 0.29.1 and
Pillow 13.0.0. Only needed to renew the fixture: the tests read the file alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Resize, ToTensor

SIZES = {"brain": (240, 240), "liver": (512, 512), "retina": (512, 1024)}  # rows and columns of BMAD's sets
VALUES = (58, 122, 255)
RADII = (1, 2, 3, 5, 8, 13, 21)
DISCS = 40


def discs(rows: int, columns: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Discs of ``VALUES`` and ``RADII`` pixels at random places, [rows, columns]."""
    mask = np.zeros((rows, columns), np.uint8)
    row, column = np.ogrid[:rows, :columns]
    for number in range(DISCS):
        distance = np.hypot(row - random.integers(rows), column - random.integers(columns))
        mask[distance <= RADII[number % len(RADII)]] = VALUES[number % len(VALUES)]
    return mask


def as_the_authors_do(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask at 240x240."""
    resize = Compose([Resize((448, 448), interpolation=InterpolationMode.NEAREST), ToTensor()])
    label = resize(Image.fromarray(mask).convert("L"))
    small = torch.nn.functional.interpolate(label[None], size=(240, 240), mode="nearest")
    return (small[0, 0] * 255).round().to(torch.uint8).numpy()


def main() -> None:
    """Write a source, and its result, for every size."""
    random = np.random.default_rng(0)
    sources = {name: discs(*size, random) for name, size in SIZES.items()}
    results = {f"{name}_240": as_the_authors_do(mask) for name, mask in sources.items()}
    np.savez_compressed(Path(__file__).parent / "golden" / "paper240_masks.npz", **sources, **results)


if __name__ == "__main__":
    main()
