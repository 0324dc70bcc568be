"""The steps of the application that the App SDK does not have, or does with a geometry that is not checked."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from monai.deploy.core import AppContext, Image, Operator, OperatorSpec
from monai.deploy.core.domain.dicom_series import DICOMSeries
from monai.deploy.core.domain.dicom_series_selection import SelectedSeries, StudySelectedSeries
from monai.deploy.core.domain.dicom_study import DICOMStudy
from monai.deploy.operators import DICOMDataLoaderOperator, DICOMSeriesSelectorOperator, DICOMSeriesToVolumeOperator
from pydicom import Dataset
from pydicom.misc import is_dicom

from bundle import __version__
from bundle.dicom.objects import Algorithm, write_objects
from bundle.dicom.selection import SeriesRule, choose
from bundle.dicom.series import group_series, is_tilted, read_headers, read_volume
from bundle.dicom.words import header_words
from bundle.errors import BundleError
from bundle.figures import blend_slices
from bundle.learned import Learned, read_summary
from bundle.results import CaseResult, RestoredMap

STUDIES = "dicom_study_list"
SELECTED = "study_selected_series_list"
IMAGE = "image"
# what model.ts gives, see its metadata.json
FOUND = ("mask", "map", "slice_scores", "slice_counts", "score", "unlikeness", "shown")
STEM = "anomaly"  # of the names of all results
OURS = "dinov3_spatial_ar"

logger = logging.getLogger(OURS)


class StudyLoader(DICOMDataLoaderOperator):
    """Headers of a folder of DICOM files, by study and series.

    The SDK's own loader keeps one of several slices at a position and reads all pixels. Here nothing is dropped, since
    the check of the geometry must see it, and pixels are read of the selected series alone. Localizers come apart from
    the slices that they share a series with. Files that are no images to examine are passed over and counted.
    """

    def load_data_to_studies(self, input_path: Path) -> list[DICOMStudy]:
        """The studies in ``input_path``, at any depth.

        Raises:
            BundleError: if there is no image, or a DICOM file cannot be read: it may be a slice.
        """
        files = sorted(file for file in Path(input_path).rglob("*") if file.is_file())
        dicom = list(filter(_is_dicom, files))
        choice = choose(group_series(dicom))
        choice.no_images.update({"another format": len(files) - len(dicom)} if len(dicom) < len(files) else {})
        studies: dict[str, DICOMStudy] = {}
        for index, group in enumerate(choice.series):
            header = read_headers(group.files[:1])[0]
            study = studies.setdefault(header.StudyInstanceUID, DICOMStudy(header.StudyInstanceUID))
            study.add_series(_series(f"{index}", header, group.files))
        if not studies:
            raise BundleError(f"'{input_path}' holds no DICOM image: give the folder of a study with --input")
        if choice.passes_over:
            logger.info("passed over %s", choice)
        return list(studies.values())


def _series(key: str, header: Dataset, files: list[Path]) -> DICOMSeries:
    """A series of the SDK, whose rules look into ``header`` for all attributes but these.

    Args:
        key: tells it from a series of the same UID in its study: a localizer, or another multi-frame image.
        header: of the first file.
        files: all of it; a multi-frame image counts as many images as it has frames.
    """
    series = DICOMSeries(key)
    series.SeriesInstanceUID = header.SeriesInstanceUID
    series.PatientPosition = header.get("PatientPosition")
    for file in files * int(header.get("NumberOfFrames") or 1):
        instance = Dataset() if file != files[0] else header
        instance.filename = str(file)
        series.add_sop_instance(instance)
    return series


class SeriesSelector(DICOMSeriesSelectorOperator):
    """The one series that the selections of ``app.yaml`` choose, by :class:`bundle.dicom.selection.SeriesRule`.

    Args:
        context: with the model, which knows what it has learned from.
    """

    def __init__(self, fragment: Any, *args: Any, context: AppContext, **kwargs: Any) -> None:
        self.context = context
        super().__init__(fragment, *args, **kwargs)

    def filter(
        self,
        selection_rules: dict[str, Any],
        dicom_study_list: list[DICOMStudy],
        all_matched: bool = True,
        sort_by_sop_instance_count: bool = True,
    ) -> list[StudySelectedSeries]:
        """The series with most images of those that fit the first selection that any fits.

        Raises:
            BundleError: if no series fits, those of more than one study do, or a selection is not understood.
        """
        learned = read_summary(self.context.models.get().predictor.detector.case_likeness.summary)
        series = [(study, one) for study in dicom_study_list for one in study.get_all_series()]
        passed_over = []
        for name, rule in _rules(selection_rules["selections"], learned):
            misfits = [rule.misfit(_header(one)) for _, one in series]
            fitting = [pair for pair, misfit in zip(series, misfits, strict=True) if misfit is None]
            if fitting:
                break
            passed_over.append(f"{name}: {', '.join(sorted(set(filter(None, misfits))))}")
        else:
            raise BundleError(
                f"none of {len(series)} series matches the selections of app.yaml ({'; '.join(passed_over)}): give "
                "another study, or change them"
            )
        studies = {study.StudyInstanceUID for study, _ in fitting}
        if len(studies) > 1:
            raise BundleError(f"series of {len(studies)} studies match the selections of app.yaml: give one study")
        study, chosen = max(fitting, key=lambda pair: len(pair[1].get_sop_instances()))
        logger.info("selection '%s': 1 series of %d, %d passed over", name, len(series), len(series) - 1)
        only = StudySelectedSeries(study)
        only.add_selected_series(SelectedSeries(name, chosen, None))
        return [only]


def _rules(selections: Any, learned: Learned) -> list[tuple[str, SeriesRule]]:
    """The rules of ``app.yaml`` by name."""
    try:
        return [(str(one["name"]), SeriesRule(one["conditions"], learned.unseen)) for one in selections]
    except (BundleError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(
            f"the selections of app.yaml are not understood ({error}): see the examples in that file"
        ) from error


def _header(series: DICOMSeries) -> Dataset:
    """Of its first file."""
    return series.get_sop_instances()[0].get_native_sop_instance()


class VolumeReader(DICOMSeriesToVolumeOperator):
    """The selected series as a volume, of which position and order of every slice have been checked."""

    def convert_to_image(self, study_selected_series_list: list[StudySelectedSeries]) -> Image:
        """The volume [C, x, y, slices] with an affine to RAS.

        Raises:
            BundleError: if the series is no straight volume, or has no position.
        """
        selected = study_selected_series_list[0].selected_series[0]
        volume = read_volume(files_of(selected.series))
        if volume.pixels.shape[-1] < 2:
            raise BundleError(
                "the selected series has one slice: a volume is needed, change the selections of app.yaml"
            )
        if is_tilted(volume.affine, volume.pixels.shape[-1]):
            raise BundleError(
                "the selected series was taken with a tilted gantry, which this application does not read: give it to "
                "the command inferring"
            )
        selected.image = Image(
            volume.pixels,
            {
                "affine": volume.affine,
                "original_affine": volume.affine,
                "original_channel_dim": 0,
                "Modality": volume.modality,
            },
        )
        return selected.image


class ResultWriter(Operator):
    """Writes what was found as DICOM objects: all of them, or, where something fails, none.

    Args:
        context: with the model and the folder of the results.
        worst_slices: how many the report names.
        segment_unlike: whether a series that is unlike the training data gets a segmentation.
    """

    def __init__(
        self, fragment: Any, *args: Any, context: AppContext, worst_slices: int, segment_unlike: bool, **kwargs: Any
    ) -> None:
        self.context = context
        self.worst_slices = worst_slices
        self.segment_unlike = segment_unlike
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Inputs: the series, and all that ``model.ts`` gives of it."""
        for name in (SELECTED, *FOUND):
            spec.input(name)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the objects."""
        series = op_input.receive(SELECTED)[0].selected_series[0].series
        model = self.context.models.get()
        found = {name: op_input.receive(name) for name in FOUND}
        sources = read_headers(files_of(series))
        result = as_result(found, model.predictor, sources[0])
        air = float(model.predictor.detector.foreground.air)
        pictures = blend_slices(found["shown"], result.restored.values, result.threshold, air)
        segments = self.segment_unlike or not result.unlike
        if result.unlike:
            logger.warning("%s%s", result.doubt("the series"), "" if segments else "; no segmentation is written")
        output = Path(self.context.output_path)
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as folder:
            stem, algorithm = Path(folder) / STEM, algorithm_of(model)
            write_objects(stem, sources, result, pictures, algorithm, self.worst_slices, with_segmentation=segments)
            for item in sorted(Path(folder).iterdir()):
                target = output / item.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(item, target)
        logger.info("score %.2f, image threshold %.2f", result.score, result.image_threshold)


def as_result(found: dict[str, Any], study_detector: Any, header: Dataset) -> CaseResult:
    """What ``model.ts`` gave.

    Args:
        found: by names in :data:`FOUND`, on the axes [C, x, y, slices] of the series; of scores and counts all axes but
            that of the network's slices have length 1.
        study_detector: the scripted :class:`~scripts.integrations.monai_deploy.study.StudyDetector`, for the
            thresholds and what it was learned from.
        header: of the first slice.

    Raises:
        BundleError: if the map is not finite.
    """
    anomaly_map, scores = found["map"], found["slice_scores"][0]
    if not np.isfinite(anomaly_map).all():
        raise BundleError("the anomaly map is not finite: make model.ts anew, from another checkpoint")
    likeness = study_detector.detector.case_likeness
    unlikeness = float(found["unlikeness"])
    read = found["mask"].metadata()  # of the image, as the preprocessing left it
    meta = {
        "modality": read["Modality"],
        "intensity_scheme": read["intensity_scheme"],
        "words": header_words(header),
    }
    learned = read_summary(likeness.summary) if likeness.summary.numel() else None
    axis = 2 if scores.shape[2] == scores.size else int(np.argmax(scores.shape))
    return CaseResult(
        name=STEM,
        path="",
        anomaly_map=np.moveaxis(anomaly_map, axis + 1, -1),
        slice_scores=scores.ravel(),
        slice_counts=found["slice_counts"].ravel() > 0,
        threshold=float(study_detector.detector.threshold),
        image_threshold=float(study_detector.detector.image_threshold),
        on_file=RestoredMap(anomaly_map[0], axis, tuple(range(scores.size))),
        unlike=learned and learned.reasons(unlikeness, float(likeness.volume_threshold), meta),
        unlikeness=unlikeness,
    )


def algorithm_of(model: Any) -> Algorithm:
    """What a model of the SDK says of itself."""
    identity = json.loads(bytes(model.predictor.detector.identity.tolist()))
    with open(model.path, "rb") as stream:
        return Algorithm(__version__, str(identity["weights"]), hashlib.file_digest(stream, "sha256").hexdigest())


def files_of(series: DICOMSeries) -> list[Path]:
    """The files of a series that :class:`StudyLoader` made."""
    names = (instance.get_native_sop_instance().filename for instance in series.get_sop_instances())
    return [Path(name) for name in dict.fromkeys(names)]


def _is_dicom(file: Path) -> bool:
    """By its suffix, since a damaged file is no DICOM by its content, or by its content."""
    return file.name.upper() != "DICOMDIR" and (file.suffix.lower() == ".dcm" or is_dicom(file))
