"""Tables and figures of :mod:`scripts.benchmarks.bmad`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import Bbox

from scripts.benchmarks.common import METRICS, write

TITLES = {
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
}
REFERENCE, DENSITY, PEER = "#30506e", "#6a9cc6", "#b5651d"
PLACES = [  # where a label may stand: offset in points, horizontal and vertical alignment
    ((7, 0), "left", "center"),
    ((-7, 0), "right", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
    ((6, 9), "left", "bottom"),
    ((6, -9), "left", "top"),
    ((-6, 9), "right", "bottom"),
    ((-6, -9), "right", "top"),
]
FAR_PLACES = [((-40, 25), "right", "bottom"), ((40, 25), "left", "bottom"), ((-40, -25), "right", "top")]


def write_report(results: dict[str, Any], folder: Path) -> str:
    """Write ``benchmark.json``, ``.md``, ``_bars.png`` and ``_runtime.png`` into ``folder``; returns the page."""
    for one in results["sets"].values():
        one["rows"] = [summarize(name, cells, one, results["reference"]) for name, cells in one["cells"].items()]
    write(folder / "benchmark.json", results)
    page = "\n".join(report(results)) + "\n"
    (folder / "benchmark.md").write_text(page, encoding="utf-8")
    if any(one["rows"] for one in results["sets"].values()):
        draw_bars(results).savefig(folder / "benchmark_bars.png", dpi=150)
        draw_runtime(results).savefig(folder / "benchmark_runtime.png", dpi=150)
    return page


def summarize(method: str, cells: list[dict[str, Any]], data_set: dict[str, Any], reference: str) -> dict[str, Any]:
    """A row: means over the seeds, with deviations; accuracy as a share, None where it is not defined."""
    seconds = (data_set["times"] or {}).get("seconds", {})
    own, against = seconds.get(method), seconds.get(reference)
    return {
        "method": method,
        "seeds": [cell["recipe"]["seed"] for cell in cells],
        "accuracy": {
            protocol: {metric: spread(cell["protocols"][protocol][metric] for cell in cells) for metric in METRICS}
            for protocol in cells[0]["protocols"]
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
    lines += ["![Accuracy, runtime and memory](benchmark_bars.png)", ""] if drawn else []
    lines += ["![Accuracy against runtime](benchmark_runtime.png)", ""] if drawn else []
    for name, one in results["sets"].items():
        lines += [*section(name, one, results), ""]
    lines += beside_published(results)
    lines += legend(results)
    if results["failed"]:
        lines += ["", "## Not measured", "", *(f"- {name}: {why}" for name, why in results["failed"].items())]
    return lines


def commit_words(commit: str) -> str:
    """The short hash, and whether there were changes that are not in it."""
    hash_, plus, changes = commit.partition("+")
    return hash_[:12] + (f" with {changes}" if plus else "")


def section(name: str, data_set: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Data and table of a set."""
    title = name if data_set["title"] == name else f"{name} ({data_set['title']})"
    lines = [f"## {title}", "", f"{data_set['data']}: {counted(data_set['images'])}. {backbone_words(data_set)}.", ""]
    if differs_from_bmad(data_set):
        theirs = f"{counted(data_set['expected'])}, anomalous validation images among them"
        lines += [f"**These are not the images of BMAD's set**, which has {theirs}.", ""]
    reference = results["reference"]
    names = [*TITLES.values(), "ms per image", f"times {reference}", "peak memory MB", "stored MB"]
    lines += [f"| method | protocol | {' | '.join(names)} |", "| --- | --- " + "| ---: " * len(names) + "|"]
    for protocol, meaning in results["protocols"].items():
        for row in data_set["rows"]:
            accuracy = row["accuracy"].get(protocol)
            if accuracy is None:
                continue
            cells = [with_deviation(accuracy[metric], 100) for metric in METRICS]
            cells += [digits(row["ms"]), digits(row["times_reference"])]
            cells += [with_deviation(row["peak_mb"]), with_deviation(row["stored_mb"])]
            lines.append(f"| {row['method']} | {protocol_words(meaning)} | {' | '.join(cells)} |")
    return lines


def backbone_words(data_set: dict[str, Any]) -> str:
    """Backbones and weights, RANDOM where they are."""
    models = (cell["model"].partition(", ")[2] for cells in data_set["cells"].values() for cell in cells)
    return "; ".join(dict.fromkeys(models))


def counted(images: dict[str, int]) -> str:
    """The numbers of images of a set."""
    return f"{images['training']} / {images['validation']} / {images['test']} (training / validation / test)"


