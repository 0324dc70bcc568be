"""What inference writes: one class a format and one a table, with no more reading than needed."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image
from test_dicom_objects import radiograph
from test_dicom_series import series

import bundle.dicom.series
import bundle.transforms.loading
import bundle.writers
from bundle.checkpoint import save_checkpoint
from bundle.errors import BundleError, user_error
from bundle.locks import lock_folder
from bundle.manifest import Manifest
from bundle.model import make_detector
from bundle.outputs import DetectionSaver, ScoreTable, Table
from bundle.tracking import Tracker
from bundle.writers import WRITERS, Writer, _original

MODEL = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8}
KNOBS = {"device": "cpu", "tracking_uri": "off", "bundle_root": str(ROOT)}


def infer(dataset_dir, output_dir, meanwhile=lambda: None, **knobs):
    """The inference of the bundle in this process, with a network that knows nothing.

    ``meanwhile`` happens when all images were checked and before the networks see them.
    """
    model = Path(output_dir).parent / "model.pt"
    save_checkpoint(make_detector(MODEL), model)
    config = ConfigParser.load_config_file(ROOT / "configs" / "inference.json")
    given = {"dataset_dir": str(dataset_dir), "output_dir": str(output_dir), "checkpoint": str(model), **KNOBS, **knobs}
    evaluator = ConfigParser(config | given).get_parsed_content("evaluator")
    meanwhile()
    evaluator.run()


def counting(monkeypatch, module, name):
    """How often a function of ``module`` is called, by the name of the file or folder it is called with."""
    calls = Counter()
    function = getattr(module, name)

    def count(path, *args, **kwargs):
        calls[Path(path).name] += 1
        return function(path, *args, **kwargs)

    monkeypatch.setattr(module, name, count)
    return calls


@pytest.fixture
def two_series(tmp_path):
    """Twelve files without suffix."""
    files = []
    for patient in ("p1", "p2"):
        for file in series(tmp_path / "in" / patient, patient=patient):
            files.append(file.rename(file.with_name(f"{patient}-{file.stem}")))
    return tmp_path / "in", [file.name for file in files]


@pytest.mark.slow
def test_a_dicom_file_is_parsed_once_to_group_it_and_each_time_its_pixels_are_read(two_series, tmp_path, monkeypatch):
    folder, names = two_series
    parsed = counting(monkeypatch, bundle.dicom.series, "dcmread")
    looked_at = counting(monkeypatch, bundle.transforms.loading, "is_dicom")
    infer(folder, tmp_path / "out", write_dicom=True)
    assert (tmp_path / "out" / "p2_report.dcm").is_file()
    first_ones = {"p1-IM0001", "p2-IM0001"}  # of series, by which they are chosen
    assert parsed == {name: 3 + (name in first_ones) for name in names}  # pixels: before work begins, for the networks
    assert looked_at == dict.fromkeys(names, 1)


@pytest.mark.slow
def test_a_radiograph_among_series_gets_the_dicom_results_that_it_can_have(two_series, tmp_path):
    folder, _ = two_series
    radiograph(folder / "chest")
    infer(folder, tmp_path / "out", write_dicom=True, segment_unlike=True)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*_*.dcm")}
    of_series = {f"{name}_{kind}.dcm" for name in ("p1", "p2") for kind in ("seg", "heatmap", "report")}
    assert written == of_series | {"chest/IM0001_report.dcm"}
    assert (tmp_path / "out" / "chest" / "IM0001_overlay" / "IM0001.dcm").is_file()


@pytest.mark.slow
def test_the_model_is_hashed_once_a_run_and_only_for_dicom(two_series, tmp_path, monkeypatch):
    hashed = counting(monkeypatch, bundle.writers, "file_sha256")
    infer(two_series[0], tmp_path / "out")
    assert not hashed
    infer(two_series[0], tmp_path / "out", write_dicom=True)
    assert hashed == {"model.pt": 1}


class NoteWriter(Writer):
    """A format that a user adds."""

    suffixes = ("_note.txt",)

    def applies(self, result):
        return result.score > 1

    def write(self, stem, result, image):
        Path(f"{stem}_note.txt").write_text(f"{result.score}")


class ShapeTable(Table):
    """A table that a user adds."""

    file = "shapes.csv"
    columns = ("name", "slices")
    order = ("name",)

    def rows_of(self, result):
        return [{"name": result.name, "slices": len(result.slices)}]


def case(folder, score):
    """A picture as the engine leaves it."""
    Image.fromarray(np.zeros((20, 16), np.uint8)).save(folder / "a.png")
    image = MetaTensor(torch.rand(1, 20, 16, 1), meta={"filename_or_obj": str(folder / "a.png")})
    pred = {"pred_slice_scores": torch.tensor([score]), "pred_slice_counts": torch.tensor([True])}
    return {"name": "a", "image": image, "pred_map": image, "pred_map_restored": image, **pred}


def saver_in(folder, detector, **options):
    (folder / "out").mkdir(exist_ok=True)
    return DetectionSaver(folder / "out", detector, folder, Tracker("off", "inferring", {}), **options)


def test_a_format_is_added_by_one_class_and_what_it_left_is_replaced_where_it_no_longer_applies(detector, tmp_path):
    saver = saver_in(tmp_path, detector, writers=(*WRITERS, NoteWriter))
    saver.save(case(tmp_path, 2.0))
    assert (tmp_path / "out" / "a_note.txt").read_text() == "2.0"
    saver.save(case(tmp_path, 0.5))
    assert {path.name for path in (tmp_path / "out").glob("a_*")} == {"a_map.tiff", "a_mask.png", "a_overlay.png"}


def test_a_table_is_added_by_one_class(detector, tmp_path):
    saver = saver_in(tmp_path, detector, tables=(ScoreTable, ShapeTable))
    saver.save(case(tmp_path, 2.0))
    saver.save_tables()
    with (tmp_path / "out" / "shapes.csv").open() as stream:
        assert list(csv.DictReader(stream)) == [{"name": "a", "slices": "1"}]


def test_nothing_is_left_of_a_result_that_cannot_be_written(detector, tmp_path):
    class Failing(NoteWriter):
        def write(self, stem, result, image):
            raise BundleError("no")

    saver = saver_in(tmp_path, detector, writers=(*WRITERS, Failing), on_error="skip")
    data = case(tmp_path, 2.0)
    saver.save_batch(SimpleNamespace(state=SimpleNamespace(batch=[data], output=[data])))
    assert saver.skipped == 1
    assert not list((tmp_path / "out").iterdir())


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (32, 32)).astype(np.uint8)
    Image.fromarray(values).save(path.with_name("image.png"))
    return path.with_name("image.png").rename(path)


def left_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


OF_RUN = {"scores.csv", "results.json", "inferring_report.html"}


def results_of(*names):
    return {f"{name}_{kind}" for name in names for kind in ("map.tiff", "mask.png", "overlay.png")}


def error_of(run, *arguments, **knobs):
    with pytest.raises(RuntimeError) as caught:
        run(*arguments, **knobs)
    return str(user_error(caught.value))


def test_results_of_inputs_in_a_folder_that_is_named_like_a_result_stay(tmp_path, detector):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/a_overlay/b.png")
    saver = saver_in(tmp_path, detector)
    (tmp_path / "a.png").touch()
    saver.save(case(tmp_path, 1.0) | {"name": "a_overlay/b"})
    saver.save(case(tmp_path, 1.0))  # its overlay of an earlier run, as DICOM, would have been in 'a_overlay'
    assert left_in(tmp_path / "out") >= results_of("a", "a_overlay/b")
    infer(tmp_path / "in", tmp_path / "all")
    infer(tmp_path / "in", tmp_path / "all")
    assert left_in(tmp_path / "all") == {*results_of("a", "a_overlay/b"), *OF_RUN}


@pytest.mark.parametrize("output", ["in", "link"])
def test_an_output_folder_with_an_input_is_refused_before_any_work(tmp_path, output):
    picture(tmp_path / "in/a.png", 1)
    mask = picture(tmp_path / "in/a_mask.png", 2).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = left_in(tmp_path / "in")
    line = error_of(infer, tmp_path / "in", tmp_path / output)
    assert f"'{tmp_path}/in/a.png' lies in output_dir" in line and "give an --output_dir without images" in line
    assert left_in(tmp_path / "in") == before
    assert (tmp_path / "in/a_mask.png").read_bytes() == mask


def test_results_in_the_folder_of_the_data_are_no_inputs_of_the_next_run(tmp_path):
    picture(tmp_path / "in/a.png")
    infer(tmp_path / "in", tmp_path / "in/out")
    infer(tmp_path / "in", tmp_path / "in/out")
    assert left_in(tmp_path / "in/out") == {*results_of("a"), *OF_RUN}


def test_an_image_among_the_results_that_is_none_is_not_passed_over(tmp_path):
    picture(tmp_path / "in/a.png")
    infer(tmp_path / "in", tmp_path / "in/out")
    picture(tmp_path / "in/out/photo.png")
    assert "out/photo.png' lies in output_dir" in error_of(infer, tmp_path / "in", tmp_path / "in/out")


@pytest.mark.parametrize("name", ["a_mask.png", "scores.csv", "a_seg.dcm"])
def test_a_file_in_the_place_of_a_result_is_neither_replaced_nor_removed(tmp_path, name):
    picture(tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    line = error_of(infer, tmp_path / "in", tmp_path / "out")
    assert f"out/{name}' is in the place of a result, but 'results.json' names no such result" in line
    assert left_in(tmp_path / "out") == {name}
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_file_that_comes_into_the_place_of_a_result_later_is_not_replaced_either(tmp_path, detector):
    saver = saver_in(tmp_path, detector)
    (tmp_path / "out/a_mask.png").write_text("mine")
    with pytest.raises(BundleError, match="is in the place of a result"):
        saver.save(case(tmp_path, 1.0))
    assert left_in(tmp_path / "out") == {"a_mask.png"}


def test_a_folder_with_images_that_is_named_like_a_file_of_results_is_refused(tmp_path):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/a_mask.png/b.png")
    assert "a result would be called 'a_mask.png', as is a folder" in error_of(infer, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_in_the_folder_of_results_stay(tmp_path):
    picture(tmp_path / "in/a.png")
    for name in ("notes.txt", "a_notes.txt", "b_mask.png", "a_overlay/own.txt", "deep/c_map.tiff"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    before = left_in(tmp_path / "out")
    infer(tmp_path / "in", tmp_path / "out")
    assert before < left_in(tmp_path / "out")


def test_a_result_that_is_not_written_anew_is_removed_by_the_next_run(tmp_path):
    volume = nib.Nifti1Image(np.random.default_rng(0).random((32, 32, 3)).astype(np.float32), np.eye(4))
    (tmp_path / "in").mkdir()
    nib.save(volume, tmp_path / "in/a.nii.gz")
    infer(tmp_path / "in", tmp_path / "out")
    assert left_in(tmp_path / "out") > {"slice_scores.csv", "a_heatmap.nii.gz"}
    (tmp_path / "in/a.nii.gz").unlink()
    picture(tmp_path / "in/a.png")
    infer(tmp_path / "in", tmp_path / "out")
    assert left_in(tmp_path / "out") == {*results_of("a"), *OF_RUN}


def test_results_json_names_every_result_and_its_input(tmp_path):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/deep/b.png")
    infer(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out/results.json").read_text()) == {
        "tables": ["inferring_report.html", "scores.csv"],
        "results": {
            name: {"input": str(tmp_path / "in" / f"{name}.png"), "files": sorted(results_of(name))}
            for name in ("a", "deep/b")
        },
    }


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import bundle.files
from test_outputs import infer

moved = []
replace = os.replace

def kill(source, target):
    replace(source, target)
    moved.append(target)
    if len(moved) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)

bundle.files.os.replace = kill
infer({source!r}, {output!r}, batch_size=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_killed_run_leaves_no_result_that_the_next_one_does_not_own(tmp_path, count):
    for name in ("a", "b"):
        picture(tmp_path / f"in/{name}.png")
    places = {"source": str(tmp_path / "in"), "output": str(tmp_path / "in/out")}
    code = KILLED.format(path=[str(ROOT), str(ROOT / "tests")], count=count, **places)
    (tmp_path / "killed.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "killed.py"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {name for name in left_in(tmp_path / "in/out") if not name.startswith((".partial", "results-"))}
    assert len(left) in (count, count - 1)  # the first one moved is the model
    assert left <= Manifest(tmp_path / "in/out").files
    infer(tmp_path / "in", tmp_path / "in/out")
    assert left_in(tmp_path / "in/out") >= {*results_of("a", "b"), *OF_RUN}
    assert not list((tmp_path / "in/out").glob("results-*"))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"tables": ["../mine.txt"], "results": {}}', '{"results": {"a": {"input": "", "files": ["/etc/x"]}}}'],
)
def test_a_damaged_or_hostile_list_of_results_is_refused(tmp_path, content):
    picture(tmp_path / "in/a.png")
    (tmp_path / "mine.txt").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(content)
    line = error_of(infer, tmp_path / "in", tmp_path / "out")
    assert "results.json' is no list of results of this bundle" in line
    assert (tmp_path / "mine.txt").exists()


FAULTS = {
    "vanishes": Path.unlink,
    "is cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "changes": lambda path: picture(path, 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_input_that_goes_bad_after_the_check_is_named_counted_and_passed_over(tmp_path, caplog, fault, num_workers):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"in/{name}.png")

    def meanwhile():
        FAULTS[fault](tmp_path / "in/b.png")

    infer(tmp_path / "in", tmp_path / "out", meanwhile, num_workers=num_workers, on_error="skip", batch_size=1)
    assert left_in(tmp_path / "out") == {*results_of("a", "c"), *OF_RUN}
    assert f"{tmp_path}/in/b.png'" in caplog.text
    assert "skipped 1 of 3 images that cannot be read any more" in caplog.text


@pytest.mark.slow
def test_an_input_that_goes_bad_after_the_check_ends_a_run_that_skips_nothing(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"in/{name}.png")
    with pytest.raises(BundleError, match="no file at '.*b.png'"):
        infer(tmp_path / "in", tmp_path / "out", (tmp_path / "in/b.png").unlink)


@pytest.mark.slow
def test_a_run_of_which_every_input_goes_bad_has_no_result(tmp_path):
    picture(tmp_path / "in/a.png")
    with pytest.raises(BundleError, match="there is no result of any input"):
        infer(tmp_path / "in", tmp_path / "out", (tmp_path / "in/a.png").unlink, on_error="skip")


def test_a_volume_that_changes_before_its_header_is_needed_has_no_result(tmp_path, detector):
    with pytest.raises(BundleError, match="has changed since it was read"):
        nib.save(nib.Nifti1Image(np.zeros((20, 20, 4)), np.eye(4)), tmp_path / "a.nii.gz")
        _original(str(tmp_path / "a.nii.gz"), (20, 20, 3))
    with pytest.raises(BundleError, match="cannot read '.*b.nii.gz' any more"):
        _original(str(tmp_path / "b.nii.gz"), (20, 20, 3))


@contextmanager
def small_disk():
    """Let no file of more than 20 kB be written: the system says so as of a full disk.

    The limit is of the whole process, so that it must end before the test does: pytest writes its own log.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_the_disk_cannot_hold_leaves_no_half_result(tmp_path, detector, caplog):
    saver = saver_in(tmp_path, detector, on_error="skip")
    small = case(tmp_path, 1.0)
    large = small | {"name": "b"}
    for key in ("image", "pred_map", "pred_map_restored"):
        large[key] = MetaTensor(torch.rand(1, 200, 200, 1), meta=small[key].meta)
    with small_disk():
        for data in (large, small):
            saver.save_batch(SimpleNamespace(state=SimpleNamespace(batch=[data], output=[data])))
        saver.save_tables()
    assert left_in(tmp_path / "out") == {*results_of("a"), "scores.csv", "results.json"}
    assert f"skipped 'b': cannot write '{tmp_path}/out' (File too large" in caplog.text
    assert "skipped 1 of 2 inputs whose results cannot be written" in caplog.text


