"""The formats in which results of a case are written: one class each, and one row in :data:`WRITERS`."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

import nibabel as nib
import numpy as np
from monai.data import ITKWriter, MetaTensor
from PIL import Image, PngImagePlugin

from bundle import __version__
from bundle.errors import BundleError
from bundle.figures import blend_slices, overlay, picture, placement
from bundle.files import ITK_SUFFIXES, NIFTI_SUFFIXES, file_sha256, is_flat
from bundle.networks.detector import Detector, air_of
from bundle.provenance import model_words
from bundle.results import CaseResult, heat

if TYPE_CHECKING:  # highdicom is not everywhere
    from bundle.dicom.objects import Algorithm

NIFTI, INPUT = OUTPUT_FORMATS = ("nifti", "input")
_TIFF_DESCRIPTION = 270
_QFORM_TOLERANCE = 1e-2  # mm
_FORM_FIELDS = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputSettings:
    """What the outputs of a run have in common.

    Attributes:
        detector: which found the results.
        data: the data set in words.
        model_file: of the detector; DICOM objects tell its hash.
        preprocessing: of the images; its inverse brings them back to the axes of their files.
        write_dicom: whether DICOM objects are wanted, of all images, or ``auto``: of DICOM images alone.
        worst_slices: how many slices are named.
        segment_unlike: whether a case that is unlike the training data gets a DICOM segmentation.
        output_format: ``nifti`` or, for NRRD and MetaImage, ``input``.
    """

    detector: Detector
    data: str
    model_file: str | os.PathLike = ""
    preprocessing: Any = None
    write_dicom: bool | Literal["auto"] = False
    worst_slices: int = 3
    segment_unlike: bool = False
    output_format: str = NIFTI

    @cached_property
    def model(self) -> str:
        """The detector in words."""
        return model_words(self.detector.describe())

    @cached_property
    def air(self) -> float:
        """The intensity up to which the detector takes a patch for air, see :func:`~bundle.figures.body`."""
        return air_of(self.detector)


class Writer(ABC):
    """One format of results.

    Args:
        settings: of the run.
    """

    suffixes: ClassVar[tuple[str, ...]]
    """Of all that it may write: files and folders ``STEM + suffix``."""

    def __init__(self, settings: OutputSettings) -> None:
        self.settings = settings

    def applies(self, result: CaseResult) -> bool:
        """Whether ``result`` is to be written in this format; to all, unless a writer says otherwise."""
        return True

    @abstractmethod
    def write(self, stem: Path, result: CaseResult, image: MetaTensor) -> None:
        """Write one result.

        Args:
            stem: path and first part of the names.
            result: of the case.
            image: [C, rows, columns, slices] in [0, 1], as the network saw it, with what was done to it.

        Raises:
            BundleError: if it cannot be written in this format.
        """


class PictureWriter(Writer):
    """Map (32-bit float) and mask (0 or 255) of a flat image."""

    suffixes = ("_map.tiff", "_mask.png")

    def applies(self, result: CaseResult) -> bool:
        """Whether the image is flat."""
        return is_flat(result.path)

    def write(self, stem: Path, result: CaseResult, image: MetaTensor) -> None:
        """Write both."""
        write_map(f"{stem}_map.tiff", result, self.settings.model)
        note = PngImagePlugin.PngInfo()
        note.add_text("Description", self.settings.model)
        Image.fromarray(result.mask[..., 0].T.astype(np.uint8) * 255).save(f"{stem}_mask.png", pnginfo=note)


class VolumeWriter(Writer):
    """Map (float), mask (0 or 1) and heat map (0 to 255, 128 is the threshold) on the grid of a volume."""

    kinds = ("map", "mask", "heatmap")

    def applies(self, result: CaseResult) -> bool:
        """Whether the image has a place in space."""
        return not is_flat(result.path)

    def keeps_format(self, result: CaseResult) -> bool:
        """Whether the format of the input is wanted, and one that ITK writes."""
        return self.settings.output_format == INPUT and result.path.lower().endswith(ITK_SUFFIXES)

    def volumes(self, result: CaseResult) -> Iterator[tuple[str, np.ndarray]]:
        """Each of :attr:`kinds` with its values [x, y, slices]."""
        anomaly_map = result.restored.values
        yield "map", anomaly_map.astype(np.float32)
        yield "mask", result.mask.astype(np.uint8)
        yield "heatmap", np.round(255 * heat(anomaly_map, result.threshold)).astype(np.uint8)


class NiftiWriter(VolumeWriter):
    """The volumes as NIfTI."""

    suffixes = tuple(f"_{kind}.nii.gz" for kind in VolumeWriter.kinds)

    def applies(self, result: CaseResult) -> bool:
        """Whether the image has a place in space, and its own format is not wanted."""
        return super().applies(result) and not self.keeps_format(result)

    def write(self, stem: Path, result: CaseResult, image: MetaTensor) -> None:
        """Write all three; without a place in space they keep the affine alone."""
        for kind, values in self.volumes(result):
            written = nifti_of(values, result.restored.affine, result.path, image.meta["slice_axis"] is not None)
            written.header["descrip"] = self.settings.model[:79]
            nib.save(written, f"{stem}_{kind}.nii.gz")


class InputFormatWriter(VolumeWriter):
    """The volumes in the format of a NRRD or MetaImage input, packed, as 3D Slicer reads them."""

    suffixes = tuple(f"_{kind}{suffix}" for kind in VolumeWriter.kinds for suffix in (*ITK_SUFFIXES, ".zraw"))

    def applies(self, result: CaseResult) -> bool:
        """Whether this format is wanted."""
        return self.keeps_format(result)

    def write(self, stem: Path, result: CaseResult, image: MetaTensor) -> None:
        """Write all three, with the geometry of the input."""
        import itk

        for kind, values in self.volumes(result):
            stored = values[..., 0] if image.meta["axes"] == 2 else values
            # the rest of MONAI's writer would resample
            written = ITKWriter.create_backend_obj(stored, None, result.restored.affine, values.dtype)
            itk.imwrite(written, f"{stem}_{kind}{Path(result.path).suffix.lower()}", compression=True)


class OverlayWriter(Writer):
    """A picture of the most anomalous slice, beside itself under its heat map."""

    suffixes = ("_overlay.png",)

    def write(self, stem: Path, result: CaseResult, image: MetaTensor) -> None:
        """Write the picture, with the score in words."""
        worst = result.slices[result.worst_position]
        instance = f" (instance {worst.instance})" if worst.instance is not None else ""
        plane = f" {result.cut_plane}" if result.cut_plane else ""
        place = f"{plane} slice {worst.index}{instance}" if len(result.slices) > 1 else ""
        warning = f"UNLIKE THE TRAINING DATA: {result.warning}. " if result.unlike else ""
        score = f"score {result.score:.2f}, image threshold {result.image_threshold:.2f}"
        overlay(
            picture(image.as_tensor(), worst.position),
            result.anomaly_map[0, ..., worst.position],
            result.threshold,
            self.settings.air,
            placement(image),
            f"{warning}{result.name}{place}: {score}. {self.settings.model}. {self.settings.data}",
        ).save(f"{stem}_overlay.png")


class DicomWriter(Writer):
    """The objects of :func:`bundle.dicom.objects.write_objects`, of DICOM images, if they are wanted."""

    suffixes = ("_seg.dcm", "_heatmap.dcm", "_report.dcm", "_overlay")

    def applies(self, result: CaseResult) -> bool:
        """Whether DICOM is wanted; where it is of all images, that they are DICOM is checked before work begins."""
        return self.settings.write_dicom is True or (self.settings.write_dicom == "auto" and result.of_dicom)

    def write(self, stem: Path, result: CaseResult, image: MetaTensor) -> None:
        """Write the objects; what goes wrong is told without the header, which is the patient's."""
        from bundle.dicom.objects import write_objects

        stored = self.settings.preprocessing.inverse({"image": image.clone()})["image"].as_tensor()
        pictures = blend_slices(stored.numpy(), result.restored.values, result.threshold, self.settings.air)
        sources = image.meta["files"].headers()
        try:
            segments = self.settings.segment_unlike or not result.unlike
            write_objects(stem, sources, result, pictures, self.algorithm, self.settings.worst_slices, segments)
        except BundleError:
            raise
        except Exception as error:  # whose text may hold values of the header
            logger.debug("no DICOM results", exc_info=True)
            raise BundleError(
                f"no DICOM results of '{result.path}' ({type(error).__name__}): leave write_dicom off for it"
            ) from None

    @cached_property
    def algorithm(self) -> Algorithm:
        """What found the results."""
        from bundle.dicom.objects import Algorithm

        identity = self.settings.detector.describe()
        return Algorithm(__version__, str(identity["weights"]), file_sha256(self.settings.model_file))