def differs_from_bmad(data_set: dict[str, Any]) -> bool:
    """Whether the folder is named as a set of BMAD but has other images."""
    return data_set["expected"] is not None and data_set["expected"] != data_set["listed"]


def protocol_words(protocol: dict[str, Any]) -> str:
    """Size and mask rule, which belong to every number."""
    size, via = protocol["evaluation_size"], protocol.get("mask_via")
    detour = "" if size is None or via is None else f" by {via}x{via}"
    return f"{'native size' if size is None else f'{size}x{size}'}, mask `{protocol['mask_rule']}`{detour}"


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
        f"of its own. Measured: {words}{other}; {backbones}, whatever a published name says.",
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
        accuracy = row["accuracy"].get(protocol) if row else None
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
    lines = [
        "## What was measured",
        "",
        "- Accuracy in %, mean ± deviation over the seeds where there are several; all test pixels pooled; AUPRO up to "
        "a false positive rate of 0.3; '-': not defined, as pixel metrics without masks.",
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


def with_deviation(value: list[float | None], scale: float = 1) -> str:
    """Mean ± deviation, two decimals where it is a percentage."""
    average, deviation = value
    if average is None:
        return "-"
    show = digits if scale == 1 else "{:.2f}".format
    return show(scale * average) + ("" if deviation is None else f" ± {show(scale * deviation)}")


def digits(value: float | None) -> str:
    """``value`` in three digits or all that are before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shown_metrics(data_set: dict[str, Any], protocol: str) -> tuple[str, str]:
    """Average precision and AUROC of pixels, of images where there are no masks."""
    has_masks = any(row["accuracy"][protocol]["pixel_ap"][0] is not None for row in data_set["rows"])
    return ("pixel_ap", "pixel_auroc") if has_masks else ("image_ap", "image_auroc")


def color_of(method: str, results: dict[str, Any]) -> str:
    """One color each for the reference, other densities and peers."""
    if method == results["reference"]:
        return REFERENCE
    configs = results["methods"][method].get("configs", [])
    return PEER if any(Path(name).name == "peers.json" for name in configs) else DENSITY


def picture_words(results: dict[str, Any], protocol: str) -> str:
    """Protocol, backbone, machine and, where it is so, SYNTHETIC."""
    synthetic = [one["synthetic"] for one in results["sets"].values()]
    made = "SYNTHETIC data. " if all(synthetic) else "SYNTHETIC data where a panel says so. " if any(synthetic) else ""
    backbones = "; ".join(dict.fromkeys(backbone_words(one) for one in results["sets"].values() if one["rows"]))
    accuracy = f"Accuracy at {protocol_words(results['protocols'][protocol])}"
    return textwrap.fill(f"{made}{accuracy}. {backbones}. {results['machine']}".replace("`", ""), 120)


def set_words(name: str, data_set: dict[str, Any]) -> str:
    """The title of a panel."""
    title = name if data_set["title"] == name else f"{name} ({data_set['title']})"
    return f"SYNTHETIC: {title}" if data_set["synthetic"] else title


def draw_bars(results: dict[str, Any]) -> Figure:
    """A line of panels for each set: accuracy, milliseconds, memory and stored size of all methods."""
    protocol = next(iter(results["protocols"]))
    sets = {name: one for name, one in results["sets"].items() if one["rows"]}
    heights = [0.36 * len(one["rows"]) + 1 for one in sets.values()]
    figure = Figure(figsize=(11.5, sum(heights) + 0.7), layout="constrained")
    lines = figure.subplots(len(sets), 5, squeeze=False, height_ratios=heights)
    for line, (name, data_set) in zip(lines, sets.items(), strict=True):
        rows = data_set["rows"]
        precision, auroc = shown_metrics(data_set, protocol)
        accuracy = [row["accuracy"][protocol] for row in rows]
        bars(line[0], f"{TITLES[precision]}, %", [percent(one[precision]) for one in accuracy], 100)
        bars(line[1], f"{TITLES[auroc]}, %", [percent(one[auroc]) for one in accuracy], 100)
        bars(line[2], "ms per image", [[row["ms"], None] for row in rows])
        bars(line[3], "peak memory, MB", [row["peak_mb"] for row in rows])
        bars(line[4], "stored model, MB", [row["stored_mb"] for row in rows])
        for panel in line:
            for bar, row in zip(panel.patches, rows, strict=True):
                bar.set_color(color_of(row["method"], results))
            panel.set_yticks(range(len(rows)), [row["method"] if panel is line[0] else "" for row in rows])
            panel.set_ylim(len(rows) - 0.4, -0.6)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_title(set_words(name, data_set), loc="left", fontsize=11, fontweight="bold")
    figure.suptitle(picture_words(results, protocol), fontsize=9)
    return figure


def percent(value: list[float | None]) -> list[float | None]:
    """Mean and deviation of a share as percentages."""
    return [None if one is None else 100 * one for one in value]


def bars(panel: Axes, label: str, values: list[list[float | None]], limit: float | None = None) -> None:
    """Horizontal bars of means with deviations, each with its number."""
    lengths = [average or 0.0 for average, _ in values]
    deviations = [deviation or 0.0 for _, deviation in values]
    panel.barh(range(len(values)), lengths, height=0.7)
    for place, ((average, deviation), length, error) in enumerate(zip(values, lengths, deviations, strict=True)):
        if deviation:
            panel.errorbar(length, place, xerr=error, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        number = digits(average) if limit is None or average is None else f"{average:.1f}"
        panel.annotate(
            number,
            (length + error, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    longest = max(length + error for length, error in zip(lengths, deviations, strict=True))
    panel.set_xlim(0, 1.25 * (limit or longest or 1))
    panel.xaxis.set_major_locator(MaxNLocator(4) if limit is None else FixedLocator([0, 50, 100]))
    panel.set_xlabel(label, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", labelsize=9, length=0)


def draw_runtime(results: dict[str, Any]) -> Figure:
    """A panel for each set: average precision against milliseconds per image, one labeled point for each method."""
    protocol = next(iter(results["protocols"]))
    sets = {name: one for name, one in results["sets"].items() if one["rows"]}
    columns = min(2, len(sets))
    lines = -(-len(sets) // columns)
    figure = Figure(figsize=(max(6.5, 5 * columns), 4.2 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    labels: list[tuple[Axes, list[tuple[float, float, str, str]]]] = []
    for panel, (name, data_set) in zip(panels, sets.items(), strict=False):
        precision, _ = shown_metrics(data_set, protocol)
        points = [
            (row["ms"], *percent(row["accuracy"][protocol][precision]), row["method"])
            for row in data_set["rows"]
            if row["ms"] is not None and row["accuracy"][protocol][precision][0] is not None
        ]
        for ms, height, deviation, method in points:
            color = color_of(method, results)
            order = 4 if color == REFERENCE else 3  # above all others
            panel.errorbar(ms, height, yerr=deviation, fmt="o", color=color, capsize=2, markersize=8, zorder=order)
        panel.set_xscale("log")
        panel.set_title(set_words(name, data_set), loc="left", fontsize=11, fontweight="bold")
        panel.set(xlabel="ms per image", ylabel=f"{TITLES[precision]}, %")
        panel.grid(alpha=0.3, which="both")
        make_room(panel, [point[0] for point in points], [point[1] for point in points])
        labels.append((panel, [(ms, height, method, color_of(method, results)) for ms, height, _, method in points]))
    for panel in panels[len(sets) :]:
        panel.set_visible(False)
    figure.suptitle(textwrap.fill(picture_words(results, protocol), 75 * columns), fontsize=8)
    figure.draw_without_rendering()  # settles the layout that the labels are placed in
    for panel, named in labels:
        label_points(figure, panel, named)
    return figure


def make_room(panel: Axes, x: list[float], y: list[float]) -> None:
    """Limits with space for labels, and ticks that can be read in less than a decade."""
    if not x:
        return
    panel.set_xlim(min(x) / 2, max(x) * 2)
    margin = max(0.2 * (max(y) - min(y)), 1)
    panel.set_ylim(max(min(y) - margin, -2), min(max(y) + margin, 102))
    ticks = [
        base * 10**power
        for power in range(-2, 5)
        for base in (1, 2, 3, 5)
        if min(x) / 2 <= base * 10**power <= 2 * max(x)
    ]
    panel.set_xticks(ticks, [digits(tick) for tick in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def label_points(figure: Figure, panel: Axes, points: list[tuple[float, float, str, str]]) -> None:
    """Write the name beside each point where it covers no other and no point, and nowhere if there is no such place.

    The reference comes first, and may have its name further away, at the end of a line.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in panel.transData.transform([one[:2] for one in points])]
    inside = panel.get_window_extent(renderer)
    for x, y, name, color in sorted(points, key=lambda point: (point[3] != REFERENCE, point)):
        far = FAR_PLACES if color == REFERENCE else []
        for place in [*PLACES, *far]:
            offset, horizontal, vertical = place
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.8} if place in far else None
            text = panel.annotate(
                name,
                (x, y),
                offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                color=color,
                arrowprops=line,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line
            if inside.contains(*box.min) and inside.contains(*box.max) and not box.count_overlaps(taken):
                text.set_in_layout(False)
                taken.append(box)
                break
            text.remove()
