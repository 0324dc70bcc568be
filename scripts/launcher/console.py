"""The console command ``dinov3_spatial_ar``: the bundle's configs, put together for one purpose each.

    dinov3_spatial_ar train DATA -o RESULTS
    dinov3_spatial_ar examine STUDY -o FOUND --model RESULTS/model.pt

Whatever a purpose changes stands in a config, over that of the command. All knobs can follow. Help and errors of the
command line need none of the bundle's libraries.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .bundle_command import ROOT
from .bundle_command import main as run_bundle
from .completion import SHELLS, choices, completing
from .doctor import doctor
from .knobs_page import in_words, knobs_of, width

NAME = "dinov3_spatial_ar"
REPORT, BROWSE, DOCTOR, COMPLETION = "report", "browse", "doctor", "completion"
ARGUMENTS = ("bundle_root", "dataset_dir", "output_dir", "checkpoint")  # knobs that have a place of their own
NO_DEVICE = "Research software; not a medical device."
ABOUT_REPORTS = (
    "Each training, evaluation and inference writes a report, one HTML file. This opens it, or writes a copy: with "
    "numbers in the place of names, or with fewer pictures. Pixels stay as they are: faces are not hidden."
)


class Purpose(NamedTuple):
    """A command of the bundle for the console.

    Attributes:
        command: of the bundle.
        configs: that it is made of, the later ones over the earlier.
        tables: of its knobs in ``docs/knobs.md``, that of the last config first.
        data: what its first argument is called; empty: it takes none.
        summary: one line.
        help: the whole of it.
        needs: whether data, results and model must be given; else the configs have defaults.
    """

    command: str
    configs: tuple[str, ...]
    tables: tuple[str, ...]
    data: str
    summary: str
    help: str
    needs: bool = False


PURPOSES = {
    "train": Purpose(
        "training",
        ("train.json",),
        ("training", "every", "model"),
        "DATA",
        "learn from healthy images, and score the test split",
        "Learn from healthy images: a BMAD folder, a folder of healthy images, volumes or studies, or a MONAI "
        "datalist. Writes model.pt, metrics and figures. Without DATA, the synthetic sample cohort is made.",
    ),
    "evaluate": Purpose(
        "evaluating",
        ("train.json", "evaluate.json"),
        ("evaluating", "every"),
        "DATA",
        "metrics of a trained model on a labeled test split",
        "Metrics and figures of a trained model on the test split of DATA. Settings come from the model.",
    ),
    "infer": Purpose(
        "inferring",
        ("inference.json",),
        ("inferring", "every"),
        "IMAGES",
        "maps, masks and scores of images",
        "Maps, masks and scores of any image, volume or DICOM study, or of all in a folder. Settings come from the "
        "model.",
    ),
    "examine": Purpose(
        "inferring",
        ("inference.json", "examine.json"),
        ("examine", "inferring", "every"),
        "FOLDER",
        "DICOM results of the series of a study that the model knows",
        "Anomaly maps of the DICOM series of a study, or of any images in a folder. Settings come from the model, and "
        "so does the choice of series: those of a modality and sequence that the model has not learned from are passed "
        "over and counted, as are localizers, reports, earlier results and other files. A damaged file is an error. "
        "There is no MLflow run, unless --tracking_uri asks for one.",
        needs=True,
    ),
    "export": Purpose(
        "exporting",
        ("inference.json", "export.json"),
        ("exporting", "every"),
        "",
        "a trained model as TorchScript, ONNX and OpenVINO",
        "Writes a trained model as TorchScript, ONNX and OpenVINO, and compares each file with the model. The files "
        "hold the weights of the backbone, whose license they carry.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, default: that of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, purposes = make_parser()
    data = given.pop(1) if given[1:] and not given[1].startswith("-") and given[0] in PURPOSES else None
    chosen, knobs = parser.parse_known_args(given)
    if chosen.purpose in PURPOSES:
        purpose = PURPOSES[chosen.purpose]
        _check_data(data, purpose, purposes[chosen.purpose])
        return run(purpose, chosen, data, knobs)
    if knobs:
        purposes[chosen.purpose].error(f"'{knobs[0]}' is unknown")
    if chosen.purpose == COMPLETION:
        return print(completing(with_knobs(), chosen.shell))
    if chosen.purpose == DOCTOR:
        sys.exit(doctor(ROOT))
    if chosen.purpose == REPORT:
        return report(chosen)
    sys.path.insert(0, str(ROOT))
    from bundle.browse import browse

    browse(Path(chosen.results), chosen.open_browser, chosen.port)


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line without data and knobs, which stand anywhere, and its part for each purpose."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description=f"Anomaly maps of medical images, learned from healthy images alone. {NO_DEVICE}",
        epilog=f"{NAME} PURPOSE --help names all knobs of a purpose.",
    )
    purposes = parser.add_subparsers(dest="purpose", required=True, metavar="PURPOSE")
    for name, purpose in PURPOSES.items():
        _add(purposes, name, purpose)
    reports = purposes.add_parser(
        REPORT, help="open the reports of results, or copy one without names", description=ABOUT_REPORTS
    )
    reports.add_argument("results", nargs="+", metavar="RESULTS", help="output folders, or reports")
    reports.add_argument("-o", "--copy", metavar="PAGE", help="write a copy of the latest report, and open that")
    reports.add_argument("--hide_names", action="store_true", help="of cases, files and folders, in the copy")
    reports.add_argument("--limit_mb", type=float, default=8.0, help="the size of the copy (default: 8)")
    reports.add_argument("--no_browser", dest="open_browser", action="store_false", help="print addresses only")
    pages = purposes.add_parser(BROWSE, help="look at the runs of a folder of results in MLflow's pages")
    pages.add_argument("results", metavar="RESULTS", help="an output folder, or an MLflow database of several")
    pages.add_argument("--no_browser", dest="open_browser", action="store_false", help="print the address only")
    pages.add_argument("--port", type=int, default=0, help="0: any free one (default: 0)")
    machine = "look at packages, weights, device, disk and memory, and make a map of a picture"
    purposes.add_parser(DOCTOR, help=machine, description=f"{machine.capitalize()}. Nothing is fetched or left behind.")
    shells = purposes.add_parser(COMPLETION, help="print what a shell needs to complete this command")
    shells.add_argument("shell", choices=SHELLS)
    return parser, dict(purposes.choices)


def with_knobs() -> argparse.ArgumentParser:
    """The command line with data and knobs as arguments, for completion; it knows no knobs of configs of a user."""
    parser, purposes = make_parser()
    names = {knob.name for purpose in PURPOSES.values() for knob in knobs_of(purpose.tables)}
    for name, purpose in PURPOSES.items():
        purposes[name].description = purpose.summary  # shells show its first line
        if purpose.data:
            purposes[name].add_argument("data", nargs="?", metavar=purpose.data)
        for knob in knobs_of(purpose.tables, without=ARGUMENTS):
            says = knob.meaning.partition(": ")[0].partition(". ")[0].replace("%", "%%")
            purposes[name].add_argument(f"--{knob.name}", choices=choices(knob, names) or None, help=says)
    return parser


def report(chosen: argparse.Namespace) -> None:
    """Open reports, or a copy of the latest one; an error is one line."""
    sys.path.insert(0, str(ROOT))
    from bundle.errors import BundleError
    from bundle.report.copying import copy_report, reports_in, show_reports

    try:
        places = chosen.results
        if chosen.copy is not None:
            copy_report(reports_in(places)[0], Path(chosen.copy), chosen.limit_mb, chosen.hide_names)
            places = [chosen.copy]
        show_reports(places, chosen.open_browser)
    except BundleError as error:
        sys.exit(f"error: {error}")


def run(purpose: Purpose, chosen: argparse.Namespace, data: str | None, knobs: Sequence[str]) -> None:
    """Run the bundle's command of a purpose, without what MONAI says of itself."""
    if not chosen.config:  # these configs are the package's own; of others MONAI's notice tells what they can do
        warnings.filterwarnings("ignore", "parsing config_file")
    named = {"dataset_dir": data, "output_dir": chosen.output_dir, "checkpoint": chosen.checkpoint}
    words = [f"--{name}={value}" for name, value in named.items() if value is not None]
    run_bundle(["run", purpose.command, "--config_file", str([*purpose.configs, *chosen.config]), *words, *knobs])


