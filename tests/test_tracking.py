"""Every command has a run of its own, and its end is told; no fault of MLflow decides about a command."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ignite.engine import Engine, Events
from mlflow_server import Server

from bundle.errors import BundleError
from bundle.locks import lock_folder, unlock_folders
from bundle.processes import process_name
from bundle.tracking import FOLDER, PROCESS, Tracker, database, epoch_logger

OF_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch):
    for name in OF_MLFLOW:
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def server():
    server = Server().start()
    yield server
    server.stop()


def statuses(folder):
    with sqlite3.connect(folder / "mlflow.db") as connection:
        return [row[0] for row in connection.execute("select status from runs order by start_time")]


def trainer(tracker, after_epoch):
    """An engine of three epochs that logs into the run, and what happens after each of its epochs."""
    engine = Engine(lambda *_: None)
    epoch_logger(tracker).attach(engine)

    @engine.on(Events.EPOCH_STARTED)
    def _(engine):
        engine.state.metrics["train_loss"] = float(engine.state.epoch)

    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: after_epoch(engine.state.epoch))
    return engine


def losses(run):
    return sorted((one["step"], one["value"]) for one in run["data"]["metrics"] if one["key"] == "train_loss")


@pytest.mark.slow
def test_two_commands_never_share_a_run(tmp_path):
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
    tracker.log({"loss": 1.0}, {"report": ["missing"]})
    tracker.finish()
    tracker.handler().attach(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_long_parameters_are_cut_and_objects_left_out(tmp_path):
    tracker = Tracker(database(tmp_path), "training", {}, config={"long": "x" * 9000, "object": object(), "seed": 0})
    tracker.start()
    tracker.finish()
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        parameters = dict(connection.execute("select key, value from params"))
    assert parameters == {"long": "x" * 500, "seed": "0"}


def test_a_server_is_told_everything(server, tmp_path, caplog):
    (tmp_path / "scores.csv").write_text("name\n")
    tracker = Tracker(server.uri, "training", {"backbone": "x"}, config={"seed": 0, "max_epochs": 9})
    trainer(tracker, lambda epoch: None).run([0], max_epochs=3)
    tracker.log({"aupro": 0.5, "none": None}, {"report": [tmp_path / "scores.csv"]})
    tracker.finish()
    (run,) = server.runs.values()
    assert run["info"]["status"] == "FINISHED"
    assert losses(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {one["key"]: one["value"] for one in run["data"]["params"]} == {
        "max_epochs": "3",  # of the engine, which came first
        "epoch_length": "1",
        "seed": "0",
    }
    assert len(run["files"]) == 2
    assert not caplog.text


def test_a_server_that_is_not_there_costs_no_more_than_its_time_and_a_line(tmp_path, caplog):
    tracker = Tracker("http://127.0.0.1:9", "training", {}, config={"seed": 0})
    begin = time.monotonic()
    trainer(tracker, lambda epoch: None).run([0], max_epochs=3)
    tracker.log({"aupro": 0.5}, {"report": [tmp_path / "scores.csv"]})
    tracker.finish()
    assert time.monotonic() - begin < 5
    first, last = (record.getMessage() for record in caplog.records)
    assert "the command goes on, and tries again later" in first
    assert "missing are 2 of parameters, 4 of metrics, 2 of files, 1 of ends of runs" in last
    assert all("\n" not in line for line in (first, last))


def test_a_server_that_takes_requests_and_never_answers_costs_its_time_twice(server, caplog):
    server.hangs.set()
    tracker = Tracker(server.uri, "inferring", {}, timeout=0.5)
    begin = time.monotonic()
    tracker.start()
    for _ in range(20):
        tracker.log({"inputs": 1}, {})
    tracker.finish()
    assert 1 <= time.monotonic() - begin < 4
    assert "no answer in 0.5 s, which tracking_timeout sets" in caplog.text


def test_an_address_that_swallows_everything_costs_its_time_twice(caplog):
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:  # until the queue is full, and further connections are left without a word
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        tracker = Tracker(f"http://127.0.0.1:{full.getsockname()[1]}", "inferring", {}, timeout=0.5)
        begin = time.monotonic()
        tracker.start()
        tracker.finish()
        assert 1 <= time.monotonic() - begin < 4
        for one in waiting:
            one.close()
    assert "no answer in 0.5 s" in caplog.text


def test_a_server_that_dies_and_comes_back_has_everything_in_the_end(server, caplog):
    tracker = Tracker(server.uri, "training", {})

    def after_epoch(epoch):
        if epoch == 1:
            server.stop()
        elif epoch == 2:
            server.start()

    trainer(tracker, after_epoch).run([0], max_epochs=3)
    tracker.finish()
    (run,) = server.runs.values()
    assert run["info"]["status"] == "FINISHED"
    assert losses(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "tries again later" in caplog.text
    assert "missing" not in caplog.text


def test_a_server_that_dies_for_good_has_what_came_before(server, caplog):
    tracker = Tracker(server.uri, "training", {})
    trainer(tracker, lambda epoch: server.stop() if epoch == 2 else None).run([0], max_epochs=3)
    tracker.finish()
    server.start()
    (run,) = server.runs.values()
    assert losses(run) == [(1, 1.0), (2, 2.0)]
    assert "missing are 1 of metrics, 1 of files, 1 of ends of runs" in caplog.text


def test_a_server_that_makes_the_run_and_loses_the_answer_has_one_run(server):
    make = server.runs_create

    def make_and_fail(body, query):
        make(body, query)
        server.runs_create = make
        raise ValueError("INTERNAL_ERROR")

    server.runs_create = make_and_fail
    tracker = Tracker(server.uri, "training", {})
    tracker.start()
    tracker.finish()
    assert [run["info"]["status"] for run in server.runs.values()] == ["FINISHED"]


def test_what_a_server_refuses_keeps_nothing_else_from_it(server, caplog):
    server.refuses = {"runs/log-batch"}
    tracker = Tracker(server.uri, "training", {}, config={"seed": 0})
    tracker.log({"aupro": 0.5}, {})
    tracker.finish()
    (run,) = server.runs.values()
    assert run["info"]["status"] == "FINISHED"
    assert "(RestException: INVALID_PARAMETER_VALUE: not so): missing are 1 of metrics, 1 of parameters" in caplog.text


def test_where_files_cannot_be_kept_numbers_and_the_end_are(server, tmp_path, caplog):
    server.loses_files = True
    (tmp_path / "scores.csv").write_text("name\n")
    tracker = Tracker(server.uri, "training", {})
    tracker.log({}, {"report": [tmp_path / "scores.csv"]})
    tracker.metrics({"train_loss": 1.0}, 1)
    tracker.finish()
    (run,) = server.runs.values()
    assert run["info"]["status"] == "FINISHED"
    assert losses(run) == [(1, 1.0)]
    assert "missing are 2 of files; results" in caplog.text


def test_a_file_that_has_gone_keeps_nothing_else_from_the_server(server, tmp_path, caplog):
    tracker = Tracker(server.uri, "training", {})
    tracker.log({"aupro": 0.5}, {"report": [tmp_path / "gone.csv"]})
    tracker.finish()
    assert next(iter(server.runs.values()))["info"]["status"] == "FINISHED"
    assert "missing are 1 of files" in caplog.text


def test_runs_of_killed_commands_are_marked_and_no_others(server, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(killed.pid)
    killed.kill()
    killed.wait()
    for process in (name, process_name(os.getppid()), f"00000000-{name[9:]}"):
        tags = [{"key": PROCESS, "value": process}, {"key": FOLDER, "value": str(tmp_path)}]
        server.runs_create({"run_name": process, "start_time": 0, "tags": tags}, {})
    tracker = Tracker(server.uri, "training", {}, output_dir=tmp_path)
    tracker.start()
    assert [run["info"]["status"] for run in server.runs.values()] == ["KILLED", "RUNNING", "RUNNING", "RUNNING"]


@pytest.mark.slow
def test_a_locked_folder_has_no_other_run_at_work_whatever_machine_it_was_on(tmp_path):
    first = Tracker(database(tmp_path), "training", {}, output_dir=tmp_path)
    first.start()
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("update tags set value = '00000000-1-1' where key = ?", (PROCESS,))
    Tracker(database(tmp_path), "training", {}, output_dir=tmp_path).start()
    assert statuses(tmp_path) == ["RUNNING", "RUNNING"]
    lock_folder(tmp_path)
    Tracker(database(tmp_path), "training", {}, output_dir=tmp_path).start()
    unlock_folders()
    assert statuses(tmp_path)[0] == "KILLED"


def test_no_time_at_all_is_refused():
    with pytest.raises(BundleError, match="tracking_timeout is 0: give seconds"):
        Tracker("http://127.0.0.1:9", "training", {}, timeout=0)


def test_a_database_that_cannot_be_made_ends_no_command(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tracker = Tracker(f"sqlite:///{tmp_path}/file/mlflow.db", "training", {})
    tracker.start()
    tracker.finish()
    assert "missing are 1 of files, 1 of ends of runs" in caplog.text
    assert Path(tmp_path / "file").read_text() == ""
