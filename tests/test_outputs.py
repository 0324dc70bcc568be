"""What inference writes: one class a format and one a table, with no more reading than needed."""

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image
from test_dicom_series import series

import bundle.dicom.series
import bundle.transforms.loading
import bundle.writers
from bundle.checkpoint import save_checkpoint
from bundle.errors import BundleError
from bundle.model import make_detector
from bundle.outputs import DetectionSaver, ScoreTable, Table
from bundle.tracking import Tracker
from bundle.writers import WRITERS, Writer

MODEL = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8}
KNOBS = {"device": "cpu", "tracking_uri": "off", "bundle_root": str(ROOT)}


def infer(dataset_dir, output_dir, **knobs):
    """The inference of the bundle in this process, with a network that knows nothing."""
    model = Path(output_dir).parent / "model.pt"
    save_checkpoint(make_detector(MODEL), model)
    config = ConfigParser.load_config_file(ROOT / "configs" / "inference.json")
    given = {"dataset_dir": str(dataset_dir), "output_dir": str(output_dir), "checkpoint": str(model), **KNOBS, **knobs}
    ConfigParser(config | given).get_parsed_content("evaluator").run()


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
    assert parsed == dict.fromkeys(names, 3)  # its pixels twice: before work begins, and for the networks
    assert looked_at == dict.fromkeys(names, 1)


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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_map.tiff", "a_mask.png", "a_overlay.png"}


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


@pytest.mark.parametrize(
    ("options", "message"),
    [({"worst_slices": 0}, "worst_slices is 0: give at least 1"), ({"write_dicom": True}, "preprocessing is missing")],
)
def test_settings_that_cannot_be_met_are_refused(detector, tmp_path, options, message):
    with pytest.raises(BundleError, match=message):
        saver_in(tmp_path, detector, **options)
