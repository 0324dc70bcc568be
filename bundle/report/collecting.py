"""What a run has found, taken from its engines while it runs, and written as a page at its end."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from torch import Tensor

from bundle import NAME, __version__
from bundle.distributed import gather
from bundle.errors import check
from bundle.figures import placement
from bundle.files import file_sha256, whole_file
from bundle.networks.detector import Detector, air_of
from bundle.networks.likeness import patch_rates
from bundle.networks.scores import LOWEST, conformal_threshold, rate_interval
from bundle.provenance import is_synthetic, model_words
from bundle.report.page import package_versions, page_of
from bundle.report.pictures import MOST_SLICES, Extremes, pictures_of
from bundle.report.rates import Tally, curves_of, edges_of, kept_rates, share_of, tally_of_scores
from bundle.results import CaseResult
from bundle.tracking import Tracker, epoch_numbers

FORMAT = 1  # of the data in a page
SUFFIX = "_report.html"
MEGABYTE = 1e6  # bytes
MOST_PICTURES = 100  # cases at either end of each group
MOST_VOLUMES = 4  # the same, with all of their slices
MOST_LINES = 2000  # of the table of cases
GROUPS = {None: "input", 0: "healthy", 1: "anomalous"}
WANTED = np.geomspace(0.001, 0.5, 28)  # false positive rates of the calibration plot


class Truth(NamedTuple):
    """What is known of a test case.

    Attributes:
        label: 1 if it is anomalous, else 0.
        owner: whose case it is.
        mask: [rows, columns, slices] as the network saw them, above 0 in lesions; None where nobody knows.
        scored: map and mask on the grid of the metrics, of equal shape; None without a mask.
    """

    label: int
    owner: int
    mask: np.ndarray | None
    scored: tuple[np.ndarray, np.ndarray] | None


class Report:
    """Collects what a run finds, and writes it as one HTML file.

    Memory does not grow with pixels: of each case a line is kept, and pictures of those with extreme scores.

    Args:
        command: ``training``, ``evaluating`` or ``inferring``; the file is called after it.
        output_dir: the folder.
        detector: with the thresholds of its checkpoint, once it is loaded or calibrated.
        checkpoint: its file, whose hash the page tells.
        tracker: of the run; it knows data, settings and code, and keeps the page.
        limit_mb: the size of the page; pictures that would exceed it are left out. 0: there is no page.

    Raises:
        BundleError: if the limit is below 2 and not 0.
    """

    def __init__(
        self,
        command: str,
        output_dir: str | os.PathLike,
        detector: Detector,
        checkpoint: str | os.PathLike,
        tracker: Tracker,
        limit_mb: float = 8.0,
    ) -> None:
        check(limit_mb == 0 or limit_mb >= 2, "report_limit_mb", limit_mb, "give 2 or more, or 0 for no report")
        self.command = command
        self.file = Path(output_dir) / f"{command}{SUFFIX}"
        self.detector = detector
        self.checkpoint = checkpoint
        self.tracker = tracker
        self.limit = limit_mb * MEGABYTE
        self.epochs: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []
        self.metrics: dict[str, float | None] = {}
        self.protocol: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.shown, self.volumes = Extremes(MOST_PICTURES), Extremes(MOST_VOLUMES)
        self.pixels: Tally | None = None  # of the test split
        self.patches: Tally | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether there will be a page."""
        return self.limit > 0

    def add_epoch(self, epoch: int, values: Mapping[str, Any]) -> None:
        """Note numbers of an epoch."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        self.epochs.setdefault(epoch, {}).update(numbers)

    def add_note(self, text: str) -> None:
        """Note a sentence on the training."""
        self.notes.append(text)

    def add_metrics(self, metrics: Mapping[str, float | None], protocol: Mapping[str, Any]) -> None:
        """Note the metrics of a test split, and how they were made."""
        self.metrics, self.protocol = dict(metrics), dict(protocol)

    def add_case(
        self, result: CaseResult, data: Mapping[str, Any], truth: Truth | None = None, files: Collection[str] = ()
    ) -> None:
        """Note one case.

        Args:
            result: what was found.
            data: with ``image`` as the network saw it, and, with ``truth``, ``pred_patch_map``.
            truth: of a test case.
            files: its results, below the output folder.
        """
        if not self.is_wanted:
            return
        label = None if truth is None else truth.label
        seen = result.anomaly_map
        inside = seen > LOWEST
        self.lines.append(
            {
                "name": result.name,
                "label": label,
                "score": _short(result.score),
                "peak": _short(float(seen.max())),
                "share": _short(float((seen > result.threshold).sum() / max(1, inside.sum()))),
                "slices": len(result.slice_scores),
                "slice": result.slices[result.worst_position].index if result.on_file else result.worst_position,
                "like": None if result.unlike is None else not result.unlike,
                "unlike": result.warning,
                "files": sorted(files),
                "owner": None if truth is None else truth.owner,
            }
        )
        if truth is not None:
            self._count(result, data["pred_patch_map"], truth)
        air, image = air_of(self.detector), data["image"]
        make = partial(pictures_of, result, image.as_tensor(), truth.mask if truth else None, air, placement(image))
        self.shown.add(GROUPS[label], result.score, result.name, make)
        if len(result.slice_scores) > 1:
            self.volumes.add(GROUPS[label], result.score, result.name, partial(make, slices=MOST_SLICES))

    def _count(self, result: CaseResult, patch_map: Tensor, truth: Truth) -> None:
        edges = edges_of(result.threshold)
        self.pixels, self.patches = self.pixels or Tally(edges), self.patches or Tally(edges)
        if truth.scored is not None:
            self.pixels.add(bool(truth.label), truth.owner, *truth.scored)
        patches = patch_map.cpu().numpy()
        patches = patches[patches > LOWEST]
        if not truth.label:
            self.patches.add(False, truth.owner, patches, np.zeros(patches.shape, bool))

    def finish(self) -> None:
        """Write the page, with what all processes have found; each has to call it."""
        self.join()
        self.write()

    def join(self) -> None:
        """Let the first process have what all have found; each has to call it."""
        if self.is_wanted:
            self.lines = sorted(chain(*gather(self.lines)), key=itemgetter("name"))
            self.shown, self.volumes = _joined(gather(self.shown)), _joined(gather(self.volumes))
            self.pixels, self.patches = _joined(gather(self.pixels)), _joined(gather(self.patches))

    def write(self) -> None:
        """Write the page in the first process, after :meth:`join`, and give it to the tracker."""
        if not self.is_wanted or idist.get_rank() > 0:
            return
        record = self._record(self.lines, self.pixels, self.patches)
        page = page_of(record, list(self.shown.in_turn()), list(self.volumes.in_turn()), self.limit)
        with whole_file(self.file) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
        self.tracker.log({}, {"report": [self.file]})
        print(f"the report is {self.file.resolve()} ({len(page.encode()) / MEGABYTE:.1f} MB)")

    def _record(self, lines: list[dict[str, Any]], pixels: Tally | None, patches: Tally | None) -> dict[str, Any]:
        """Everything that the page tells, as plain JSON values, but for pictures."""
        detector, data = self.detector, self.tracker.data
        identity = detector.describe()
        rates = {name: _finite(float(getattr(detector, name))) for name in RATES}
        kept = sorted(lines, key=lambda line: -line["score"])[:MOST_LINES]
        return {
            "format": FORMAT,
            "command": self.command,
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "model": model_words(identity),
            "data": {
                "name": data.name if data else "",
                "words": data.words if data else "",
                "counts": data.counts if data else "",
                "is_synthetic": data is not None and is_synthetic(data.directory),
            },
            "unit": "squared error" if identity.get("score_scale") == "squared_error" else "z",
            "rates": rates,
            "epochs": [{"epoch": epoch, **values} for epoch, values in sorted(self.epochs.items())],
            "notes": self.notes,
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "protocol": {name: value for name, value in self.protocol.items() if value is not None},
            "cases": [{name: value for name, value in line.items() if name != "owner"} for line in kept],
            "left_out": len(lines) - len(kept),
            "validation": self._validation(),
            "of_pixels": curves_of(pixels, rates["threshold"] or 0.0) if pixels else None,
            "of_cases": _of_cases(lines, rates["image_threshold"] or 0.0),
            "patches": _above(patches) if patches else None,
            "calibration": self._calibration(lines, patches),
            "facts": {
                "model file": Path(self.checkpoint).name,
                "sha256 of the model file": file_sha256(self.checkpoint),
                **{name: str(value) for name, value in self.tracker.tags.items()},
            },
            "settings": dict(sorted(self.tracker.plain_values.items())),
            "versions": {NAME: __version__, **package_versions()},
        }

    def _validation(self) -> dict[str, Any] | None:
        """Healthy validation, as the model remembers it; None where it does not."""
        known = self.detector.case_likeness
        if not known.knows:
            return None
        patches = known.healthy_patches.double().cpu()
        return {
            "scores": [_short(value) for value in known.healthy_scores.tolist()],
            "patients": known.learned.patients,
            "learned": {kind: sorted(words) for kind, words in known.learned.cases.items()},
            "patches": (
                [
                    {"above": _short(value), "share": _short(rate)}
                    for value, rate in zip(patches, patch_rates(), strict=True)
                ]
                if patches.any()
                else []
            ),
        }

    def _calibration(self, lines: Sequence[dict[str, Any]], patches: Tally | None) -> list[dict[str, Any]]:
        """Wanted against measured false positive rates of healthy test data."""
        known, points = self.detector.case_likeness, []
        if known.knows and known.healthy_patches.any() and patches is not None:
            shares, values = patch_rates().numpy(), known.healthy_patches.double().cpu().numpy()
            thresholds = np.interp(np.log(WANTED), np.log(shares), values)
            points += [{"of": "patches", **point} for point in kept_rates(WANTED, thresholds, patches)]
        healthy = np.array([line["score"] for line in lines if line["label"] == 0])
        if known.knows and len(healthy):
            for wanted in WANTED[WANTED * (known.learned.patients + 1) >= 1]:
                limit = conformal_threshold(known.healthy_scores.cpu(), float(wanted), "images")
                low, high = rate_interval(known.learned.patients, float(wanted))
                promised = {"promised_low": low, "promised_high": high}
                measured = share_of(int((healthy > limit).sum()), len(healthy))
                points.append({"of": "images", "wanted": float(wanted), **measured, **promised})
        return [{name: _short(v) if name != "of" else v for name, v in point.items()} for point in points]


RATES = ("threshold", "image_threshold", "false_positive_rate", "image_false_positive_rate")


class EpochNotes:
    """A handler by which an engine tells a report the metrics of its epochs.

    Args:
        report: of the run.
    """

    def __init__(self, report: Report) -> None:
        self.report = report

    def attach(self, engine: Engine) -> None:
        """Register with the engine."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.note)

    def note(self, engine: Engine) -> None:
        """Note the numbers of the epoch."""
        self.report.add_epoch(engine.state.epoch, epoch_numbers(engine))


def _of_cases(lines: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any] | None:
    """The curves of the scores of test cases."""
    labels = [line["label"] for line in lines]
    if not (0 in labels and 1 in labels):
        return None
    scores, owners = [line["score"] for line in lines], [line["owner"] for line in lines]
    return curves_of(tally_of_scores(scores, labels, owners), threshold)


def _above(tally: Tally) -> list[dict[str, float]]:
    """What share of healthy patches exceeds each value."""
    healthy = tally.above()[0].sum(axis=0)
    if not len(healthy) or not healthy[0]:
        return []
    return [
        {"above": _short(edge), "share": _short(count / healthy[0])}
        for edge, count in zip(tally.edges, healthy[1:], strict=True)
    ]


def _joined(parts: Sequence[Any]) -> Any:
    """What all processes have as one; None where none has any."""
    known = [part for part in parts if part is not None]
    for rank, other in enumerate(known[1:], start=1):
        known[0].join(other, rank)
    return known[0] if known else None


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return None if value is None or not np.isfinite(value) else float(value)
