"""Every command has a run of its own, and its end is told; no fault of MLflow decides about a command."""

import json
import math
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from commands import EVALUATE, ROOT, command, environment
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from mlflow_server import Server
from PIL import Image

from bundle.checkpoint import save_checkpoint
from bundle.errors import BundleError
from bundle.locks import lock_folder, unlock_folders
from bundle.model import make_detector
from bundle.processes import process_name
from bundle.provenance import DataSet
from bundle.tracking import EXPERIMENT, FOLDER, PROCESS, Tracker, database, epoch_logger

SMALL = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8}
BUSY = 60.0  # seconds that a server may take for an entry on a busy machine
OF_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch):
    for name in OF_MLFLOW:
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def only_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(only_server):
    return only_server.start()


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


@pytest.fixture
def data(tmp_path):
    """A data set of one training and two test images."""
    (tmp_path / "scans").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "scans" / f"{name}.png").write_text(name)
    cases = [{"name": name, "image": str(tmp_path / "scans" / f"{name}.png")} for name in ("a", "b", "c")]
    return DataSet({"training": cases[:1], "validation": [], "test": cases[1:]}, tmp_path / "scans")


def only_run(folder):
    client = MlflowClient(database(folder))
    [run] = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    return run


@pytest.mark.slow
def test_mlflow_lists_the_data_set_with_its_splits(data, tmp_path):
    tracker = Tracker(database(tmp_path), "training", {}, data=data)
    tracker.start()
    tracker.finish()
    [found] = only_run(tmp_path).inputs.dataset_inputs
    assert found.dataset.name == "scans"
    assert data.fingerprint.startswith(found.dataset.digest)
    assert json.loads(found.dataset.source) == {"uri": str(tmp_path / "scans")}
    assert json.loads(found.dataset.profile) == {"training": 1, "test": 2}
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}


@pytest.mark.slow
def test_the_description_begins_with_what_came_last_and_ends_with_pictures(data, tmp_path):
    tracker = Tracker(database(tmp_path), "training", {}, data=data)
    tracker.start()
    tracker.describe("| aupro | 0.5 |", ["figures/curves.png"])
    tracker.describe("the end")
    tracker.finish()
    run = only_run(tmp_path)
    assert run.data.tags["mlflow.note.content"].split("\n\n") == [
        "the end",
        "| aupro | 0.5 |",
        f"Data: `{tmp_path}/scans` (1 training, 2 test)",
        f"![figures/curves.png](get-artifact?path=figures/curves.png&run_uuid={run.info.run_id})",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "commit", "dirty"), [("abc", "abc", "False"), ("abc+changes", "abc", "True"), ("unknown", None, None)]
)
def test_mlflow_shows_the_command_and_the_commit_as_source(tmp_path, told, commit, dirty):
    Tracker(database(tmp_path), "training", {"git_commit": told}).start()
    tags = only_run(tmp_path).data.tags
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("dinov3_spatial_ar training", "LOCAL")
    assert (tags.get("mlflow.source.git.commit"), tags.get("mlflow.source.git.dirty")) == (commit, dirty)


@pytest.mark.slow
def test_epochs_of_a_trainer_tell_the_learning_rate(tmp_path):
    tracker = Tracker(database(tmp_path), "training", {})
    engine = trainer(tracker, lambda epoch: engine.optimizer.param_groups[0].update(lr=0.1 / (epoch + 1)))
    engine.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    engine.run([0], max_epochs=3)
    tracker.finish()
    history = MlflowClient(database(tmp_path)).get_metric_history(only_run(tmp_path).info.run_id, "learning_rate")
    assert [(one.step, round(one.value, 3)) for one in history] == [(1, 0.1), (2, 0.05), (3, 0.033)]


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


