"""A 3D acquisition is cut into slices of another plane on request, and its results lie where it was acquired."""

import csv
import json

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from commands import ROOT
from monai.bundle import ConfigParser
from monai.transforms import Compose, Invertd
from PIL import Image
from pydicom import dcmread
from test_dicom_series import series
from test_outputs import KNOBS, MODEL, infer
from test_volumes import stored_as

from bundle.checkpoint import save_checkpoint
from bundle.data import SplitFinder, settings_for
from bundle.dicom.series import read_headers
from bundle.errors import BundleError
from bundle.learned import Learned
from bundle.model import make_detector
from bundle.networks.likeness import CaseLikeness
from bundle.transforms import LoadCased, OrientSlicesd

SHAPE = (28, 32, 20)  # left to right, posterior to anterior, inferior to superior
AXIAL = np.array([[1.0, 0, 0, -14], [0, 1.0, 0, -16], [0, 0, 1.0, -10], [0, 0, 0, 1]])
TILTED = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.15, 0.12)) @ AXIAL


def volume():
    """A bright body of noise in air, as if acquired axially."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij")
    noise = np.random.default_rng(0).integers(200, 1000, SHAPE)
    return nib.Nifti1Image((noise * (x**2 + y**2 + z**2 / 2 < 0.9)).astype(np.uint16), AXIAL)


def sagittal(image):
    return stored_as(image, "ASR")


def dicom_of(image, folder):
    return series(folder, image.affine, volume=np.asarray(image.dataobj))


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Results with DICOM objects of one volume that was acquired axially, and sagittally."""
    folder = tmp_path_factory.mktemp("studies")
    dicom_of(volume(), folder / "in" / "axial")
    dicom_of(sagittal(volume()), folder / "in" / "sagittal")
    infer(folder / "in", folder / "out", write_dicom=True, cut_plane="axial")
    infer(folder / "in", folder / "as acquired")
    return folder


def in_patient(file):
    return nib.as_closest_canonical(nib.load(file))


@pytest.mark.slow
def test_a_volume_has_the_same_map_in_whatever_plane_it_was_acquired(studies):
    axial, other = (in_patient(studies / "out" / f"{name}_map.nii.gz") for name in ("axial", "sagittal"))
    np.testing.assert_allclose(other.affine, axial.affine, atol=1e-5)
    np.testing.assert_allclose(other.get_fdata(), axial.get_fdata(), atol=1e-5)
    uncut = in_patient(studies / "as acquired" / "sagittal_map.nii.gz")
    assert np.abs(uncut.get_fdata() - axial.get_fdata()).max() > 0.1


@pytest.mark.slow
def test_a_nifti_volume_has_the_map_of_its_dicom_series(studies, tmp_path):
    nib.save(sagittal(volume()), tmp_path / "sagittal.nii.gz")
    infer(tmp_path / "sagittal.nii.gz", tmp_path / "out", cut_plane="axial")
    found, expected = (in_patient(path / "sagittal_map.nii.gz") for path in (tmp_path / "out", studies / "out"))
    np.testing.assert_allclose(found.get_fdata(), expected.get_fdata(), atol=1e-5)


@pytest.mark.slow
def test_tables_tell_the_plane_and_no_instance_of_another_one(studies):
    rows = {row["name"]: row for row in csv.DictReader((studies / "out" / "scores.csv").open())}
    assert (rows["axial"]["cut_plane"], rows["sagittal"]["cut_plane"]) == ("", "axial")
    assert len(rows["axial"]["worst_instances"].split()) == 3
    assert rows["sagittal"]["worst_instances"] == ""
    assert float(rows["sagittal"]["score"]) == pytest.approx(float(rows["axial"]["score"]), abs=1e-5)
    slices = [row for row in csv.DictReader((studies / "out" / "slice_scores.csv").open()) if row["name"] == "sagittal"]
    assert sorted(int(row["slice"]) for row in slices) == list(range(SHAPE[2]))
    assert {row["instance"] for row in slices} == {""}


