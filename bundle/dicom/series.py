"""DICOM files to series, and a series to a volume with its affine, or to one line that says why it is none.

A series is an ordered volume only if its slices have one size, spacing and orientation and stand in line at equal
distances: anything else is refused, for a wrong geometry would not be seen in the result. The line may be tilted
against the slices, as with a gantry. Slices of a series and frames of a multi-frame image pass the same checks. Pixels
are decoded by pydicom's plugins, if what the header claims fits the file: see :mod:`bundle.limits` and
:mod:`bundle.dicom.decoding`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pydicom.config
from pydicom import DataElement, Dataset, FileDataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from bundle.dicom.decoding import decompress, is_compressed, remedy
from bundle.errors import BundleError
from bundle.limits import INFLATED, MAX_VOXELS, RATIO, check_claim, check_regular, check_size

if TYPE_CHECKING:  # it needs pydicom 3; headers can be read and checked without it
    import highdicom as hd

SPACING_TOLERANCE = 0.05  # of the distance of two slices, relative; scanners round positions, a missing slice is 1
STEEPEST = 2**0.5  # of the way from slice to slice, relative to their distance: a tilt of 45 degrees; gantries have 30
SIDE_TOLERANCE = 1e-3  # of the sides of a pixel, relative
ANGLE_TOLERANCE = 1e-3  # of direction cosines; positions in files have few digits
PRODUCT = "dinov3_spatial_ar"  # ManufacturerModelName of what this bundle writes

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_HEADER = [
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "ImageType",
    "NumberOfFrames",
    "Rows",
    "Modality",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SharedFunctionalGroupsSequence",
]
# modalities whose images are views or photographs: without a position, those of a series are no slices of a volume
_RADIOGRAPHS = ("CR", "DX", "MG", "IO", "PX", "RF", "RG", "XA")
_PHOTOGRAPHS = ("DMS", "ES", "GM", "OP", "OT", "XC")
_OF_VIEWS = (*_RADIOGRAPHS, *_PHOTOGRAPHS, "US")
# objects with pixels that are results or doses, not images of a patient
_DERIVED_MODALITIES = ("SEG", "RTDOSE")
_PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
_FIRST_OF_PIXELS = 0x7FE00008  # tag
_FIRST_GROUPS = (b"\x02\0", b"\x08\0", b"\0\x08")  # of a data set without preamble
# what sets images at one position apart, the most telling first
_APART = (
    "EchoTime",
    "EffectiveEchoTime",
    "InversionTime",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "FlipAngle",
    "ImageType",
    "FrameType",
    "AcquisitionNumber",
    "AcquisitionTime",
    "FrameAcquisitionDateTime",
    "ContentTime",
)
_STEP = 2**20  # bytes
_PIXELS: dict[str, Any] = {"dtype": np.float32, "apply_real_world_transform": False}

# what these say of a file holds values of its header, which may be the patient's; errors come as one line from here
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
logging.getLogger("highdicom").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b")
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

T = TypeVar("T")

logger = logging.getLogger(__name__)


class NoImageError(BundleError):
    """A sound DICOM object that is no image to examine: a report, a result, a localizer.

    Args:
        message: one line.
        kind: what it is, in words that hold nothing of its header.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class SeriesFiles:
    """The files of a series in the order of its slices, and the headers that were read with their pixels.

    Made to travel in the ``meta`` of an image, so that results can refer to its headers without reading them anew. What
    headers hold of the patient stays in this process: a copy is the object itself, neither its text nor its pickle has
    a header; where there is none, :meth:`headers` reads the files.

    Args:
        paths: in order; the one file of a multi-frame image.
        headers: of the files, without pixels; None: not read yet.
    """

    def __init__(self, paths: Sequence[Path], headers: list[Dataset] | None = None) -> None:
        self.paths = list(paths)
        self._headers = headers

    def headers(self) -> list[Dataset]:
        """The headers, as :func:`read_headers` gives them.

        Raises:
            BundleError: if they have to be read and cannot be.
        """
        if self._headers is None:
            self._headers = read_headers(self.paths)
        return self._headers

    def __copy__(self) -> SeriesFiles:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SeriesFiles:
        return self

    def __reduce__(self) -> tuple[type[SeriesFiles], tuple[list[Path]]]:
        return SeriesFiles, (self.paths,)

    def __repr__(self) -> str:
        return f"SeriesFiles({[str(path) for path in self.paths]})"