@pytest.mark.slow
def test_a_server_is_told_everything(server, tmp_path, caplog):
    (tmp_path / "scores.csv").write_text("name\n")
    tracker = Tracker(server.uri, "training", {"backbone": "x"}, config={"seed": 0, "max_epochs": 9}, timeout=BUSY)
    trainer(tracker, lambda epoch: None).run([0], max_epochs=3)
    tracker.log({"aupro": 0.5, "none": None}, {"report": [tmp_path / "scores.csv"]})
    tracker.finish()
    [run] = server.runs(tracker.run_name)
    assert run.info.status == "FINISHED"
    assert run.data.tags["backbone"] == "x"
    assert run.data.metrics == {"train_loss": 3.0, "aupro": 0.5}
    assert server.losses(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    # those of the engine came first
    assert run.data.params == {"max_epochs": "3", "epoch_length": "1", "seed": "0"}
    assert server.artifacts(run) == ["configs/resolved_config.json", "report/scores.csv"]
    kept = server.client.download_artifacts(run.info.run_id, "report/scores.csv", str(tmp_path))
    assert Path(kept).read_text() == "name\n"
    assert not caplog.text


@pytest.mark.slow
def test_a_server_with_proxied_files_keeps_them_all_and_the_data_set_and_nothing_is_here(server, data, tmp_path):
    """The client knows no folder and no credentials of the place where the server keeps files."""
    (tmp_path / "work").mkdir()
    (tmp_path / "curves.png").write_bytes(b"picture")
    tracker = Tracker(server.uri, "training", {}, output_dir=tmp_path / "work", timeout=BUSY, data=data)
    tracker.describe("| aupro | 0.5 |", ["figures/curves.png"])
    tracker.log({}, {"figures": [tmp_path / "curves.png"]})
    tracker.finish()
    [run] = server.runs(tracker.run_name)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert not os.listdir(tmp_path / "work")
    assert [used.dataset.name for used in run.inputs.dataset_inputs] == ["scans"]
    assert run.data.tags["mlflow.note.content"].endswith(f"run_uuid={run.info.run_id})")
    [address] = re.findall(r"\((get-artifact.*)\)", run.data.tags["mlflow.note.content"])
    with urllib.request.urlopen(f"{server.uri}/{address}") as answer:
        assert answer.read() == b"picture"


@pytest.mark.slow
def test_a_server_with_proxied_files_keeps_the_model_and_registers_it(server, detector, tmp_path, monkeypatch, caplog):
    (tmp_path / "work").mkdir()
    save_checkpoint(detector, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path / "work")
    name = tmp_path.name
    for version in ("1", "2"):
        tracker = Tracker(server.uri, "training", {"backbone": "x"}, settings={"mode": "guarded"}, timeout=BUSY)
        tracker.metrics({"train_loss": 3.0}, 1)
        tracker.model(tmp_path / "model.pt", name)
        tracker.log({"aupro": 0.5}, {})
        tracker.finish()
        [run] = server.runs(tracker.run_name)
        [made] = run.outputs.model_outputs
        model = server.client.get_logged_model(made.model_id)
        assert model.artifact_location.startswith("mlflow-artifacts:/")
        assert (model.status, model.source_run_id) == ("READY", run.info.run_id)
        assert (model.tags["backbone"], model.params) == ("x", {"mode": "guarded"})
        assert run.data.metrics == {"train_loss": 3.0, "aupro": 0.5}
        assert [(one.key, one.value) for one in model.metrics] == [("aupro", 0.5)]  # what came before is none of it
        [found] = server.client.search_model_versions(f"run_id = '{run.info.run_id}'")
        assert (found.name, str(found.version), found.source) == (name, version, model.artifact_location)
        assert json.loads(model.tags["mlflow.modelVersions"])[0]["name"] == name
    assert not os.listdir(tmp_path / "work")
    assert not caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{name}/2", model_config={"device": "cpu"})
    assert len(loaded.predict(loaded.input_example)) == 1


@pytest.mark.slow
def test_a_server_that_loses_answers_while_it_takes_a_model_has_one_model_and_one_version(
    server, detector, tmp_path, monkeypatch
):
    save_checkpoint(detector, tmp_path / "model.pt")

    def losing(method):
        made = getattr(MlflowClient, method)

        def make_and_fail(*arguments, **options):
            made(*arguments, **options)
            monkeypatch.setattr(MlflowClient, method, made)
            raise ConnectionError

        monkeypatch.setattr(MlflowClient, method, make_and_fail)

    for method in ("create_logged_model", "log_outputs", "finalize_logged_model", "create_model_version"):
        losing(method)
    tracker = Tracker(server.uri, "training", {}, timeout=BUSY)
    tracker.model(tmp_path / "model.pt", tmp_path.name)
    for _ in range(4):
        tracker._not_before = -math.inf
        tracker._send()
    tracker.finish()
    [run] = server.runs(tracker.run_name)
    models = server.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert [model.model_id for model in models] == [made.model_id for made in run.outputs.model_outputs]
    assert [one.version for one in server.client.search_model_versions(f"name = '{tmp_path.name}'")] in ([1], ["1"])


@pytest.mark.slow
def test_a_server_that_has_no_place_for_the_model_has_all_numbers_and_a_line_says_so(
    server, detector, tmp_path, caplog
):
    save_checkpoint(detector, tmp_path / "model.pt")
    tracker = Tracker(server.uri, "training", {}, timeout=BUSY)
    with server.without_disk():
        tracker.model(tmp_path / "model.pt", tmp_path.name)
        tracker.metrics({"train_loss": 1.0}, 1)
        tracker.finish()
    [run] = server.runs(tracker.run_name)
    assert (run.info.status, server.losses(run)) == ("FINISHED", [(1, 1.0)])
    assert "missing are 2 of models, 1 of files; results" in caplog.text


@pytest.mark.slow
def test_a_server_that_makes_the_run_and_loses_the_answer_has_one_run(server, monkeypatch):
    make = MlflowClient.create_run

    def make_and_fail(*arguments):
        make(*arguments)
        monkeypatch.setattr(MlflowClient, "create_run", make)
        raise ConnectionError

    monkeypatch.setattr(MlflowClient, "create_run", make_and_fail)
    tracker = Tracker(server.uri, "training", {}, timeout=BUSY)
    tracker.start()
    tracker.finish()
    assert [run.info.status for run in server.runs(tracker.run_name)] == ["FINISHED"]


@pytest.mark.slow
def test_what_a_server_refuses_keeps_nothing_else_from_it(server, caplog):
    too_long = "x" * 300
    tracker = Tracker(server.uri, "training", {}, config={too_long: 0}, timeout=BUSY)
    tracker.log({too_long: 0.5}, {})
    tracker.log({"aupro": 0.5}, {})
    tracker.finish()
    [run] = server.runs(tracker.run_name)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"aupro": 0.5}
    assert "missing are 1 of metrics, 1 of parameters; results" in caplog.text


