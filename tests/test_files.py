import csv
import hashlib
import io
import json
import logging
import os
import subprocess
import sys

import pytest

from bundle.errors import BundleError, OneLine, log_single_lines
from bundle.files import content_key, whole_file, whole_files, write_csv, write_json

HEAVY = {"torch", "monai", "pydicom", "nibabel", "numpy", "matplotlib"}


@pytest.fixture
def hashed(monkeypatch):
    """The files whose content is hashed, in order."""
    names = []
    digest = hashlib.file_digest

    def counted(stream, algorithm):
        names.append(os.path.basename(stream.name))
        return digest(stream, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


@pytest.mark.parametrize("module", ["bundle.files", "scripts.integrations.environments", "scripts.benchmarks.common"])
def test_the_ground_floor_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_a_file_is_hashed_once(tmp_path, hashed):
    (tmp_path / "a.png").write_bytes(b"a")
    assert content_key(tmp_path / "a.png") == content_key([str(tmp_path / "a.png")])
    assert hashed == ["a.png"]


def test_a_file_that_has_changed_is_hashed_again(tmp_path, hashed):
    (tmp_path / "a.png").write_bytes(b"a")
    before = content_key(tmp_path / "a.png")
    write_json(tmp_path / "a.png", "b")
    assert content_key(tmp_path / "a.png") != before
    assert hashed == ["a.png", "a.png"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with pytest.raises(KeyboardInterrupt), whole_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not list(file.parent.iterdir())
    with whole_file(file) as partial:
        partial.write_text("whole")
        assert not file.exists()
    assert [item.name for item in file.parent.iterdir()] == ["a.txt"]
    assert file.read_text() == "whole"


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_set_of_files_appears_together_and_replaces_what_is_stale(tmp_path):
    for name in ("x_map.nii.gz", "x_mask.png", "y_mask.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "x_overlay").mkdir()
    (tmp_path / "x_overlay" / "1.png").write_text("old")
    with whole_files(tmp_path, ["x_map.nii.gz", "x_mask.png", "x_overlay"]) as fresh:
        (fresh / "x_mask.png").write_text("new")
        (fresh / "x_overlay").mkdir()
        (fresh / "x_overlay" / "2.png").write_text("new")
        assert (tmp_path / "x_mask.png").read_text() == "old"
    assert {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == {
        "x_mask.png": "new",
        "y_mask.png": "old",
        "2.png": "new",
    }


def test_a_set_that_is_interrupted_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path, ["a"]) as fresh:
        (fresh / "a").write_text("new")
        raise KeyboardInterrupt
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_table_has_a_header_and_a_line_a_row(tmp_path):
    write_csv(tmp_path / "new" / "a.csv", [{"name": "a, b", "score": 1.5}], ["name", "score"])
    assert (tmp_path / "new" / "a.csv").read_text().splitlines() == ["name,score", '"a, b",1.5']


# links


def test_a_link_that_lies_in_the_way_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other.txt").write_text("untouched")
    for name in ("result.txt", f"result.txt.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(tmp_path / "other.txt")
    with whole_file(tmp_path / "result.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "other.txt").read_text() == "untouched"
    assert not (tmp_path / "result.txt").is_symlink() and (tmp_path / "result.txt").read_text() == "new"


def test_links_in_the_places_of_files_are_replaced_and_not_followed(tmp_path):
    other, target = tmp_path / "other", tmp_path / "results"
    for folder in (other, target):
        folder.mkdir()
    (other / "kept.txt").write_text("untouched")
    (target / "a.txt").symlink_to(other / "kept.txt")
    (target / "b.txt").symlink_to(tmp_path / "nowhere")
    (target / "c.txt").symlink_to(other)
    with whole_files(target) as fresh:
        for name in ("a.txt", "b.txt", "c.txt"):
            (fresh / name).write_text("new")
    assert [(file.name, file.read_text()) for file in other.iterdir()] == [("kept.txt", "untouched")]
    assert not any(file.is_symlink() for file in target.iterdir())
    assert [(target / name).read_text() for name in ("a.txt", "b.txt", "c.txt")] == ["new"] * 3


def test_a_set_is_not_written_through_a_link_in_the_place_of_its_folder(tmp_path):
    other, target = tmp_path / "other", tmp_path / "results"
    other.mkdir()
    target.mkdir()
    (target / "a_series").symlink_to(other)
    with pytest.raises(BundleError, match=f"'{target}/a_series' is a link to '{other}'"):
        with whole_files(target, stale=["a_series"]) as fresh:
            (fresh / "a_series").mkdir()
            (fresh / "a_series" / "1.dcm").write_text("new")
    assert not list(other.iterdir())


def test_nothing_is_written_through_a_linked_folder_below_that_of_the_results(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a").symlink_to(tmp_path / "other")
    with pytest.raises(BundleError, match=f"'{tmp_path}/results/a' is a link to '{tmp_path}/other'"):
        with whole_files(tmp_path / "results" / "a" / "b", within=tmp_path / "results"):
            pass
    assert not list((tmp_path / "other").iterdir())


def test_the_folder_of_the_results_may_be_a_link(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "other")
    with whole_files(tmp_path / "results" / "a", within=tmp_path / "results") as fresh:
        (fresh / "b.txt").write_text("new")
    assert (tmp_path / "other" / "a" / "b.txt").read_text() == "new"


# spreadsheets


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "'"])
def test_no_text_of_a_table_is_a_formula(tmp_path, start):
    rows = [{"name": f"{start}HYPERLINK(1)", "score": -1.5}]
    write_csv(tmp_path / "table.csv", rows, ["name", "score"])
    with (tmp_path / "table.csv").open(newline="") as stream:
        (cells,) = csv.DictReader(stream)
    assert cells == {"name": f"'{start}HYPERLINK(1)", "score": "-1.5"}


def test_numbers_and_plain_texts_of_a_table_stay_as_they_are(tmp_path):
    rows = [{"name": "a=b", "score": "-1.5e-3"}, {"name": None, "score": -float("inf")}]
    write_csv(tmp_path / "table.csv", rows, ["name", "score"])
    assert (tmp_path / "table.csv").read_text().splitlines() == ["name,score", "a=b,-1.5e-3", ",-inf"]


# one line


HOSTILE = "a\nerror: forged\r\x1b[31m\u2028b\udcff.png"


def test_a_file_name_forges_no_line_of_an_error():
    message = str(BundleError(f"cannot read '{HOSTILE}': check it"))
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert str(BundleError(message)) == message


def logged(message, *values, times=1, **more):
    """The lines of a log that has a record, which as many handlers have shown before."""
    stream = io.StringIO()
    record = logging.LogRecord("bundle", logging.WARNING, "", 0, message, values, more.get("exc_info"))
    for _ in range(times):
        stream.truncate(stream.seek(0))
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        handler.addFilter(OneLine())
        handler.handle(record)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_name_forges_no_line_of_a_log(times):
    (line,) = logged("skipped: '%s'\n", HOSTILE, times=times)
    assert line.startswith("WARNING skipped: 'a\\nerror: forged\\r\\x1b[31m\\u2028b")


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_name_forges_no_line_of_a_trace(times):
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        first, *trace = logged("failed", exc_info=sys.exc_info(), times=times)
    assert first == "WARNING failed"
    assert all(line.startswith("| ") and not line.startswith("| | ") and line.isprintable() for line in trace)
    assert (
        trace[0] == "| Traceback (most recent call last):" and "| error: forged\\r\\x1b[31m\\u2028b\\udcff.png" in trace
    )


def test_handlers_of_libraries_show_single_lines_as_well(monkeypatch):
    stream = io.StringIO()
    library = logging.getLogger("some.library")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(stream)])
    log_single_lines()
    library.warning(HOSTILE)
    assert len(stream.getvalue().splitlines()) == 1


def test_values_that_do_not_fit_their_message_end_nothing():
    (line,) = logged("%d slices", HOSTILE)
    assert line.startswith("WARNING %d slices ('a\\nerror: forged")
