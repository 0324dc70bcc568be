"""Reading one case: a flat image (PNG, JPEG, BMP, TIFF, DICOM) or a volume (NIfTI, NRRD, MetaImage, DICOM series)."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.image_reader import PILReader
from monai.transforms import MapTransform
from PIL import Image, ImageFile, ImageMode
from PIL.JpegImagePlugin import JpegImageFile
from pydicom.misc import is_dicom

from bundle.dicom.series import SeriesFiles, group_series, modality_in, read_volume
from bundle.dicom.words import header_words, name_words
from bundle.errors import BundleError
from bundle.files import (
    DICOM_SUFFIXES,
    FLAT_SUFFIXES,
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    SUFFIXES,
    VOLUME_SUFFIXES,
    Source,
    files_of,
)
from bundle.limits import (
    GRANTED,
    MAX_PARTS,
    MAX_SCANS,
    MAX_VOXELS,
    check_claim,
    check_count,
    check_limit,
    check_regular,
    check_size,
)
from bundle.reading import check_channel
from bundle.transforms.axes import turn_between, turned
from bundle.transforms.itk_files import read_itk

MIN_SIDE = 16  # pixels; less than one patch of any backbone holds nothing to map
THICKER = 1.1  # times the other two sides of a voxel: only then they tell along which axis slices were acquired
PICTURES = ("PNG", "JPEG", "BMP", "TIFF")  # of Pillow's formats; others run programs, such as Ghostscript
_SIDES_OF_TILES = (322, 323)  # tags of TIFF
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # of JPEG, with a length after it; others have none
_SCAN, _END = b"\xda", b"\xd9"

Image.MAX_IMAGE_PIXELS = None  # its limit is another than ours, and only warns up to twice its size

logger = logging.getLogger(__name__)


def is_dicom_file(file: str | os.PathLike) -> bool:
    """Whether a file is DICOM, by its suffix or, whatever its name, by its content; an index (DICOMDIR) is not."""
    name = Path(file).name
    if name.lower().endswith(SUFFIXES) or name.upper() == "DICOMDIR":
        return name.lower().endswith(DICOM_SUFFIXES)
    return os.path.isfile(file) and is_dicom(Path(file))


class RequireDicomd(MapTransform):
    """Refuse what no DICOM result could refer to: loaded ``keys`` must come from DICOM.

    Raises:
        BundleError: for anything else.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check each key of ``data``, which stays as it is."""
        for key in self.key_iterator(dict(data)):
            meta = data[key].meta
            if "files" not in meta:
                place = meta["filename_or_obj"]
                raise BundleError(f"write_dicom needs DICOM images, but '{place}' is none: leave it off, or give DICOM")
        return dict(data)


class _Pixels(NamedTuple):
    """What a reader gives: values [C, x, y, slices] and the entries of ``meta`` that are kept of the header."""

    values: np.ndarray
    affine: np.ndarray
    modality: str = ""
    slice_axis: int | None = None
    axes: int = 3
    files: SeriesFiles | None = None
    instances: tuple[int, ...] = ()
    oriented: bool = True


class LoadCased(MapTransform):
    """Load files into :class:`MetaTensor` of one shape: [C, x, y, slices], float32, C = 1 or 3.

    A flat image is a volume of one slice. x and y are in the order of MONAI's readers (x first), see
    :class:`~bundle.transforms.OrientSlicesd` for the order that the networks see. ``meta`` holds ``modality``
    (``"8bit"`` for 8-bit images, the DICOM modality, or ``""``), ``slice_axis`` (of x, y, slices, the one along which
    slices were acquired: see :func:`acquisition_axis`; None for images without geometry), ``axes`` (2 where a NRRD or
    MetaImage file has no third one), ``oriented`` (whether the header of a volume tells its directions), of a DICOM
    series its ``files`` (:class:`~bundle.dicom.series.SeriesFiles`) and the ``instances`` (InstanceNumber) of its
    slices, and the affine in mm, where pictures have pixels of side 1. Its ``words`` are what header or name tell of
    the sequence, in a fixed vocabulary (:mod:`bundle.dicom.words`).

    Args:
        keys: what to load: see :data:`bundle.files.Source`.
        channel: the volume of a 4D file to take, from 0, or of a NRRD or MetaImage file with several values in each
            voxel; None: these are refused. 3D files have one.
        min_slices: of an image; 2 or more where a volume is wanted.
        max_voxels: largest number of pixels or voxels of an image; each channel counts.
        allow_missing_keys: do not fail where a case has no such key.

    Raises:
        BundleError: one line with the file and the remedy if it is missing, unreadable, truncated, of another rank than
            2 or 3, smaller than 16x16, larger than ``max_voxels``, claims more than it can hold, is a pipe or a device,
            or holds NaN or infinite pixels; if a mask has another size or affine than its image; if a DICOM series is
            no regular volume (see :mod:`bundle.dicom.series`).
    """

    def __init__(
        self,
        keys: KeysCollection,
        channel: int | None = None,
        min_slices: int = 1,
        max_voxels: int = MAX_VOXELS,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_channel(channel)
        if min_slices < 1:
            raise BundleError(f"min_slices is {min_slices}: give at least 1")
        check_limit(max_voxels)
        self.channel = channel
        self.max_voxels = max_voxels
        self.min_slices = min_slices

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path of ``data`` by what it holds."""
        loaded = dict(data)
        images: list[MetaTensor] = []
        for key in self.key_iterator(loaded):
            loaded[key] = load_case(loaded[key], self.channel, self.max_voxels)
            if images and _is_placed(images[0]) and _is_placed(loaded[key]):
                loaded[key] = turned(loaded[key], turn_between(loaded[key].affine, images[0].affine))
                loaded[key].meta["slice_axis"] = images[0].meta["slice_axis"]  # its own is of the axes that it had
            images.append(loaded[key])
        for image in images[:1]:
            axis = image.meta["slice_axis"]
            slices = image.shape[1:][2 if axis is None else axis]
            if slices < self.min_slices:
                raise BundleError(
                    f"'{image.meta['filename_or_obj']}' has {slices} slices, but min_slices is {self.min_slices}: give "
                    "a volume, or lower min_slices"
                )
        _check_same_grid(images)
        return loaded


