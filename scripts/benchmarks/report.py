"""The page of :mod:`scripts.benchmarks.bmad`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from scripts.benchmarks.common import METRICS, write
from scripts.benchmarks.figures import draw_bars, draw_runtime, is_timed
from scripts.benchmarks.words import (
    TITLES,
    backbone_words,
    commit_words,
    counted,
    difference_words,
    digits,
    protocol_words,
    with_deviation,
    with_interval,
)


def write_report(results: dict[str, Any], folder: Path) -> str:
    """Write ``benchmark.json``, ``.md``, ``_bars.png`` and, if there are times, ``_runtime.png``; returns the page."""
    for one in results["sets"].values():
        one["rows"] = [summarize(name, cells, one, results["reference"]) for name, cells in one["cells"].items()]
    write(folder / "benchmark.json", results)
    page = "\n".join(report(results)) + "\n"
    (folder / "benchmark.md").write_text(page, encoding="utf-8")
    if any(one["rows"] for one in results["sets"].values()):
        draw_bars(results).savefig(folder / "benchmark_bars.png", dpi=150)
    if is_timed(results):
        draw_runtime(results).savefig(folder / "benchmark_runtime.png", dpi=150)
    return page


def summarize(method: str, cells: list[dict[str, Any]], data_set: dict[str, Any], reference: str) -> dict[str, Any]:
    """A row: means over the seeds, with deviations; accuracy as a share, None where it is not defined.

    ``accuracy`` is that of the part of the test split that is reported, ``whole`` that of all test images.
    """
    seconds = (data_set["times"] or {}).get("seconds", {})
    own, against = seconds.get(method), seconds.get(reference)
    return {
        "method": method,
        "seeds": [cell["recipe"]["seed"] for cell in cells],
        "accuracy": {
            protocol: {metric: spread(one["seeds"]) for metric, one in compared["rows"][method].items()}
            for protocol, compared in data_set["compared"].items()
        },
        "whole": {
            protocol: {metric: spread(cell["protocols"][protocol][metric] for cell in cells) for metric in METRICS}
            for protocol in data_set["compared"]
        },
        "ms": 1000 * median(own) if own else None,
        "times_reference": median(a / b for a, b in zip(own, against, strict=True)) if own and against else None,
        "peak_mb": spread(cell["peak_mb"] for cell in cells),
        "stored_mb": spread(cell["stored_mb"] for cell in cells),
        "fit_and_score_s": spread(cell["seconds"] for cell in cells),
    }


def spread(values: Iterable[float | None]) -> list[float | None]:
    """Mean and sample deviation of the ``values``; None where there are too few."""
    known = [value for value in values if value is not None]
    return [mean(known) if known else None, stdev(known) if len(known) > 1 else None]


def report(results: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = ["# Benchmark", "", "Made by", "", "```sh", results["command"], "```", ""]
    lines += [f"on {results['machine']}; commit {commit_words(results['commit'])}, {results['date'][:10]}.", ""]
    drawn = any(one["rows"] for one in results["sets"].values())
    lines += ["![Accuracy and costs](benchmark_bars.png)", ""] if drawn else []
    lines += ["![Accuracy against runtime](benchmark_runtime.png)", ""] if is_timed(results) else []
    for name, one in results["sets"].items():
        lines += [*section(name, one, results), ""]
    lines += beside_published(results)
    lines += legend(results)
    if results["failed"]:
        lines += ["", "## Not measured", "", *(f"- {name}: {why}" for name, why in results["failed"].items())]
    return lines


def section(name: str, data_set: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Data and table of a set."""
    title = name if data_set["title"] == name else f"{name} ({data_set['title']})"
    lines = [f"## {title}", "", f"{data_set['data']}: {counted(data_set['images'])}. {backbone_words(data_set)}.", ""]
    if differs_from_bmad(data_set):
        theirs = f"{counted(data_set['expected'])}, anomalous validation images among them"
        lines += [f"**These are not the images of BMAD's set**, which has {theirs}.", ""]
    lines += [part_words(data_set, results), ""]
    reference = results["reference"]
    names = [*TITLES.values(), "ms per image", f"times {reference}", "peak memory MB", "stored MB"]
    lines += [f"| method | protocol | {' | '.join(names)} |", "| --- | --- " + "| ---: " * len(names) + "|"]
    for protocol, meaning in results["protocols"].items():
        for row in data_set["rows"]:
            accuracy = row["accuracy"][protocol]
            intervals = data_set["compared"][protocol]["rows"][row["method"]]
            cells = [with_interval(accuracy[metric], intervals[metric]["interval"]) for metric in METRICS]
            cells += [digits(row["ms"]), digits(row["times_reference"])]
            cells += [with_deviation(row["peak_mb"]), with_deviation(row["stored_mb"])]
            lines.append(f"| {row['method']} | {protocol_words(meaning)} | {' | '.join(cells)} |")
    return lines + differences(data_set, results)


