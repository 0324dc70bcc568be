"""What inference leaves for each input: maps, mask, overlay, DICOM objects, and lines in tables of scores."""

from __future__ import annotations

import logging
import os
import tempfile
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from PIL import Image, PngImagePlugin

from bundle import __version__
from bundle.distributed import gather
from bundle.errors import BundleError, check_choice
from bundle.figures import blend, heat, overlay, picture
from bundle.files import NIFTI_SUFFIXES, content_key, is_flat, write_csv
from bundle.networks.detector import Detector
from bundle.provenance import data_words, model_words
from bundle.tracking import Tracker

SCORE_COLUMNS = (
    "name",
    "image",
    "score",
    "worst_slices",
    "worst_instances",
    "max",
    "anomalous_share",
    "threshold",
    "image_threshold",
    "model",
    "data",
)
SLICE_COLUMNS = ("name", "slice", "instance", "score", "rank", "counts")
# all that may be written for an input
RESULTS = (
    "_map.nii.gz",
    "_mask.nii.gz",
    "_heatmap.nii.gz",
    "_map.tiff",
    "_mask.png",
    "_overlay.png",
    "_seg.dcm",
    "_heatmap.dcm",
    "_report.dcm",
    "_overlay",
)
_TIFF_DESCRIPTION = 270

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