@pytest.mark.parametrize("output", ["file", "file/deep", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_is_one_line_before_any_work(tmp_path, output):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match=r"cannot write '.*' \(.*\): mend the folder") as caught:
        lock_folder(tmp_path / output)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_where_a_folder_of_results_should_be_is_named_before_any_work(tmp_path):
    picture(tmp_path / "in/deep/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/deep").write_text("mine")
    line = error_of(infer, tmp_path / "in", tmp_path / "out")
    assert f"cannot write '{tmp_path}/out/deep' (Not a directory): " in line
    assert (tmp_path / "out/deep").read_text() == "mine"


@pytest.mark.slow
def test_a_name_that_is_no_text_is_named_and_passed_over(tmp_path, caplog):
    picture(tmp_path / "in/a.png")
    os.rename(picture(tmp_path / "in/b.png"), os.fsencode(tmp_path) + b"/in/b\xff.png")
    line = error_of(infer, tmp_path / "in", tmp_path / "out")
    assert r"in/b\udcff.png' is no UTF-8: rename the file" in line
    infer(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert "skipped 1 of 2 images" in caplog.text
    assert left_in(tmp_path / "out") == {*results_of("a"), *OF_RUN}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"worst_slices": 0}, "worst_slices is 0: give at least 1"), ({"write_dicom": True}, "preprocessing is missing")],
)
def test_settings_that_cannot_be_met_are_refused(detector, tmp_path, options, message):
    with pytest.raises(BundleError, match=message):
        saver_in(tmp_path, detector, **options)