def load_case(source: Source, channel: int | None = None, max_voxels: int = MAX_VOXELS) -> MetaTensor:
    """One image or volume as [C, x, y, slices], see :class:`LoadCased`."""
    files = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    for file in files:
        if len(files) > 1 or not os.path.isdir(file):
            check_regular(file)
    place = str(files[0] if len(files) == 1 else Path(files[0]).parent)
    name = place.lower()
    if len(files) == 1 and name.endswith(NIFTI_SUFFIXES):
        pixels = _read(place, _read_nifti, place, channel, max_voxels)
    elif len(files) == 1 and name.endswith(ITK_SUFFIXES):
        pixels = _read(place, _read_itk, place, channel, max_voxels)
    elif len(files) == 1 and name.endswith(".nhdr"):
        raise BundleError(f"'{place}' is a NRRD header beside its data: save it as one .nrrd file")
    elif len(files) == 1 and name.endswith(FLAT_SUFFIXES):
        pixels = _read(place, _read_picture, place, max_voxels)
    else:
        pixels = _read(place, _read_dicom, [Path(file) for file in files], max_voxels)
    values = torch.from_numpy(pixels.values)
    across = 2 if pixels.slice_axis is None else pixels.slice_axis
    sides = [side for axis, side in enumerate(values.shape[1:]) if axis != across]
    if min(sides) < MIN_SIDE:
        raise BundleError(
            f"'{place}' has slices of {sides[0]}x{sides[1]} pixels: at least {MIN_SIDE}x{MIN_SIDE} are needed"
        )
    if not torch.isfinite(values).all():
        raise BundleError(f"'{place}' holds NaN or infinite pixels: clean it, or skip such files with --on_error skip")
    # of the header nothing else is open to see: the rest of a DICOM header is about the patient
    meta: dict[str, Any] = {"filename_or_obj": place, "modality": pixels.modality, "slice_axis": pixels.slice_axis}
    meta |= {"axes": pixels.axes, "oriented": pixels.oriented}
    meta["words"] = {} if name.endswith(FLAT_SUFFIXES) else name_words(Path(place).name)
    if pixels.files is not None:
        meta |= {"files": pixels.files, "instances": pixels.instances, "words": header_words(pixels.files.headers()[0])}
    return MetaTensor(values, affine=torch.from_numpy(pixels.affine), meta=meta)


def modality_of(source: Source) -> str | None:
    """What :func:`load_case` will tell as ``modality``, from the header alone; None if the file cannot be read."""
    try:
        file = files_of(source)[0]
        name = file.name.lower()
        if name.endswith(FLAT_SUFFIXES):
            with Image.open(file) as picture:
                return "" if _is_deep(picture.mode) else "8bit"
        return "" if name.endswith(VOLUME_SUFFIXES) else modality_in(file)
    except Exception:  # damaged headers raise whatever they like; reading the file tells
        return None


