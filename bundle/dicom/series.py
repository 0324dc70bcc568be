"""DICOM files to series, and a series to a volume with its affine, or to one line that says why it is none.

A series is an ordered volume only if its slices have one size, spacing and orientation, and stand at equal distances:
anything else is refused, for a wrong geometry would not be seen in the result. Pixels are decoded by pydicom's plugins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import highdicom as hd
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from bundle.errors import BundleError

SPACING_TOLERANCE = 0.05  # of the distance of two slices, relative; scanners round positions, a missing slice is 1
ANGLE_TOLERANCE = 1e-3  # of direction cosines; positions in files have few digits
PRODUCT = "dinov3_spatial_ar"  # ManufacturerModelName of what this bundle writes

_HEADER = [
    "SeriesInstanceUID",
    "SeriesNumber",
    "ImageType",
    "NumberOfFrames",
    "Rows",
]
# objects with pixels that are results or doses, not images of a patient
_DERIVED_MODALITIES = ("SEG", "RTDOSE")
_PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"


class DicomVolume(NamedTuple):
    """What a series holds.

    Attributes:
        pixels: [C, x, y, slices] float32, C = 1 or 3, after rescale slope and intercept.
        affine: [4, 4], from voxel indices to mm in RAS.
        modality: ``MR``, ``CT``, ...
        files: of the slices, in order; the one file of a multi-frame image.
        instances: InstanceNumber of every slice, in order; the frame number for multi-frame images.
        positioned: whether the affine is a place in a patient.
    """

    pixels: np.ndarray
    affine: np.ndarray
    modality: str
    files: list[Path]
    instances: list[int]
    positioned: bool = True


class Series(NamedTuple):
    """Files that are read together, and a name for them in their folder."""

    files: list[Path]
    name: str


def group_series(files: Iterable[Path]) -> list[Series]:
    """Split ``files`` into what is to be read together, in order of name.

    Slices of one series stay together, in any order of files; localizers that share a series with the slices they plan
    come apart from them. A multi-frame image, a file that is no image, and one that cannot be read stand alone.
    """
    groups: dict[Any, Series] = {}
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=_HEADER)
        except (InvalidDicomError, OSError, ValueError, AttributeError):
            groups[file] = Series([file], file.name)
            continue
        alone = "Rows" not in header or int(header.get("NumberOfFrames") or 1) > 1 or "SeriesInstanceUID" not in header
        key = file if alone else (header.SeriesInstanceUID, _is_localizer(header))
        name = f"{'localizer' if _is_localizer(header) else 'series'}-{header.get('SeriesNumber') or 0}"
        groups.setdefault(key, Series([], name)).files.append(file)
    return list(groups.values())


def patient_of(file: Path) -> str | None:
    """The identity of the patient, to keep a patient's images in one split; never to be shown. None if unknown."""
    try:
        header = dcmread(file, stop_before_pixels=True, specific_tags=["PatientID", "StudyInstanceUID"])
    except (InvalidDicomError, OSError, ValueError, AttributeError):
        return None
    return str(header.get("PatientID") or header.get("StudyInstanceUID") or "") or None


def read_headers(files: Sequence[Path]) -> list[Dataset]:
    """The headers of a series without pixels, in the order of :func:`read_volume`'s slices.

    Raises:
        BundleError: if they are no volume.
    """
    return _in_order([_read(file, stop_before_pixels=True) for file in files], files)


def read_volume(files: Sequence[Path]) -> DicomVolume:
    """The volume of one series, or of one image.

    Slices are ordered along the normal of their plane (right-handed: columns, rows, slices). An image without a
    position (radiograph, photograph) is a volume of one slice whose rows run down and columns to the right, in mm if
    its pixel spacing is known.

    Args:
        files: one series as :func:`group_series` gives it.

    Raises:
        BundleError: one line with the file and the reason.
    """
    datasets = _in_order([_read(file) for file in files], files)
    first = datasets[0]
    in_order = [Path(str(dataset.filename)) for dataset in datasets]
    for dataset in datasets:
        _check_pixels(dataset)
    if not _has_position(first):
        if len(datasets) > 1 or _frames(first) > 1:
            count = max(len(datasets), _frames(first))
            raise BundleError(f"'{_place(files)}' has {count} images without positions: give them one by one")
        pixels = _decode(lambda: hd.Image.from_dataset(first, copy=False).get_frame(1, dtype=np.float32), files)
        rows, columns = (float(side) for side in first.get("PixelSpacing", first.get("ImagerPixelSpacing", (1, 1))))
        affine = np.diag([-columns, -rows, 1.0, 1.0])
        return DicomVolume(_to_xyz(pixels[None]), affine, _modality(first), in_order, [1], positioned=False)
    if _frames(first) > 1:
        image = hd.Image.from_dataset(first, copy=False)
        volume = _decode(lambda: image.get_volume(rtol=SPACING_TOLERANCE, **_PIXELS), files)
        instances = frame_numbers(first)
    else:
        volume = _decode(
            lambda: hd.get_volume_from_series(
                datasets, rtol=SPACING_TOLERANCE, orientation_tol=ANGLE_TOLERANCE, **_PIXELS
            ),
            files,
        )
        instances = [int(dataset.get("InstanceNumber") or index + 1) for index, dataset in enumerate(datasets)]
    volume = volume.flip_spatial(0)  # highdicom stacks against the normal
    affine = volume.get_affine("RAH")[:, [2, 1, 0, 3]]  # of [x, y, slices]
    return DicomVolume(_to_xyz(np.asarray(volume.array)), affine, _modality(first), in_order, instances)