class DetectionSaver:
    """A handler of the inference engine that writes what it found.

    For an input ``NAME``: ``NAME_map.nii.gz`` (float), ``NAME_mask.nii.gz`` (0 or 1) and ``NAME_heatmap.nii.gz`` (0 to
    255, 128 is the threshold) with the affine, shape and axes of the input, or ``NAME_map.tiff`` (32-bit float) and
    ``NAME_mask.png`` for flat images; ``NAME_overlay.png``, of the most anomalous slice; of DICOM, if wanted, the
    objects of :func:`bundle.dicom.objects.write_objects`. Files appear whole or not at all. At the end ``scores.csv``
    has a line for each input, and ``slice_scores.csv`` one for each slice of a volume.

    Args:
        output_dir: the folder; subfolders of the input are kept.
        detector: with the threshold of its checkpoint.
        dataset_dir: for the words about the data.
        tracker: its run opens with the first result and keeps ``scores.csv``.
        model_file: of the detector; DICOM objects tell its hash.
        write_dicom: write DICOM objects; cases must have passed :class:`~bundle.transforms.RequireDicomd`.
        worst_slices: how many slices ``scores.csv`` and the DICOM report name.
        on_error: ``raise``, or ``skip``: warn of results that cannot be written, count them, and go on.

    Raises:
        BundleError: if no slice is to be named.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        detector: Detector,
        dataset_dir: str | os.PathLike,
        tracker: Tracker,
        model_file: str | os.PathLike = "",
        write_dicom: bool = False,
        worst_slices: int = 3,
        on_error: str = "raise",
    ) -> None:
        if worst_slices < 1:
            raise BundleError(f"worst_slices is {worst_slices}: give at least 1")
        self.output_dir = Path(output_dir)
        self.detector = detector
        self.data = data_words(dataset_dir)
        self.tracker = tracker
        self.model_file = model_file
        self.write_dicom = write_dicom
        self.worst_slices = worst_slices
        self.skips = check_choice("on_error", on_error, ("raise", "skip")) == "skip"
        self.skipped = 0
        self.rows: list[dict[str, Any]] = []
        self.slice_rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register with the inference engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.save_batch)
        engine.add_event_handler(Events.COMPLETED, self.save_scores)

    def save_batch(self, engine: Engine) -> None:
        """Write the files of the current batch."""
        state: Any = engine.state
        for case, found in zip(state.batch, state.output, strict=True):
            try:
                self.save(case, found)
            except BundleError as error:
                if not self.skips:
                    raise
                logger.warning(f"skipped: {error}")
                self.skipped += 1
        if self.rows:
            self.tracker.start()  # only now: the first result need not wait until MLflow has its database

    def save(self, case: dict[str, Any], found: dict[str, Any]) -> None:
        """Write the files of one case.

        Args:
            case: with ``name`` and ``image`` [C, rows, columns, slices] in [0, 1].
            found: with ``pred_map`` [1, rows, columns, slices], ``pred_map_restored`` and ``image_restored`` on the
                axes of the file, ``pred_score``, ``pred_worst_slice``, ``pred_slice_scores`` and ``pred_slice_counts``.
        """
        threshold = float(self.detector.threshold)
        model = model_words(self.detector.describe())
        anomaly_map: MetaTensor = found["pred_map_restored"]
        values = anomaly_map.numpy()[0]
        path = str(anomaly_map.meta["filename_or_obj"])
        slices = slice_rows(case, found)
        worst = [one for one in sorted(slices, key=itemgetter("rank")) if one["counts"]][: self.worst_slices]
        row = {
            "name": case["name"],
            "image": path,
            "score": float(found["pred_score"]),
            "worst_slices": " ".join(str(one["slice"]) for one in worst),
            "worst_instances": " ".join(str(one["instance"]) for one in worst).strip(),
            "max": float(values.max()),
            "anomalous_share": float((values > threshold).mean()),
            "threshold": threshold,
            "image_threshold": float(self.detector.image_threshold),
            "model": model,
            "data": self.data,
        }
        instance = f" (instance {worst[0]['instance']})" if worst[0]["instance"] else ""
        place = f" slice {worst[0]['slice']}{instance}" if len(slices) > 1 else ""
        at = int(found["pred_worst_slice"])
        shown = overlay(
            picture(case["image"].as_tensor(), at),
            found["pred_map"].numpy()[0, ..., at],
            threshold,
            f"{case['name']}{place}: score {row['score']:.2f}, threshold {threshold:.2f}. {model}. {self.data}",
        )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".partial-") as folder:
            (new := Path(folder) / "new").mkdir()
            stem = new / Path(case["name"]).name
            if is_flat(path):
                _write_flat(stem, values, values > threshold, model)
            else:
                _write_volume(stem, values, threshold, anomaly_map.affine.numpy(), path, model)
            shown.save(f"{stem}_overlay.png")
            if self.write_dicom:
                self._write_dicom(stem, found, row, slices)
            _replace(self.output_dir / case["name"], stem, Path(folder) / "old")
        self.rows.append(row)
        if len(slices) > 1:
            self.slice_rows += slices

    def _write_dicom(
        self, stem: Path, found: dict[str, Any], row: dict[str, Any], slices: list[dict[str, Any]]
    ) -> None:
        from bundle.dicom.objects import Algorithm, Findings, write_objects  # highdicom is not everywhere

        image, anomaly_map = found["image_restored"].as_tensor(), found["pred_map_restored"].as_tensor()[0].numpy()
        threshold = row["threshold"]
        pictures = [
            blend(picture(image, index), anomaly_map[..., index], threshold).swapaxes(0, 1)
            for index in range(image.shape[-1])
        ]
        as_stored = all(one["instance"] != "" for one in slices)  # the network saw the slices of the files
        findings = Findings(
            anomaly_map.transpose(2, 1, 0),
            np.stack(pictures),
            threshold,
            row["score"],
            row["image_threshold"],
            [one["score"] for one in sorted(slices, key=itemgetter("slice"))] if as_stored else (),
            [int(index) for index in row["worst_slices"].split()] if as_stored else (),
        )
        identity = self.detector.describe()
        algorithm = Algorithm(__version__, str(identity["weights"]), content_key(self.model_file))
        files = [Path(file) for file in found["pred_map_restored"].meta["files"]]
        try:
            write_objects(stem, files, findings, algorithm)
        except BundleError:
            raise
        except Exception as error:  # whose text may hold values of the header
            logger.debug("no DICOM results", exc_info=True)
            raise BundleError(
                f"no DICOM results of '{row['image']}' ({type(error).__name__}): leave write_dicom off for it"
            ) from None

    def save_scores(self) -> None:
        """Write ``scores.csv``, one line per input of all processes, in the first one."""
        rows = sorted(chain(*gather(self.rows)), key=itemgetter("name"))
        of_slices = sorted(chain(*gather(self.slice_rows)), key=itemgetter("name", "slice"))
        skipped = sum(gather(self.skipped))
        if idist.get_rank() > 0:
            return
        if skipped:
            logger.warning(f"skipped {skipped} of {skipped + len(rows)} inputs whose results cannot be written")
        if not rows:
            raise BundleError(f"no result of {skipped} inputs could be written: see above")
        write_csv(self.output_dir / "scores.csv", rows, SCORE_COLUMNS)
        if of_slices:
            write_csv(self.output_dir / "slice_scores.csv", of_slices, SLICE_COLUMNS)
        highest = max(row["score"] for row in rows)
        self.tracker.log({"inputs": len(rows), "highest_score": highest}, {"report": [self.output_dir / "scores.csv"]})
        print(f"{len(rows)} inputs: maps, masks, overlays and scores.csv are in {self.output_dir.resolve()}")


def slice_rows(case: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each slice that the network saw: index in the file, DICOM instance, score, rank, whether it counts.

    Args:
        case: with ``name`` and the oriented ``image``.
        found: see :meth:`DetectionSaver.save`.
    """
    stack, restored = case["image"], found["pred_map_restored"]
    scores, counts = found["pred_slice_scores"].tolist(), found["pred_slice_counts"].tolist()
    order = sorted(range(len(scores)), key=lambda index: (not counts[index], -scores[index]))
    rank = {index: place for place, index in enumerate(order, start=1)}
    to_file = np.linalg.inv(restored.affine.numpy()) @ stack.affine.numpy()
    axis = int(np.abs(to_file[:3, 2]).argmax())
    rows = []
    for index, score in enumerate(scores):
        place = round(float((to_file @ [0, 0, index, 1])[axis]))
        instances = restored.meta.get("instances", ()) if axis == 2 else ()
        rows.append(
            {
                "name": case["name"],
                "slice": place,
                "instance": instances[place] if instances else "",
                "score": score,
                "rank": rank[index],
                "counts": int(counts[index]),
            }
        )
    return rows


