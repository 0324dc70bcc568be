"""Disks that get full, or cannot be written; `tests/disks.py` fills as many as one likes."""

import subprocess
import sys

import pytest
from commands import ROOT, environment
from disks import has_namespaces

FULL = {  # kilobytes, and what cannot be written then
    "training": ([100, 4600], "feature_cache training_state.pt"),
    "evaluating": ([50], "test_examples.png"),
    "torchscript": ([100], "model.ts"),
    "openvino": ([4200], "model.xml"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where data and undisturbed results are."""
    return tmp_path_factory.mktemp("disks") / "place"


def ends_as_undisturbed(place, command, limit, kilobytes):
    """What :mod:`disks` says of a command, of which every run ends early and then, with room, as undisturbed."""
    sizes = map(str, kilobytes)
    words = [f"--commands={command}", f"--limit={limit}", f"--out={place}", "--kilobytes", *sizes]
    done = subprocess.run(
        [sys.executable, "tests/disks.py", *words],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{len(kilobytes)} runs, {len(kilobytes)} ended early, 0 with another end" in done.stdout
    return done.stdout


needs_namespaces = pytest.mark.skipif(not has_namespaces(), reason="this system lets no user mount a disk of his own")


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_one_line_and_with_room_the_command_ends_as_undisturbed(place, command):
    kilobytes, files = FULL[command]
    lines = ends_as_undisturbed(place, command, "disk", kilobytes)
    assert all(file in lines for file in files.split())


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kilobytes"), [("training", 400), ("torchscript", 2000)])
def test_a_limit_on_the_size_of_files_is_the_same(place, command, kilobytes):
    ends_as_undisturbed(place, command, "file", [kilobytes])


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("command", ["evaluating", "torchscript"])
def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(place, command):
    assert "Read-only file system" in ends_as_undisturbed(place, command, "rights", [0])
