"""Write an unaligned copy of a data set of pictures: python -m scripts.samples.unaligned --data SET --out COPY.

Each image is turned by up to 30 degrees, scaled by 0.8 to 1.2, moved by up to a tenth of its side and mirrored at
random, its mask with it. What is drawn depends on the name of the image alone, so that the copy is always the same.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
from monai.data import PILReader, PILWriter
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandAffined, RandFlipd
from monai.utils import GridSamplePadMode
from tqdm import tqdm

from bundle.data.cases import SPLITS, Case, find_splits
from bundle.errors import BundleError

TURN = math.radians(30)
SCALE = 0.2
MOVE = 0.1  # of a side


def write_unaligned(source: Path, target: Path) -> int:
    """Write the copy of the set ``source``, with healthy validation images only; returns how many images it has.

    Raises:
        BundleError: if ``target`` is there and not empty, or ``source`` is no data set of pictures.
    """
    if target.exists() and any(target.iterdir()):
        raise BundleError(f"'{target}' is not empty: give a new folder")
    source = source.resolve()
    cases = [case for split in SPLITS for case in find_splits(source)[split]]
    for case in tqdm(cases, desc="moving images", unit="image"):
        for path, moved in move(case).items():
            written = target / Path(path).relative_to(source)
            written.parent.mkdir(parents=True, exist_ok=True)
            writer = PILWriter(output_dtype=np.uint8, scale=None)
            writer.set_data_array(moved, channel_dim=0)
            writer.write(str(written))
    return len(cases)


def move(case: Case) -> dict[str, np.ndarray]:
    """Image and mask of ``case``, moved together: [C, W, H] by the path that they come from."""
    keys = [key for key in ("image", "mask") if key in case]
    modes = ["bilinear" if key == "image" else "nearest" for key in keys]
    side = min(LoadImaged(keys, reader=PILReader)(case)["image"].shape[:2])
    transform = Compose(
        [
            LoadImaged(keys, reader=PILReader),
            EnsureChannelFirstd(keys),
            RandAffined(
                keys,
                prob=1.0,
                rotate_range=TURN,
                scale_range=(SCALE, SCALE),
                translate_range=(MOVE * side, MOVE * side),
                mode=modes,
                padding_mode=GridSamplePadMode.ZEROS,
            ),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
        ]
    )
    transform.set_random_state(int.from_bytes(hashlib.sha256(case["name"].encode()).digest()[:4]))
    moved = transform(case)
    return {case[key]: moved[key].round().clamp(0, 255).numpy().astype(np.uint8) for key in keys}


def main() -> None:
    """Write the copy and tell where it lies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a set of pictures with train, valid and test")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    given = parser.parse_args()
    try:
        count = write_unaligned(given.data, given.out)
    except BundleError as error:
        sys.exit(f"error: {error}")
    print(f"{count} images in {given.out}")


if __name__ == "__main__":
    main()
