"""Pictures for people: overlays of single detections, a gallery of test images, ROC and precision-recall curves.

What a picture says of a slice it says in one way, here: shape by the spacing of its pixels, a scale bar, letters of
directions, the colors of its map inside the body, and the threshold on the color bar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from nibabel.orientations import aff2axcodes
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion
from torch import Tensor

from bundle.results import OUTLINE, heat

if TYPE_CHECKING:
    from monai.data import MetaTensor

COLORMAP = "inferno"  # its lightness rises evenly, so it serves the color-blind and prints in gray
OPACITY = 0.6
OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
LOW = 256  # pixels: no overlay is lower
LONG = 2048  # pixels: spacing makes no side longer
CELL = 240  # pixels: the longer side of a picture in a gallery
BAR = (14, 200)  # pixels: width and height of the color bar
BAR_ROOM = (132, LOW)  # pixels: the same with its labels
GAP = 8  # pixels, around text and between pictures
LINE = 18  # pixels
NO_PATIENT = 1e6  # mm: a pixel that is larger, or smaller than its inverse, says nothing of a patient


class Placement(NamedTuple):
    """How the pixels of a slice lie in a patient.

    Attributes:
        spacing: mm from row to row, and from column to column.
        edges: what lies beyond the left, right, upper and lower edge, as ``"RLAP"``; empty where the file tells none.
    """

    spacing: tuple[float, float]
    edges: str


def placement(image: MetaTensor) -> Placement | None:
    """That of the slices of ``image`` [C, rows, columns, slices]; None if it has no place in a patient."""
    if image.meta.get("slice_axis") is None:
        return None
    affine = image.affine.numpy()
    down, right = np.linalg.norm(affine[:3, :2], axis=0).tolist()
    if not all(1 / NO_PATIENT < side < NO_PATIENT for side in (down, right)):
        return None
    below, beside, _ = aff2axcodes(affine)
    edges = OPPOSITE[beside] + beside + OPPOSITE[below] + below
    return Placement((down, right), edges if image.meta.get("oriented", True) else "")


def picture(image: Tensor, index: int) -> np.ndarray:
    """Slice ``index`` of ``image`` [C, rows, columns, slices], as [rows, columns] or [rows, columns, 3]."""
    return image[..., index].movedim(0, -1).squeeze(-1).numpy()


def body(image: np.ndarray, air: float) -> np.ndarray:
    """Which pixels show the body, holes included: the rule of :class:`bundle.networks.foreground.Foreground`.

    The map has a value for each patch, and those at the border reach beyond the body.

    Args:
        image: [H, W] or [H, W, 3] in [0, 1].
        air: the intensity up to which it is air; below 0 where nothing is.

    Returns:
        [H, W] bool.
    """
    bright = (image.mean(axis=2) if image.ndim == 3 else image) > air
    from_above, from_left = (np.logical_or.accumulate(bright, axis=axis) for axis in (0, 1))
    turned = bright[::-1, ::-1]
    from_below, from_right = (np.logical_or.accumulate(turned, axis=axis)[::-1, ::-1] for axis in (0, 1))
    return from_above & from_below & from_left & from_right


def blend(image: np.ndarray, anomaly_map: np.ndarray, threshold: float, air: float) -> np.ndarray:
    """``image`` under its heat map, with the outline of the mask at the threshold; the air stays as it is.

    Args:
        image: [H, W] or [H, W, 3] in [0, 1].
        anomaly_map: [H, W], z-scores among healthy patches.
        threshold: of the mask.
        air: see :func:`body`.

    Returns:
        [H, W, 3] uint8.
    """
    inside = body(image, air)
    share = heat(anomaly_map, threshold) * inside
    opacity = OPACITY * share[..., None]
    mixed = (1 - opacity) * np.clip(_as_rgb(image), 0, 1) + opacity * colormaps[COLORMAP](share)[..., :3]
    mask = (anomaly_map > threshold) & inside
    mixed[mask & ~binary_erosion(mask)] = np.array(OUTLINE) / 255
    return _as_bytes(mixed)


def blend_slices(image: np.ndarray, anomaly_map: np.ndarray, threshold: float, air: float) -> np.ndarray:
    """Each slice of ``image`` [C, x, y, slices], C = 1 or 3, under its heat map of ``anomaly_map`` [x, y, slices].

    Returns:
        [slices, rows, columns, 3] uint8, rows along y.
    """
    slices = image.T if image.shape[0] == 3 else image[0].T
    return np.stack([blend(shown, values, threshold, air) for shown, values in zip(slices, anomaly_map.T, strict=True)])


def marks(threshold: float) -> list[tuple[float, float]]:
    """The ticks of a color bar: where they are, from 0 to 1, and their z-scores.

    0, the threshold and its multiples; the threshold alone where :func:`~bundle.results.heat` knows no more.
    """
    z_scores = [count * threshold for count in range(4)] if 0 < threshold < math.inf else [threshold]
    return [(float(heat(np.array(z), threshold)) if z != threshold else 0.5, z) for z in z_scores]


def scale_length(width: float) -> float:
    """The longest of 1, 2, 5, 10, 20, 50, ... mm that takes at most a third of ``width`` mm."""
    limit = width / 3
    power = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit)


class Example(NamedTuple):
    """One row of a gallery.

    Attributes:
        name: of the case.
        image: [H, W] or [H, W, 3] in [0, 1].
        anomaly_map: [H, W], z-scores among healthy patches.
        mask: [H, W] bool, the true one; None if there is none.
        score: of the case.
        place: of the slice; None if it has none.
    """

    name: str
    image: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray | None
    score: float
    place: Placement | None = None


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float,
    air: float,
    place: Placement | None,
    caption: str,
) -> Image.Image:
    """The image beside its overlay and the color bar, and a line of text below, at least 256 pixels high.

    Args:
        image, anomaly_map, threshold, air: see :func:`blend`.
        place: of the slice: gives both pictures their shape, a scale bar and letters; None: pixels are squares.
        caption: the text.
    """
    height, width = extent(anomaly_map, place)
    zoom = min(max(1, math.ceil(LOW / height)), max(LONG, *anomaly_map.shape) / max(height, width))
    shown, values = (resized(one, place, zoom) for one in (image, anomaly_map))
    panels = [
        _annotated(pixels, _millimeters(image, place), place)
        for pixels in (_as_bytes(_as_rgb(shown)), blend(shown, values, threshold, air))
    ]
    side = panels[0].width + GAP
    size = (2 * side + BAR_ROOM[0], max(panels[0].height, BAR_ROOM[1]))
    lines = _wrapped(caption, size[0] - 2 * GAP)
    canvas = Image.new("RGB", (size[0], size[1] + LINE * len(lines) + GAP), "black")
    for index, panel in enumerate(panels):
        canvas.paste(panel, (index * side, 0))
    canvas.paste(_color_bar(threshold, "white", "black"), (2 * side, 0))
    ImageDraw.Draw(canvas).multiline_text((GAP, size[1] + 4), "\n".join(lines), "white", _font(), spacing=4)
    return canvas


def gallery(examples: Sequence[Example], threshold: float, air: float, title: str) -> Image.Image:
    """Rows of image, true mask, anomaly map and overlay, with the color bar.

    Args:
        examples: a row each.
        threshold, air: see :func:`blend`.
        title: above all.
    """
    columns = ("image", "true mask", "anomaly map", "overlay")
    step = CELL + GAP
    lines = [line for part in title.splitlines() for line in _wrapped(part, len(columns) * step)]
    rows = [_row(example, threshold, air) for example in examples]
    top = LINE * (len(lines) + 1) + 2 * GAP
    heights = [LINE + panels[0].height + GAP for panels in rows]
    size = (GAP + len(columns) * step + BAR_ROOM[0], top + max(sum(heights), BAR_ROOM[1]))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((GAP, GAP), "\n".join(lines), "black", _font(), spacing=4)
    canvas.paste(_color_bar(threshold, "black", "white"), (GAP + len(columns) * step, top))
    for index, name in enumerate(columns):
        draw.text((GAP + index * step + CELL // 2, top - 6), name, "black", _font(), anchor="ms")
    for example, panels, height in zip(examples, rows, heights, strict=True):
        words = _shortened(f"{example.name}: score {example.score:.1f}", len(columns) * step)
        draw.text((GAP, top + LINE - 5), words, "black", _font(), anchor="ls")
        for index, panel in enumerate(panels):
            canvas.paste(panel, (GAP + index * step + (CELL - panel.width) // 2, top + LINE))
        top += height
    return canvas


def curves(roc: tuple[np.ndarray, np.ndarray], precision_recall: tuple[np.ndarray, np.ndarray], title: str) -> Figure:
    """Pixel ROC curve (false positive rate, true positive rate) and precision-recall curve (recall, precision)."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*roc)
    left.set(xlabel="false positive rate", ylabel="true positive rate", title="pixel ROC", xlim=(0, 1), ylim=(0, 1.01))
    right.plot(*precision_recall)
    right.set(xlabel="recall", ylabel="precision", title="pixel precision-recall", xlim=(0, 1), ylim=(0, 1.01))
    figure.suptitle(title, fontsize=9)
    return figure