def _replace(target: Path, fresh: Path, old: Path) -> None:
    """Put the results of stem ``fresh`` in the place of those of stem ``target``, which go to the folder ``old``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old.mkdir()
    for suffix in RESULTS:
        new, place = Path(f"{fresh}{suffix}"), Path(f"{target}{suffix}")
        if place.exists():
            os.replace(place, old / place.name)
        if new.exists():
            os.replace(new, place)


def _write_flat(stem: Path, anomaly_map: np.ndarray, mask: np.ndarray, model: str) -> None:
    """Pictures have rows first, MONAI's axes x first."""
    Image.fromarray(anomaly_map[..., 0].T.astype(np.float32)).save(
        f"{stem}_map.tiff", tiffinfo={_TIFF_DESCRIPTION: model}
    )
    note = PngImagePlugin.PngInfo()
    note.add_text("Description", model)
    Image.fromarray(mask[..., 0].T.astype(np.uint8) * 255).save(f"{stem}_mask.png", pnginfo=note)


def _write_volume(
    stem: Path, anomaly_map: np.ndarray, threshold: float, affine: np.ndarray, source: str, model: str
) -> None:
    original: Any = nib.load(source) if source.lower().endswith(NIFTI_SUFFIXES) else None
    gray_levels = np.round(255 * heat(anomaly_map, threshold))
    for name, values in (
        ("map", anomaly_map.astype(np.float32)),
        ("mask", (anomaly_map > threshold).astype(np.uint8)),
        ("heatmap", gray_levels.astype(np.uint8)),
    ):
        image = nib.Nifti1Image(values[..., 0] if original is not None and original.ndim == 2 else values, affine)
        image.header.set_xyzt_units("mm")
        if original is not None and isinstance(original.header, nib.Nifti1Header):
            _take_geometry(image.header, original.header)
        image.header["descrip"] = model[:79]
        nib.save(image, f"{stem}_{name}.nii.gz")


def _take_geometry(header: nib.Nifti1Header, original: nib.Nifti1Header) -> None:
    """Both transforms with their codes, field by field, since some programs read one and some the other."""
    for field in (*_FORM_FIELDS, "xyzt_units"):
        header[field] = original[field]
    header["pixdim"][:4] = original["pixdim"][:4]
