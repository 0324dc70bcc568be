r"""How much the image score of healthy images follows noise, organ area and slice position.

    python -m scripts.benchmarks.image_score --checkpoint output/model.pt --data sample_cohort/slices

Both scores come from the same patch maps of the healthy test images: the mean of the top 1 % of foreground patches, and
the score of the checkpoint, which is the same, or adjusted after a training with ``--image_score adjusted``
(:class:`bundle.networks.scores.ImageScore`). Noise is Rician, as in magnitude MR images, and added before the image is
resized.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, RandRicianNoised
from monai.utils import set_determinism

from bundle.command_line import set_knobs
from bundle.errors import BundleError
from bundle.networks.scores import LOWEST
from scripts.benchmarks.common import EVALUATE, ROOT

ORGAN = 0.1  # intensity in [0, 1] above which a pixel counts as organ
SCORES = ("top patches", "image score")


def score_healthy(checkpoint: Path, data: Path, knobs: dict[str, Any], noise: float) -> dict[str, Any]:
    """Both scores, organ area and name of every healthy test image.

    Args:
        checkpoint: of the bundle.
        data: a labeled data set of pictures.
        knobs: of the evaluation, such as where the weights are.
        noise: deviation of the Rician noise, in parts of the intensity range.

    Raises:
        BundleError: if the checkpoint does not fit, or there are fewer than four healthy test images.
    """
    set_determinism(0)
    files = [str(ROOT / name) for name in ("configs/train.json", EVALUATE)]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    given = {"bundle_root": str(ROOT), "dataset_dir": str(data), "checkpoint": str(checkpoint), "tracking_uri": "off"}
    set_knobs(parser, {**given, **knobs})
    healthy = [case for case in parser.get_parsed_content("splits")["test"] if not case.get("label", "mask" in case)]
    if len(healthy) < 4:
        raise BundleError(f"'{data}' has {len(healthy)} healthy test images: at least 4 are needed")
    noisy = RandRicianNoised("image", prob=1.0, std=noise, sample_std=False)
    parser["test::dataset::data"] = healthy
    clean = parser.get_parsed_content("preprocessing")
    parser["test::dataset::transform"] = Compose([clean, noisy]) if noise else clean
    parser.get_parsed_content("load_checkpoint")
    network, inferer = (parser.get_parsed_content(name) for name in ("network", "inferer"))
    found: dict[str, list[Any]] = {name: [] for name in (*SCORES, "area", "name")}
    for batch in parser.get_parsed_content("test::dataloader"):
        images = torch.stack([one.image for one in batch])
        detection = inferer.detect(images, network)
        inside = detection.patch_map > LOWEST
        found["top patches"] += network.image_score.statistics(detection.patch_map, inside)[0].tolist()
        found["image score"] += detection.image_score.tolist()
        found["area"] += (images > ORGAN).float().mean(dim=(1, 2, 3)).tolist()
        found["name"] += [one.case.item["name"] for one in batch]
    return {name: values if name == "name" else np.array(values) for name, values in found.items()}


def explained(score: np.ndarray, cause: np.ndarray) -> float:
    """The share of the score's variance that a parabola in ``cause`` explains, adjusted for its three parameters."""
    residual = score - np.polyval(np.polyfit(cause, score, 2), cause)
    return float(1 - residual.var() * (len(score) - 1) / (score.var() * (len(score) - 3)))


def positions(names: Iterable[str], pattern: str) -> np.ndarray | None:
    """The number of the slice in each name, None if one has none."""
    found = [re.search(pattern, name) for name in names]
    return np.array([float(one[1]) for one in found if one]) if all(found) else None


def measure(given: argparse.Namespace) -> list[str]:
    """The rows of the table."""
    clean = score_healthy(given.checkpoint, given.data, given.knobs, 0.0)
    position = positions(clean["name"], given.slice_pattern)
    rows = []
    for level in given.noise:
        noisy = score_healthy(given.checkpoint, given.data, given.knobs, level)
        shifts = [(noisy[name].mean() - clean[name].mean()) / clean[name].std() for name in SCORES]
        rows.append(row(f"shift by noise of {level:g}, in deviations of clean images", shifts, "{:+.1f}"))
    for words, cause in (("organ area", clean["area"]), ("slice position", position)):
        if cause is not None:
            shares = [100 * explained(clean[name], cause) for name in SCORES]
            rows.append(row(f"variance that {words} explains, %", shares, "{:.0f}"))
    header = f"| {len(clean['name'])} healthy test images of {given.data.name} | {' | '.join(SCORES)} |"
    return [header, "| --- " + "| ---: " * len(SCORES) + "|", *rows]


def row(words: str, values: Sequence[float], form: str) -> str:
    """A line of the table."""
    return f"| {words} | {' | '.join(form.format(value) for value in values)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="model.pt of a training")
    parser.add_argument("--data", type=Path, required=True, help="labeled data set of pictures")
    parser.add_argument(
        "--knobs", type=json.loads, default={}, metavar="JSON", help="of the evaluation, such as weights"
    )
    parser.add_argument("--noise", type=float, nargs="+", default=[0.02, 0.05], help="deviations, of the range [0, 1]")
    parser.add_argument("--slice_pattern", default=r"slice-(\d+)", help="where a name has the number of its slice")
    try:
        print("\n".join(measure(parser.parse_args())))
    except BundleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