WRITERS: tuple[type[Writer], ...] = (PictureWriter, NiftiWriter, InputFormatWriter, OverlayWriter, DicomWriter)


def write_map(target: str | BinaryIO, result: CaseResult, model: str) -> None:
    """Write the map of a flat image as a TIFF of 32-bit floats; pictures have rows first, MONAI's axes x first.

    Args:
        target: path, or a stream.
        result: of the image.
        model: in words, for the description.
    """
    picture = Image.fromarray(result.restored.values[..., 0].T.astype(np.float32))
    picture.save(target, "TIFF", tiffinfo={_TIFF_DESCRIPTION: model})


def nifti_of(values: np.ndarray, affine: np.ndarray | None, path: str, placed: bool) -> nib.Nifti1Image:
    """``values`` on the grid of the image at ``path``, with the geometry that its header tells if it is NIfTI.

    Args:
        values: [x, y, slices].
        affine: from voxels to the patient, in mm; None: not known.
        path: of the image that they were found in.
        placed: whether an image of another format has a place in space: then both transforms lead to the coordinates
            of the scanner.

    Raises:
        BundleError: if a NIfTI image has vanished, or changed its shape.
    """
    original = _original(path, values.shape)
    flat = original is not None and original.ndim == 2
    written = nib.Nifti1Image(values[..., 0] if flat else values, affine)
    written.header.set_xyzt_units("mm")
    if original is not None and isinstance(original.header, nib.Nifti1Header):
        _take_geometry(written.header, original.header)
    elif placed:
        _place_in_scanner(written)
    return written


