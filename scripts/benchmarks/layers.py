r"""Which layers of a backbone suit the detector: the detector without its network, on labeled sets of pictures.

    python -m scripts.benchmarks.layers --data BR35H IDRID --backbone dinov2_vits14 --weights FILE --layers 11 6 4+6

Each image goes through the backbone once. For every choice of layers the detector is fitted in closed form: the context
network stays untrained, when it predicts nothing, so the prediction is the linear one. Details are left out. Choose by
the development half of the test images, a half by a hash of their names; the other half is to report on (``--part``).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bundle.data.cases import Case, find_splits
from bundle.errors import BundleError
from bundle.metrics import AnomalyMetrics
from bundle.model import make_detector
from bundle.networks.detector import AnomalyDetector
from bundle.networks.foreground import mean_brightness
from scripts.benchmarks.common import FIT_BATCH, machine_words, say
from scripts.benchmarks.images import load_images
from scripts.benchmarks.tables import PARTS, part_of

METRICS = ("pixel_auroc", "pixel_ap", "aupro", "image_auroc")

Settings = dict[str, Any]


class Embedded(NamedTuple):
    """What a backbone gives of some images."""

    maps: dict[int, Tensor]
    """Of each layer [N, C, h, w], in 16 bits."""
    brightness: Tensor
    """Of each patch, [N, 1, h, w]."""


def draw_cases(data: Path, training: int, part: str) -> dict[str, list[Case]]:
    """The cases of each split: ``training`` healthy ones by chance, all for validation, a part of those to test."""
    splits = find_splits(data)
    drawn = random.Random(0).sample(splits["training"], min(training, len(splits["training"])))
    return {
        **splits,
        "training": drawn,
        "test": [case for case in splits["test"] if part in ("all", part_of(case["name"]))],
    }


@torch.inference_mode()
def embed(cases: Sequence[Case], layers: Sequence[int], given: argparse.Namespace) -> Embedded:
    """The maps of each of ``layers``, ascending, and the brightness of patches."""
    detector = make_detector(settings_of(given, layers), given.weights)
    if averages(detector):
        detector = make_detector({**settings_of(given, layers), "blocks": "joined"}, given.weights)
    widths = [make_detector(settings_of(given, [layer]), given.weights).features.num_channels for layer in layers]
    maps, brightness = [], []
    for case in cases:
        image = detector.resize(load_images([case["image"]], "cpu")[..., 0])
        maps.append(detector.features(detector.features.normalize(image)).half())
        brightness.append(mean_brightness(image, detector.features.patch_size))
    parts = torch.cat(maps).split(widths, dim=1)
    return Embedded(dict(zip(layers, parts, strict=True)), torch.cat(brightness))


def settings_of(given: argparse.Namespace, layers: Sequence[int]) -> Settings:
    """Those of a detector that taps ``layers``."""
    return {"detail_layers": [], **given.knobs, "backbone": given.backbone, "layers": list(layers)}


def fitted_detector(given: argparse.Namespace, layers: Sequence[int], embedded: dict[str, Embedded]) -> AnomalyDetector:
    """The detector that taps ``layers``, fitted to the healthy images; its network stays untrained."""
    detector = make_detector(settings_of(given, layers), given.weights)
    training, validation = (batches_of(detector, layers, embedded[split]) for split in ("training", "validation"))
    deviation, mean = torch.std_mean(torch.cat(training), dim=(0, 2, 3))
    detector.set_standardization(mean, deviation)
    detector.fit_before_training(training, validation)
    detector.fit_after_training(training)
    detector.calibrate(validation)
    return detector


def batches_of(detector: AnomalyDetector, layers: Sequence[int], embedded: Embedded) -> list[Tensor]:
    """What ``detector`` would keep of the images."""
    batches = []
    parts = [embedded.maps[layer].split(FIT_BATCH) for layer in layers]
    for *maps, brightness in zip(*parts, embedded.brightness.split(FIT_BATCH), strict=True):
        joined = torch.stack(maps).float().mean(dim=0) if averages(detector) else torch.cat(maps, dim=1).float()
        batches.append(torch.cat([detector.feature_pooling(joined), brightness], dim=1))
    return batches


def averages(detector: AnomalyDetector) -> bool:
    """Whether it averages what it taps."""
    return detector.features.describe().get("blocks") == "averaged"


@torch.inference_mode()
def metrics_of(
    detector: AnomalyDetector, layers: Sequence[int], embedded: Embedded, cases: Sequence[Case]
) -> list[float | None]:
    """The metrics of :data:`METRICS`, in this order, over ``cases``, at the size of their images."""
    metrics = AnomalyMetrics(threshold=float(detector.threshold))
    scored = [detector.score_patches(batch) for batch in batches_of(detector, layers, embedded)]
    patch_maps, inside = (torch.cat(values) for values in zip(*scored, strict=True))
    for patch_map, image_score, case in zip(patch_maps, detector.image_score(patch_maps, inside), cases, strict=True):
        mask = read_mask(case)
        anomaly_map = F.interpolate(patch_map[None, None], mask.shape, mode="bilinear", align_corners=False)
        metrics.update(anomaly_map[0, 0], mask, image_score, bool(case["label"]))
    found = metrics.compute()
    return [found[name] for name in METRICS]


def read_mask(case: Case) -> np.ndarray:
    """The lesions of a picture, as true and false; none where there is no mask."""
    with Image.open(case["mask"] if "mask" in case else case["image"]) as picture:
        values = np.asarray(picture.convert("L"))
    return values > 0 if "mask" in case else np.zeros(values.shape, bool)


def measure(given: argparse.Namespace) -> list[str]:
    """The rows of the table."""
    layers = sorted({layer for choice in given.layers for layer in choice})
    found: dict[tuple[int, ...], list[str]] = {choice: [] for choice in given.layers}
    for data in given.data:
        splits = draw_cases(data, given.training, given.part)
        counts = ", ".join(f"{len(cases)} {split}" for split, cases in splits.items())
        say(f"{data.name}: embedding {counts} images")
        embedded = {split: embed(cases, layers, given) for split, cases in splits.items()}
        for choice in given.layers:
            detector = fitted_detector(given, choice, embedded)
            values = metrics_of(detector, choice, embedded["test"], splits["test"])
            cell = " / ".join("-" if value is None else f"{100 * value:.1f}" for value in values)
            found[choice].append(cell)
            say(f"{data.name}, layers {words(choice)}: {cell}")
    names = " | ".join(data.name for data in given.data)
    table = [f"| layers | {names} |", "| --- " + "| --- " * len(given.data) + "|"]
    return [*table, *(f"| {words(choice)} | {' | '.join(cells)} |" for choice, cells in found.items())]


def words(choice: Sequence[int]) -> str:
    """As it is given on the command line."""
    return "+".join(map(str, choice))


def read_choice(text: str) -> tuple[int, ...]:
    """Layers that are tapped together, ascending, from ``4+6``."""
    return tuple(sorted({int(layer) for layer in text.split("+")}))


def make_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="labeled sets of pictures")
    add("--backbone", required=True, help="its name")
    add("--weights", help="of the backbone, as the knob has it")
    add("--layers", type=read_choice, nargs="+", required=True, help="choices from 0 on, such as 6 4+6")
    add("--knobs", type=json.loads, default={}, metavar="JSON", help="more settings of the model")
    add("--training", type=int, default=150, help="healthy images to fit to")
    add("--part", choices=PARTS, default="development", help="of the test images")
    return parser


def main() -> None:
    """Print the table."""
    given = make_parser().parse_args()
    try:
        rows = measure(given)
    except BundleError as error:
        sys.exit(f"error: {error}")
    print(f"Pixel AUROC / AP / AUPRO / image AUROC in percent, {given.part} test images; {machine_words()}.\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