@pytest.mark.slow
def test_where_files_cannot_be_kept_numbers_and_the_end_are(server, tmp_path, caplog):
    (tmp_path / "scores.csv").write_text("name\n")
    tracker = Tracker(server.uri, "training", {}, timeout=BUSY)
    with server.without_disk():
        tracker.log({}, {"report": [tmp_path / "scores.csv"]})
        tracker.metrics({"train_loss": 1.0}, 1)
        tracker.finish()
    [run] = server.runs(tracker.run_name)
    assert run.info.status == "FINISHED"
    assert server.losses(run) == [(1, 1.0)]
    assert "missing are 2 of files; results" in caplog.text


@pytest.mark.slow
def test_a_file_that_has_gone_keeps_nothing_else_from_the_server(server, tmp_path, caplog):
    tracker = Tracker(server.uri, "training", {}, timeout=BUSY)
    tracker.log({"aupro": 0.5}, {"report": [tmp_path / "gone.csv"]})
    tracker.finish()
    assert [run.info.status for run in server.runs(tracker.run_name)] == ["FINISHED"]
    assert "missing are 1 of files; results" in caplog.text


@pytest.mark.slow
def test_runs_of_killed_commands_are_marked_and_no_others(server, tmp_path):
    opened = Tracker(server.uri, "training", {}, timeout=BUSY)
    opened.start()
    experiment = server.client.get_experiment_by_name(EXPERIMENT).experiment_id
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(killed.pid)
    killed.kill()
    killed.wait()
    others = (name, process_name(os.getppid()), f"00000000-{name[9:]}")
    for process in others:
        tags = {PROCESS: process, FOLDER: str(tmp_path)}
        server.client.create_run(experiment, tags=tags, run_name=process)
    Tracker(server.uri, "training", {}, output_dir=tmp_path, timeout=BUSY).start()
    found = [server.runs(run)[0].info.status for run in (*others, opened.run_name)]
    assert found == ["KILLED", "RUNNING", "RUNNING", "RUNNING"]


