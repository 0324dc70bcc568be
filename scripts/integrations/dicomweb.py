"""Examine a series of a DICOMweb server.

python -m scripts.integrations.dicomweb --url URL --study UID --checkpoint FILE
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from dicomweb_client import DICOMwebClient
from pydicom import Dataset, dcmread

from bundle.dicom.series import PRODUCT
from bundle.errors import BundleError
from bundle.files import partial_prefix

MODALITIES = ("MR", "CT")
TIMEOUT = 300.0
ROOT = Path(__file__).parents[2]
ANY_SYNTAX = (("application/dicom", "*"),)  # as the server has it
_URL = re.compile(r"https?://[\w.\-\[\]:]+(/[\w.\-/]*)?")  # no user, no query: nothing that parsers read differently


class SeriesChoice(NamedTuple):
    """A series of a study on a server."""

    uid: str
    words: str


def connect(url: str, allow_remote: bool = False, timeout: float = TIMEOUT) -> DICOMwebClient:
    """A client of the DICOMweb server at ``url``, with the name and password that ``~/.netrc`` has for it, if any.

    Args:
        url: such as ``http://127.0.0.1:8042/dicom-web``.
        allow_remote: servers on other machines may be asked, and get the results.
        timeout: seconds that an answer may take.

    Raises:
        BundleError: if the URL is none, or leads to another machine and that is not allowed.
    """
    if not _URL.fullmatch(url):
        raise BundleError(f"'{url}' is no DICOMweb URL: give one like http://127.0.0.1:8042/dicom-web")
    session = requests.Session()
    if not allow_remote:
        if not is_loopback(urlsplit(url).hostname or ""):
            raise BundleError(
                f"'{url}' is on another machine: images and results would leave this one; if they may, "
                "add --allow_remote true"
            )
        session.max_redirects = 0  # an answer must not send us elsewhere
        session.trust_env = False  # nor must a proxy
    session.auth = requests.utils.get_netrc_auth(url)
    client = DICOMwebClient(url.rstrip("/"), session=session, timeout=timeout)
    client.set_http_retry_params(False)
    return client


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine by its loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_series(client: DICOMwebClient, study: str, modalities: Sequence[str] = MODALITIES) -> list[SeriesChoice]:
    """The series of a study that could be examined: of one of ``modalities``, and no result of this bundle."""
    with _answers(f"study {study}"):
        found = [Dataset.from_json(item) for item in client.search_for_series(study, fields=["SeriesDescription"])]
    return [
        SeriesChoice(
            series.SeriesInstanceUID,
            f"{series.Modality} {series.get('SeriesNumber', '?')} '{series.get('SeriesDescription', '')}', "
            f"{series.get('NumberOfSeriesRelatedInstances', '?')} objects",
        )
        for series in found
        if series.get("Modality") in modalities and PRODUCT not in series.get("SeriesDescription", "")
    ]


def choose_series(client: DICOMwebClient, study: str, modalities: Sequence[str] = MODALITIES) -> str:
    """The UID of the one series of ``study`` that could be examined.

    Raises:
        BundleError: if there is none, or more than one: which one the model was trained for, only a person knows.
    """
    series = find_series(client, study, modalities)
    if not series:
        raise BundleError(f"study {study} has no {' or '.join(modalities)} series: check --study and --modalities")
    if len(series) > 1:
        listing = "; ".join(f"{one.uid} ({one.words})" for one in series)
        raise BundleError(f"study {study} has {len(series)} series: give --series one of {listing}")
    return series[0].uid


def retrieve(client: DICOMwebClient, study: str, series: str, folder: Path) -> int:
    """Write the objects of a series to ``folder/series`` as the server keeps them, compressed or not.

    Returns:
        their number.

    Raises:
        BundleError: if the server has no such series.
    """
    count = 0
    (folder / "series").mkdir(parents=True)
    with _answers(f"series {series}"):
        for count, image in enumerate(client.iter_series(study, series, media_types=ANY_SYNTAX), 1):
            image.save_as(folder / "series" / f"IM{count:04d}.dcm", enforce_file_format=True)
            if str(image.PatientName).startswith("SYNTHETIC^"):
                (folder / "cohort.json").write_text("{}")  # so that what comes of them is called SYNTHETIC too
    if not count:
        raise BundleError(f"the server has no objects of series {series}: check --study and --series")
    return count


def infer(images: Path, results: Path, checkpoint: Path, knobs: Sequence[str] = ()) -> None:
    """Run the bundle's ``inferring`` with DICOM results, and tell what it warns of.

    Args:
        images: a folder with a DICOM series.
        results: a folder for the results.
        checkpoint: the model.
        knobs: further ``--name=value`` of ``configs/inference.json``.

    Raises:
        BundleError: with the line that the bundle ends with, if it fails.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json"]
    given = {"dataset_dir": images, "output_dir": results, "checkpoint": checkpoint, "write_dicom": True}
    # nothing about the images outlives them, so no MLflow run either, unless a knob says where
    words = ["--tracking_uri=off", *(f"--{name}={value}" for name, value in given.items()), *knobs]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for text in (done.stdout, done.stderr) for line in text.replace("\r", "\n").strip().splitlines()]
    for line in lines:
        if " WARNING " in line:
            print(line, file=sys.stderr)
    if done.returncode:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise BundleError((errors or lines or ["inferring ended without a word"])[-1])