def acquisition_axis(spacing: Sequence[float], told: int | None = None) -> int:
    """The axis, of three, along which slices were acquired.

    It is what the header tells, else that of the largest ``spacing`` (mm) if it clearly is, else the last, along which
    converters and scanners stack slices.
    """
    if told is not None:
        return told
    thickest = int(np.argmax(spacing))
    others = [side for axis, side in enumerate(spacing) if axis != thickest]
    return thickest if spacing[thickest] > THICKER * max(others) else 2


def _read(place: str, reader: Callable[..., _Pixels], *arguments: Any) -> _Pixels:
    try:
        return reader(*arguments)
    except BundleError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"cannot read '{place}' ({reason}): replace the file, or skip such files with --on_error skip"
        ) from error


def _read_nifti(path: str, channel: int | None, max_voxels: int) -> _Pixels:
    _check_nifti(path, max_voxels)
    # MONAI's reader changes affines that disagree with the size of voxels; a map of a file that is cut ends the process
    image: Any = nib.load(path, mmap=False)
    if len(image.shape) not in (2, 3, 4):
        raise BundleError(
            f"'{path}' has {len(image.shape)} axes of {'x'.join(map(str, image.shape))}: give a 2D image or a 3D volume"
        )
    if len(image.shape) == 4:
        image = image.slicer[..., _wanted_volume(path, image.shape, channel)]
    if image.get_data_dtype().kind not in "iuf":
        raise BundleError(f"'{path}' has pixels of type {image.get_data_dtype()}: give real numbers")
    values = np.asarray(image.dataobj, dtype=np.float32)
    values = values[..., None] if values.ndim == 2 else values
    forms = isinstance(image.header, nib.Nifti1Header)
    oriented = not forms or bool(image.header["qform_code"] or image.header["sform_code"])
    if not oriented:
        logger.warning(f"'{path}' tells no orientation: x, y, z are taken for left, anterior, superior")
    told = image.header.get_dim_info()[2] if hasattr(image.header, "get_dim_info") else None
    affine = np.asarray(image.affine, dtype=np.float64)
    return _placed(path, values, affine, told)._replace(oriented=oriented)


def _read_itk(path: str, channel: int | None, max_voxels: int) -> _Pixels:
    image = read_itk(path, max_voxels)
    if not image.placed:
        logger.warning(f"'{path}' tells no orientation: x, y, z are taken for left, posterior, superior")
    wanted = image.values[..., _wanted_volume(path, image.values.shape, channel)]
    return _placed(path, np.ascontiguousarray(wanted), image.affine)._replace(axes=image.axes, oriented=image.placed)


def _wanted_volume(path: str, shape: Sequence[int], channel: int | None) -> int:
    """Which volume along the last axis of ``shape`` is read: of several the ``channel``.

    Raises:
        BundleError: if it is not said, or there is none of that number.
    """
    volumes = shape[-1]
    if volumes > 1 and channel is None:
        raise BundleError(
            f"'{path}' has 4 axes of {'x'.join(map(str, shape))}: choose one of its {volumes} volumes with --channel"
        )
    if volumes > 1 and channel is not None and channel >= volumes:
        raise BundleError(f"'{path}' has {volumes} volumes, but channel is {channel}: give 0 to {volumes - 1}")
    return (channel or 0) if volumes > 1 else 0


def _placed(path: str, values: np.ndarray, affine: np.ndarray, told: int | None = None) -> _Pixels:
    """``values`` [x, y, slices] at a place; ``told`` is the axis of slices, if the header tells it.

    Raises:
        BundleError: if the affine is none.
    """
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise BundleError(f"'{path}' has an affine that is not finite or not invertible: correct its header")
    axis = 2 if values.shape[2] == 1 else acquisition_axis(np.linalg.norm(affine[:3, :3], axis=0).tolist(), told)
    return _Pixels(values[None], affine, slice_axis=axis)


