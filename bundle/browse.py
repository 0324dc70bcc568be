"""Look at the runs of a folder of results in MLflow's pages, on this machine alone.

python -m bundle.browse RESULTS
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from bundle.errors import BundleError
from bundle.mlflow_database import PREFIX, database_file, ready_database
from bundle.servers import HOST, free_ports, until_interrupted
from bundle.tracking import EXPERIMENT, database

CHARTS = "&compareRunsMode=CHART"  # of all runs
START_SECONDS = 120.0  # on a busy machine
STOP_SECONDS = 10.0
PAGE = "#/experiments/{}/runs?workflowType=machine_learning"  # without the last word MLflow opens its mode for chats
OF_SERVER = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves the machine
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight more processes, for nothing that is used here
}


def browse(results: str | os.PathLike, open_browser: bool = True, port: int = 0) -> None:
    """Show runs in MLflow's pages, and print their address, until Ctrl-C or a signal to end; an error is one line.

    Args:
        results: the output folder of commands, or a database that several share.
        open_browser: open the page, too.
        port: 0: any free one.
    """

    def words(url: str) -> str:
        if open_browser:
            webbrowser.open(url)
        return f"MLflow  {url}\ncharts  {url}{CHARTS}"

    until_interrupted(browsing(Path(results), port), words)


@contextmanager
def browsing(results: Path, port: int = 0) -> Iterator[str]:
    """The address of the table of runs; the server has ended when the block ends.

    A database of an earlier MLflow is brought to the present form first, as any command does.

    Args:
        results: see :func:`browse`.
        port: 0: any free one.

    Raises:
        BundleError: if there is no run, or the server does not start.
    """
    file = database_file(database(results)) if results.is_dir() else results.resolve()
    if file is None or not file.is_file():
        raise BundleError(
            f"no MLflow run in '{results}': give the output_dir of a command, or its --tracking_uri's file"
        )
    number = _experiment(file)
    [chosen] = free_ports(port=port).values()
    url = f"http://{HOST}:{chosen}"
    words = [f"--backend-store-uri={PREFIX}{file}", f"--host={HOST}", f"--port={chosen}", "--workers=1"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with tempfile.TemporaryDirectory(prefix="mlflow-") as workspace:
        log = Path(workspace, "log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                cwd=workspace,
                env=clean | OF_SERVER,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it has children, which end with it
            )
        try:
            _wait(url, process, log)
            yield f"{url}/{PAGE.format(number)}"
        finally:
            _stop(process)


def _experiment(file: Path) -> str:
    """The id of the bundle's experiment in the database ``file``."""
    ready_database(file, EXPERIMENT)
    with sqlite3.connect(file) as connection:
        row = connection.execute("select experiment_id from experiments where name = ?", (EXPERIMENT,)).fetchone()
    if row is None:
        raise BundleError(f"no MLflow run of this bundle in '{file}': give the output_dir of a command")
    return str(row[0])


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    """Return when the server answers."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with suppress(URLError, OSError), urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise BundleError(f"MLflow's server did not start ({lines[-1] if lines else 'no answer'}): check the database")


def _stop(process: subprocess.Popen) -> None:
    """End the server with its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Run until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description="MLflow's pages of runs on this machine; only this machine can reach them."
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="an output folder, or a database of several")
    parser.add_argument("--no_browser", dest="open_browser", action="store_false", help="print the address only")
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default: 0)")
    browse(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
