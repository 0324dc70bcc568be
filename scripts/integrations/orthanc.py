"""Start an Orthanc DICOM server that only this machine can reach.

python -m scripts.integrations.orthanc --storage DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from pydicom.filereader import read_file_meta_info
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from bundle.errors import BundleError
from bundle.servers import HOST, free_ports, until_interrupted

PLACES = ("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin")  # services are often not on the PATH
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
INSTALL = "apt-get install orthanc orthanc-dicomweb"
CALLERS = ("STORESCU", "ECHOSCU", "FINDSCU", "MOVESCU")  # what dcmtk's programs call themselves
START_SECONDS = 30.0
STOP_SECONDS = 30.0

# what storescu must be told to send compressed files as they are
PROPOSALS = {
    RLELossless: "--propose-rle",
    JPEGLSLossless: "--propose-jls-lossless",
    JPEG2000Lossless: "--propose-j2k-lossless",
    JPEGLosslessSV1: "--propose-lossless",
}


@dataclass(frozen=True)
class Orthanc:
    """A server that runs.

    Args:
        http_port: of the web pages, the REST API and DICOMweb.
        dicom_port: of the DICOM network.
        aet: application entity title in the DICOM network.
    """

    http_port: int
    dicom_port: int
    aet: str

    @property
    def http_url(self) -> str:
        """Of the web pages and the REST API."""
        return f"http://{HOST}:{self.http_port}"

    @property
    def dicomweb_url(self) -> str:
        """Of QIDO-RS, WADO-RS and STOW-RS."""
        return f"{self.http_url}/dicom-web"

    def store(self, source: Path) -> None:
        """Send the ``.dcm`` files of the folder ``source``, or the one file, by dcmtk's ``storescu`` (C-STORE).

        Raises:
            BundleError: if ``storescu`` is missing, or anything could not be stored.
        """
        program = shutil.which("storescu")
        if program is None:
            raise BundleError("no storescu, which sends DICOM files: apt-get install dcmtk")
        files = sorted(source.rglob("*.dcm")) if source.is_dir() else [source]
        if not files:
            raise BundleError(f"no .dcm file in '{source}': check the path")
        by_option: dict[str, list[str]] = {}
        for file in files:
            option = PROPOSALS.get(read_file_meta_info(file).TransferSyntaxUID, "--propose-uncompr")
            by_option.setdefault(option, []).append(str(file))
        for option, names in by_option.items():
            command = [program, option, "--required", "--aetitle", CALLERS[0], "--call", self.aet]
            sent = subprocess.run(
                [*command, HOST, str(self.dicom_port), *names], capture_output=True, text=True, check=False
            )
            if sent.returncode:
                reason = next(iter(sent.stderr.strip().splitlines()), "no reason given")
                raise BundleError(f"storescu could not store all of '{source}' ({reason}): check the files")


@contextmanager
def running(
    storage: Path | None = None,
    http_port: int = 0,
    dicom_port: int = 0,
    aet: str = "ORTHANC",
    callers: Sequence[str] = CALLERS,
) -> Iterator[Orthanc]:
    """An Orthanc with DICOMweb that answers this machine alone; it has ended when the block ends.

    Args:
        storage: a folder for what is stored; None: a temporary one, removed at the end.
        http_port, dicom_port: 0: any free one.
        aet: application entity title.
        callers: titles that may store and ask by the DICOM network. Orthanc cannot bind that port to the loopback
            interface; it refuses others, and these from other machines.

    Raises:
        BundleError: if Orthanc or its plugin is missing, or it does not start.
    """
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path=":".join(PLACES))
    if program is None or not PLUGIN.is_file():
        raise BundleError(f"no {'Orthanc' if program is None else PLUGIN.name} on this machine: {INSTALL}")
    with ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orthanc-")))
        server = Orthanc(**free_ports(http_port=http_port, dicom_port=dicom_port), aet=aet)
        settings = workspace / "orthanc.json"
        settings.write_text(json.dumps(configuration(server, storage or workspace / "storage", callers), indent=1))
        log = workspace / "orthanc.log"
        with log.open("w") as stream:
            process = subprocess.Popen([program, str(settings)], stdout=stream, stderr=subprocess.STDOUT)
        stack.callback(_stop, process)
        _wait(server, process, log)
        yield server


def configuration(server: Orthanc, storage: Path, callers: Sequence[str] = CALLERS) -> dict:
    """Orthanc's configuration file: everything that is not this machine is refused."""
    known = {"Host": HOST, "Port": 104, "AllowStore": True, "AllowEcho": True, "AllowFind": True, "AllowMove": True}
    return {
        "Name": "dinov3_spatial_ar",
        "StorageDirectory": str(storage.resolve()),
        "IndexDirectory": str(storage.resolve()),
        "HttpPort": server.http_port,
        "DicomPort": server.dicom_port,
        "DicomAet": server.aet,
        "DefaultEncoding": "Utf8",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "WebDavEnabled": False,
        "DicomAlwaysAllowEcho": False,
        "DicomAlwaysAllowStore": False,
        "DicomCheckModalityHost": True,
        "DicomModalities": {title: {"AET": title, **known} for title in callers},
        "UnknownSopClassAccepted": False,
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {
            "Enable": True,
            "Root": "/dicom-web/",
            "EnableWado": True,
            "WadoRoot": "/wado",
            "Host": f"{HOST}:{server.http_port}",
            "Ssl": False,
        },
    }


def _wait(server: Orthanc, process: subprocess.Popen, log: Path) -> None:
    """Return when the server answers."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            requests.get(f"{server.dicomweb_url}/studies", params={"limit": 1}, timeout=5).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("E")]
    raise BundleError(f"Orthanc did not start ({lines[-1] if lines else 'no answer'}): check ports and storage")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def make_parser() -> argparse.ArgumentParser:
    """The options of the command, see :func:`running`."""
    parser = argparse.ArgumentParser(description="An Orthanc DICOM server that only this machine can reach.")
    parser.add_argument(
        "--storage", type=Path, help="folder of what is stored (default: temporary, removed at the end)"
    )
    parser.add_argument("--http_port", type=int, default=8042, help="0: any free one (default: 8042)")
    parser.add_argument("--dicom_port", type=int, default=4242, help="0: any free one (default: 4242)")
    parser.add_argument("--aet", default="ORTHANC", help="application entity title (default: ORTHANC)")
    parser.add_argument(
        "--callers",
        type=lambda text: text.split(","),
        default=list(CALLERS),
        help=f"titles that may use the DICOM network (default: {','.join(CALLERS)})",
    )
    return parser


def addresses(server: Orthanc) -> str:
    """Where ``server`` answers, in lines."""
    return (
        f"pages     {server.http_url}/app/explorer.html\n"
        f"DICOMweb  {server.dicomweb_url}\n"
        f"DICOM     {server.aet} at {HOST}, port {server.dicom_port}"
    )


def main() -> None:
    """Run until Ctrl-C."""
    until_interrupted(running(**vars(make_parser().parse_args())), addresses)


if __name__ == "__main__":
    main()
