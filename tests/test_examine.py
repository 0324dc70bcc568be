"""The clinical command: one folder in, results of what the model knows out, everything else counted."""

import logging
import shutil

import pytest
from commands import error_line
from pydicom import dcmread
from pydicom.uid import generate_uid
from test_console import dinov3_spatial_ar
from test_dicom_series import as_localizer, as_report, identity, truncate, volume_of

from bundle.checkpoint import save_checkpoint
from bundle.data import find_images, keep_readable
from bundle.dicom.mr import mr_series, write_series
from bundle.dicom.selection import series_rule
from bundle.errors import BundleError
from bundle.learned import Learned
from bundle.model import make_detector
from bundle.transforms import LoadCased

LEARNED = Learned({"modality": {"MR": 9}, "sequence": {"flair": 9}}, 5, True)
AS_LEARNED = series_rule("learned", "learned", unseen=LEARNED.unseen)
AXIAL = [[1.0, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 1]]
SAGITTAL = [[0, 0, 4.0, 0], [-1.5, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]


def add_series(study, number, description, affine=AXIAL, modality="MR"):
    images = mr_series(volume_of(number), affine, identity(number=number))
    for image in images:
        image.SeriesDescription, image.Modality = description, modality
    return write_series(images, study / f"{number}")


def learn_from_flair(folder):
    """A model that knows what it has learned from, and nothing else."""
    detector = make_detector({"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8})
    detector.case_likeness.remember(LEARNED)
    save_checkpoint(detector, folder / "model.pt")
    return folder / "model.pt"


def make_study(folder):
    """Two FLAIR series, a T1 series, a CT, and what else lies in a study."""
    add_series(folder, 1, "ax T2 FLAIR")
    add_series(folder, 2, "sag flair", SAGITTAL)
    add_series(folder, 3, "t1 mprage")
    add_series(folder, 4, "head", modality="CT")
    for file in add_series(folder, 5, "survey"):
        as_localizer(file)
    report, state, *rest = add_series(folder, 6, "others")
    as_report(report)
    as_report(state)
    image = dcmread(state)
    image.SOPClassUID, image.SOPInstanceUID, image.Modality = "1.2.840.10008.5.1.4.1.1.11.1", generate_uid(), "PR"
    image.save_as(state)
    for file in rest:
        file.unlink()
    (folder / "README.txt").write_text("of the hospital")
    return folder


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".dcm", ".gz", ".db")}


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "study")


@pytest.mark.slow
def test_a_study_is_examined_where_the_model_knows_its_series(study, tmp_path, caplog):
    model = learn_from_flair(tmp_path)
    done = dinov3_spatial_ar("examine", study, "-o", "out", "--model", model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = names(tmp_path / "out")
    assert {"1_seg.dcm", "1_heatmap.dcm", "1_report.dcm", "1_overlay/IM0001.dcm", "2_report.dcm"} <= found
    assert not [name for name in found if name[0] in "3456" or name.endswith(".db")]
    assert (
        "passed over 2 series (sequence t1, which the model has not learned from: 1, modality CT, which the model has "
        "not learned from: 1) and 9 files (localizer: 6, Basic Text SR: 1, Grayscale Softcopy Presentation State: 1, "
        "another format: 1)"
    ) in done.stderr
    assert "| 12/12 " in done.stderr  # slices
    assert "Secret" not in done.stdout + done.stderr
    # what was found comes back from the archive with the next export
    for name in found - {name for name in found if name.endswith(".gz")}:
        shutil.copy(tmp_path / "out" / name, study / name.replace("/", "_"))
    with caplog.at_level(logging.INFO):
        assert [case["name"] for case in find_images(study, series=AS_LEARNED)] == ["1", "2"]
    assert "result of dinov3_spatial_ar: 18" in caplog.text


@pytest.mark.slow
def test_a_misspelled_knob_is_refused_with_the_closest_name(study, tmp_path):
    words = ("--model", learn_from_flair(tmp_path), "--serise_modality", "MR")
    done = dinov3_spatial_ar("examine", study, "-o", "out", *words, cwd=tmp_path)
    assert "did you mean 'series_modality'" in error_line(done)


def test_series_are_chosen_by_orientation(study, caplog):
    with caplog.at_level(logging.INFO):
        [case] = find_images(study, series=series_rule(orientation="sagittal"))
    assert case["name"] == "2"
    assert "passed over 3 series (not sagittal: 3)" in caplog.text


def test_a_study_without_a_series_that_fits_is_refused_with_the_reasons(study):
    with pytest.raises(BundleError, match=r"no series to examine .* 4 series \(Modality without 'PT': 4\).*modality"):
        find_images(study, series=series_rule(modality="PT"))


def test_a_truncated_file_of_a_study_is_an_error(study):
    truncate(study / "1" / "IM0002.dcm")
    with pytest.raises(BundleError, match=r"IM0002\.dcm"):
        keep_readable(find_images(study, series=AS_LEARNED), LoadCased("image"))