def differences(data_set: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """The table of what each method is ahead of the reference; none where there is nothing to compare."""
    reference = results["reference"]
    others = [row["method"] for row in data_set["rows"] if row["method"] != reference]
    if not others or len(others) == len(data_set["rows"]):
        return []
    lines = ["", f"Ahead of **{reference}**, in points, on the same draws of test images:", ""]
    lines += [f"| method | protocol | {' | '.join(TITLES.values())} |", "| --- | --- " + "| ---: " * len(TITLES) + "|"]
    for protocol, meaning in results["protocols"].items():
        for method in others:
            row = data_set["compared"][protocol]["rows"][method]
            cells = [difference_words(row[metric]["difference"]) for metric in METRICS]
            lines.append(f"| {method} | {protocol_words(meaning)} | {' | '.join(cells)} |")
    return lines


def part_words(data_set: dict[str, Any], results: dict[str, Any]) -> str:
    """Which test images the numbers are of."""
    (images, *_) = [one["images"] for one in data_set["compared"].values()]
    count = f"{images['healthy']} healthy and {images['anomalous']} anomalous"
    if results["part"] == "all":
        return f"Reported on **all** test images, {count}: choices may have been made on the same ones."
    words = {"report": "no choice was made on", "development": "choices are made on, and not for the record"}
    return (
        f"Reported on the half **{results['part']}** of the test images, {count}, which {words[results['part']]}; a "
        "hash of the name says which half an image belongs to."
    )


def differs_from_bmad(data_set: dict[str, Any]) -> bool:
    """Whether the folder is named as a set of BMAD but has other images."""
    return data_set["expected"] is not None and data_set["expected"] != data_set["listed"]


def beside_published(results: dict[str, Any]) -> list[str]:
    """Published rows and measured ones, in the form of the published table; empty where there is nothing to compare."""
    published = results["published"]
    sets = {
        name: one for name, one in results["sets"].items() if any(name in row for row in published["rows"].values())
    }
    if not sets:
        return []
    protocol = (
        published["protocol"] if published["protocol"] in results["protocols"] else next(iter(results["protocols"]))
    )
    words = protocol_words(results["protocols"][protocol])
    other = ", which is another protocol" if protocol != published["protocol"] else ""
    backbones = "; ".join(dict.fromkeys(backbone_words(one) for one in sets.values()))
    titles = [one["title"] for one in sets.values()]
    lines = [
        "## Beside the published numbers",
        "",
        f"Pixel AUROC / pixel AP in %. Published: {published['source']}, protocol {published['protocol']}, on hardware "
        f"of its own. Measured: {words}{other}; **all** test images, those that choices were made on too; {backbones}, "
        "whatever a published name says.",
        "",
        f"| method | | ms | {' | '.join(titles)} |",
        "| --- | --- | ---: " + "| --- " * len(sets) + "|",
    ]
    same_as = {whole.get("published"): method for method, whole in results["methods"].items()}
    for name, row in published["rows"].items():
        cells = [" / ".join(f"{value:.2f}" for value in row[one]) if one in row else "none" for one in sets]
        lines.append(f"| {name} | published | {row['ms']} | {' | '.join(cells)} |")
        if name in same_as:
            lines += measured_line(same_as[name], protocol, sets)
    for method in [
        name for name, whole in results["methods"].items() if whole.get("published") not in published["rows"]
    ]:
        lines += measured_line(method, protocol, sets)
    return [*lines, ""]


def measured_line(method: str, protocol: str, sets: dict[str, Any]) -> list[str]:
    """The measured line of a method; none where it was not measured."""
    rows = [next((row for row in one["rows"] if row["method"] == method), None) for one in sets.values()]
    if not any(rows):
        return []
    cells = []
    for row in rows:
        accuracy = row["whole"].get(protocol) if row else None
        cells.append(
            " / ".join(with_deviation(accuracy[one], 100) for one in ("pixel_auroc", "pixel_ap")) if accuracy else "-"
        )
    times = sorted({digits(row["ms"]) for row in rows if row and row["ms"] is not None}, key=float)
    ms = times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}" if times else "-"
    return [f"| {method} | **measured** | {ms} | {' | '.join(cells)} |"]