@pytest.mark.slow
def test_dicom_objects_stand_on_the_slices_that_were_acquired(studies):
    sources = read_headers(sorted((studies / "in" / "sagittal").iterdir()))
    mask = nib.load(studies / "out" / "sagittal_mask.nii.gz")
    written = hd.seg.segread(studies / "out" / "sagittal_seg.dcm")
    np.testing.assert_array_equal(
        written.get_volume(combine_segments=True).flip_spatial(0).array.T, np.asarray(mask.dataobj)
    )
    known = {source.SOPInstanceUID for source in sources}
    assert {uid for *_, uid in written.get_source_image_uids()} <= known
    overlay = [dcmread(file) for file in sorted((studies / "out" / "sagittal_overlay").iterdir())]
    assert [image.SourceImageSequence[0].ReferencedSOPInstanceUID for image in overlay] == [
        source.SOPInstanceUID for source in sources
    ]
    assert all("cut plane axial" in image.DerivationDescription for image in overlay)
    algorithm = written.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert "cut plane=axial" in algorithm.AlgorithmParameters, algorithm


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slices", "told"), [("sagittal", 0, True), ("axial", 3, False)])
def test_the_report_says_that_another_plane_was_cut_and_names_no_slice(studies, name, slices, told):
    report = hd.sr.srread(studies / "out" / f"{name}_report.dcm")
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == 1 + slices
    texts = [str(element.value) for element in report.iterall() if element.keyword == "TextValue"]
    assert any("cut into axial slices on request, not those that were acquired" in text for text in texts) == told
    assert ("cut plane axial" in texts) == told


# the volume


def stored(folder, image, name="v.nii.gz"):
    nib.save(image, folder / name)
    return {"image": folder / name}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("affine", [AXIAL, TILTED, AXIAL @ np.diag([1, -1, -1, 1])], ids=["axial", "tilted", "flipped"])
def test_a_cut_is_undone_exactly(tmp_path, affine, plane):
    image = sagittal(nib.Nifti1Image(volume().dataobj, affine))
    reading = Compose([LoadCased("image"), OrientSlicesd("image", cut_plane=plane)])
    case = reading(stored(tmp_path, image))
    assert case["image"].shape[-1] == dict(zip(("sagittal", "coronal", "axial"), SHAPE, strict=True))[plane]
    assert case["image"].meta.get("cut_plane") == (None if plane == "sagittal" else plane)
    case["map"] = case["image"].clone()
    restored = Invertd("map", reading, orig_keys="image")(case)["map"]
    np.testing.assert_array_equal(restored.numpy()[0], np.asarray(image.dataobj))
    np.testing.assert_allclose(restored.affine, image.affine, atol=1e-5)


@pytest.mark.parametrize(("step", "refused"), [(1.0, False), (2.0, False), (2.1, True), (5.0, True)])
def test_thick_slices_are_not_cut_into_another_plane(tmp_path, step, refused):
    image = nib.Nifti1Image(volume().dataobj, np.diag([1.0, 1, step, 1]))
    loaded = LoadCased("image")(stored(tmp_path, image))
    cut = OrientSlicesd("image", cut_plane="coronal")
    if not refused:
        assert cut(loaded)["image"].shape[-1] == SHAPE[1]
        return
    with pytest.raises(BundleError, match=rf"axial slices and voxels of 1 x 1 x {step:g} mm, too long.*3D acquisition"):
        cut(loaded)
    assert OrientSlicesd("image", cut_plane="axial")(loaded)["image"].shape[-1] == SHAPE[2]  # as they were acquired


def test_what_has_one_slice_or_no_place_is_not_cut(tmp_path):
    slice_ = stored(tmp_path, nib.Nifti1Image(np.ones((20, 20, 1), np.uint8), AXIAL))
    Image.new("L", (20, 20), 9).save(tmp_path / "a.png")
    for case, message in ((slice_, "is a single axial slice"), ({"image": tmp_path / "a.png"}, "has no place")):
        with pytest.raises(BundleError, match=f"{message}.*: leave cut_plane off for it"):
            OrientSlicesd("image", cut_plane="sagittal")(LoadCased("image")(case))


