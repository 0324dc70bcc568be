"""What inference leaves for each input: the float map, the mask, an overlay, and a line in ``scores.csv``."""

from __future__ import annotations

import csv
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

from bundle.data.cases import is_flat
from bundle.distributed import gather
from bundle.figures import overlay, picture
from bundle.networks.detector import Detector
from bundle.provenance import data_words, model_words
from bundle.tracking import Tracker

SCORE_COLUMNS = (
    "name",
    "image",
    "score",
    "worst_slice",
    "max",
    "anomalous_share",
    "threshold",
    "image_threshold",
    "model",
    "data",
)
_TIFF_DESCRIPTION = 270


class DetectionSaver:
    """A handler of the inference engine that writes what it found.

    For an input ``NAME``: ``NAME_map.nii.gz`` and ``NAME_mask.nii.gz`` with the affine, shape and axes of the input, or
    ``NAME_map.tiff`` (32-bit float) and ``NAME_mask.png`` for flat images; ``NAME_overlay.png``, of the most anomalous
    slice. Files appear whole or not at all; ``scores.csv`` is written at the end.

    Args:
        output_dir: the folder; subfolders of the input are kept.
        detector: with the threshold of its checkpoint.
        dataset_dir: for the words about the data.
        tracker: its run opens with the first result and keeps ``scores.csv``.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        detector: Detector,
        dataset_dir: str | os.PathLike,
        tracker: Tracker,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.detector = detector
        self.data = data_words(dataset_dir)
        self.tracker = tracker
        self.rows: list[dict[str, Any]] = []

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
            found: with ``pred_map`` [1, rows, columns, slices], ``pred_map_restored`` on the axes of the file,
                ``pred_score`` and ``pred_worst_slice``.
        """
        threshold = float(self.detector.threshold)
        model = model_words(self.detector.describe())
        worst = int(found["pred_worst_slice"])
        anomaly_map: MetaTensor = found["pred_map_restored"]
        values = anomaly_map.numpy()[0]
        path = str(anomaly_map.meta["filename_or_obj"])
        row = {
            "name": case["name"],
            "image": path,
            "score": float(found["pred_score"]),
            "worst_slice": _index_in_file(case["image"], anomaly_map, worst),
            "max": float(values.max()),
            "anomalous_share": float((values > threshold).mean()),
            "threshold": threshold,
            "image_threshold": float(self.detector.image_threshold),
            "model": model,
            "data": self.data,
        }
        place = f" slice {row['worst_slice']}" if case["image"].shape[-1] > 1 else ""
        shown = overlay(
            picture(case["image"].as_tensor(), worst),
            found["pred_map"].numpy()[0, ..., worst],
            threshold,
            f"{case['name']}{place}: score {row['score']:.2f}, threshold {threshold:.2f}. {model}. {self.data}",
        )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".partial-") as folder:
            stem = Path(folder) / Path(case["name"]).name
            write = _write_flat if is_flat(path) else _write_volume
            write(stem, values, values > threshold, anomaly_map.affine.numpy(), model)
            shown.save(f"{stem}_overlay.png")
            target = self.output_dir / Path(case["name"]).parent
            target.mkdir(parents=True, exist_ok=True)
            for file in Path(folder).iterdir():
                os.replace(file, target / file.name)
        self.rows.append(row)

    def save_scores(self) -> None:
        """Write ``scores.csv``, one line per input of all processes, in the first one."""
        rows = sorted(chain(*gather(self.rows)), key=itemgetter("name"))
        if idist.get_rank() > 0:
            return
        write_csv(self.output_dir / "scores.csv", rows, SCORE_COLUMNS)
        highest = max(row["score"] for row in rows)
        self.tracker.log({"inputs": len(rows), "highest_score": highest}, {"report": [self.output_dir / "scores.csv"]})
        print(f"{len(rows)} inputs: maps, masks, overlays and scores.csv are in {self.output_dir.resolve()}")


def _index_in_file(stack: MetaTensor, restored: MetaTensor, index: int) -> int:
    """Where slice ``index`` of the oriented ``stack`` lies along the axis of the file that it is a slice of."""
    to_file = np.linalg.inv(restored.affine.numpy()) @ stack.affine.numpy()
    axis = int(np.abs(to_file[:3, 2]).argmax())
    return round(float((to_file @ [0, 0, index, 1])[axis]))


def _write_flat(stem: Path, anomaly_map: np.ndarray, mask: np.ndarray, affine: np.ndarray, model: str) -> None:
    """Pictures have rows first, MONAI's axes x first."""
    Image.fromarray(anomaly_map[..., 0].T.astype(np.float32)).save(
        f"{stem}_map.tiff", tiffinfo={_TIFF_DESCRIPTION: model}
    )
    note = PngImagePlugin.PngInfo()
    note.add_text("Description", model)
    Image.fromarray(mask[..., 0].T.astype(np.uint8) * 255).save(f"{stem}_mask.png", pnginfo=note)


def _write_volume(stem: Path, anomaly_map: np.ndarray, mask: np.ndarray, affine: np.ndarray, model: str) -> None:
    for name, values in (("map", anomaly_map.astype(np.float32)), ("mask", mask.astype(np.uint8))):
        image = nib.Nifti1Image(values, affine)
        image.header["descrip"] = model[:79]
        image.header.set_xyzt_units("mm")
        nib.save(image, f"{stem}_{name}.nii.gz")


def write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] | list[str]) -> None:
    """Write rows under a header line, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