def _row(example: Example, threshold: float, air: float) -> list[Image.Image]:
    """The pictures of a gallery's row."""
    place = example.place
    zoom = CELL / max(extent(example.anomaly_map, place))
    shown, values = (resized(one, place, zoom) for one in (example.image, example.anomaly_map))
    mask = np.zeros(values.shape) if example.mask is None else resized(example.mask, place, zoom) > 0
    heated = colormaps[COLORMAP](heat(values, threshold) * body(shown, air))[..., :3]
    image = _annotated(_as_bytes(_as_rgb(shown)), _millimeters(example.image, place), place)
    truth, colors = (Image.fromarray(_as_bytes(_as_rgb(one))) for one in (mask, heated))
    if example.mask is None:
        ImageDraw.Draw(truth).text((truth.width / 2, truth.height / 2), "none", "white", _font(), anchor="mm")
    return [image, truth, colors, Image.fromarray(blend(shown, values, threshold, air))]


def extent(image: np.ndarray, place: Placement | None) -> tuple[float, float]:
    """Height and width of ``image`` [H, W, ...], in the shorter sides of its pixels."""
    down, right = place.spacing if place else (1.0, 1.0)
    return image.shape[0] * down / min(down, right), image.shape[1] * right / min(down, right)


def _millimeters(image: np.ndarray, place: Placement | None) -> float:
    """From the left edge of ``image`` to the right one; 0 where nobody knows."""
    return image.shape[1] * place.spacing[1] if place else 0.0