def _original(path: str, shape: tuple[int, ...]) -> Any:
    """The NIfTI image at ``path``, for its header, or None if it is of another format.

    Raises:
        BundleError: if it has vanished, or has no longer the ``shape`` [x, y, slices] that it was read with.
    """
    if not path.lower().endswith(NIFTI_SUFFIXES):
        return None
    try:
        image: Any = nib.load(path)
    except Exception as error:  # damaged files raise whatever they like
        raise BundleError(f"cannot read '{path}' any more ({type(error).__name__}): check the file") from error
    if (*image.shape, 1)[:3] != tuple(shape):
        raise BundleError(f"'{path}' has changed since it was read: run again when it is complete")
    return image


def _take_geometry(header: nib.Nifti1Header, original: nib.Nifti1Header) -> None:
    """Both transforms with their codes, field by field, since some programs read one and some the other."""
    for field in (*_FORM_FIELDS, "xyzt_units"):
        header[field] = original[field]
    header["pixdim"][:4] = original["pixdim"][:4]


def _place_in_scanner(image: nib.Nifti1Image) -> None:
    """Say that the affine leads to the coordinates of the scanner, as DICOM has them; shear in the sform alone."""
    image.set_sform(image.affine, code="scanner")
    image.set_qform(image.affine, code="scanner")
    if not np.allclose(image.get_qform(), image.affine, atol=_QFORM_TOLERANCE):  # which holds no shear
        image.set_qform(image.affine, code="unknown")