_PIXELS: dict[str, Any] = {"dtype": np.float32, "apply_real_world_transform": False}


def volume_geometry(sources: Sequence[Dataset]) -> hd.VolumeGeometry:
    """The grid [slices, rows, columns] of ``sources``, headers in the order of :func:`read_headers`.

    Raises:
        BundleError: if they have no position.
    """
    first = sources[0]
    if not _has_position(first):
        raise BundleError(
            f"'{first.filename}' has no position in a patient: DICOM results need one, leave write_dicom off"
        )
    if _frames(first) > 1:
        geometry = hd.Image.from_dataset(first, copy=False).get_volume_geometry(rtol=SPACING_TOLERANCE)
        assert geometry is not None  # it was a volume when its pixels were read
        return geometry.flip_spatial(0)
    step = _normal(first) * (_thickness(first) if len(sources) == 1 else 1.0)
    if len(sources) > 1:
        step = (_position(sources[-1]) - _position(first)) / (len(sources) - 1)
    cosines = np.array(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    rows, columns = map(float, first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([step, cosines[1] * rows, cosines[0] * columns, _position(first)], axis=1)
    return hd.VolumeGeometry(
        affine,
        (len(sources), first.Rows, first.Columns),
        coordinate_system="PATIENT",
        frame_of_reference_uid=first.get("FrameOfReferenceUID"),
    )


def frame_numbers(source: Dataset) -> list[int]:
    """Of a multi-frame image, the numbers of its frames, from 1, in the order of :func:`read_volume`'s slices."""
    shared = source.SharedFunctionalGroupsSequence[0]
    frames = source.PerFrameFunctionalGroupsSequence
    plane = shared.get("PlaneOrientationSequence") or frames[0].PlaneOrientationSequence
    normal = _normal(plane[0])
    heights = [float(_position(frame.PlanePositionSequence[0]) @ normal) for frame in frames]
    return [index + 1 for index in np.argsort(heights, kind="stable").tolist()]


def _read(file: Path, stop_before_pixels: bool = False) -> Dataset:
    """One file.

    Raises:
        BundleError: if it is truncated, or no image of a patient.
    """
    try:
        with _quiet():
            dataset = dcmread(file, stop_before_pixels=stop_before_pixels)
    except Exception as error:
        raise _unreadable(file, error) from error
    name = UID(str(dataset.get("SOPClassUID", ""))).name or "unknown class"
    if "Rows" not in dataset and "Image Storage" in name:
        raise _without_pixels(file)
    if (
        "Rows" not in dataset
        or dataset.get("Modality") in _DERIVED_MODALITIES
        or dataset.get("SOPClassUID") == _PARAMETRIC_MAP
        or dataset.get("ManufacturerModelName") == PRODUCT
    ):
        raise BundleError(
            f"'{file}' is no image to examine ({name}, modality {dataset.get('Modality', '?')}): "
            "remove it, or skip such files with --on_error skip"
        )
    if _is_localizer(dataset):
        raise BundleError(
            f"'{file}' is a localizer ({dataset.get('Modality', '?')}): remove it, or skip such files with "
            "--on_error skip"
        )
    return dataset


def _in_order(datasets: list[Dataset], files: Sequence[Path]) -> list[Dataset]:
    """The slices along the normal of their plane.

    Raises:
        BundleError: if they are no volume.
    """
    place = _place(files)
    if not datasets:
        raise BundleError(f"'{place}' holds no image: give a folder with a DICOM series")
    first = datasets[0]
    if len(datasets) == 1 or not all(map(_has_position, datasets)):
        return datasets
    for what, tags in (("size", ("Rows", "Columns")), ("pixel spacing", ("PixelSpacing",))):
        values = sorted({" x ".join(str(dataset.get(tag)) for tag in tags) for dataset in datasets})
        if len(values) > 1:
            raise BundleError(f"'{place}' mixes slices of {what} {' and '.join(values[:3])}: separate them")
    cosines = np.array([dataset.ImageOrientationPatient for dataset in datasets], dtype=float)
    if np.abs(cosines - cosines[0]).max() > ANGLE_TOLERANCE:
        raise BundleError(f"'{place}' mixes slices of different orientation, as a localizer does: separate them")
    if len({dataset.get("FrameOfReferenceUID") for dataset in datasets}) > 1:
        raise BundleError(f"'{place}' mixes frames of reference (the patient was moved): separate its slices")
    positions = np.array([_position(dataset) for dataset in datasets])
    heights = positions @ _normal(first)
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(heights[order])
    usual = float(np.median(gaps))
    names = [Path(str(datasets[index].filename)).name for index in order]
    if usual <= 0 or gaps.min() < SPACING_TOLERANCE * usual:
        at = int(gaps.argmin())
        raise BundleError(
            f"'{place}' has several slices at one position ('{names[at]}' and '{names[at + 1]}'), as echoes or time "
            "points have: separate them"
        )
    if np.abs(gaps - usual).max() > SPACING_TOLERANCE * usual:
        at = int(np.abs(gaps - usual).argmax())
        raise BundleError(
            f"'{place}' lacks slices: '{names[at]}' and '{names[at + 1]}' are {gaps[at]:.2f} mm apart, others "
            f"{usual:.2f} mm: complete the series, or skip such files with --on_error skip"
        )
    along = positions[order[-1]] - positions[order[0]]
    sheared = np.linalg.norm(along - _normal(first) * (along @ _normal(first)))
    if sheared > SPACING_TOLERANCE * usual:
        raise BundleError(
            f"'{place}' is sheared by {sheared:.2f} mm, as with a tilted gantry: resample it to a straight volume"
        )
    return [datasets[index] for index in order]


def _check_pixels(dataset: Dataset) -> None:
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise _without_pixels(dataset.filename)
    if _frames(dataset) == 1:
        try:
            with _quiet():
                dataset.pixel_array  # noqa: B018  decoded once and kept by pydicom
        except Exception as error:
            raise _unreadable(dataset.filename, error) from error


def _decode(decode: Any, files: Sequence[Path]) -> Any:
    try:
        with _quiet():
            return decode()
    except Exception as error:
        raise _unreadable(_place(files), error) from error


def _unreadable(place: Any, error: Exception) -> BundleError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BundleError(f"cannot read '{place}' ({reason}): replace the file, or skip such files with --on_error skip")


@contextmanager
def _quiet() -> Iterator[None]:
    """pydicom logs what it is about to raise, with values of the header: it comes as one line from us."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _without_pixels(place: Any) -> BundleError:
    return BundleError(
        f"'{place}' has no pixels, it may be truncated: replace the file, or skip such files with --on_error skip"
    )


def _place(files: Sequence[Path]) -> Path:
    return files[0] if len(files) == 1 else files[0].parent


def _frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _is_localizer(header: Dataset) -> bool:
    return "LOCALIZER" in (header.get("ImageType") or ())


def _has_position(dataset: Dataset) -> bool:
    if _frames(dataset) > 1:
        return "SharedFunctionalGroupsSequence" in dataset
    return all(dataset.get(tag) is not None for tag in ("ImagePositionPatient", "ImageOrientationPatient"))


def _position(dataset: Dataset) -> np.ndarray:
    return np.array(dataset.ImagePositionPatient, dtype=float)


def _normal(dataset: Dataset) -> np.ndarray:
    cosines = np.array(dataset.ImageOrientationPatient, dtype=float).reshape(2, 3)
    return np.cross(cosines[0], cosines[1])


def _thickness(dataset: Dataset) -> float:
    return float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 1.0)


def _modality(dataset: Dataset) -> str:
    return str(dataset.get("Modality", "")).strip()


def _to_xyz(array: np.ndarray) -> np.ndarray:
    """[slices, rows, columns] or [slices, rows, columns, 3] to [C, x, y, slices]."""
    channels = array[..., None] if array.ndim == 3 else array
    return np.ascontiguousarray(channels.transpose(3, 2, 1, 0), dtype=np.float32)