def legend(results: dict[str, Any]) -> list[str]:
    """What the columns and the methods are."""
    times = next((one["times"] for one in results["sets"].values() if one["times"]), None)
    timed = (
        f"from resized images in memory to maps, features included, {times['recipe']['batch_size']} at once, "
        f"{times['images']} test images, threads: {times['threads']}; all methods of a set alternate in one process, "
        f"median of {times['recipe']['repeats']} rounds, and of the ratios within each round"
        if times
        else "not measured"
    )
    fitted = {
        f" Fitted and scored with OMP_NUM_THREADS {cell['threads']}."
        for one in results["sets"].values()
        for cell in chain.from_iterable(one["cells"].values())
        if cell.get("threads")
    }
    pattern = results["patient_pattern"]
    drawn = f"patients with all of their images, by `{pattern}`" if pattern else "each image as another patient"
    lines = [
        "## What was measured",
        "",
        "- Accuracy in %, mean ± deviation over the seeds where there are several; all test pixels pooled; AUPRO up to "
        "a false positive rate of 0.3; '-': not defined, as pixel metrics without masks.",
        f"- [from, to]: 95 % interval over test images, by {results['draws']} draws with replacement, healthy and "
        f"anomalous ones apart, {drawn}, the same draws for all methods. **undecided**: the interval of a difference "
        "holds 0.",
        f"- ms per image: {timed}.",
        "- peak memory: the most that the process which fits and scores under the first protocol holds resident, "
        "imports included. The feature cache counts while its files are mapped; it is shared, so that densities which "
        f"come later find the features of the first, while every peer computes its own.{''.join(sorted(fitted))}",
        "- stored: the file of the trained model without the backbone; of peers, all that they keep, in float32.",
        "- No method sees an anomalous image, or a test image, before it is scored. All methods see the same features "
        "where image_size is the same.",
        "",
        "Methods, by what they change of the bundle's defaults:",
        "",
    ]
    return lines + recipe_lines(results["sets"])


def recipe_lines(sets: dict[str, Any]) -> list[str]:
    """Config files and knobs of every method, once where they are the same on all sets."""
    used: dict[str, dict[str, list[str]]] = {}
    for name, one in sets.items():
        for method, cells in one["cells"].items():
            recipe = cells[0]["recipe"]
            configs = [f"`{path}`" for path in recipe["configs"]]
            knobs = [f"{knob} {json.dumps(value)}" for knob, value in sorted(recipe["knobs"].items())]
            used.setdefault(method, {}).setdefault(", ".join(configs + knobs), []).append(name)
    return [
        f"- {method}{' on ' + ', '.join(names) if len(recipes) > 1 else ''}: {words}"
        for method, recipes in used.items()
        for words, names in recipes.items()
    ]
