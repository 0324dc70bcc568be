"""Figures of :mod:`scripts.benchmarks.bmad`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import Bbox

from scripts.benchmarks.words import TITLES, backbone_words, digits, protocol_words, set_words

REFERENCE, DENSITY, PEER = "#30506e", "#6a9cc6", "#b5651d"
INK = "#333333"  # of names, which are too pale in the colors of their points
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


def draw_bars(results: dict[str, Any]) -> Figure:
    """A line of panels for each set: accuracy, milliseconds if they were measured, memory and stored size."""
    protocol = next(iter(results["protocols"]))
    sets = {name: one for name, one in results["sets"].items() if one["rows"]}
    heights = [0.36 * len(one["rows"]) + 1 for one in sets.values()]
    figure = Figure(figsize=(11.5, sum(heights) + 0.7), layout="constrained")
    timed = is_timed(results)
    lines = figure.subplots(len(sets), 4 + timed, squeeze=False, height_ratios=heights)
    for line, (name, data_set) in zip(lines, sets.items(), strict=True):
        rows = data_set["rows"]
        precision, auroc = shown_metrics(data_set, protocol)
        accuracy = [row["accuracy"][protocol] for row in rows]
        bars(line[0], f"{TITLES[precision]}, %", [percent(one[precision]) for one in accuracy], 100)
        bars(line[1], f"{TITLES[auroc]}, %", [percent(one[auroc]) for one in accuracy], 100)
        if timed:
            bars(line[2], "ms per image", [[row["ms"], None] for row in rows])
        bars(line[-2], "peak memory, MB", [row["peak_mb"] for row in rows])
        bars(line[-1], "stored model, MB", [row["stored_mb"] for row in rows])
        for panel in line:
            for bar, row in zip(panel.patches, rows, strict=True):
                bar.set_color(color_of(row["method"], results))
            panel.set_yticks(range(len(rows)), [row["method"] if panel is line[0] else "" for row in rows])
            panel.set_ylim(len(rows) - 0.4, -0.6)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_title(set_words(name, data_set), loc="left", fontsize=11, fontweight="bold")
    add_legend(figure, results)
    figure.suptitle(picture_words(results, protocol), fontsize=9)
    return figure


def is_timed(results: dict[str, Any]) -> bool:
    """Whether any method was timed."""
    return any(row["ms"] is not None for one in results["sets"].values() for row in one["rows"])


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
    labels: list[tuple[Axes, list[tuple[float, float, str, str]], list[float]]] = []
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
        named = [(ms, height, method, color_of(method, results)) for ms, height, _, method in points]
        labels.append((panel, named, [deviation or 0.0 for _, _, deviation, _ in points]))
    for panel in panels[len(sets) :]:
        panel.set_visible(False)
    add_legend(figure, results)
    figure.suptitle(picture_words(results, protocol, 75 * columns), fontsize=8)
    figure.draw_without_rendering()  # settles the layout that the labels are placed in
    for panel, named, deviations in labels:
        label_points(figure, panel, named, deviations)
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


def label_points(
    figure: Figure, panel: Axes, points: list[tuple[float, float, str, str]], deviations: Sequence[float] = ()
) -> None:
    """Write the name beside each point where it covers no other, no point and none of the bars of their ``deviations``.

    It is written nowhere if there is no such place. The reference comes first, and may have its name further away, at
    the end of a line.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in panel.transData.transform([one[:2] for one in points])]
    for (x, y, _, _), deviation in zip(points, deviations, strict=False):
        low, high = panel.transData.transform([(x, y - deviation), (x, y + deviation)])
        taken.append(Bbox([low - (2, 0), high + (2, 0)]))
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
                color=INK,
                arrowprops=line,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line
            if inside.contains(*box.min) and inside.contains(*box.max) and not box.count_overlaps(taken):
                text.set_in_layout(False)
                taken.append(box)
                break
            text.remove()


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


def add_legend(figure: Figure, results: dict[str, Any]) -> None:
    """What the colors mean, below all panels, if there is more than one."""
    names = {REFERENCE: results["reference"], DENSITY: "other settings of this bundle", PEER: "peers"}
    methods = [row["method"] for one in results["sets"].values() for row in one["rows"]]
    colors = {color_of(method, results) for method in methods}
    handles = [Patch(color=color, label=name) for color, name in names.items() if color in colors]
    if len(handles) > 1:
        figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles))


def picture_words(results: dict[str, Any], protocol: str, width: int = 120) -> str:
    """Protocol, backbone, machine and, where it is so, SYNTHETIC, in lines of about one length up to ``width``."""
    synthetic = [one["synthetic"] for one in results["sets"].values()]
    made = "SYNTHETIC data. " if all(synthetic) else "SYNTHETIC data where a panel says so. " if any(synthetic) else ""
    backbones = "; ".join(dict.fromkeys(backbone_words(one) for one in results["sets"].values() if one["rows"]))
    accuracy = f"Accuracy at {protocol_words(results['protocols'][protocol])}"
    words = f"{made}{accuracy}. {backbones}. {results['machine']}".replace("`", "")
    lines = len(textwrap.wrap(words, width))
    shortest = next(one for one in range(len(words) // lines, width + 1) if len(textwrap.wrap(words, one)) <= lines)
    return textwrap.fill(words, shortest)