def _add(purposes: Any, name: str, purpose: Purpose) -> None:
    """Add the parser of one purpose; its data come first and are no argument, since a knob may stand before others."""
    data = "" if not purpose.data else f" {purpose.data}" if purpose.needs else f" [{purpose.data}]"
    output, model = ("-o OUT", "--model FILE") if purpose.needs else ("[-o OUT]", "[--model FILE]")
    model = "" if purpose.command == "training" else f" {model}"
    parser = purposes.add_parser(
        name,
        usage=textwrap.fill(
            f"{NAME} {name}{data} {output}{model} [--config FILE] [--NAME VALUE ...]",
            width() - len("usage: "),
            subsequent_indent=" " * len("usage: "),
        ),
        help=purpose.summary,
        description=textwrap.fill(f"{purpose.help} {NO_DEVICE}", width()),
        epilog="knobs, as --NAME VALUE:\n\n" + in_words(knobs_of(purpose.tables, without=ARGUMENTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(checkpoint=None)
    parser.add_argument("-o", "--output_dir", metavar="OUT", required=purpose.needs, help="the folder of the results")
    if model:
        parser.add_argument(
            "--model", "--checkpoint", dest="checkpoint", metavar="FILE", required=purpose.needs, help="of a training"
        )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a config over the purpose's own; repeat for more",
    )


def _check_data(data: str | None, purpose: Purpose, parser: argparse.ArgumentParser) -> None:
    """Refuse data that are missing, or that the purpose does not take."""
    if data is None and purpose.needs:
        parser.error(f"give {purpose.data} first, then -o, --model and knobs")
    if data is not None and not purpose.data:
        parser.error(f"'{data}' belongs to no knob: write --NAME VALUE")
