"""The console command ``dinov3_spatial_ar``: the bundle's configs, put together for one purpose.

    dinov3_spatial_ar examine FOLDER -o OUT --model model.pt

Whatever a purpose changes stands in a config of its name, over that of the command. All knobs can follow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bundle_command import main as run_bundle

EXAMINE = """\
Anomaly maps of the DICOM series of a study, or of any images in a folder. Settings come from the model, and so does the
choice of series: those of a modality and sequence that the model has not learned from are passed over and counted, as
are localizers, reports, earlier results and other files. A damaged file is an error. Research software; not a medical
device.
"""
KNOBS = """\
Every knob of inference can follow as --NAME VALUE, such as --device cuda:0, --on_error skip, --weights PATH,
--segment_unlike true, or --tracking_uri sqlite:///runs.db for an MLflow run. docs/knobs.md lists them.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, default: that of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="dinov3_spatial_ar", description=(__doc__ or "").splitlines()[0])
    purposes = parser.add_subparsers(dest="purpose", required=True, metavar="PURPOSE")
    examine = purposes.add_parser(
        "examine", help="anomaly maps of studies and images", description=EXAMINE, epilog=KNOBS, allow_abbrev=False
    )
    examine.add_argument("dataset_dir", metavar="FOLDER", help="a study, a folder of images, or one file")
    examine.add_argument("-o", "--output_dir", metavar="OUT", required=True, help="the folder of the results")
    examine.add_argument("--model", "--checkpoint", dest="checkpoint", required=True, help="model.pt of a training")
    examine.add_argument("--series_modality", metavar="TEXT", help="such as MR; null: any (default: learned)")
    examine.add_argument(
        "--series_description", metavar="TEXT", help="a regular expression; null: any (default: learned)"
    )
    examine.add_argument("--series_orientation", metavar="PLANE", help="axial, coronal or sagittal (default: any)")
    if given[1:] and given[1].startswith("-") and given[1] not in ("-h", "--help"):
        examine.error(f"'{given[1]}' stands where FOLDER is expected: give the folder first")
    chosen, knobs = parser.parse_known_args(given)
    named = {name: value for name, value in vars(chosen).items() if name != "purpose" and value is not None}
    words = [f"--{name}={value}" for name, value in named.items()]
    run_bundle(["run", "inferring", "--config_file", "['inference.json','examine.json']", *words, *knobs])
