"""How many cases of each kind a model calls unlike its training data.

    python -m scripts.benchmarks.likeness --checkpoint output/model.pt --data sample_cohort/slices \\
        --others "fundus=IDRID/test/good" "FLAIR volume=MS_FLAIR/patient07"

The healthy and the anomalous test images of ``--data``, the healthy ones altered, and what lies in each folder of
``--others``. Prints a table in Markdown, with the 90 % interval of each share (Clopper and Pearson).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.utils import set_determinism
from scipy.stats import binomtest
from torch import Tensor

from bundle.command_line import set_knobs
from bundle.data import find_images
from bundle.errors import BundleError
from scripts.benchmarks.common import EVALUATE, ROOT


def rician(image: Tensor, deviation: float) -> Tensor:
    """``image`` with Rician noise, as magnitude MR images have it."""
    real, imaginary = image + deviation * torch.randn(image.shape), deviation * torch.randn(image.shape)
    return torch.hypot(real, imaginary).clamp(0, 1)


ALTERED: dict[str, Callable[[Tensor], Tensor]] = {  # of images [C, rows, columns, slices] in [0, 1]
    "inverted": lambda image: 1 - image,
    "upside down": lambda image: image.flip(1),
    "turned by 90 degrees": lambda image: image.transpose(1, 2),
    "Rician noise 0.05": lambda image: rician(image, 0.05),
    "Rician noise 0.2": lambda image: rician(image, 0.2),
    "gamma 2": torch.square,
    "noise alone": torch.rand_like,
}


def load(checkpoint: Path, data: Path, knobs: dict[str, Any]) -> ConfigParser:
    """The evaluation of ``checkpoint`` on ``data``, ready to run.

    Raises:
        BundleError: if the model keeps no summary of its training data.
    """
    set_determinism(0)
    parser = ConfigParser(
        ConfigParser.load_config_files([str(ROOT / name) for name in ("configs/train.json", EVALUATE)])
    )
    given = {"bundle_root": str(ROOT), "dataset_dir": str(data), "checkpoint": str(checkpoint), "tracking_uri": "off"}
    set_knobs(parser, given | knobs)
    parser.get_parsed_content("load_checkpoint")
    if not parser.get_parsed_content("network").case_likeness.knows:
        raise BundleError(f"'{checkpoint}' keeps no summary of its training data: train anew")
    return parser


def called_unlike(parser: ConfigParser, images: Iterable[MetaTensor]) -> list[bool]:
    """Of each of ``images`` [C, rows, columns, slices], whether it is called unlike the training data."""
    network, inferer = (parser.get_parsed_content(name) for name in ("network", "inferer"))
    found = []
    for image in images:
        joined = inferer(image[None], network)
        counts = joined["slice_counts"][0]
        unlikeness = float(joined["slice_unlikeness"][0].cpu()[counts.cpu()].quantile(0.5))
        found.append(bool(network.case_likeness.reasons(unlikeness, image.shape[-1] > 1, image.meta)))
    return found


def images_of(parser: ConfigParser, cases: Sequence[dict[str, Any]]) -> Iterator[MetaTensor]:
    """The images of ``cases``, one by one, as the detector sees them."""
    preprocessing = parser.get_parsed_content("preprocessing")
    for case in cases:
        yield preprocessing({"image": case["image"]})["image"]


def rows_of(parser: ConfigParser, others: dict[str, Path], limit: int) -> Iterator[tuple[str, list[bool]]]:
    """The name of each kind of input, and what each of up to ``limit`` cases of it is called."""
    tests = parser.get_parsed_content("splits")["test"]
    healthy, anomalous = (
        [case for case in tests if bool(case.get("label", "mask" in case)) is label] for label in (False, True)
    )
    yield "healthy test images", called_unlike(parser, images_of(parser, healthy))
    yield "anomalous test images", called_unlike(parser, images_of(parser, anomalous))
    for name, alter in ALTERED.items():
        images = images_of(parser, spread(healthy, limit))
        yield name, called_unlike(parser, (MetaTensor(alter(image), meta=image.meta) for image in images))
    for name, folder in others.items():
        yield name, called_unlike(parser, images_of(parser, spread(find_images(folder), limit)))


def spread(cases: Sequence[Any], limit: int) -> list[Any]:
    """Up to ``limit`` of ``cases``, at equal distances."""
    count = min(limit, len(cases))
    return [cases[index * len(cases) // count] for index in range(count)]


def table(rows: Iterable[tuple[str, list[bool]]]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield "| input | cases | called unlike | 90 % interval |"
    yield "| --- | --- | --- | --- |"
    for name, found in rows:
        low, high = binomtest(sum(found), len(found)).proportion_ci(0.9)
        share = sum(found) / len(found)
        yield f"| {name} | {len(found)} | {100 * share:.1f} % | {100 * low:.1f} to {100 * high:.1f} % |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a labeled data set")
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME=FOLDER", help="other images")
    parser.add_argument("--limit", type=int, default=40, help="cases of each altered or other kind (default: 40)")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    others = {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in given.others)}
    try:
        loaded = load(given.checkpoint, given.data, {"device": given.device})
        for line in table(rows_of(loaded, others, given.limit)):
            print(line, flush=True)
    except BundleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
