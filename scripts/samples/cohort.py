"""Write the synthetic sample cohort: python -m scripts.samples.cohort --out sample_cohort."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from bundle.errors import BundleError
from bundle.samples.cohort import make_sample_cohort


def make_parser() -> argparse.ArgumentParser:
    """A parser with the defaults of :func:`bundle.samples.cohort.make_sample_cohort`."""
    parser = argparse.ArgumentParser(description="Write a cohort of SYNTHETIC brain images, with and without lesions.")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory, or an earlier cohort")
    for name, text in {
        "seed": "what the random numbers start from",
        "train_subjects": "healthy subjects to learn from",
        "valid_subjects": "subjects to choose thresholds with, every second one healthy",
        "test_subjects": "subjects to report on, every fourth one healthy",
        "slices_per_subject": "axial slices",
    }.items():
        default = inspect.signature(make_sample_cohort).parameters[name].default
        option = f"--{name.removesuffix('_per_subject').removesuffix('_subjects')}"
        parser.add_argument(option, dest=name, type=int, default=default, help=f"{text} (default: {default})")
    return parser


def main() -> None:
    """Write the cohort and tell where everything lies."""
    arguments = vars(make_parser().parse_args())
    try:
        directory = make_sample_cohort(arguments.pop("out"), **arguments)
    except BundleError as error:
        sys.exit(f"error: {error}")
    print(f"volumes   {directory / 'volumes'}")
    print(f"slices    {directory / 'slices'} (BMAD layout)")
    print(f"manifest  {directory / 'manifest.csv'}")
    print(f"read me   {directory / 'README.txt'}")


if __name__ == "__main__":
    main()
