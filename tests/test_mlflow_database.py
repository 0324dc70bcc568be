"""The database of MLflow is there whole or not at all, and keeps its files beside it."""

import errno
import os
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from kills import killed_in

from bundle import mlflow_database
from bundle.errors import BundleError
from bundle.files import remove_leftovers
from bundle.mlflow_database import ready_database
from bundle.tracking import EXPERIMENT, Tracker, database

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A new database."""
    file = tmp_path_factory.mktemp("whole") / "mlflow.db"
    ready_database(file, EXPERIMENT)
    return file


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder with a run that keeps a file."""
    folder = tmp_path_factory.mktemp("tracked")
    track(folder)
    return folder


def track(folder):
    (folder / "scores.csv").write_text("name,score\n")
    tracker = Tracker(database(folder), "inferring", {}, output_dir=folder)
    tracker.log({"inputs": 1}, {"report": [folder / "scores.csv"]})
    tracker.finish()


def ask(file, statement):
    with sqlite3.connect(file) as connection:
        return connection.execute(statement).fetchall()


def tables(file):
    return {name for (name,) in ask(file, "select name from sqlite_master where type = 'table'")}


def kept_files(folder):
    return {Path(urlsplit(uri).path) for (uri,) in ask(folder / "mlflow.db", "select artifact_uri from runs")}


def has_grown(files, share, whole):
    """Whether one of ``files`` has this share of the size of ``whole``: a moment that no speed of a machine moves."""
    return any(file.exists() and file.stat().st_size >= share * whole.stat().st_size for file in files)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_kill_while_it_is_made_leaves_nothing_in_the_way(tmp_path, whole, share):
    file = tmp_path / "mlflow.db"
    killed_in(
        lambda: ready_database(file, EXPERIMENT),
        once=lambda: has_grown(tmp_path.glob(".partial-*/mlflow.db"), share, whole),
    )
    assert not file.exists()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    ready_database(file, EXPERIMENT)
    assert tables(file) == tables(whole)


def test_half_a_database_of_an_earlier_version_is_made_anew(tmp_path, whole, caplog):
    file = tmp_path / "mlflow.db"
    killed_in(lambda: mlflow_database._bring_to_newest(file, tmp_path), once=lambda: has_grown([file], 0.4, whole))
    assert tables(file) != tables(whole)
    ready_database(file, EXPERIMENT)
    assert tables(file) == tables(whole)
    assert "made by halves by a command that was killed: it is made anew" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlruns"}


@pytest.mark.parametrize("content", [b"no database" * 100, None], ids=["foreign", "overwritten"])
def test_what_cannot_be_read_is_moved_aside(tmp_path, tracked, whole, caplog, content):
    file = tmp_path / "mlflow.db"
    shutil.copy(tracked / "mlflow.db", file)
    before = file.read_bytes()[:100] + b"\xff" * 100_000 if content is None else content
    file.write_bytes(before)
    ready_database(file, EXPERIMENT)
    assert (tmp_path / "mlflow.db.damaged-1").read_bytes() == before
    assert tables(file) == tables(whole)
    assert "it is now 'mlflow.db.damaged-1', and a new one is made" in caplog.text


def test_a_full_disk_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    def fill(file, artifacts):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_database, "_bring_to_newest", fill)
        with pytest.raises(OSError, match="No space left"):
            ready_database(tmp_path / "mlflow.db", EXPERIMENT)
    assert not list(tmp_path.iterdir())


def test_runs_of_a_later_mlflow_are_not_touched(tmp_path, tracked):
    file = tmp_path / "mlflow.db"
    shutil.copy(tracked / "mlflow.db", file)
    with sqlite3.connect(file) as connection:
        connection.execute("update alembic_version set version_num = 'of-tomorrow'")
    with pytest.raises(BundleError, match="cannot bring '.*' to its version .*: move it to another folder"):
        ready_database(file, EXPERIMENT)
    assert ask(file, "select count(*) from runs") == [(1,)]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_of_two_processes_that_make_one_database_the_first_wins(tmp_path, whole):
    target, fresh = tmp_path / "mlflow.db", tmp_path / "fresh.db"
    target.write_text("with runs")
    shutil.copy(whole, fresh)
    mlflow_database._place(fresh, target)
    assert target.read_text() == "with runs"


def test_a_copied_folder_keeps_its_files_in_itself(tmp_path, tracked, caplog):
    caplog.set_level("INFO")
    before = {path for path in tracked.rglob("*") if path.is_file()}
    copy = tmp_path / "a copy"
    shutil.copytree(tracked, copy)
    track(copy)
    assert {path for path in tracked.rglob("*") if path.is_file()} == before
    assert len(kept_files(tracked)) == 1
    places = {Path(str(path).replace("%20", " ")) for path in kept_files(copy)}
    assert len(places) == 2
    assert all(copy in place.parents and (place / "report/scores.csv").is_file() for place in places)
    assert "is a copy, or was moved" in caplog.text


def test_runs_whose_files_were_left_behind_keep_their_place(tmp_path, tracked):
    shutil.copy(tracked / "mlflow.db", tmp_path / "mlflow.db")
    track(tmp_path)
    assert {place.parents[2] for place in kept_files(tmp_path)} == {tracked, tmp_path}


def test_files_that_someone_keeps_elsewhere_stay_there(tmp_path, whole):
    file = tmp_path / "mlflow.db"
    shutil.copy(whole, file)
    with sqlite3.connect(file) as connection:
        connection.execute(
            "insert into experiments (experiment_id, name, artifact_location, lifecycle_stage, workspace)"
            f" values (1, '{EXPERIMENT}', 's3://bucket/mlruns', 'active', 'default')"
        )
    ready_database(file, EXPERIMENT)
    assert ask(file, f"select artifact_location from experiments where name = '{EXPERIMENT}'") == [
        ("s3://bucket/mlruns",)
    ]