def _check_nifti(path: str, max_voxels: int) -> None:
    """Compare the header with the file and the limit; nibabel takes memory for what either part of it claims."""
    with nib.openers.ImageOpener(path) as stream:
        start = stream.read(nib.Nifti2Header.template_dtype.itemsize)
    kind = nib.Nifti2Header if nib.Nifti2Header.may_contain_header(start) else nib.Nifti1Header
    header = kind(start[: kind.template_dtype.itemsize], check=False)
    sides, offset = header.get_data_shape(), int(header["vox_offset"])
    if len(sides) in (2, 3, 4):
        check_size(path, sides[:3], max_voxels)
    if not 0 <= offset <= GRANTED:
        raise BundleError(
            f"'{path}' has a header of {offset} bytes: replace the file, or skip such files with --on_error skip"
        )
    claimed = offset + math.prod(sides) * header.get_data_dtype().itemsize
    check_claim(path, claimed, os.path.getsize(path), packed=path.lower().endswith(".gz"))


def _read_picture(path: str, max_voxels: int) -> _Pixels:
    reader = PILReader(converter=partial(_to_gray_or_rgb, path=path, max_voxels=max_voxels), formats=PICTURES)
    with open(path, "rb") as stream:  # a file that Pillow has by name it may map, as nibabel does
        streams: Any = [stream]  # MONAI's types know names alone
        values, header = reader.get_data(reader.read(streams))
    values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    # rows run down and columns to the right of a picture, as posterior and left do in a radiological display
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    values = np.ascontiguousarray(values[..., None], dtype=np.float32)
    return _Pixels(values, affine, "" if _is_deep(header["mode"]) else "8bit")


def _read_dicom(files: list[Path], max_voxels: int) -> _Pixels:
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        series = group_series(filter(is_dicom_file, files_of(folder)))
        if len(series) != 1:
            raise BundleError(
                f"'{folder}' holds {len(series)} DICOM series and other objects: give the folder of one series, or "
                "--dataset_dir the folder for all of them"
            )
        files = series[0].files
    volume = read_volume(files, max_voxels)
    return _Pixels(
        volume.pixels,
        volume.affine,
        volume.modality,
        2 if volume.positioned else None,
        files=volume.files,
        instances=tuple(volume.instances),
    )


def _check_same_grid(images: Sequence[MetaTensor]) -> None:
    """Image and mask have one size, and lie at one place if both have a place."""
    sizes = {str(image.meta["filename_or_obj"]): tuple(image.shape[1:]) for image in images}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"'{path}' {'x'.join(map(str, shape))}" for path, shape in sizes.items())
        raise BundleError(f"image and mask differ in size ({listed}): give a mask on the grid of its image")
    placed = [image for image in images if _is_placed(image)]
    if any(not torch.allclose(image.affine, placed[0].affine, atol=1e-2) for image in placed[1:]):
        names = ", ".join(repr(image.meta["filename_or_obj"]) for image in placed)
        raise BundleError(
            f"image and mask lie at different places by their affines ({names}): give a mask on the grid of its image"
        )


def _is_placed(image: MetaTensor) -> bool:
    """Whether the affine is a place in a patient."""
    return image.meta["slice_axis"] is not None


def _to_gray_or_rgb(image: ImageFile.ImageFile, path: str, max_voxels: int) -> Image.Image:
    """Decode now, so that a truncated file fails here, and bring palettes and alpha to plain gray or RGB."""
    bands, each = image.getbands(), np.dtype(ImageMode.getmode(image.mode).typestr).itemsize
    channels = 1 if bands[0] in ("1", "L", "I", "F") else 3
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles are decoded whole, however little of them shows
    sides = [max(side, tags.get(tag, 0)) for side, tag in zip(image.size, _SIDES_OF_TILES, strict=True)]
    check_size(path, sides, max_voxels, channels)
    check_claim(path, math.prod(sides) * max(channels, len(bands)) * each, os.path.getsize(path))
    check_count(path, len(image.tile), "strips or tiles", MAX_PARTS)
    if isinstance(image, JpegImageFile):
        check_count(path, _scans(Path(path).read_bytes()), "scans", MAX_SCANS)
    image.load()
    if image.mode in ("L", "RGB") or _is_deep(image.mode):
        return image
    converted = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    converted.format = image.format
    return converted


def _scans(jpeg: bytes) -> int:
    """How many scans a JPEG has up to its end, by the markers that decoders follow."""
    at = count = 0
    while (marker := _MARKER.search(jpeg, at)) and marker[1] != _END:
        count += marker[1] == _SCAN
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return count


def _is_deep(mode: str) -> bool:
    """Whether pictures of Pillow's ``mode`` have more than 8 bits."""
    return mode in ("F", "I") or mode.startswith("I;16")
