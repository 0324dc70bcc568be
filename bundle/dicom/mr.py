"""A volume as a classic MR series: one MR Image Storage object a slice, with its geometry."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from bundle.errors import BundleError
from bundle.planes import PLANES

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
MAX_COSINE = 1e-4  # between two axes that still count as orthogonal
FILE_NAME = "IM{:04d}.dcm"  # from 1


@dataclass(frozen=True)
class SeriesIdentity:
    """Whose images these are, and which series of which study they form.

    Args:
        patient_id, patient_name: the name in DICOM's form ``Family^Given``.
        study_uid, series_uid, frame_of_reference_uid: unique identifiers.
        study_date: YYYYMMDD, or empty where it is unknown.
        study_description, series_description, comments: free text.
        series_number: place of the series in its study.
        body_part: a defined term of DICOM, or empty.
        manufacturer: of the equipment.
    """

    patient_id: str
    patient_name: str
    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    study_date: str = ""
    study_description: str = ""
    series_description: str = ""
    comments: str = ""
    series_number: int = 1
    body_part: str = ""
    manufacturer: str = ""


class Stack(NamedTuple):
    """Slices as DICOM has them.

    Args:
        pixels: [slices, rows, columns], in the order of their positions along ``normal``.
        affine: [4, 4], from [column, row, slice] to mm in DICOM's frame: left, posterior, superior.
    """

    pixels: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Of columns, rows and slices, in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def directions(self) -> np.ndarray:
        """Unit vectors along increasing column, row and slice, as the columns of a matrix [3, 3]."""
        return self.affine[:3, :3] / self.spacing

    def position(self, index: int) -> np.ndarray:
        """The place in mm of the first pixel of slice ``index``."""
        return (self.affine @ [0, 0, index, 1])[:3]


def mr_series(
    volume: np.ndarray, affine: np.ndarray, identity: SeriesIdentity, scale: float | None = None
) -> list[Dataset]:
    """The MR Image Storage objects of a volume, one a slice, in the order of their positions.

    Slices lie along the third axis. In its plane an image is flipped and transposed to radiological display order, as
    scanners write it; nothing is resampled.

    Args:
        volume: [x, y, slices]; integers of 16 bits, or any numbers with a ``scale``.
        affine: [4, 4], from voxels to mm in RAS. It may be oblique, flipped or left-handed.
        identity: of patient, study and series.
        scale: ``volume`` is stored in multiples of it, which every object tells as its rescale slope; None: integers as
            they are.

    Raises:
        BundleError: if the axes are not orthogonal, which no MR image can tell, or the pixels do not fit into 16 bits.
    """
    stack = to_stack(_stored(volume, scale), affine)
    study = _study(stack, identity)
    if scale is not None:
        study.RescaleIntercept, study.RescaleSlope, study.RescaleType = 0, DSfloat(scale, auto_format=True), "US"
    return [_slice(study, stack, index) for index in range(len(stack.pixels))]


def write_series(images: Iterable[Dataset], folder: Path) -> list[Path]:
    """Write ``images`` as ``IM0001.dcm`` and so on to the new ``folder``; returns the files."""
    folder.mkdir(parents=True)
    files = []
    for number, image in enumerate(images, 1):
        files.append(folder / FILE_NAME.format(number))
        image.save_as(files[-1], enforce_file_format=True)
    return files


def to_stack(volume: np.ndarray, affine: np.ndarray) -> Stack:
    """``volume`` [x, y, slices] with an ``affine`` to mm in RAS, as DICOM has it.

    Raises:
        BundleError: if the axes are not orthogonal.
    """
    affine = np.asarray(affine, dtype=float)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if not cosine < MAX_COSINE:
        raise BundleError(
            f"the axes of a volume are not orthogonal (cosine {cosine:.4f}), which no MR series can tell: resample it"
        )
    own = io_orientation(affine)
    plane = next(shown for shown in map(axcodes2ornt, PLANES.values()) if shown[2, 0] == own[2, 0])
    turn = ornt_transform(own, np.stack([plane[1], plane[0], own[2]]))
    affine = affine @ inv_ornt_aff(turn, volume.shape)
    volume = apply_orientation(volume, turn)
    affine[:3] *= RAS_TO_LPS[:, None]
    if np.linalg.det(affine[:3, :3]) < 0:  # against the normal of rows and columns
        volume = volume[..., ::-1]
        affine = affine @ inv_ornt_aff(np.array([[0, 1], [1, 1], [2, -1]]), volume.shape)
    return Stack(np.ascontiguousarray(volume.T), affine)


def _stored(volume: np.ndarray, scale: float | None) -> np.ndarray:
    """The integers that stand for ``volume``."""
    if scale is not None:
        volume = np.rint(volume / scale)
    elif not np.issubdtype(volume.dtype, np.integer):
        raise BundleError(f"a volume of {volume.dtype} has no stored integers: give a scale, such as 1/1275")
    low, high = volume.min(), volume.max()
    for dtype in (np.uint16, np.int16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return volume.astype(dtype)
    raise BundleError(f"pixels from {low:g} to {high:g} do not fit into 16 bits: give a larger scale")


def _study(stack: Stack, identity: SeriesIdentity) -> Dataset:
    """What all slices of a series share."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = MRImageStorage
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian

    image.SpecificCharacterSet = "ISO_IR 192"
    image.SOPClassUID = MRImageStorage
    image.PatientName = identity.patient_name
    image.PatientID = identity.patient_id
    image.PatientBirthDate = image.PatientSex = ""

    image.StudyInstanceUID = identity.study_uid
    image.StudyDate = identity.study_date
    image.StudyTime = "000000" if identity.study_date else ""
    image.StudyID = image.AccessionNumber = image.ReferringPhysicianName = ""
    image.StudyDescription = identity.study_description

    image.Modality = "MR"
    image.SeriesInstanceUID = identity.series_uid
    image.SeriesNumber = identity.series_number
    image.SeriesDescription = identity.series_description
    image.PatientPosition = "HFS"
    if identity.body_part:
        image.BodyPartExamined = identity.body_part
    image.FrameOfReferenceUID = identity.frame_of_reference_uid
    image.PositionReferenceIndicator = ""
    image.Manufacturer = identity.manufacturer

    image.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    if identity.comments:
        image.ImageComments = identity.comments
    image.ScanningSequence = "IR"
    image.SequenceVariant = "NONE"
    image.MRAcquisitionType = "2D"
    # of how a volume was acquired nothing is known; DICOM wants these to be there, maybe empty
    image.ScanOptions = image.RepetitionTime = image.EchoTime = image.InversionTime = image.EchoTrainLength = None

    columns, rows, gap = (DSfloat(side, auto_format=True) for side in stack.spacing)
    image.PixelSpacing = [rows, columns]
    image.SliceThickness = image.SpacingBetweenSlices = gap
    image.ImageOrientationPatient = _decimals(stack.directions[:, :2].T.ravel())

    dtype = stack.pixels.dtype
    low, high = int(stack.pixels.min()), int(stack.pixels.max())
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = stack.pixels.shape[1:]
    image.BitsAllocated = 16
    image.BitsStored = 12 if low >= 0 and high < 2**12 else 16
    image.HighBit = image.BitsStored - 1
    image.PixelRepresentation = int(np.issubdtype(dtype, np.signedinteger))
    image.WindowCenter = DSfloat((low + high) / 2, auto_format=True)
    image.WindowWidth = max(high - low, 1)  # of the whole series, so that all its slices look alike
    return image


def _slice(study: Dataset, stack: Stack, index: int) -> Dataset:
    """The object of slice ``index``."""
    image = deepcopy(study)
    image.SOPInstanceUID = generate_uid(entropy_srcs=[study.SeriesInstanceUID, str(index)])
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.AcquisitionNumber = 1
    image.InstanceNumber = index + 1
    position = stack.position(index)
    image.ImagePositionPatient = _decimals(position)
    image.SliceLocation = DSfloat(float(position @ stack.directions[:, 2]), auto_format=True)
    image.PixelData = stack.pixels[index].astype("<u2" if study.PixelRepresentation == 0 else "<i2").tobytes()
    return image


def _decimals(values: np.ndarray) -> list[DSfloat]:
    return [DSfloat(float(value) + 0.0, auto_format=True) for value in values]
