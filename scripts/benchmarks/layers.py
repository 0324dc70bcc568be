r"""Which layers of a backbone suit the detector: the detector without its network, on labeled sets of pictures.

    python -m scripts.benchmarks.layers --data BR35H IDRID --backbone dinov2_vits14 --weights FILE --layers 11 6 4+6

Each image goes through the backbone once. For every choice of layers the detector is fitted in closed form: the context
network stays untrained, when it predicts nothing, so the prediction is the linear one. The map is lowest outside of the
foreground, and the image score is the mean of the top 1 % of foreground patches. Choose by the development half of the
test images, a half by a hash of their names; the other half is there to report (``--half``).
"""

from __future__ import annotations

import argparse
import hashlib
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
from bundle.networks.scores import TOP_SHARE
from scripts.benchmarks.common import FIT_BATCH, machine_words, say
from scripts.benchmarks.images import load_images

HALVES = ("development", "report", "all")
METRICS = ("pixel_auroc", "pixel_ap", "aupro", "image_auroc")
AIR = 0.02  # mean intensity in [0, 1] of a patch, up to which it is background

Settings = dict[str, Any]


class Embedded(NamedTuple):
    """What a backbone gives of some images."""

    maps: dict[int, Tensor]
    """Of each layer [N, C, h, w], in 16 bits."""
    foreground: Tensor
    """Which patches show more than air, [N, h, w]."""


def in_half(case: Case, half: str) -> bool:
    """Whether a test case is in ``half``, one of :data:`HALVES`: its file's name decides, in every set and release."""
    odd = int(hashlib.sha256(Path(case["image"]).stem.encode()).hexdigest(), 16) % 2
    return half == "all" or odd == (half == "report")


def draw_cases(data: Path, training: int, half: str) -> dict[str, list[Case]]:
    """The cases of each split: ``training`` healthy ones by chance, all for validation, a half of those to test."""
    splits = find_splits(data)
    drawn = random.Random(0).sample(splits["training"], min(training, len(splits["training"])))
    return {**splits, "training": drawn, "test": [case for case in splits["test"] if in_half(case, half)]}


@torch.inference_mode()
def embed(cases: Sequence[Case], layers: Sequence[int], given: argparse.Namespace) -> Embedded:
    """The maps of each of ``layers``, ascending, and the foreground."""
    detector = make_detector(settings_of(given, layers), given.weights)
    if averages(detector):
        detector = make_detector({**settings_of(given, layers), "blocks": "joined"}, given.weights)
    widths = [make_detector(settings_of(given, [layer]), given.weights).features.num_channels for layer in layers]
    maps, brightness = [], []
    for case in cases:
        image = detector.resize(load_images([case["image"]], "cpu")[..., 0])
        maps.append(detector.features(detector.features.normalize(image)).half())
        brightness.append(F.avg_pool2d(image.mean(dim=1), detector.features.patch_size))
    parts = torch.cat(maps).split(widths, dim=1)
    return Embedded(dict(zip(layers, parts, strict=True)), foreground(torch.cat(brightness)))


def settings_of(given: argparse.Namespace, layers: Sequence[int]) -> Settings:
    """Those of a detector that taps ``layers``."""
    return {**given.knobs, "backbone": given.backbone, "layers": list(layers)}


def foreground(brightness: Tensor) -> Tensor:
    """Where ``brightness`` [N, h, w] in [0, 1] is more than air's, holes filled: the same as true and false.

    A patch is in a hole if there is foreground to its left and right, above and below.
    """
    bright = brightness > AIR
    seen = [bright.cummax(axis).values for axis in (1, 2)]
    seen += [bright.flip(axis).cummax(axis).values.flip(axis) for axis in (1, 2)]
    return torch.stack(seen).all(dim=0)


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
    """The embeddings that ``detector`` would make of the images."""
    batches = []
    for maps in zip(*(embedded.maps[layer].split(FIT_BATCH) for layer in layers), strict=True):
        joined = torch.stack(maps).float().mean(dim=0) if averages(detector) else torch.cat(maps, dim=1).float()
        batches.append(detector.feature_pooling(joined))
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
    scores = torch.cat([detector.score_patches(batch) for batch in batches_of(detector, layers, embedded)])
    for patch_map, inside, case in zip(scores, embedded.foreground, cases, strict=True):
        tissue = patch_map[inside] if inside.any() else patch_map.flatten()
        image_score = tissue.topk(max(1, round(TOP_SHARE * len(tissue)))).values.mean()
        restricted = torch.where(inside, patch_map, scores.min())
        mask = read_mask(case)
        anomaly_map = F.interpolate(restricted[None, None], mask.shape, mode="bilinear", align_corners=False)
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
        splits = draw_cases(data, given.training, given.half)
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
    add("--half", choices=HALVES, default="development", help="of the test images")
    return parser


def main() -> None:
    """Print the table."""
    given = make_parser().parse_args()
    try:
        rows = measure(given)
    except BundleError as error:
        sys.exit(f"error: {error}")
    print(f"Pixel AUROC / AP / AUPRO / image AUROC in percent, {given.half} test images; {machine_words()}.\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
