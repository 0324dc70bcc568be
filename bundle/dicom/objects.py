"""What a detection leaves in an archive: segmentation, parametric map, fused overlay and structured report.

All objects stand in the study of their source images, with its patient and frame of reference, refer to the images they
were made from, and say which algorithm, version and model made them. Images without a place in a patient, such as
radiographs, get overlay and report only. Arrays are [slices, rows, columns] in the order of
:func:`bundle.dicom.series.read_headers`, and so are the ``sources``: the single-frame headers of a series, or the one
header of a multi-frame image.
"""

from __future__ import annotations

import logging
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
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pydicom.valuerep import TM, DSfloat

from bundle.dicom.series import PRODUCT, lacks_of_place, slice_places, slice_positions, volume_geometry
from bundle.results import OUTLINE, CaseResult, SliceResult, heat

MANUFACTURER = "dinov3_spatial_ar team"
SCHEME = "99DINOV3AR"  # of the concepts that no public scheme has
REPORT = Code("anomaly-report", SCHEME, "Anomaly report")
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
    "plane": Code("other-plane", SCHEME, "Slices of another plane than in training"),
    "scheme": Code("other-intensities", SCHEME, "Intensities read in another way than in training"),
    "appearance": Code("other-appearance", SCHEME, "Looks unlike healthy training images"),
}
HEAT = Code("anomaly-heat", SCHEME, "Anomaly from 0 to 1, 0.5 at the threshold")
# by defined terms of BodyPartExamined
_NAMED = ("Abdomen", "Brain", "Breast", "Chest", "Hand", "Head", "Heart", "Knee", "Liver", "Neck", "Pelvis", "Spine")
REGIONS = {name.upper(): getattr(codes.SCT, name) for name in _NAMED}
DEVIATIONS = Code("{SD}", "UCUM", "standard deviations above healthy images")
# how a SEG stores the voxels of a mask
BITS: dict[str, Any] = {"segmentation_type": seg.SegmentationTypeValues.BINARY}
BYTES: dict[str, Any] = {
    "segmentation_type": seg.SegmentationTypeValues.FRACTIONAL,
    "fractional_type": seg.SegmentationFractionalTypeValues.OCCUPANCY,
    "max_fractional_value": 1,
}
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
_LARGEST_NUMBER = 2**31 - 1  # of a series

logger = logging.getLogger(__name__)

MASK_FILE, MAP_FILE, REPORT_FILE = "{}_seg.dcm", "{}_heatmap.dcm", "{}_report.dcm"
OVERLAY_FOLDER, OVERLAY_FILE = "{}_overlay", "IM{:04d}.dcm"


class Algorithm(NamedTuple):
    """What made a result.

    Attributes:
        version: of this bundle.
        weights: SHA-256 of the backbone's weights, or what stands for it.
        model: SHA-256 of the trained model's file.
        cut_plane: see :class:`~bundle.results.CaseResult`.
    """

    version: str
    weights: str
    model: str
    cut_plane: str = ""

    @property
    def parameters(self) -> dict[str, str]:
        """What else it was given, in words, by name."""
        hashes = {"weights sha256": self.weights, "model sha256": self.model}
        return hashes | ({"cut plane": self.cut_plane} if self.cut_plane else {})


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
    """
    sources = [_completed(source) for source in sources]
    algorithm = algorithm._replace(cut_plane=result.cut_plane)
    mask = None
    if lacking := lacks_of_place(sources):
        logger.warning(
            f"'{result.path}' has no {lacking}, which segmentation and parametric map need: its DICOM results are "
            "report and overlay"
        )
    else:
        if with_segmentation:
            mask = segmentation(sources, result.mask.T, algorithm)
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
    """The mask as a DICOM SEG with the one segment 'anomaly'.

    Its voxels are bits, which all readers know, where every frame fills its last byte. Where it does not, the next one
    begins within a byte: OHIF 3.13.2 takes its bits from the wrong end, and Orthanc serves no single frame. There the
    SEG is a fractional one of the values 0 and 1, which the same readers take for the same mask.

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
        display_color=hd.color.CIELabColor.from_rgb(*OUTLINE),
    )
    measures = _measures(sources)
    written = seg.Segmentation(
        source_images=list(sources),
        pixel_array=_as_stored(sources, mask.astype(np.uint8)),
        pixel_measures=measures,
        **BITS if mask[0].size % 8 == 0 else BYTES,
        segment_descriptions=[segment],
        content_label="ANOMALY",
        content_description="Where the anomaly map exceeds the threshold of the model",
        omit_empty_frames=bool(mask.any()),
        **_series(sources, 1, "Anomaly mask"),
        **_equipment(algorithm),
    )
    _tell_spacing(written, measures)
    _pad(written)
    return written


