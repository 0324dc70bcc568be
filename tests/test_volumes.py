"""Studies in, studies out: NIfTI volumes and DICOM series through the real commands."""

import csv
import shutil

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from commands import INFER, QUICK, TRAIN, error_line, run, succeed
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom import dcmread

from bundle.results import heat
from scripts.samples.dicom import make_sample_dicom

STORED_AS = {
    # how one volume can lie in a file
    "ras": "RAS",
    "flipped": "LPS",
    "left-handed": "LAS",
    "slices first": "SRA",
}
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.15, 0.12))


def a_test_volume(cohort):
    return nib.load(sorted((cohort / "volumes" / "test").glob("*_flair.nii.gz"))[0])


def stored_as(image, axcodes):
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axcodes)))


@pytest.fixture(scope="module")
def volumes(cohort, tmp_path_factory):
    """One volume in every orientation, turned by some degrees, and as the second volume of a 4D file."""
    folder = tmp_path_factory.mktemp("volumes")
    image = a_test_volume(cohort)
    for name, axcodes in STORED_AS.items():
        nib.save(stored_as(image, axcodes), folder / f"{name}.nii.gz")
    turned = nib.Nifti1Image(image.get_fdata(dtype=np.float32), OBLIQUE @ image.affine)
    turned.set_qform(turned.affine, 1)
    turned.set_sform(turned.affine, 2)
    nib.save(turned, folder / "oblique.nii.gz")
    values = image.get_fdata(dtype=np.float32)
    nib.save(nib.Nifti1Image(np.stack([values * 0 + 1, values], axis=-1), image.affine), folder / "series.nii.gz")
    return folder


@pytest.fixture(scope="module")
def inferred(volumes, knobs, tmp_path_factory):
    output = tmp_path_factory.mktemp("maps")
    succeed("inferring", INFER, dataset_dir=volumes, output_dir=output, channel=1, tracking_uri="off", **knobs)
    return output


NAMES = [*STORED_AS, "oblique", "series"]


@pytest.mark.parametrize("name", NAMES)
def test_map_mask_and_heat_map_lie_on_the_grid_of_the_input(volumes, inferred, name):
    source = nib.load(volumes / f"{name}.nii.gz")
    for kind, dtype in (("map", np.float32), ("mask", np.uint8), ("heatmap", np.uint8)):
        image = nib.load(inferred / f"{name}_{kind}.nii.gz")
        assert image.shape == source.shape[:3]
        assert image.get_data_dtype() == dtype
        np.testing.assert_array_equal(image.affine, source.affine)
        np.testing.assert_allclose(image.header.get_zooms(), source.header.get_zooms()[:3])
        for code in ("qform_code", "sform_code"):
            assert image.header[code] == source.header[code]
        np.testing.assert_array_equal(image.get_qform(), source.get_qform())


@pytest.mark.parametrize("name", [*STORED_AS, "series"])
def test_the_same_volume_has_the_same_map_however_it_is_stored(inferred, name):
    expected = nib.load(inferred / "ras_map.nii.gz").get_fdata()
    found = nib.as_closest_canonical(nib.load(inferred / f"{name}_map.nii.gz")).get_fdata()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.1


def test_mask_and_heat_map_follow_from_map_and_threshold(inferred):
    rows = {row["name"]: row for row in csv.DictReader((inferred / "scores.csv").open())}
    threshold = float(rows["ras"]["threshold"])
    values, mask, gray = (
        np.asarray(nib.load(inferred / f"ras_{kind}.nii.gz").dataobj) for kind in ("map", "mask", "heatmap")
    )
    np.testing.assert_array_equal(mask, values > threshold)
    np.testing.assert_array_equal(gray, np.round(255 * heat(values, threshold)))
    assert mask.any() and not mask.all()


def test_each_slice_has_a_score_and_the_study_that_of_its_worst(inferred):
    studies = {row["name"]: row for row in csv.DictReader((inferred / "scores.csv").open())}
    slices = [row for row in csv.DictReader((inferred / "slice_scores.csv").open()) if row["name"] == "slices first"]
    assert [int(row["slice"]) for row in slices] == list(range(12))
    counting = sorted((row for row in slices if row["counts"] == "1"), key=lambda row: -float(row["score"]))
    assert [int(row["rank"]) for row in counting] == list(range(1, len(counting) + 1))
    study = studies["slices first"]
    assert study["worst_slices"].split() == [row["slice"] for row in counting[:3]]
    assert study["score"] == counting[0]["score"]
    assert float(study["score"]) == pytest.approx(float(studies["ras"]["score"]), abs=1e-3)


def test_a_4d_file_needs_a_channel(volumes, knobs, tmp_path):
    given = {"dataset_dir": volumes / "series.nii.gz", "output_dir": tmp_path / "out", **knobs}
    assert "choose one of its 2 volumes with --channel" in error_line(run("inferring", INFER, **given))
    assert "has 2 volumes, but channel is 2: give 0 to 1" in error_line(run("inferring", INFER, channel=2, **given))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dicom(cohort, tmp_path_factory):
    return make_sample_dicom(cohort, tmp_path_factory.mktemp("dicom") / "cohort")


