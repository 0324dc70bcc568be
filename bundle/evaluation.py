"""The report of an evaluation: metrics with their protocol, a line per image, figures, and a table for the reader."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from bundle.data.cases import Case, number_patients
from bundle.distributed import gather
from bundle.errors import BundleError
from bundle.figures import Example, curves, gallery, picture, placement
from bundle.files import whole_file, write_csv, write_json
from bundle.manifest import FIGURES, SCORES
from bundle.metrics import METRIC_NAMES, AnomalyMetric
from bundle.networks.detector import Detector, air_of
from bundle.provenance import data_words, model_words
from bundle.report import Report, Truth
from bundle.results import CaseResult
from bundle.tracking import Tracker

TEST_COLUMNS = ("name", "label", "score", "in_distribution", "unlike", "model", "data")
EXAMPLES = {0: 2, 1: 4}  # how many healthy and anomalous images are shown


class EvaluationReport:
    """A handler of the evaluation engine that writes the report into ``output_dir``.

    ``metrics.json`` and ``metrics.csv``: the metrics (null where a class is missing) and the protocol they follow;
    ``test_scores.csv``: a line per test image; ``test_examples.png`` and ``test_curves.png``.

    Args:
        output_dir: the folder.
        metric: attached to the same engine.
        detector: with the threshold of its checkpoint.
        data: the test cases; a few of each class, always the same, are shown.
        dataset_dir: for the words about the data.
        protocol: how the numbers were made: size, mask rule, ... (plain JSON values).
        tracker: logs numbers and figures.
        report: of the run, which shows the cases; None: none is made.
        false_positive_rate, image_false_positive_rate: what the thresholds of ``detector`` must have been chosen for,
            see :func:`check_rates`; None: whatever it was.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        metric: AnomalyMetric,
        detector: Detector,
        data: list[Case],
        dataset_dir: str | os.PathLike,
        protocol: dict[str, Any],
        tracker: Tracker,
        report: Report | None = None,
        false_positive_rate: float | None = None,
        image_false_positive_rate: float | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.metric = metric
        self.detector = detector
        self.protocol = protocol
        self.data_words = data_words(dataset_dir)
        self.tracker = tracker
        self.report = report
        self.owners = dict(zip((case["name"] for case in data), number_patients(data), strict=True))
        self.rates = (false_positive_rate, image_false_positive_rate)
        names: dict[int, list[str]] = {label: [] for label in EXAMPLES}
        for case in data:
            names[case.get("label", int("mask" in case))].append(case["name"])
        self.shown = {name for label, count in EXAMPLES.items() for name in _spread(names[label], count)}
        self.examples: list[Example] = []
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register with the evaluation engine."""
        engine.add_event_handler(Events.STARTED, lambda: check_rates(self.detector, *self.rates))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def note(self, engine: Engine) -> None:
        """Keep the scores of the current batch, and the pictures of the few that are shown."""
        state: Any = engine.state
        for case, output in zip(state.batch, state.output, strict=True):
            result = CaseResult.from_output({**case, **output}, self.detector)
            like = None if result.unlike is None else int(not result.unlike)
            found = {"score": result.score, "in_distribution": like, "unlike": result.warning}
            self.rows.append({"name": result.name, "label": int(case["label"])} | found)
            if self.report is not None:
                self.report.add_case(result, {**case, **output}, self._truth(case, output))
            if result.name in self.shown:
                worst = result.worst_position
                self.examples.append(
                    Example(
                        name=result.name,
                        image=picture(case["image"].as_tensor(), worst),
                        anomaly_map=result.anomaly_map[0, ..., worst],
                        mask=case["mask"].numpy()[0, ..., worst] > 0 if "mask" in case else None,
                        score=result.score,
                        place=placement(case["image"]),
                    )
                )

    def _truth(self, case: dict[str, Any], output: dict[str, Any]) -> Truth:
        scored = None
        if "metric_mask" in output:
            scored = (output["metric_map"].cpu().numpy(), output["metric_mask"].cpu().numpy() > 0)
        mask = case["mask"].numpy()[0] if "mask" in case else None
        return Truth(int(case["label"]), self.owners[case["name"]], mask, scored)

    def write(self, engine: Engine) -> None:
        """Write the files, log them and print the table, in the first process for all."""
        self.rows = sorted(chain(*gather(self.rows)), key=itemgetter("name"))
        self.examples = sorted(chain(*gather(self.examples)), key=attrgetter("name"))
        if idist.get_rank() > 0:
            return
        metrics = {name: engine.state.metrics[name] for name in METRIC_NAMES}
        model = model_words(self.detector.describe())
        title = f"{model}\n{self.data_words}"
        threshold = float(self.detector.threshold)
        protocol = self.protocol | {
            f"threshold_{name}": _finite(float(getattr(self.detector, name)))
            for name in ("false_positive_rate", "image_false_positive_rate")
        }
        report = {
            **metrics,
            "threshold": threshold,
            "image_threshold": _finite(float(self.detector.image_threshold)),
            "images": {
                "healthy": sum(not row["label"] for row in self.rows),
                "anomalous": sum(row["label"] for row in self.rows),
            },
            "unlike_training_data": _unlike_shares(self.rows, self.detector),
            "protocol": protocol,
            "model": model,
            "data": self.data_words,
            "identity": self.detector.describe(),
        }
        rows = [{**row, "model": model, "data": self.data_words} for row in self.rows]
        write_csv(self.output_dir / SCORES, rows, TEST_COLUMNS)
        row = {**metrics, "threshold": threshold, **protocol, "model": model, "data": self.data_words}
        write_csv(self.output_dir / "metrics.csv", [row], list(row))
        of_images, of_curves = FIGURES
        figures: dict[str, Callable[..., None]] = {}  # what saves each
        if self.examples:
            figures[of_images] = gallery(self.examples, threshold, air_of(self.detector), title).save
        pooled = self.metric.pooled  # of all processes
        roc, precision_recall = (pooled.roc_curve(), pooled.pr_curve()) if pooled else (None, None)
        if roc and precision_recall:
            figures[of_curves] = partial(curves(roc, precision_recall, title).savefig, dpi=100)
        for name, save in figures.items():
            with whole_file(self.output_dir / name) as unfinished:
                save(unfinished, format="png")
        write_json(self.output_dir / "metrics.json", report)
        if self.report is not None:
            self.report.add_metrics(metrics, protocol)
        self.tracker.log(metrics, {"report": [self.output_dir / "metrics.json"]})
        self.tracker.describe(self.markdown(report), [f"figures/{name}" for name in figures])
        self.tracker.log({}, {"figures": [self.output_dir / name for name in figures]})
        print(self.table(report))

    def markdown(self, report: dict[str, Any]) -> str:
        """The key figures of the report, as Markdown."""
        images = f"{report['images']['healthy']} healthy, {report['images']['anomalous']} anomalous"
        lines = [f"| {report['model']} | {images} |", "| --- | ---: |"]
        return "\n".join([*lines, *(f"| {name} | {_number(report[name])} |" for name in METRIC_NAMES)])

    def table(self, report: dict[str, Any]) -> str:
        """The report for a terminal."""
        rule = "-" * 60
        numbers = [f"{name:<22}{_number(report[name])}" for name in METRIC_NAMES]
        protocol = ", ".join(f"{key} {value}" for key, value in report["protocol"].items() if value is not None)
        images = f"{report['images']['healthy']} healthy and {report['images']['anomalous']} anomalous test images"
        if any(row["unlike"] for row in self.rows):
            images += f", {sum(bool(row['unlike']) for row in self.rows)} of them unlike the training data"
        lies = f"metrics.json, metrics.csv, test_scores.csv and figures are in {self.output_dir.resolve()}"
        return "\n".join([rule, report["model"], report["data"], images, rule, *numbers, rule, protocol, lies, rule])


def check_rates(
    detector: Detector, false_positive_rate: float | None = None, image_false_positive_rate: float | None = None
) -> None:
    """Refuse to score with thresholds that were chosen for other rates: only training can choose them anew.

    Args:
        detector: with the thresholds of its checkpoint, and the rates that they were chosen for.
        false_positive_rate: wanted share of healthy patches above ``threshold``; None: that of the checkpoint.
        image_false_positive_rate: wanted share of healthy images above ``image_threshold``; None: the same.

    Raises:
        BundleError: if a rate is not that of the checkpoint.
    """
    wanted = {"false_positive_rate": false_positive_rate, "image_false_positive_rate": image_false_positive_rate}
    for name, rate in wanted.items():
        own = float(getattr(detector, name))
        if rate is not None and rate != own:
            raise BundleError(
                f"{name} is {rate}, but the checkpoint was trained with {own}: train with it, or leave it off"
            )


def metric_input(output: list[dict[str, Any]]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """What :class:`~bundle.metrics.AnomalyMetric` takes, from the output of the engine.

    Maps and masks as [slices, rows, columns], masks None where they are not known.
    """
    maps = [case["metric_map"][0].movedim(-1, 0) for case in output]
    masks = [case["metric_mask"][0].movedim(-1, 0) if "metric_mask" in case else None for case in output]
    return maps, masks, [CaseResult.from_output(case).score for case in output], [case["label"] for case in output]


def _unlike_shares(rows: list[dict[str, Any]], detector: Detector) -> dict[str, float | None]:
    """The shares of healthy and anomalous test images that are called unlike the training data, and the wanted one.

    None where the model cannot tell, or a class is missing.
    """
    shares: dict[str, float | None] = {}
    for name, label in (("healthy", 0), ("anomalous", 1)):
        told = [
            not row["in_distribution"] for row in rows if row["label"] == label and row["in_distribution"] is not None
        ]
        shares[name] = sum(told) / len(told) if told else None
    return shares | {"wanted": float(detector.case_likeness.unlike_rate) if detector.case_likeness.knows else None}


def _number(value: float | None) -> str:
    """For a reader."""
    return "not defined" if value is None else f"{value:.4f}"


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _spread(names: list[str], count: int) -> list[str]:
    """``count`` names at equal distances, always the same ones; all if there are not more."""
    count = min(count, len(names))
    return [names[int((index + 0.5) * len(names) / count)] for index in range(count)]
