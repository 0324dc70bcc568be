"""MLflow's pages of a folder of results: at one address, on this machine alone, and gone at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from commands import ROOT, environment

from bundle import browse as module
from bundle.browse import browse, browsing
from bundle.errors import BundleError
from bundle.tracking import Tracker, database

BROWSE = [sys.executable, "-m", "bundle.browse"]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder with a run."""
    folder = tmp_path_factory.mktemp("tracked")
    tracker = Tracker(database(folder), "training", {}, output_dir=folder)
    tracker.log({"aupro": 0.5}, {})
    tracker.finish()
    return folder


def runs_at(url):
    """What the pages ask for, of the experiment that the address names."""
    number = urlsplit(url).fragment.split("/")[2]
    server = url.partition("/#")[0]
    request = urllib.request.Request(
        f"{server}/ajax-api/2.0/mlflow/runs/search",
        json.dumps({"experiment_ids": [number]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return [run["info"]["run_name"].split()[0] for run in json.load(answer)["runs"]]


@pytest.mark.slow
def test_the_command_prints_the_address_of_the_runs_and_ends_with_all_its_processes(tracked):
    words = [*BROWSE, tracked, "--no_browser"]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as running:
        url = next(line for line in running.stdout if line.startswith("MLflow")).split()[1]
        assert urlsplit(url).fragment.endswith("/runs?workflowType=machine_learning")
        assert runs_at(url) == ["training"]
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)
    with socket.socket() as again:  # no child holds the port, though the system may remember connections to it
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", urlsplit(url).port))


@pytest.mark.slow
def test_the_page_of_a_shared_database_is_opened_unless_told_not_to(tracked, monkeypatch, capsys):
    opened = []

    def ctrl_c(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.webbrowser, "open", opened.append)
    monkeypatch.setattr("bundle.servers.time.sleep", ctrl_c)  # as soon as there is nothing to do but wait
    monkeypatch.setattr(module, "_wait", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    browse(tracked / "mlflow.db")
    browse(tracked / "mlflow.db", open_browser=False)
    signal.signal(signal.SIGTERM, before)
    first, second = (line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("MLflow"))
    assert opened == [first]
    assert second != first


def test_a_folder_without_runs_is_one_line_and_stays_as_it_is(tmp_path):
    with pytest.raises(BundleError, match="no MLflow run in"), browsing(tmp_path):
        pass
    assert not os.listdir(tmp_path)
    with pytest.raises(BundleError, match="no MLflow run in"), browsing(tmp_path / "missing"):
        pass


@pytest.mark.slow
def test_a_server_that_does_not_start_is_one_line(tracked, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(BundleError, match=r"MLflow's server did not start \(no answer\)"), browsing(tracked):
        pass