@pytest.fixture(scope="module")
def objects(dicom, knobs, tmp_path_factory):
    """Inference on two series, with DICOM results."""
    folder = tmp_path_factory.mktemp("study")
    for study in sorted((dicom / "test").iterdir())[:2]:
        shutil.copytree(study, folder / "in" / study.name)
    for file in sorted((folder / "in").rglob("*.dcm"))[:12]:  # one study
        image = dcmread(file)
        image.PatientName = "Secretname John"  # of one component: libraries like to warn of it
        image.save_as(file)
    done = succeed(
        "inferring",
        INFER,
        dataset_dir=folder / "in",
        output_dir=folder / "out",
        write_dicom=True,
        segment_unlike=True,
        tracking_uri="off",
        **knobs,
    )
    return folder, done


def test_a_dicom_series_has_the_map_of_its_nifti_volume(objects, cohort, inferred):
    folder, _ = objects
    name = a_test_volume(cohort).get_filename().rsplit("/", 1)[1].split("_")[0]
    found = nib.as_closest_canonical(nib.load(folder / "out" / f"{name}_map.nii.gz"))
    expected = nib.load(inferred / "ras_map.nii.gz")
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    np.testing.assert_allclose(found.get_fdata(), expected.get_fdata(), atol=1e-3)


@pytest.mark.parametrize("kind", ["map", "mask", "heatmap"])
def test_nifti_results_of_a_dicom_series_are_in_the_coordinates_of_the_scanner(objects, kind):
    folder, _ = objects
    for file in (folder / "out").glob(f"*_{kind}.nii.gz"):
        image = nib.load(file)
        (qform, qform_code), (sform, sform_code) = image.get_qform(coded=True), image.get_sform(coded=True)
        assert (qform_code, sform_code) == (1, 1)
        np.testing.assert_allclose(qform, sform, atol=1e-4)
        np.testing.assert_allclose(image.affine, sform)


def test_dicom_objects_hold_the_voxels_of_the_nifti_files(objects):
    folder, _ = objects
    threshold = float(next(csv.DictReader((folder / "out/scores.csv").open()))["threshold"])
    for study in (folder / "in").iterdir():
        mask = hd.seg.segread(folder / "out" / f"{study.name}_seg.dcm").get_volume(combine_segments=True)
        expected = np.asarray(nib.load(folder / "out" / f"{study.name}_mask.nii.gz").dataobj)
        np.testing.assert_array_equal(mask.flip_spatial(0).array.T, expected)
        values = hd.imread(folder / "out" / f"{study.name}_heatmap.dcm").get_volume().flip_spatial(0).array.T
        expected = nib.load(folder / "out" / f"{study.name}_map.nii.gz").get_fdata()
        np.testing.assert_allclose(values, heat(expected, threshold), atol=1e-5)
        overlay = sorted((folder / "out" / f"{study.name}_overlay").iterdir())
        assert len(overlay) == expected.shape[2]
        report = hd.sr.srread(folder / "out" / f"{study.name}_report.dcm")
        assert len(report.content.get_image_measurement_groups()) == 1 + 3


def test_nothing_of_the_patient_is_logged_and_nothing_half_is_left(objects):
    folder, done = objects
    assert "Secretname" not in done.stdout + done.stderr
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".partial")]


def test_a_later_run_replaces_all_results_of_its_inputs(objects, knobs):
    folder, _ = objects
    before = {path.relative_to(folder) for path in (folder / "out").rglob("*")}
    given = {"dataset_dir": folder / "in", "output_dir": folder / "out", "tracking_uri": "off"}
    succeed("inferring", INFER, **given, **knobs)
    after = {path.relative_to(folder) for path in (folder / "out").rglob("*")}
    assert after == {path for path in before if path.suffix != ".dcm" and not path.name.endswith("_overlay")}


def test_what_cannot_be_written_as_dicom_is_skipped_and_counted(objects, volumes, knobs):
    folder, _ = objects
    mixed = folder / "mixed"
    shutil.copytree(sorted((folder / "in").iterdir())[0], mixed / "study")
    shutil.copy(volumes / "ras.nii.gz", mixed)
    given = {"dataset_dir": mixed, "output_dir": folder / "mixed_out", "write_dicom": True, "tracking_uri": "off"}
    done = succeed("inferring", INFER, on_error="skip", **given, **knobs)
    assert "ras.nii.gz' is none" in done.stderr and "skipped 1 of 2" in done.stderr
    assert (folder / "mixed_out" / "study_seg.dcm").is_file()
    assert not (folder / "mixed_out" / "ras_map.nii.gz").exists()


def test_dicom_results_of_anything_else_are_refused_before_work(volumes, knobs, tmp_path):
    done = run(
        "inferring", INFER, dataset_dir=volumes / "ras.nii.gz", output_dir=tmp_path / "o", write_dicom=True, **knobs
    )
    assert "write_dicom needs DICOM images" in error_line(done)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_trains_on_dicom_studies(dicom, tmp_path):
    quick = {**QUICK, "max_epochs": 1, "hidden_channels": 8}
    done = succeed("training", TRAIN, dataset_dir=dicom / "train", output_dir=tmp_path, tracking_uri="off", **quick)
    assert (tmp_path / "model.pt").is_file()
    assert "of the training images serve" in done.stderr
    assert "SYNTHETIC^" not in done.stdout + done.stderr