@pytest.mark.slow
def test_a_server_that_takes_requests_and_never_answers_costs_its_time_twice(server, caplog):
    tracker = Tracker(server.uri, "inferring", {}, timeout=0.5)
    begin = time.monotonic()
    with server.silent():
        tracker.start()
        for _ in range(20):
            tracker.log({"inputs": 1}, {})
        tracker.finish()
    assert 1 <= time.monotonic() - begin < 4
    assert "no answer in 0.5 s, which tracking_timeout sets" in caplog.text


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_everything_in_the_end(server, tmp_path, caplog):
    (tmp_path / "scores.csv").write_text("name\n")
    tracker = Tracker(server.uri, "training", {}, config={"seed": 0}, timeout=BUSY)

    def after_epoch(epoch):
        if epoch == 1:
            server.kill()
        elif epoch == 2:
            tracker.log({"aupro": 0.5}, {"report": [tmp_path / "scores.csv"]})
            server.start()

    trainer(tracker, after_epoch).run([0], max_epochs=3)
    tracker.finish()
    [run] = server.runs(tracker.run_name)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"train_loss": 3.0, "aupro": 0.5}
    assert server.losses(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert run.data.params["seed"] == "0"
    assert server.artifacts(run) == ["configs/resolved_config.json", "report/scores.csv"]
    assert "tries again later" in caplog.text
    assert "missing" not in caplog.text


@pytest.mark.slow
def test_a_server_that_dies_for_good_during_a_command_keeps_no_result_from_it(server, tmp_path):
    random = np.random.default_rng(0)
    for place in ("test/good/img", "test/Ungood/img", "test/Ungood/label"):
        (tmp_path / place).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(random.integers(1, 255, (64, 64), np.uint8)).save(tmp_path / place / f"{index}.png")
    detector = make_detector(SMALL)
    for name in ("threshold", "image_threshold", "false_positive_rate", "image_false_positive_rate"):
        getattr(detector, name).fill_(0.05)
    save_checkpoint(detector, tmp_path / "model.pt")
    options = {"dataset_dir": tmp_path, "checkpoint": tmp_path / "model.pt", "output_dir": tmp_path / "out"}
    evaluating = subprocess.Popen(
        command("evaluating", EVALUATE, device="cpu", tracking_uri=server.uri, tracking_timeout=BUSY, **options),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    opened = "select count(*) from runs where name like 'evaluating %' and status = 'RUNNING'"
    while evaluating.poll() is None and not server.ask(opened):
        time.sleep(0.05)
    server.kill()
    errors = evaluating.communicate()[1]
    assert evaluating.returncode == 0, errors
    [line] = [line for line in errors.splitlines() if "does not have all of this command" in line]
    assert "of metrics" in line and "1 of ends of runs; results are not concerned" in line
    assert {"metrics.json", "metrics.csv", "test_scores.csv", "test_examples.png"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert server.ask(opened) == 1