class DicomVolume(NamedTuple):
    """What a series holds.

    Attributes:
        pixels: [C, x, y, slices] float32, C = 1 or 3, after rescale slope and intercept; padding is the lowest value.
        affine: [4, 4], from voxel indices to mm in RAS; sheared where the gantry was tilted, see :func:`is_tilted`.
        modality: ``MR``, ``CT``, ...
        files: of the slices, with their headers.
        instances: InstanceNumber of every slice, in order; the frame number for multi-frame images.
        positioned: whether the affine is a place in a patient.
    """

    pixels: np.ndarray
    affine: np.ndarray
    modality: str
    files: SeriesFiles
    instances: list[int]
    positioned: bool = True


class Series(NamedTuple):
    """Files that are read together, and a name for them in their folder."""

    files: list[Path]
    name: str


class _Member(NamedTuple):
    """A file, what it is read together with, the name of that, and the UID of the image in it."""

    file: Path
    key: Any
    name: str
    instance: str = ""


class _Plane(NamedTuple):
    """Where a slice or frame lies: mm in DICOM's frame (left, posterior, superior)."""

    name: str
    position: np.ndarray
    cosines: np.ndarray  # [2, 3], of increasing column and increasing row
    spacing: np.ndarray  # [2], of columns and of rows
    thickness: float
    parts: Sequence[Dataset]  # of the header that may tell images at one position apart

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.cosines[0], self.cosines[1])


class _Stack(NamedTuple):
    """The order of slices along their normal, and the affine [4, 4] of [column, row, slice] in DICOM's frame."""

    order: list[int]
    affine: np.ndarray


def group_series(files: Iterable[Path]) -> list[Series]:
    """Split ``files`` into what is to be read together, in order of name.

    Slices of one series stay together, in any order of files; localizers that share a series with the slices they plan
    come apart from them. A radiograph, photograph or ultrasound image without a position, a multi-frame image, a file
    that is no image, and one that cannot be read stand alone. Files with one SOPInstanceUID and the same bytes, as of
    an export that was copied twice, count once, by the shortest path.
    """
    groups: dict[Any, Series] = {}
    for member in _without_copies([_member(file) for file in files]):
        groups.setdefault(member.key, Series([], member.name)).files.append(member.file)
    return list(groups.values())


def _member(file: Path) -> _Member:
    try:
        header = _dataset_of(file, stop_before_pixels=True, specific_tags=_HEADER)
        view = _modality(header) in _OF_VIEWS and not _has_position(header)
        alone = "Rows" not in header or view or _is_multi_frame(header) or not header.get("SeriesInstanceUID")
        key: Any = file if alone else (str(header.SeriesInstanceUID), _is_localizer(header))
        kind = "localizer" if _is_localizer(header) else "series"
        name = file.name if alone else f"{kind}-{_number(header, 'SeriesNumber', 0)}"
        return _Member(file, key, name, str(header.get("SOPInstanceUID") or ""))
    except Exception:  # damaged headers raise whatever they like; reading the file tells
        return _Member(file, file, file.name)


def _without_copies(members: list[_Member]) -> list[_Member]:
    """``members`` but for copies, which are counted in one line."""
    images = Counter(member.instance for member in members if member.instance)
    equal: dict[tuple[str, str], list[Path]] = {}
    for member in members:
        if images[member.instance] > 1:
            equal.setdefault((member.instance, _digest(member.file)), []).append(member.file)
    copies = [file for files in equal.values() for file in sorted(files, key=lambda file: (len(str(file)), file))[1:]]
    if copies:
        logger.warning(f"dropped {len(copies)} DICOM files that equal others byte by byte, such as '{copies[0]}'")
    dropped = set(copies)
    return [member for member in members if member.file not in dropped]


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def patient_of(file: Path) -> str | None:
    """The identity of the patient, to keep a patient's images in one split; never to be shown. None if unknown."""
    try:
        header = _dataset_of(file, stop_before_pixels=True, specific_tags=["PatientID", "StudyInstanceUID"])
        return str(header.get("PatientID") or header.get("StudyInstanceUID") or "") or None
    except Exception:  # as above
        return None