def test_a_misspelled_plane_is_named():
    with pytest.raises(BundleError, match="cut_plane"):
        OrientSlicesd("image", cut_plane="axail")


@pytest.mark.parametrize("axes", ["RAS", "SRA", "ASR"])
def test_a_mask_is_cut_as_its_image_is(tmp_path, axes):
    mask = nib.Nifti1Image((np.asarray(volume().dataobj) > 500).astype(np.uint8), AXIAL)
    case = stored(tmp_path, stored_as(volume(), axes)) | {"mask": stored(tmp_path, mask, "m.nii.gz")["image"]}
    cut = OrientSlicesd(["image", "mask"], cut_plane="coronal")(LoadCased(["image", "mask"])(case))
    np.testing.assert_array_equal(cut["mask"].numpy(), cut["image"].numpy() > 500)
    assert cut["mask"].shape[-1] == SHAPE[1]


# what a model knows of planes


def words_of(case, **options):
    return OrientSlicesd("image", **options)(LoadCased("image")(case))["image"].meta


def test_slices_of_another_plane_than_in_training_are_unlike_and_on_request_they_are_not(tmp_path):
    likeness = CaseLikeness()
    likeness.remember(Learned({"plane": {"axial": 9}}, 9, True))
    case = stored(tmp_path, sagittal(volume()))
    [reason] = likeness.reasons(0.0, True, words_of(case))
    assert reason == ("plane", "slices sagittal, learned from axial")
    assert not likeness.reasons(0.0, True, words_of(case, cut_plane="axial"))


def test_slices_between_two_planes_tell_none(tmp_path):
    oblique = nib.affines.from_matvec(nib.eulerangles.euler2mat(0, 0, np.pi / 4))
    image = nib.Nifti1Image(volume().dataobj, oblique)
    assert words_of(stored(tmp_path, image))["words"]["plane"] == []
    assert words_of(stored(tmp_path, nib.Nifti1Image(volume().dataobj, TILTED)))["words"]["plane"] == ["axial"]


def test_a_training_is_refused_with_the_knob_that_it_has(tmp_path):
    with pytest.raises(BundleError, match="cut_plane has no part in training: give --slice_plane axial"):
        settings_for({}, SplitFinder(tmp_path), cut_plane="axial")


@pytest.mark.slow
def test_an_evaluation_cuts_volumes_and_their_masks_and_tells_it_in_its_protocol(tmp_path):
    body = np.asarray(volume().dataobj)
    (tmp_path / "data").mkdir()
    items = []
    for name, label in (("healthy", 0), ("anomalous", 1)):
        mask = np.zeros_like(body)
        mask[10:14, 10:20, 8:12] = label
        stored(tmp_path / "data", stored_as(nib.Nifti1Image(mask, AXIAL), "SRA"), f"{name}_mask.nii.gz")
        stored(tmp_path / "data", sagittal(nib.Nifti1Image(body + 500 * mask, AXIAL)), f"{name}.nii.gz")
        items.append({"image": f"{name}.nii.gz", "mask": f"{name}_mask.nii.gz", "label": label})
    (tmp_path / "data" / "datalist.json").write_text(json.dumps({"test": items}))
    detector = make_detector(MODEL)
    detector.threshold.fill_(1.0)
    detector.false_positive_rate.fill_(0.01)
    save_checkpoint(detector, tmp_path / "model.pt")
    config = ConfigParser.load_config_files([ROOT / "configs" / name for name in ("train.json", "evaluate.json")])
    given = {
        "dataset_dir": str(tmp_path / "data" / "datalist.json"),
        "output_dir": str(tmp_path / "out"),
        "checkpoint": str(tmp_path / "model.pt"),
        "cut_plane": "coronal",
    }
    (tmp_path / "out").mkdir()
    parser = ConfigParser(config | KNOBS | given)
    parser.get_parsed_content("load_checkpoint")
    parser.get_parsed_content("evaluator").run()
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["protocol"]["cut_plane"] == "coronal"
    assert report["pixel_auroc"] is not None
