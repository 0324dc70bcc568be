"""What a detection leaves in an archive: segmentation, parametric map, fused overlay and structured report.

All objects stand in the study of their source images, with its patient and frame of reference, refer to the images they
were made from, and say which algorithm, version and model made them. Arrays are [slices, rows, columns] in the order of
:func:`bundle.dicom.series.read_headers`, and so are the ``sources``: the single-frame headers of a series, or the one
header of a multi-frame image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import highdicom as hd
import numpy as np
from highdicom import seg, sr
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import RLELossless
from pydicom.valuerep import TM

from bundle.dicom.series import PRODUCT, slice_places, volume_geometry
from bundle.results import CaseResult, SliceResult

MANUFACTURER = "dinov3_spatial_ar team"
SCHEME = "99DINOV3AR"  # of the concepts that no public scheme has
ANOMALY_SCORE = Code("anomaly-score", SCHEME, "Anomaly score")
THRESHOLD = Code("anomaly-threshold", SCHEME, "Threshold of the anomaly score")
SLICE_SCORE = Code("slice-anomaly-score", SCHEME, "Anomaly score of a slice")
ABOVE = Code("anomaly-finding", SCHEME, "Score above threshold")
UNLIKE = Code("unlike-training-data", SCHEME, "Unlike the training data")
UNLIKE_REASON = Code("unlike-reason", SCHEME, "Reason for being unlike the training data")
REASONS = {
    "modality": Code("other-modality", SCHEME, "Another modality than in training"),
    "sequence": Code("other-sequence", SCHEME, "Another sequence than in training"),
    "contrast": Code("other-contrast", SCHEME, "Another contrast than in training"),
    "kernel": Code("other-kernel", SCHEME, "Another kernel than in training"),
    "scheme": Code("other-intensities", SCHEME, "Intensities read in another way than in training"),
    "appearance": Code("other-appearance", SCHEME, "Looks unlike healthy training images"),
}
Z_SCORE = Code("anomaly-z-score", SCHEME, "Z-score among healthy patches")
_GRAY_LEVELS = 2**16 - 1
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
_LARGEST_NUMBER = 2**31 - 1  # of a series


MASK_FILE, MAP_FILE, REPORT_FILE = "{}_seg.dcm", "{}_heatmap.dcm", "{}_report.dcm"
OVERLAY_FOLDER, OVERLAY_FILE = "{}_overlay", "IM{:04d}.dcm"


class Algorithm(NamedTuple):
    """What made a result.

    Attributes:
        version: of this bundle.
        weights: SHA-256 of the backbone's weights, or what stands for it.
        model: SHA-256 of the trained model's file.
    """

    version: str
    weights: str
    model: str


def write_objects(
    stem: str | os.PathLike,
    sources: Sequence[Dataset],
    result: CaseResult,
    pictures: np.ndarray,
    algorithm: Algorithm,
    worst_slices: int = 3,
    with_segmentation: bool = True,
) -> None:
    """Write the objects of a series: ``STEM_seg.dcm``, ``STEM_heatmap.dcm``, ``STEM_report.dcm``, ``STEM_overlay/``.

    Args:
        stem: path and first part of the names.
        sources: headers of the series, which are completed in place where something of patient or study is missing.
        result: with the map on the axes of the series, its slices in the order of ``sources``.
        pictures: [slices, rows, columns, 3] uint8, the slices under their heat map.
        algorithm: what found the result.
        worst_slices: how many slices the report names; none where the network saw those of another plane.
        with_segmentation: whether the mask is written, which calls what it marks a lesion.

    Raises:
        BundleError: if the images have no position in a patient.
    """
    sources = [_completed(source) for source in sources]
    mask = segmentation(sources, result.mask.T, algorithm) if with_segmentation else None
    if mask is not None:
        mask.save_as(MASK_FILE.format(stem))
    anomaly_map = result.restored.values.T
    parametric_map(sources, anomaly_map, result.threshold, algorithm).save_as(MAP_FILE.format(stem))
    worst = result.worst(worst_slices) if result.shows_stored_slices else []
    report(sources, result, worst, mask, algorithm).save_as(REPORT_FILE.format(stem))
    folder = Path(OVERLAY_FOLDER.format(stem))
    folder.mkdir()
    for number, image in enumerate(overlay_series(sources, pictures, algorithm), start=1):
        image.save_as(folder / OVERLAY_FILE.format(number))


def segmentation(sources: Sequence[Dataset], mask: np.ndarray, algorithm: Algorithm) -> seg.Segmentation:
    """The mask as a binary DICOM SEG with the one segment 'anomaly'.

    Args:
        sources: of ``mask``.
        mask: [slices, rows, columns] bool; may be empty.
        algorithm: what made it.
    """
    segment = seg.SegmentDescription(
        segment_number=1,
        segment_label="anomaly",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_identification(algorithm),
        tracking_uid=hd.UID(),
        tracking_id="anomaly",
    )
    measures = _measures(sources)
    written = seg.Segmentation(
        source_images=list(sources),
        pixel_array=_as_stored(sources, mask.astype(np.uint8)),
        pixel_measures=measures,
        segmentation_type=seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        content_label="ANOMALY",
        content_description="Where the anomaly map exceeds the threshold of the model",
        omit_empty_frames=bool(mask.any()),
        **_series(sources, 1, "Anomaly mask"),
        **_equipment(algorithm),
    )
    _tell_spacing(written, measures)
    return written


def parametric_map(
    sources: Sequence[Dataset], anomaly_map: np.ndarray, threshold: float, algorithm: Algorithm
) -> hd.pm.ParametricMap:
    """The anomaly map as a DICOM Parametric Map.

    Values are stored in 16 bits with a real world value map (slope and intercept), since few viewers show float pixels;
    they come back to 1/65535 of their range. The window makes the threshold middle gray, as in all pictures.

    Args:
        sources: of ``anomaly_map``.
        anomaly_map: [slices, rows, columns] float, z-scores among healthy patches.
        threshold: of the mask.
        algorithm: what made it.
    """
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    slope = (high - low) / _GRAY_LEVELS or 1.0
    stored = np.round((anomaly_map - low) / slope).astype(np.uint16)
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="ANOMALY",
        lut_explanation="Z-score among healthy patches",
        unit=codes.UCUM.NoUnits,
        value_range=(0, _GRAY_LEVELS),
        slope=slope,
        intercept=low,
        quantity_definition=Z_SCORE,
    )
    measures = _measures(sources)
    written = hd.pm.ParametricMap(
        source_images=list(sources),
        pixel_array=_as_stored(sources, stored),
        pixel_measures=measures,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[_window(threshold, low, slope)],
        content_label="ANOMALY",
        content_description="Z-score among healthy patches",
        contributing_equipment=[_contribution(algorithm)],
        **_series(sources, 2, "Anomaly map"),
        **_equipment(algorithm),
    )
    written.Laterality = sources[0].get("Laterality", "")  # type 2C: empty where it is unknown
    _tell_spacing(written, measures)
    return written


def overlay_series(sources: Sequence[Dataset], pictures: np.ndarray, algorithm: Algorithm) -> list[Dataset]:
    """Slices under their heat map as a series of color images (Secondary Capture) that every viewer shows.

    Args:
        sources: of ``pictures``.
        pictures: [slices, rows, columns, 3] uint8.
        algorithm: what made them.

    Returns:
        One image a slice, with position and orientation, so that viewers link and scroll it with its source.
    """
    geometry = volume_geometry(sources)
    common = _series(sources, 3, "Anomaly overlay") | {"manufacturer": MANUFACTURER}
    images: list[Dataset] = []
    for index, ((source, frame), picture) in enumerate(zip(slice_places(sources), pictures, strict=True)):
        image = hd.sc.SCImage.from_ref_dataset(
            source,
            pixel_array=np.ascontiguousarray(picture),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=_row_and_column_direction(geometry),
            pixel_spacing=geometry.pixel_spacing,  # type: ignore[arg-type]  # its hint says int
            transfer_syntax_uid=RLELossless,
            **common | {"sop_instance_uid": hd.UID(), "instance_number": index + 1},
        )
        _sign(image, algorithm)
        image.copy_patient_and_study_information(source)
        for keyword in _LOSSY:
            if keyword in source:
                image[keyword] = source[keyword]
        image.Laterality = source.get("Laterality", "")
        image.DerivationDescription = f"{PRODUCT} {algorithm.version}; {_hashes(algorithm)}"
        image.ImageType = ["DERIVED", "SECONDARY", "OVERLAY"]
        image.SourceImageSequence = [_reference(source, frame)]
        image.FrameOfReferenceUID = source.FrameOfReferenceUID
        image.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "")
        plane = geometry.get_plane_position(index)[0]
        image.ImagePositionPatient = plane.ImagePositionPatient
        image.ImageOrientationPatient = geometry.get_plane_orientation()[0].ImageOrientationPatient
        image.SliceThickness = str(round(geometry.spacing_between_slices, 6))
        images.append(image)
    return images


def report(
    sources: Sequence[Dataset],
    result: CaseResult,
    worst: Sequence[SliceResult],
    mask: Dataset | None,
    algorithm: Algorithm,
) -> sr.ComprehensiveSR:
    """A structured report (TID 1500) of the score, the worst slices, and whether the case is like the training data.

    Args:
        sources: of the slices.
        result: with score and threshold.
        worst: the slices to name, the worst first.
        mask: the segmentation, as evidence; None if there is none.
        algorithm: what found the result.
    """
    score, image_threshold = result.score, result.image_threshold
    identification = sr.AlgorithmIdentification(
        name=PRODUCT,
        version=algorithm.version,
        parameters=[f"weights sha256 {algorithm.weights}", f"model sha256 {algorithm.model}"],
    )
    study = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(hd.UID(), "study"),
        algorithm_id=identification,
        measurements=[
            sr.Measurement(name=name, value=float(value), unit=codes.UCUM.NoUnits)
            for name, value in ((ANOMALY_SCORE, score), (THRESHOLD, image_threshold))
            if np.isfinite(value)
        ],
        qualitative_evaluations=_evaluations(result) or None,
    )
    places = slice_places(sources)
    slices = [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(hd.UID(), _shown_as(*places[named.index])),
            source_images=[_source_image(*places[named.index])],
            algorithm_id=identification,
            measurements=[sr.Measurement(name=SLICE_SCORE, value=named.score, unit=codes.UCUM.NoUnits)],
        )
        for named in worst
    ]
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=hd.UID(), name=PRODUCT, manufacturer_name=MANUFACTURER, model_name=PRODUCT
        ),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[study, *slices],
        title=codes.DCM.ImagingMeasurementReport,
    )
    written = sr.ComprehensiveSR(
        evidence=[*sources, *([] if mask is None else [mask])],
        content=content[0],
        is_complete=True,
        manufacturer=MANUFACTURER,
        **_series(sources, 4, "Anomaly report"),
    )
    _sign(written, algorithm)
    return written


def _evaluations(result: CaseResult) -> list[sr.QualitativeEvaluation]:
    """What the report says in words, as far as the model can tell."""
    answers: list[tuple[Code, Code]] = []
    if np.isfinite(result.image_threshold):
        answers.append((ABOVE, codes.SCT.Yes if result.score > result.image_threshold else codes.SCT.No))
    if result.unlike is not None:
        answers.append((UNLIKE, codes.SCT.Yes if result.unlike else codes.SCT.No))
        answers += [(UNLIKE_REASON, REASONS[reason.kind]) for reason in result.unlike]
    return [sr.QualitativeEvaluation(name=name, value=value) for name, value in answers]


def _completed(source: Dataset) -> Dataset:
    """``source`` with what is missing or malformed of patient and study left empty, since it would be copied."""
    source.decode()
    source.SpecificCharacterSet = "ISO_IR 192"
    for keyword in (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "StudyID",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "ReferringPhysicianName",
    ):
        if keyword not in source:
            setattr(source, keyword, "")
    source.SliceThickness = source.get("SliceThickness")  # highdicom reads it, whether it is there or not
    if source.PatientSex not in ("M", "F", "O"):
        source.PatientSex = ""
    for keyword in ("PatientBirthDate", "StudyDate"):
        if not re.fullmatch(r"\d{8}", str(source[keyword].value or "")):
            setattr(source, keyword, "")
    try:
        TM(source.StudyTime or None)
    except ValueError:
        source.StudyTime = ""
    return source


def _as_stored(sources: Sequence[Dataset], array: np.ndarray) -> np.ndarray:
    """``array`` in the order of slices or frames that ``sources`` have, by which highdicom refers to them."""
    frames = [frame for _, frame in slice_places(sources) if frame is not None]
    if not frames:
        return array
    stored = np.empty_like(array)
    stored[np.array(frames) - 1] = array
    return stored


def _measures(sources: Sequence[Dataset]) -> hd.PixelMeasuresSequence:
    grid = volume_geometry(sources)
    return hd.PixelMeasuresSequence(
        pixel_spacing=grid.pixel_spacing,
        slice_thickness=float(sources[0].get("SliceThickness") or grid.spacing_between_slices),
        spacing_between_slices=grid.spacing_between_slices,
    )


def _tell_spacing(written: Dataset, measures: hd.PixelMeasuresSequence) -> None:
    """highdicom drops the distance of slices where positions are rounded; readers need it."""
    told = written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    told.SpacingBetweenSlices = measures[0].SpacingBetweenSlices


def _series(sources: Sequence[Dataset], number: int, description: str) -> dict[str, Any]:
    """A series of its own beside that of the sources."""
    source = int(sources[0].get("SeriesNumber") or 0)
    return {
        "series_instance_uid": hd.UID(),
        "series_number": number + (source * 100 if 0 < source < _LARGEST_NUMBER // 100 else 0),
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "series_description": f"{description} ({PRODUCT}, research)",
    }


def _equipment(algorithm: Algorithm) -> dict[str, Any]:
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": PRODUCT,
        "software_versions": algorithm.version,
        "device_serial_number": algorithm.model[:16],
    }


def _sign(written: Dataset, algorithm: Algorithm) -> None:
    """The equipment, where highdicom takes its maker only."""
    written.ManufacturerModelName = PRODUCT
    written.SoftwareVersions = algorithm.version
    written.DeviceSerialNumber = algorithm.model[:16]


def _identification(algorithm: Algorithm) -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence(
        name=PRODUCT,
        family=codes.DCM.ArtificialIntelligence,
        version=algorithm.version,
        source=MANUFACTURER,
        parameters={"weights sha256": algorithm.weights, "model sha256": algorithm.model},
    )


def _contribution(algorithm: Algorithm) -> hd.ContributingEquipment:
    return hd.ContributingEquipment(
        MANUFACTURER,
        codes.DCM.ProcessingEquipment,
        manufacturer_model_name=PRODUCT,
        software_versions=algorithm.version,
        contribution_description=_hashes(algorithm),
    )


def _hashes(algorithm: Algorithm) -> str:
    return f"weights sha256 {algorithm.weights}; model sha256 {algorithm.model}"


def _window(threshold: float, low: float, slope: float) -> hd.VOILUTTransformation:
    """The threshold in the middle, the mean of healthy patches black."""
    center = (threshold - low) / slope if np.isfinite(threshold) else _GRAY_LEVELS / 2
    width = 2 * threshold / slope if np.isfinite(threshold) and threshold > 0 else _GRAY_LEVELS
    return hd.VOILUTTransformation(window_center=round(center, 3), window_width=max(1.0, round(width, 3)))


def _row_and_column_direction(geometry: hd.VolumeGeometry) -> tuple[str, str]:
    directions = geometry.get_closest_patient_orientation()
    return directions[2].value, directions[1].value


def _shown_as(source: Dataset, frame: int | None) -> str:
    """What viewers call a slice."""
    return f"instance {source.get('InstanceNumber', '?')}" if frame is None else f"frame {frame}"


def _reference(source: Dataset, frame: int | None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if frame is not None:
        item.ReferencedFrameNumber = frame
    return item


def _source_image(source: Dataset, frame: int | None) -> sr.SourceImageForMeasurementGroup:
    frames = None if frame is None else [frame]
    return sr.SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID, frames)