def uid_of(file: Path, of_series: bool = False) -> str | None:
    """The UID of the image in a file, or of its series; None if unknown."""
    keyword = "SeriesInstanceUID" if of_series else "SOPInstanceUID"
    try:
        header = _dataset_of(file, stop_before_pixels=True, specific_tags=[keyword])
        return str(header.get(keyword) or "") or None
    except Exception:  # as above
        return None


def modality_in(file: Path) -> str:
    """The modality in the header of a DICOM file, such as ``CT``; raises what pydicom does if it is damaged."""
    return _modality(_dataset_of(file, stop_before_pixels=True, specific_tags=["Modality"]))


def _modality(header: Dataset) -> str:
    return str(header.get("Modality", "")).strip()


def read_headers(files: Sequence[Path]) -> list[Dataset]:
    """The headers of a series without pixels, in the order of :func:`read_volume`'s slices.

    Raises:
        BundleError: if they are no volume.
    """
    datasets: list[Dataset] = [_read(file, stop_before_pixels=True) for file in files]
    if len(datasets) == 1 or not _have_positions(datasets):
        return datasets
    return [datasets[index] for index in _stack(datasets).order]


def read_volume(files: Sequence[Path], max_voxels: int = MAX_VOXELS) -> DicomVolume:
    """The volume of one series, or of one image.

    Slices are ordered along the normal of their plane (right-handed: columns, rows, slices). An image without a
    position (radiograph, photograph) is a volume of one slice whose rows run down and columns to the right, in mm if
    its pixel spacing is known.

    Args:
        files: one series as :func:`group_series` gives it.
        max_voxels: largest number of voxels; each channel counts.

    Raises:
        BundleError: one line with the file and the reason.
    """
    datasets = [_read(Path(file)) for file in files]
    if not datasets:
        raise BundleError("a DICOM series has no file: give a folder with a series")
    _check_pixels(datasets, max_voxels)
    if bare := sum(not dataset.preamble for dataset in datasets):
        logger.warning(f"'{_place(datasets)}' has {bare} files without DICOM preamble, which are read as they are")
    headers = [_header_of(dataset) for dataset in datasets]  # decoding changes datasets
    first = headers[0]
    modality = _modality(first)
    if not _have_positions(headers):
        count = max(len(headers), _frames(first))
        if _frames(first) > 1:
            raise BundleError(
                f"'{_place(headers)}' is a cine, {count} frames without positions: save the frames to examine as "
                "single images, or skip such files with --on_error skip"
            )
        if count > 1:
            raise BundleError(
                f"'{_place(headers)}' has {count} images without positions in one series of modality "
                f"{modality or '?'}, whose slices have places: export it anew, give the file of one image, or skip "
                "such files with --on_error skip"
            )
        columns, rows = _reading(first, _side_of_pixels)
        affine = np.diag([-columns, -rows, 1.0, 1.0])
        pixels = _to_xyz(_without_padding(_frames_of(datasets[0])))
        return DicomVolume(pixels, affine, modality, _with_headers(headers), [1], positioned=False)
    order, affine = _stack(headers)
    if _is_multi_frame(first):
        array = _frames_of(datasets[0])[order]
        instances = [index + 1 for index in order]
    else:
        headers = [headers[index] for index in order]
        array = np.concatenate([_frames_of(datasets[index]) for index in order])
        instances = [_number(header, "InstanceNumber", index) for index, header in enumerate(headers, start=1)]
    pixels = _to_xyz(_without_padding(array))
    return DicomVolume(pixels, LPS_TO_RAS @ affine, modality, _with_headers(headers), instances)