def store(client: DICOMwebClient, study: str, results: Path) -> int:
    """Store the DICOM objects below ``results`` with STOW-RS; returns their number.

    Raises:
        BundleError: if the server refuses one, such as one of another study.
    """
    files = sorted(results.rglob("*.dcm"))
    for file in files:
        with _answers(f"storing {file.name}"):
            answer = client.store_instances([dcmread(file)], study)
        if answer.get("FailedSOPSequence"):
            reason = answer.FailedSOPSequence[0].get("FailureReason", "none given")
            raise BundleError(f"the server did not store '{file.name}' (reason {reason}): look at its log")
    return len(files)


def keep(results: Path, target: Path) -> None:
    """Move ``results`` to ``target``, at once, in the place of earlier ones."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=partial_prefix(), dir=target.parent) as workspace:
        shutil.copytree(results, Path(workspace, "fresh"))
        if target.exists():
            target.rename(Path(workspace, "replaced"))
        Path(workspace, "fresh").rename(target)


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """Turn what a server or the way to it may do wrong into one line."""
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "with an error"
        raise BundleError(f"the server answers {status} for {what}: check --url and the UIDs") from error
    except requests.TooManyRedirects as error:
        raise BundleError(f"the server wants to send us elsewhere for {what}: give its own --url") from error
    except requests.RequestException as error:
        raise BundleError(f"no answer for {what} ({type(error).__name__}): check --url") from error


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}': give true or false")
    return text.lower() == "true"


def make_parser() -> argparse.ArgumentParser:
    """The options of the command; all others are knobs of ``configs/inference.json``."""
    parser = argparse.ArgumentParser(
        description="Retrieve a series by DICOMweb, examine it, and store the results in its study.",
        epilog="Further --NAME=VALUE are knobs of configs/inference.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:8042/dicom-web")
    parser.add_argument("--study", required=True, metavar="UID")
    parser.add_argument("--series", metavar="UID", help="default: the only one of --modalities in the study")
    parser.add_argument("--modalities", default=",".join(MODALITIES), help=f"default: {','.join(MODALITIES)}")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model.pt of a training")
    parser.add_argument("--store", type=_flag, default=False, help="store the results on the server (default: false)")
    parser.add_argument(
        "--output_dir", type=Path, help="keep the results here, in a folder named by the UID of the series"
    )
    parser.add_argument("--allow_remote", type=_flag, default=False, help="allow a server on another machine")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help=f"seconds for an answer (default: {TIMEOUT:g})")
    return parser


def main() -> None:
    """Retrieve, examine, store."""
    arguments, knobs = make_parser().parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if not arguments.store and arguments.output_dir is None:
            raise BundleError("results would go nowhere: give --store true, --output_dir DIR, or both")
        client = connect(arguments.url, arguments.allow_remote, arguments.timeout)
        series = arguments.series or choose_series(client, arguments.study, arguments.modalities.split(","))
        # for this user alone (mode 0700), and removed at the end, also when interrupted
        with tempfile.TemporaryDirectory(prefix="infer-dicomweb-") as workspace:
            images, results = Path(workspace, "images"), Path(workspace, "results")
            print(f"{retrieve(client, arguments.study, series, images)} objects retrieved", flush=True)
            infer(images, results, arguments.checkpoint.resolve(), knobs)
            if arguments.output_dir is not None:
                keep(results, arguments.output_dir / series)
                print(f"results kept in {arguments.output_dir / series}")
            if arguments.store:
                print(f"{store(client, arguments.study, results)} objects stored in the study")
    except BundleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
