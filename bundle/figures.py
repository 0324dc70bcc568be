"""Pictures for people: overlays of single detections, a gallery of test images, ROC and precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion
from torch import Tensor

from bundle.results import OUTLINE, heat

COLORMAP = "inferno"
OPACITY = 0.6


def picture(image: Tensor, index: int) -> np.ndarray:
    """Slice ``index`` of ``image`` [C, rows, columns, slices], as [rows, columns] or [rows, columns, 3]."""
    return image[..., index].movedim(0, -1).squeeze(-1).numpy()


def blend(image: np.ndarray, anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """``image`` [H, W] or [H, W, 3] in [0, 1] under its heat map [H, W], with the outline of the mask at the threshold.

    Returns:
        [H, W, 3] uint8.
    """
    gray = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    share = heat(anomaly_map, threshold)
    opacity = OPACITY * share[..., None]
    mixed = (1 - opacity) * np.clip(gray, 0, 1) + opacity * colormaps[COLORMAP](share)[..., :3]
    mask = anomaly_map > threshold
    mixed[mask & ~binary_erosion(mask)] = np.array(OUTLINE) / 255
    return (255 * mixed).round().astype(np.uint8)


def blend_slices(image: np.ndarray, anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """Each slice of ``image`` [C, x, y, slices], C = 1 or 3, under its heat map of ``anomaly_map`` [x, y, slices].

    Returns:
        [slices, rows, columns, 3] uint8, rows along y.
    """
    slices = image.T if image.shape[0] == 3 else image[0].T
    return np.stack([blend(shown, values, threshold) for shown, values in zip(slices, anomaly_map.T, strict=True)])


def overlay(image: np.ndarray, anomaly_map: np.ndarray, threshold: float, caption: str) -> Image.Image:
    """The image beside its overlay, and a line of text below, at least 256 pixels high."""
    left = (255 * np.clip(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2), 0, 1)).round()
    pair = np.concatenate([left.astype(np.uint8), blend(image, anomaly_map, threshold)], axis=1)
    zoom = max(1, -(-256 // pair.shape[0]))
    shown = Image.fromarray(pair).resize((pair.shape[1] * zoom, pair.shape[0] * zoom), Image.Resampling.NEAREST)
    font = ImageFont.load_default(size=13)
    lines = _wrapped(caption, font, shown.width - 8)
    canvas = Image.new("RGB", (shown.width, shown.height + 18 * len(lines) + 6), "black")
    canvas.paste(shown)
    ImageDraw.Draw(canvas).multiline_text((4, shown.height + 3), "\n".join(lines), fill="white", font=font)
    return canvas


def gallery(examples: Sequence[dict[str, Any]], threshold: float, title: str) -> Figure:
    """Rows of image, true mask, anomaly map and overlay.

    Args:
        examples: each with ``name``, ``image`` [H, W] or [H, W, 3] in [0, 1], ``map`` [H, W], ``mask`` [H, W] or None,
            and ``score``.
        threshold: of the map.
        title: above all.
    """
    rows = len(examples)
    figure = Figure(figsize=(9, 2.4 * rows + 1.4), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        row[0].imshow(example["image"], cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(f"{example['name']}\nscore {example['score']:.1f}", fontsize=7)
        if example["mask"] is not None:
            row[1].imshow(example["mask"], cmap="gray", vmin=0, vmax=1)
        shown = row[2].imshow(heat(example["map"], threshold), cmap=COLORMAP, vmin=0, vmax=1)
        row[3].imshow(blend(example["image"], example["map"], threshold))
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], ("image", "true mask", "anomaly map", "overlay"), strict=True):
        axis.set_title(name, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, location="bottom", fraction=0.02, aspect=60)
    marked = [count * threshold for count in range(4)]
    bar.set_ticks([float(heat(np.array(z), threshold)) for z in marked], labels=[f"{z:.3g}" for z in marked])
    bar.set_label("z-score among healthy patches; middle: threshold", fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


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


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