def lacks_of_place(sources: Sequence[Dataset]) -> str:
    """What ``sources`` lack of a place in a patient, in words; empty if nothing."""
    if not _have_positions(sources):
        return "position"
    return "" if sources[0].get("FrameOfReferenceUID") else "FrameOfReferenceUID"


def volume_geometry(sources: Sequence[Dataset]) -> hd.VolumeGeometry:
    """The grid [slices, rows, columns] of ``sources``, placed headers in the order of :func:`read_headers`.

    It is straight: where the gantry was tilted, only :func:`slice_positions` says where slices are.
    """
    import highdicom as hd

    first = sources[0]
    order, affine = _stack(sources)
    affine[:3, 2] -= tilt_of(affine)
    return hd.VolumeGeometry(
        affine[:, [2, 1, 0, 3]],
        (len(order), first.Rows, first.Columns),
        coordinate_system="PATIENT",
        frame_of_reference_uid=first.FrameOfReferenceUID,
    )


def slice_positions(sources: Sequence[Dataset]) -> np.ndarray:
    """Where the first pixel of each slice of such ``sources`` lies: [slices, 3] mm in DICOM's frame."""
    order, affine = _stack(sources)
    return affine[:3, 3] + np.arange(len(order))[:, None] * affine[:3, 2]


def tilt_of(affine: np.ndarray, axis: int = 2) -> np.ndarray:
    """How far each slice along ``axis`` lies beside the one before, in their plane: [3] mm; 0 in a straight stack."""
    side, other = np.delete(affine[:3, :3], axis, axis=1).T
    normal = np.cross(side, other)
    step = affine[:3, axis]
    return np.asarray(step - normal * (step @ normal) / (normal @ normal))


def is_tilted(affine: np.ndarray, slices: int, axis: int = 2) -> bool:
    """Whether a stack of ``slices`` along ``axis`` is sheared by more than positions in files are rounded."""
    tilt = tilt_of(affine, axis)
    step = np.linalg.norm(affine[:3, axis] - tilt)
    return bool(np.linalg.norm(tilt) * (slices - 1) > SPACING_TOLERANCE * step)


def slice_places(sources: Sequence[Dataset]) -> list[tuple[Dataset, int | None]]:
    """Of each slice in order, the image that holds it, and its frame number if that image has frames."""
    if _is_multi_frame(sources[0]):
        order = _stack(sources).order if _have_positions(sources) else [0]
        return [(sources[0], index + 1) for index in order]
    return [(source, None) for source in sources]


def _read(file: Path, stop_before_pixels: bool = False) -> FileDataset:
    """One file.

    Raises:
        NoImageError: if it is sound, but no image of a patient.
        BundleError: if it is truncated or damaged.
    """
    try:
        dataset = _dataset_of(file, stop_before_pixels=stop_before_pixels)
        told = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""
        name = UID(str(told)).name
        modality = str(dataset.get("Modality") or "?")
        localizer = _is_localizer(dataset)
        screen = "SCREEN SAVE" in (dataset.get("ImageType") or ())
        own = dataset.get("ManufacturerModelName") == PRODUCT
        derived = modality in _DERIVED_MODALITIES or dataset.get("SOPClassUID") == _PARAMETRIC_MAP
        _frames(dataset)
    except BundleError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from error
    if "Rows" not in dataset and (not name or "Image Storage" in name):
        raise _without_pixels(file)
    if "Rows" not in dataset or own or derived or screen:
        raise NoImageError(
            f"'{file}' is no image to examine ({name}, modality {modality}): remove it, or skip such files with "
            "--on_error skip",
            f"result of {PRODUCT}" if own else "screen save" if screen else name.removesuffix(" Storage"),
        )
    if localizer:
        raise NoImageError(
            f"'{file}' is a localizer ({modality}): remove it, or skip such files with --on_error skip", "localizer"
        )
    pixels = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
    if not stop_before_pixels and not any(keyword in dataset for keyword in pixels):
        raise _without_pixels(file)
    return dataset


