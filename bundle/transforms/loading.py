"""Reading one case: a flat image (PNG, JPEG, BMP, TIFF, DICOM) or a volume (NIfTI, DICOM series), and its mask."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.image_reader import ImageReader, ITKReader, NibabelReader, PILReader
from monai.transforms import EnsureChannelFirst, MapTransform
from PIL import Image

from bundle.errors import BundleError

FLAT_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SUFFIXES = (*NIFTI_SUFFIXES, *FLAT_SUFFIXES, *DICOM_SUFFIXES)

MIN_SIDE = 16  # pixels; less than one patch of any backbone holds nothing to map


class LoadCased(MapTransform):
    """Load files into :class:`MetaTensor` of one shape: [C, x, y, slices], float32, C = 1 or 3.

    A flat image is a volume of one slice. x and y are in the order of MONAI's readers (x first), see
    :class:`~bundle.transforms.OrientSlicesd` for the order that the networks see. ``meta`` holds ``modality``
    (``"8bit"`` for 8-bit images, the DICOM modality, or ``""``) and the affine, in mm for NIfTI and DICOM; pixels of
    other formats have side 1.

    Args:
        keys: what to load, paths to files, or to a folder with one DICOM series.
        allow_missing_keys: do not fail where a case has no such key.

    Raises:
        BundleError: one line with the file and the remedy if it is missing, unreadable, truncated, of another rank than
            2 or 3, smaller than 16x16, or holds NaN or infinite pixels; if a mask has another size or affine than its
            image.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path of ``data`` by what it holds."""
        loaded = dict(data)
        shapes = {}
        for key in self.key_iterator(loaded):
            path = loaded[key]
            loaded[key] = load_case(path)
            shapes[path] = tuple(loaded[key].shape[1:])
        if len(set(shapes.values())) > 1:
            sizes = ", ".join(f"'{path}' {'x'.join(map(str, shape))}" for path, shape in shapes.items())
            raise BundleError(f"image and mask differ in size ({sizes}): give a mask on the grid of its image")
        placed = {
            loaded[key].meta["filename_or_obj"]: loaded[key].affine
            for key in self.key_iterator(loaded)
            if not str(loaded[key].meta["filename_or_obj"]).lower().endswith(FLAT_SUFFIXES)
        }
        affines = list(placed.values())
        if any(not torch.allclose(affine, affines[0], atol=1e-2) for affine in affines[1:]):
            raise BundleError(
                f"image and mask lie at different places by their affines ({', '.join(map(repr, placed))}): "
                "give a mask on the grid of its image"
            )
        return loaded


def load_case(path: str | os.PathLike) -> MetaTensor:
    """One file as [C, x, y, slices], see :class:`LoadCased`."""
    if not os.path.exists(path):
        raise BundleError(f"no file at '{path}': check the path")
    reader, kind = _reader_of(Path(path))
    try:
        pixels, header = reader.get_data(reader.read(path))
        image = cast(
            MetaTensor,
            EnsureChannelFirst()(MetaTensor(torch.from_numpy(np.array(pixels, dtype=np.float32)), meta=header)),
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"cannot read '{path}' ({reason}): replace the file, or skip such files with --on_error skip"
        ) from error
    if image.ndim == 3:
        image = cast(MetaTensor, image[..., None])
    # color is for pictures: a fourth axis of a volume is time or contrast
    if image.ndim != 4 or image.shape[0] not in ((1,) if kind == "nifti" else (1, 3)):
        raise BundleError(
            f"'{path}' has {pixels.ndim} axes of {'x'.join(map(str, pixels.shape))}: give a 2D image or a 3D volume, "
            "one of a 4D file"
        )
    if min(image.shape[1:3]) < MIN_SIDE:
        raise BundleError(
            f"'{path}' is {image.shape[1]}x{image.shape[2]} pixels: at least {MIN_SIDE}x{MIN_SIDE} are needed"
        )
    if not torch.isfinite(image.as_tensor()).all():
        raise BundleError(f"'{path}' holds NaN or infinite pixels: clean it, or skip such files with --on_error skip")
    # rows run down and columns to the right of a picture, as posterior and left do in a radiological display
    affine = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0])) if kind == "flat" else image.affine
    # of the header nothing else is kept: the rest of a DICOM header is about the patient
    return MetaTensor(
        image.as_tensor(),
        affine=affine.to(torch.float64),
        meta={"filename_or_obj": str(path), "modality": _modality(header, kind)},
    )


def _reader_of(path: Path) -> tuple[ImageReader, str]:
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return NibabelReader(), "nifti"
    if name.endswith(FLAT_SUFFIXES):
        return PILReader(converter=_to_gray_or_rgb), "flat"
    return ITKReader(), "dicom"


def _to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """Decode now, so that a truncated file fails here, and bring palettes and alpha to plain gray or RGB."""
    image.load()
    if image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return image
    converted = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    converted.format = image.format
    return converted


def _modality(header: Mapping[str, Any], kind: str) -> str:
    if kind == "flat":
        return "8bit" if header["mode"] in ("L", "RGB") else ""
    return str(header.get("0008|0060", "")).strip() if kind == "dicom" else ""
