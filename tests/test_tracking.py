"""Every command has a run of its own, and its end is told."""

import sqlite3
import subprocess
import sys

import pytest

from bundle.tracking import Tracker, database


def statuses(folder):
    with sqlite3.connect(folder / "mlflow.db") as connection:
        return [row[0] for row in connection.execute("select status from runs order by start_time")]


@pytest.mark.slow
def test_two_commands_never_share_a_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        tracker = Tracker(database(tmp_path), "training", {})
        tracker.start()
        tracker.finish()
    assert statuses(tmp_path) == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_a_command_that_fails_leaves_a_failed_run(tmp_path):
    code = (
        "from bundle.tracking import Tracker, database\n"
        f"tracker = Tracker(database({str(tmp_path)!r}), 'training', {{}})\n"
        "tracker.start()\n"
        "raise ValueError('the reason')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the reason" in done.stderr
    assert statuses(tmp_path) == ["FAILED"]


@pytest.mark.parametrize("uri", [None, "off"])
def test_tracking_can_be_turned_off(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(uri, "training", {"backbone": "x"}, config={"seed": 0})
    tracker.start()
    tracker.log({"loss": 1.0}, {})
    tracker.finish()
    tracker.handler().attach(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_long_parameters_are_cut_and_objects_left_out(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(database(tmp_path), "training", {}, config={"long": "x" * 9000, "object": object(), "seed": 0})
    tracker.start()
    tracker.finish()
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        parameters = dict(connection.execute("select key, value from params"))
    assert parameters == {"long": "x" * 500, "seed": "0"}