def _dataset_of(file: Path, **options: Any) -> FileDataset:
    """What :func:`pydicom.dcmread` gives, which inflates a deflated file as a whole and in memory.

    Raises:
        BundleError: if it is no regular file, or would become too large.
    """
    check_regular(file)
    if os.path.getsize(file) * RATIO > INFLATED:
        _check_deflated(file)
    try:
        return dcmread(file, **options)
    except InvalidDicomError:
        return _without_preamble(file, options)


def _without_preamble(file: Path, options: dict[str, Any]) -> FileDataset:
    """A data set that begins at once, as old archives and the network give it; its encoding shows in its elements.

    Raises:
        BundleError: if it is none, or compressed without a word of how.
    """
    with open(file, "rb") as stream:
        first_group = stream.read(2)
    if first_group not in _FIRST_GROUPS:
        raise _no_dicom(file)
    if tags := options.get("specific_tags"):
        options = options | {"specific_tags": [*tags, "SOPClassUID"]}
    dataset = dcmread(file, force=True, **options)
    if "SOPClassUID" not in dataset:
        raise _no_dicom(file)
    if "TransferSyntaxUID" not in dataset.file_meta:
        if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
            raise BundleError(
                f"'{file}' has compressed pixels, but neither preamble nor transfer syntax: export it anew, or skip "
                "such files with --on_error skip"
            )
        dataset.file_meta["TransferSyntaxUID"] = DataElement("TransferSyntaxUID", "UI", _syntax_of(dataset))
    return dataset


def _syntax_of(dataset: FileDataset) -> UID:
    """The transfer syntax by which plain elements were read."""
    implicit, little = dataset.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _check_deflated(file: Path) -> None:
    """Inflate a file in steps, if it is deflated, and keep nothing."""
    inflater, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with open(file, "rb") as stream:
        read_preamble(stream, force=True)
        if _read_file_meta_info(stream).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        while rest := inflater.unconsumed_tail or stream.read(_STEP):
            inflated += len(inflater.decompress(rest, _STEP))
            if inflated > INFLATED:
                raise BundleError(
                    f"'{file}' inflates to more than {INFLATED} bytes: store it without deflating, or skip such files "
                    "with --on_error skip"
                )


def _check_pixels(datasets: Sequence[Dataset], max_voxels: int) -> None:
    """Refuse a series that has too many voxels, or claims more pixels than its files can hold.

    Raises:
        BundleError: with the file and the sizes.
    """
    frames = [max(1, _frames(dataset)) for dataset in datasets]
    for dataset in datasets:
        claimed = _reading(dataset, _claimed)
        check_claim(dataset.filename, claimed, os.path.getsize(dataset.filename), packed=_is_packed(dataset))
    largest = max(datasets, key=lambda dataset: dataset.Rows * dataset.Columns)
    check_size(_place(datasets), (largest.Columns, largest.Rows, sum(frames)), max_voxels, _channels(largest))


def _claimed(dataset: Dataset) -> int:
    """The bytes of its pixels, as the header says."""
    from pydicom.pixels.utils import get_expected_length  # of pydicom 3, which not every environment has

    return int(get_expected_length(dataset))