def parametric_map(
    sources: Sequence[Dataset], anomaly_map: np.ndarray, threshold: float, algorithm: Algorithm
) -> hd.pm.ParametricMap:
    """The anomaly map as a DICOM Parametric Map, as viewers take it.

    Values are :func:`~bundle.results.heat`, from 0 to 1: OHIF multiplies maps by 100 and shows 0 to 100, whatever the
    object says. They are floats, since OHIF and dcmqi misread integers. Frames ascend along the normal: both rely on
    that.

    Args:
        sources: of ``anomaly_map``.
        anomaly_map: [slices, rows, columns] float, z-scores among healthy patches.
        threshold: of the mask.
        algorithm: what made it.
    """
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="ANOMALY",
        lut_explanation=_scale_in_words(threshold),
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, 1.0),
        slope=1.0,
        intercept=0.0,
        quantity_definition=HEAT,
    )
    measures = _measures(sources)
    written = hd.pm.ParametricMap(
        source_images=list(sources),
        pixel_array=_as_stored(sources, heat(anomaly_map, threshold).astype(np.float32)),
        pixel_measures=measures,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=0.5, window_width=1.0)],
        content_label="ANOMALY",
        content_description="Anomaly from 0 to 1; 0.5 is the threshold",
        contributing_equipment=[_contribution(algorithm)],
        **_series(sources, 2, "Anomaly map"),
        **_equipment(algorithm),
    )
    _ascend(written)
    written.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = [_anatomy(sources[0])]
    _tell_spacing(written, measures)
    return written


def overlay_series(sources: Sequence[Dataset], pictures: np.ndarray, algorithm: Algorithm) -> list[Dataset]:
    """Slices under their heat map as a series of color images (Secondary Capture) that every viewer shows.

    Args:
        sources: of ``pictures``.
        pictures: [slices, rows, columns, 3] uint8.
        algorithm: what made them.

    Returns:
        One image a slice, with position and orientation if its source has them, so that viewers link and scroll both.
    """
    geometry = None if lacks_of_place(sources) else volume_geometry(sources)
    positions = slice_positions(sources) if geometry else np.empty((0, 3))
    common = _series(sources, 3, "Anomaly overlay") | {"manufacturer": MANUFACTURER}
    images: list[Dataset] = []
    for index, ((source, frame), picture) in enumerate(zip(slice_places(sources), pictures, strict=True)):
        image = hd.sc.SCImage.from_ref_dataset(
            source,
            pixel_array=np.ascontiguousarray(picture),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=_row_and_column_direction(geometry) if geometry else ("L", "P"),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **common | {"sop_instance_uid": hd.UID(), "instance_number": _number_of(source, frame) or index + 1},
        )
        _sign(image, algorithm)
        image.copy_patient_and_study_information(source)
        for keyword in _LOSSY:
            if keyword in source:
                image[keyword] = source[keyword]
        image.Laterality = source.get("Laterality", "")
        image.DerivationDescription = f"{PRODUCT} {algorithm.version}; {'; '.join(_parameters(algorithm))}"
        image.ImageType = ["DERIVED", "SECONDARY", "OVERLAY"]
        image.SourceImageSequence = [_reference(source, frame)]
        if geometry:
            _place(image, source, geometry, positions[index])
        else:
            image.PatientOrientation = source.get("PatientOrientation")
            if source.get("PixelSpacing"):
                image.PixelSpacing = source.PixelSpacing
        # GDCM is ten times as fast, but ends the whole process at an odd number of pixels
        encoder = "pydicom" if image.Rows * image.Columns % 2 else "gdcm"
        image.compress(RLELossless, encoding_plugin=encoder, generate_instance_uid=False)
        images.append(image)
    return images


def _place(image: Dataset, source: Dataset, geometry: hd.VolumeGeometry, position: np.ndarray) -> None:
    """Put ``image`` at the ``position`` [3] of its slice."""
    image.FrameOfReferenceUID = source.FrameOfReferenceUID
    image.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "")
    plane = hd.PlanePositionSequence(hd.CoordinateSystemNames.PATIENT, position.tolist())[0]
    image.ImagePositionPatient = plane.ImagePositionPatient
    image.ImageOrientationPatient = geometry.get_plane_orientation()[0].ImageOrientationPatient
    image.PixelSpacing = [DSfloat(side, auto_format=True) for side in geometry.pixel_spacing]
    image.SliceThickness = str(round(geometry.spacing_between_slices, 6))


