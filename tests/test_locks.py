"""One command at a time in a folder, and no remains of killed ones."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from bundle import locks
from bundle.errors import BundleError
from bundle.files import PARTIAL, remove_leftovers
from bundle.locks import FILE, holds_lock, lock_folder, unlock_folders
from bundle.processes import process_name

HOLD = "import sys\nfrom bundle.locks import lock_folder\nlock_folder(sys.argv[1])\nprint('ready', flush=True)\ninput()"


@pytest.fixture(autouse=True)
def _nothing_stays_locked():
    yield
    unlock_folders()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_second_command_is_refused_by_the_name_of_the_first(tmp_path, holder):
    with pytest.raises(BundleError, match=f"is in use by .*process {holder.pid} on .*another --output_dir"):
        lock_folder(tmp_path)
    assert not holds_lock(tmp_path)


@pytest.mark.slow
def test_a_killed_command_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock_folder(tmp_path)
    assert holds_lock(tmp_path)


@pytest.mark.slow
def test_the_lock_of_a_killed_command_does_not_live_on_in_its_workers(tmp_path):
    code = (
        "import os, sys, time\nfrom bundle.locks import lock_folder\nlock_folder(sys.argv[1])\n"
        "if os.fork() == 0:\n    time.sleep(60)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        lock_folder(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_the_lock_is_given_back_without_a_trace_and_may_be_asked_for_twice(tmp_path):
    lock_folder(tmp_path)
    lock_folder(tmp_path)
    assert (tmp_path / FILE).exists()
    unlock_folders()
    assert not list(tmp_path.iterdir())


def _take_turns(folder, turns):
    for _ in range(turns):
        while True:
            try:
                lock_folder(folder)
                break
            except BundleError:
                time.sleep(0.001)
        number = int((folder / "number").read_text())
        time.sleep(0.0005)
        (folder / "number").write_text(str(number + 1))
        unlock_folders()


def test_of_many_processes_never_two_hold_the_lock(tmp_path):
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_take_turns, args=(tmp_path, 20)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "number").read_text() == "80"


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_folder(tmp_path)
    assert "has no locks: run one command at a time" in caplog.text


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(BundleError, match="cannot write .*give another"):
        lock_folder(tmp_path / "out")


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(BundleError, match="cannot write"):
        lock_folder(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "kept"


def test_only_the_first_of_several_processes_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.idist, "get_rank", lambda: 1)
    lock_folder(tmp_path)
    assert not holds_lock(tmp_path)


@pytest.mark.slow
def test_remains_of_killed_commands_are_removed_and_nothing_else(tmp_path, caplog):
    caplog.set_level("INFO")
    code = (
        "import os, signal, sys\nfrom bundle.files import whole_file, whole_files\n"
        "with whole_file(sys.argv[1] + '/a/scores.csv') as file, whole_files(sys.argv[1]) as folder:\n"
        "    file.write_text('half')\n    (folder / 'map').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    old = time.time() - 2 * 24 * 3600
    for name in ("model.pt.123.partial", ".partial-xyzabc12"):  # of version 0.5
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (old, old))
    kept = {"a", "scores.csv", ".partial-other", "half.partial", ".partial-link"}
    (tmp_path / ".partial-link").symlink_to(tmp_path / "scores.csv")
    for name in ("scores.csv", ".partial-other", "half.partial"):
        (tmp_path / name).write_text("kept")
    assert len(list(tmp_path.rglob(".partial-*"))) == 5
    lock_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept | {FILE}
    assert not list((tmp_path / "a").iterdir())
    assert "removed 4 half-written files or folders" in caplog.text


@pytest.mark.slow
def test_what_a_process_at_work_writes_stays(tmp_path, holder):
    path = tmp_path / f"{PARTIAL}{process_name(holder.pid)}-abc"
    path.write_text("in progress")
    os.utime(path, (0, 0))
    assert remove_leftovers(tmp_path) == 0


def test_a_disk_without_room_for_a_lock_is_one_line_and_nothing_is_left(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(BundleError, match=r"\(File too large\): free the disk, then run the same command again"):
            lock_folder(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    unlock_folders()
    assert not list(tmp_path.iterdir())