def _stack(datasets: Sequence[Dataset]) -> _Stack:
    """How the slices of a series, or the frames of a multi-frame image, stand.

    Raises:
        BundleError: if not in line at equal distances.
    """
    place = _place(datasets)
    _check_instances(datasets)
    planes = [plane for dataset in datasets for plane in _reading(dataset, partial(_planes_of, place=place))]
    first = planes[0]
    sizes = sorted({(dataset.Rows, dataset.Columns) for dataset in datasets})
    if len(sizes) > 1:
        listed = " and ".join(f"{rows} x {columns}" for rows, columns in sizes[:3])
        raise BundleError(f"'{place}' mixes slices of size {listed}: separate them")
    for plane in planes:
        if not np.allclose(plane.spacing, first.spacing, rtol=SIDE_TOLERANCE):
            raise BundleError(
                f"'{place}' mixes slices of pixel spacing {_sides(first)} and {_sides(plane)} ('{plane.name}'): "
                "separate them"
            )
        if np.abs(plane.cosines - first.cosines).max() > ANGLE_TOLERANCE:
            raise BundleError(
                f"'{place}' mixes slices of different orientation ('{first.name}' and '{plane.name}'), as a localizer "
                "does: separate them"
            )
    if len({str(dataset.get("FrameOfReferenceUID")) for dataset in datasets}) > 1:
        raise BundleError(f"'{place}' mixes frames of reference (the patient was moved): separate its slices")
    order, step = _in_line(place, planes) if len(planes) > 1 else ([0], first.normal * first.thickness)
    affine = np.eye(4)
    affine[:3] = np.stack(
        [
            first.cosines[0] * first.spacing[0],
            first.cosines[1] * first.spacing[1],
            step,
            planes[order[0]].position,
        ],
        axis=1,
    )
    return _Stack(order, affine)


def _check_instances(datasets: Sequence[Dataset]) -> None:
    """Refuse two images of one UID: which of them a result refers to could not be told.

    Raises:
        BundleError: with both files.
    """
    first: dict[str, Dataset] = {}
    for dataset in datasets:
        instance = str(dataset.get("SOPInstanceUID") or "")
        if instance and first.setdefault(instance, dataset) is not dataset:
            raise BundleError(
                f"'{first[instance].filename}' and '{dataset.filename}' have one SOPInstanceUID but differ, as an "
                "image and its edited copy do: remove one of them"
            )


def _in_line(place: Any, planes: Sequence[_Plane]) -> tuple[list[int], np.ndarray]:
    """The order of ``planes`` along their normal, and the way from one to the next, [3] mm.

    It is that of the normal, unless the planes stand on another line, as with a tilted gantry.

    Raises:
        BundleError: if one is missing, twice there, or off the line.
    """
    normal = planes[0].normal
    positions = np.array([plane.position for plane in planes])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(heights[order])
    usual = float(np.median(gaps))
    names = [planes[index].name for index in order]
    if usual <= 0 or gaps.min() < SPACING_TOLERANCE * usual:
        at = int(gaps.argmin())
        raise _stacked_twice(place, heights[order], *(planes[index] for index in order[at : at + 2]))
    if np.abs(gaps - usual).max() > SPACING_TOLERANCE * usual:
        at = int(np.abs(gaps - usual).argmax())
        raise BundleError(
            f"'{place}' lacks slices: '{names[at]}' and '{names[at + 1]}' are {gaps[at]:.2f} mm apart, others "
            f"{usual:.2f} mm: complete the series, or skip such files with --on_error skip"
        )
    way = (positions[order[-1]] - positions[order[0]]) / len(gaps)
    upright = normal * (way @ normal)
    for step in (upright, way):
        line = positions[order[0]] + np.arange(len(order))[:, None] * step
        off = np.linalg.norm(positions[order] - line, axis=1)
        if off.max() <= SPACING_TOLERANCE * usual and np.linalg.norm(step) <= STEEPEST * np.linalg.norm(upright):
            return order.tolist(), step
    raise BundleError(
        f"'{place}' is no straight stack: '{names[int(off.argmax())]}' stands {off.max():.2f} mm off the line of the "
        "others, as with a moved table: resample it to a straight volume"
    )


def _stacked_twice(place: Any, heights: np.ndarray, one: _Plane, other: _Plane) -> BundleError:
    """What to say of images at one position: ``one`` and ``other`` of those at sorted ``heights``."""
    gaps = np.diff(heights)
    begins = np.flatnonzero(np.r_[True, gaps > SPACING_TOLERANCE * gaps.max()]) if gaps.max() > 0 else np.zeros(1, int)
    counts = set(np.diff(np.r_[begins, len(heights)]).tolist())
    if len(counts) == 1:
        found = f"has {counts.pop()} images at each of {len(begins)} positions"
    else:
        found = "has several slices at one position"
    keyword = next((keyword for keyword in _APART if _told(one, keyword) != _told(other, keyword)), None)
    differ = f"differ in {keyword}, as echoes and time points do" if keyword else "tell of nothing that sets them apart"
    return BundleError(
        f"'{place}' {found} ('{one.name}' and '{other.name}' {differ}): give a folder with one of them for each "
        "position, or skip such files with --on_error skip"
    )


