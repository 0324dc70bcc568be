"""What inference leaves for each input: maps, mask, overlay, DICOM objects, and lines in tables of scores."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Sequence
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
from bundle.data.cases import Case, is_flat
from bundle.data.store import content_key
from bundle.distributed import gather
from bundle.errors import BundleError
from bundle.figures import blend, heat, overlay, picture
from bundle.networks.detector import Detector
from bundle.provenance import data_words, model_words
from bundle.tracking import Tracker
from bundle.transforms.loading import NIFTI_SUFFIXES, files_of, is_dicom_file

SCORE_COLUMNS = (
    "name",
    "image",
    "score",
    "worst_slices",
    "max",
    "anomalous_share",
    "threshold",
    "image_threshold",
    "model",
    "data",
)
SLICE_COLUMNS = ("name", "slice", "instance", "score", "rank", "counts")
_TIFF_DESCRIPTION = 270


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
        cases: that will come.
        model_file: of the detector; DICOM objects tell its hash.
        write_dicom: write DICOM objects.
        worst_slices: how many slices ``scores.csv`` and the DICOM report name.

    Raises:
        BundleError: if DICOM objects of anything but DICOM are wanted, or no slice is to be named.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        detector: Detector,
        dataset_dir: str | os.PathLike,
        tracker: Tracker,
        cases: Sequence[Case] = (),
        model_file: str | os.PathLike = "",
        write_dicom: bool = False,
        worst_slices: int = 3,
    ) -> None:
        if worst_slices < 1:
            raise BundleError(f"worst_slices is {worst_slices}: give at least 1")
        other = next((file for case in cases for file in files_of(case["image"])[:1] if not is_dicom_file(file)), None)
        if write_dicom and other:
            raise BundleError(f"write_dicom needs DICOM images, but '{other}' is none: leave it off, or give DICOM")
        self.output_dir = Path(output_dir)
        self.detector = detector
        self.data = data_words(dataset_dir)
        self.tracker = tracker
        self.model_file = model_file
        self.write_dicom = write_dicom
        self.worst_slices = worst_slices
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
            self.save(case, found)
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
        slices = _slice_rows(case, found)
        worst = [row["slice"] for row in sorted(slices, key=itemgetter("rank")) if row["counts"]][: self.worst_slices]
        row = {
            "name": case["name"],
            "image": path,
            "score": float(found["pred_score"]),
            "worst_slices": " ".join(map(str, worst)),
            "max": float(values.max()),
            "anomalous_share": float((values > threshold).mean()),
            "threshold": threshold,
            "image_threshold": float(self.detector.image_threshold),
            "model": model,
            "data": self.data,
        }
        place = f" slice {worst[0]}" if len(slices) > 1 else ""
        at = int(found["pred_worst_slice"])
        shown = overlay(
            picture(case["image"].as_tensor(), at),
            found["pred_map"].numpy()[0, ..., at],
            threshold,
            f"{case['name']}{place}: score {row['score']:.2f}, threshold {threshold:.2f}. {model}. {self.data}",
        )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".partial-") as folder:
            stem = Path(folder) / Path(case["name"]).name
            if is_flat(path):
                _write_flat(stem, values, values > threshold, model)
            else:
                _write_volume(stem, values, threshold, anomaly_map.affine.numpy(), path, model)
            shown.save(f"{stem}_overlay.png")
            if self.write_dicom:
                self._write_dicom(stem, found, row, slices)
            _move_all(Path(folder), self.output_dir / Path(case["name"]).parent)
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
        write_objects(stem, [Path(file) for file in found["pred_map_restored"].meta["files"]], findings, algorithm)

    def save_scores(self) -> None:
        """Write ``scores.csv``, one line per input of all processes, in the first one."""
        rows = sorted(chain(*gather(self.rows)), key=itemgetter("name"))
        slice_rows = sorted(chain(*gather(self.slice_rows)), key=itemgetter("name", "slice"))
        if idist.get_rank() > 0:
            return
        write_csv(self.output_dir / "scores.csv", rows, SCORE_COLUMNS)
        if slice_rows:
            write_csv(self.output_dir / "slice_scores.csv", slice_rows, SLICE_COLUMNS)
        highest = max(row["score"] for row in rows)
        self.tracker.log({"inputs": len(rows), "highest_score": highest}, {"report": [self.output_dir / "scores.csv"]})
        print(f"{len(rows)} inputs: maps, masks, overlays and scores.csv are in {self.output_dir.resolve()}")


def _slice_rows(case: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each slice that the network saw: index in the file, DICOM instance, score, rank, whether it counts."""
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


def _move_all(source: Path, target: Path) -> None:
    """Move what is in ``source`` to ``target``, in the place of what has the same names."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir() and (target / path.name).exists():
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)


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
    gray_levels = np.round(255 * heat(anomaly_map, threshold))
    for name, values in (
        ("map", anomaly_map.astype(np.float32)),
        ("mask", (anomaly_map > threshold).astype(np.uint8)),
        ("heatmap", gray_levels.astype(np.uint8)),
    ):
        image = nib.Nifti1Image(values, affine)
        if source.lower().endswith(NIFTI_SUFFIXES):
            _take_forms(image, source)
        image.header["descrip"] = model[:79]
        image.header.set_xyzt_units("mm")
        nib.save(image, f"{stem}_{name}.nii.gz")


def _take_forms(image: nib.Nifti1Image, source: str) -> None:
    """Both transforms of the ``source`` and their codes, since some programs read one and some the other."""
    header: Any = nib.load(source).header
    if isinstance(header, nib.Nifti1Header):
        image.set_qform(header.get_qform(), int(header["qform_code"]))
        image.set_sform(header.get_sform(), int(header["sform_code"]))


def write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] | list[str]) -> None:
    """Write rows under a header line, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