def report(
    sources: Sequence[Dataset],
    result: CaseResult,
    worst: Sequence[SliceResult],
    mask: Dataset | None,
    algorithm: Algorithm,
) -> sr.ComprehensiveSR:
    """A structured report (TID 1500) of the score, the worst slices, and whether the case is like the training data.

    Comments say what a score means. Numbers have two decimals, which is more than they are sure of. The title is one of
    its own, which PS3.16 lets a measurement report have: OHIF shows an 'Imaging Measurement Report' as drawings only.

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
        parameters=_parameters(algorithm),
    )
    study = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(hd.UID(), "study"),
        algorithm_id=identification,
        measurements=[
            sr.Measurement(name=name, value=round(float(value), 2), unit=DEVIATIONS)
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
            measurements=[sr.Measurement(name=SLICE_SCORE, value=round(named.score, 2), unit=DEVIATIONS)],
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
        title=REPORT,
    )
    content[0].ContentSequence += [
        sr.TextContentItem(codes.DCM.Comment, text, sr.RelationshipTypeValues.CONTAINS) for text in _comments(result)
    ]
    _separate(content[0])
    written = sr.ComprehensiveSR(
        evidence=[*sources, *([] if mask is None else [mask])],
        content=content[0],
        is_complete=True,
        manufacturer=MANUFACTURER,
        **_series(sources, 4, "Anomaly report"),
    )
    _sign(written, algorithm)
    return written


def _comments(result: CaseResult) -> list[str]:
    """What a score means and what to doubt, for who reads the report."""
    found = [
        "Scores are standard deviations above the mean of healthy images. What exceeds the threshold is rare among "
        "healthy images like those that the model was trained on.",
        "For research only, no diagnosis. An anomaly can be an artifact or a normal variant, and a lesion can be "
        "missed.",
    ]
    if not result.shows_stored_slices:
        cut = f"{result.cut_plane} slices on request" if result.cut_plane else "slices of the model's plane"
        found.append(f"The volume was cut into {cut}, not those that were acquired, so that no slice is named here.")
    if result.unlike:
        found.append(f"To doubt: {result.doubt('the series')}.")
    return found


def _separate(item: Dataset) -> None:
    """Let viewers show one line for each value with its name, where highdicom asks for running text."""
    if item.ValueType == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    for child in item.get("ContentSequence", []):
        _separate(child)


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


def _pad(written: Dataset) -> None:
    """Let an odd number of bytes end in a null, as PS3.5 demands; OHIF takes highdicom's letter '0' for a voxel."""
    bits = written.NumberOfFrames * written.Rows * written.Columns * written.BitsAllocated
    if (length := -(-bits // 8)) % 2:
        written.PixelData = written.PixelData[:length] + b"\0"


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
        parameters=algorithm.parameters,
    )


def _contribution(algorithm: Algorithm) -> hd.ContributingEquipment:
    return hd.ContributingEquipment(
        MANUFACTURER,
        codes.DCM.ProcessingEquipment,
        manufacturer_model_name=PRODUCT,
        software_versions=algorithm.version,
        contribution_description="; ".join(_parameters(algorithm)),
    )


def _parameters(algorithm: Algorithm) -> list[str]:
    return [f"{name} {value}" for name, value in algorithm.parameters.items()]


def _scale_in_words(threshold: float) -> str:
    """How heat follows from z-scores."""
    return f"1 - 2^(-z / {threshold:.4g}), z-score among healthy patches"


def _ascend(written: Dataset) -> None:
    """Turn the order of frames around, which highdicom lets descend along the normal."""
    shape = (written.NumberOfFrames, written.Rows, written.Columns)
    written.FloatPixelData = np.frombuffer(written.FloatPixelData, "<f4").reshape(shape)[::-1].tobytes()
    frames = written.PerFrameFunctionalGroupsSequence = written.PerFrameFunctionalGroupsSequence[::-1]
    for number, frame in enumerate(frames, start=1):
        frame.FrameContentSequence[0].DimensionIndexValues = [number]


def _anatomy(source: Dataset) -> Dataset:
    """What part of the body is shown, as far as the source tells; dcmqi reads no map without it."""
    item = Dataset()
    part = REGIONS.get(str(source.get("BodyPartExamined", "")).upper(), codes.SCT.EntireBody)
    item.AnatomicRegionSequence = source.get("AnatomicRegionSequence") or [hd.sr.CodedConcept.from_code(part)]
    item.FrameLaterality = source.get("Laterality") or "U"
    return item


def _row_and_column_direction(geometry: hd.VolumeGeometry) -> tuple[str, str]:
    directions = geometry.get_closest_patient_orientation()
    return directions[2].value, directions[1].value


def _number_of(source: Dataset, frame: int | None) -> int | None:
    """The number by which viewers call a slice, if it has one."""
    return source.get("InstanceNumber") if frame is None else frame


def _shown_as(source: Dataset, frame: int | None) -> str:
    """What viewers call a slice."""
    return f"{'instance' if frame is None else 'frame'} {_number_of(source, frame) or '?'}"


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