def _told(plane: _Plane, keyword: str) -> str:
    with suppress(Exception):  # damaged values raise whatever they like, and tell nothing
        return " ".join(str(item.get(keyword)) for item in plane.parts if item.get(keyword) is not None)
    return ""


def _planes_of(dataset: Dataset, place: Path) -> list[_Plane]:
    """The plane of an image, by its path below ``place``, or of each frame of a multi-frame image."""
    if not _is_multi_frame(dataset):
        return [_plane(os.path.relpath(str(dataset.filename), place), dataset, dataset, dataset, [dataset])]
    shared = dataset.SharedFunctionalGroupsSequence[0]

    def of(frame: Dataset, group: str) -> Dataset:
        return (frame.get(group) or shared.get(group))[0]

    return [
        _plane(
            f"frame {number}",
            of(frame, "PlanePositionSequence"),
            of(frame, "PlaneOrientationSequence"),
            of(frame, "PixelMeasuresSequence"),
            [item for group in frame if group.VR == "SQ" for item in group.value],
        )
        for number, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence, start=1)
    ]


def _plane(name: str, position: Dataset, orientation: Dataset, measures: Dataset, parts: Sequence[Dataset]) -> _Plane:
    rows, columns = map(float, measures.PixelSpacing)
    thickness = measures.get("SliceThickness") or measures.get("SpacingBetweenSlices") or 1.0
    return _Plane(
        name,
        np.array(position.ImagePositionPatient, dtype=float),
        np.array(orientation.ImageOrientationPatient, dtype=float).reshape(2, 3),
        np.array([columns, rows]),
        abs(float(thickness)),
        parts,
    )


def _side_of_pixels(dataset: Dataset) -> tuple[float, float]:
    """Of columns and rows, in mm, 1 if unknown."""
    rows, columns = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or (1, 1)
    return float(columns), float(rows)


def _frames_of(dataset: Dataset) -> np.ndarray:
    """The frames of an image, [frames, rows, columns] or [frames, rows, columns, 3] float32; padding is NaN."""
    import highdicom as hd

    def decode(image: Dataset) -> np.ndarray:
        if is_compressed(image):
            _decompress(image)
        if _is_multi_frame(image) or not _have_positions([image]) or not image.get("FrameOfReferenceUID"):
            values = hd.Image.from_dataset(image, copy=False).get_frames(**_PIXELS)
        else:  # the same, and ten times as fast for single frames
            image.SpacingBetweenSlices = image.get("SpacingBetweenSlices") or 1.0
            values = hd.get_volume_from_series([image], **_PIXELS).array
        return _padding_marked(np.asarray(values), image)

    return _reading(dataset, decode)


def _decompress(image: Dataset) -> None:
    """Raises a :class:`BundleError` with codec, reason and remedy, if the pixels cannot be decoded."""
    try:
        decompress(image, _claimed(image))
    except RuntimeError as error:
        syntax = UID(image.file_meta.TransferSyntaxUID)
        raise BundleError(
            f"cannot read '{image.filename}' ({syntax.name}: {error}): {remedy(syntax)}, replace the file, or skip "
            "such files with --on_error skip"
        ) from error


def _padding_marked(values: np.ndarray, image: Dataset) -> np.ndarray:
    padding = image.get("PixelPaddingValue")
    if padding is not None and values.ndim == 3:
        low, high = sorted([int(padding), int(image.get("PixelPaddingRangeLimit", padding))])
        stored = image.pixel_array.reshape(values.shape)
        values[(stored >= low) & (stored <= high)] = np.nan
    return values