def zoom_to(image: np.ndarray, place: Placement | None, side: int) -> float:
    """The zoom by which :func:`resized` gives ``image`` a longer side of ``side`` pixels, at most 1."""
    return min(1.0, side / max(extent(image, place)))


def resized(image: np.ndarray, place: Placement | None, zoom: float) -> np.ndarray:
    """``image`` [H, W] or [H, W, 3] as large as it is shown: pixels repeated, or their means."""
    height, width = (max(1, round(zoom * side)) for side in extent(image, place))
    if (height, width) == image.shape[:2]:
        return image
    bands = np.moveaxis(image, -1, 0) if image.ndim == 3 else image[None]
    resized = [
        np.asarray(Image.fromarray(band.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
        for band in bands
    ]
    return np.stack(resized, axis=-1) if image.ndim == 3 else resized[0]


def _annotated(pixels: np.ndarray, width: float, place: Placement | None) -> Image.Image:
    """``pixels`` [H, W, 3] uint8 of ``width`` mm, with letters of directions and a scale bar where they are known."""
    panel = Image.fromarray(pixels)
    if place is None:
        return panel
    draw = ImageDraw.Draw(panel)
    right, below = panel.width, panel.height
    edges = ((3, below / 2, "lm"), (right - 3, below / 2, "rm"), (right / 2, 2, "ma"), (right / 2, below - 3, "ms"))
    for letter, (x, y, anchor) in zip(place.edges, edges, strict=False):
        draw.text((x, y), letter, "white", _font(), anchor=anchor, stroke_width=1, stroke_fill="black")
    length = scale_length(width)
    words, end = f"{length:g} mm", GAP + round(length / width * right) - 1
    if right < GAP + _font(11).getlength(words):
        return panel
    draw.rectangle((GAP - 1, below - 11, end + 1, below - 7), "black")
    draw.rectangle((GAP, below - 10, end, below - 8), "white")
    draw.text((GAP, below - 14), words, "white", _font(11), anchor="ls", stroke_width=1, stroke_fill="black")
    return panel


def _color_bar(threshold: float, ink: str, paper: str) -> Image.Image:
    """The colors of z-scores, ticks in ``ink``, and the threshold in the color of the outline."""
    bar = Image.new("RGB", BAR_ROOM, paper)
    draw = ImageDraw.Draw(bar)
    width, height = BAR
    top = BAR_ROOM[1] - height - GAP
    colors = colormaps[COLORMAP](np.linspace(1, 0, height))[:, None, :3]
    bar.paste(Image.fromarray(np.repeat(_as_bytes(colors), width, axis=1)), (GAP, top))
    draw.rectangle((GAP - 1, top - 1, GAP + width, top + height), outline=ink)
    draw.text((GAP, top - 24), "z-score", ink, _font(), anchor="ls")
    for share, z in marks(threshold):
        y = top + round((1 - share) * (height - 1))
        words = f"{z:.3g}"
        if z == threshold:
            draw.line((GAP, y, GAP + width - 1, y), OUTLINE)
            words += " threshold"
        draw.line((GAP + width, y, GAP + width + 4, y), ink)
        draw.text((GAP + width + 8, y), words, ink, _font(11), anchor="lm")
    return bar


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, 3] as [H, W, 3]."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _as_bytes(image: np.ndarray) -> np.ndarray:
    """Shares as uint8."""
    return (255 * np.clip(image, 0, 1)).round().astype(np.uint8)


@cache
def _font(size: int = 13) -> ImageFont.FreeTypeFont:
    """The font of matplotlib, which has the letters of more languages than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shortened(text: str, width: int) -> str:
    """``text`` without its beginning, if it is too long."""
    short = text
    while _font().getlength(short) > width:
        text = text[1:]
        short = f"...{text}"
    return short