def _without_padding(array: np.ndarray) -> np.ndarray:
    """Padding, which is no tissue, becomes the lowest value of all frames."""
    padded = np.isnan(array)
    if padded.any():
        array[padded] = 0 if padded.all() else np.nanmin(array)
    return array


def _reading(dataset: Dataset, read: Callable[[Dataset], T]) -> T:
    """What ``read`` finds in ``dataset``.

    Raises:
        BundleError: with the file, for whatever it raises.
    """
    try:
        return read(dataset)
    except BundleError:
        raise
    except Exception as error:
        raise _unreadable(dataset.filename, error) from error


def _unreadable(place: Any, error: Exception) -> BundleError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BundleError(f"cannot read '{place}' ({reason}): replace the file, or skip such files with --on_error skip")


def _no_dicom(place: Any) -> BundleError:
    return BundleError(
        f"'{place}' is no DICOM file, or its header is damaged: replace the file, or skip such files with --on_error "
        "skip"
    )


def _without_pixels(place: Any) -> BundleError:
    return BundleError(
        f"'{place}' has no pixels, it may be truncated: replace the file, or skip such files with --on_error skip"
    )


def _header_of(dataset: FileDataset) -> Dataset:
    """What :func:`pydicom.dcmread` gives if it stops before the pixels; elements that both have are shared."""
    implicit, little = map(bool, dataset.original_encoding)
    header = FileDataset(
        str(dataset.filename), dataset[:_FIRST_OF_PIXELS], dataset.preamble, dataset.file_meta, implicit, little
    )
    header.set_original_encoding(implicit, little, dataset.original_character_set)
    return header


def _with_headers(headers: list[Dataset]) -> SeriesFiles:
    return SeriesFiles([Path(str(header.filename)) for header in headers], headers)


def _place(datasets: Sequence[Dataset]) -> Path:
    files = [Path(str(dataset.filename)) for dataset in datasets]
    return files[0] if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))


def _sides(plane: _Plane) -> str:
    return f"{plane.spacing[0]:g} x {plane.spacing[1]:g} mm"


def _frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _channels(dataset: Dataset) -> int:
    """Of a decoded pixel."""
    return 3 if dataset.SamplesPerPixel > 1 or "PALETTE" in dataset.PhotometricInterpretation else 1


def _is_packed(dataset: Dataset) -> bool:
    """Whether its pixels take less room in the file than in memory."""
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", ""))
    return syntax == DeflatedExplicitVRLittleEndian or is_compressed(dataset)


def _number(dataset: Dataset, keyword: str, default: int) -> int:
    try:
        return int(dataset.get(keyword) or default)
    except (TypeError, ValueError):
        return default


def _is_multi_frame(dataset: Dataset) -> bool:
    """Of one frame or more: what counts is that the geometry is told by frames."""
    return _frames(dataset) > 1 or "SharedFunctionalGroupsSequence" in dataset


def _is_localizer(header: Dataset) -> bool:
    return "LOCALIZER" in (header.get("ImageType") or ())


def _have_positions(datasets: Sequence[Dataset]) -> bool:
    """Whether all images lie somewhere in a patient.

    Raises:
        BundleError: if some do.
    """
    without = [dataset for dataset in datasets if not _has_position(dataset)]
    if without and len(without) < len(datasets):
        raise BundleError(
            f"'{without[0].filename}' has no position, but other slices of its series have: remove it, or skip such "
            "files with --on_error skip"
        )
    return not without


def _has_position(dataset: Dataset) -> bool:
    if _is_multi_frame(dataset):
        groups = [
            *dataset.get("SharedFunctionalGroupsSequence", ()),
            *dataset.get("PerFrameFunctionalGroupsSequence", ()),
        ]
        return any(group.get("PlanePositionSequence") for group in groups)
    return all(dataset.get(tag) for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))


def _to_xyz(array: np.ndarray) -> np.ndarray:
    """[slices, rows, columns] or [slices, rows, columns, 3] to [C, x, y, slices]."""
    channels = array[..., None] if array.ndim == 3 else array
    return np.ascontiguousarray(channels.transpose(3, 2, 1, 0), dtype=np.float32)
