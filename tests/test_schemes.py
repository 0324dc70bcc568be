"""A model keeps the intensity scheme of its training images, and reads by it what tells no modality."""

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
from commands import INFER, QUICK, TRAIN, succeed
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from bundle.checkpoint import read_checkpoint
from bundle.data import SplitFinder, settings_for
from bundle.transforms import LoadCased, ScaleIntensityByModalityd


def hounsfield(seed, side=48, slices=4):
    """A synthetic CT [slices, rows, columns] in HU: a body of soft tissue in air, with bone and texture."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side] - side / 2
    body = np.hypot(row, column) < 0.4 * side + random.uniform(-1, 1)
    bone = np.hypot(row - 8, column) < 4
    values = np.where(body, 40, -1000) + np.where(bone, 500, 0)
    return np.stack([values + random.normal(0, 15, values.shape) * body for _ in range(slices)]).astype(np.int16)


def save_dicom(folder, values, modality="CT"):
    """One series of CT images, a file for each slice."""
    folder.mkdir(parents=True)
    study, series, frame = (generate_uid() for _ in range(3))
    for index, pixels in enumerate(values):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.Modality, one.PatientID, one.InstanceNumber, one.SeriesNumber = modality, folder.name, index + 1, 1
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 5 * index]
        one.PixelSpacing, one.SliceThickness = [1, 1], 5
        one.RescaleSlope, one.RescaleIntercept = 1, -1024
        one.Rows, one.Columns = pixels.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.PixelData = (pixels + 1024).astype("<u2").tobytes()
        one.save_as(folder / f"{index}.dcm", enforce_file_format=True)


def save_both(root, seed):
    """The same CT as ``dicom/ctSEED`` and ``nifti/ctSEED.nii.gz``."""
    save_dicom(root / f"dicom/ct{seed}", hounsfield(seed))
    image = LoadCased("image")({"image": root / f"dicom/ct{seed}"})["image"]
    (root / "nifti").mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(image.numpy()[0], image.affine.numpy()), root / f"nifti/ct{seed}.nii.gz")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    root = tmp_path_factory.mktemp("ct")
    for seed in range(4):
        save_both(root, seed)
    return root


def read(path, scheme):
    return ScaleIntensityByModalityd("image", scheme)(LoadCased("image")({"image": path}))["image"]


@pytest.mark.parametrize(("kind", "scheme"), [("dicom", "ct_soft_tissue"), ("nifti", "mr")])
def test_a_model_keeps_the_scheme_of_its_training_images(both, kind, scheme):
    assert settings_for({}, SplitFinder(both / kind))["intensity"] == scheme


def test_pictures_of_8_bits_make_a_model_of_8_bits(tmp_path):
    for index in range(3):
        Image.new("L", (20, 20), index).save(tmp_path / f"{index}.png")
    assert settings_for({}, SplitFinder(tmp_path))["intensity"] == "8bit"


def test_training_images_of_several_schemes_leave_auto_and_are_counted(both, caplog):
    assert settings_for({}, SplitFinder(both, seed=1))["intensity"] == "auto"
    assert "of 2 intensity schemes (4 mr, 3 ct_soft_tissue): intensity stays auto" in caplog.text


def test_a_scheme_that_is_given_stays(both):
    assert settings_for({"intensity": "ct_bone"}, SplitFinder(both / "dicom"))["intensity"] == "ct_bone"


def test_a_network_can_be_looked_at_without_data(tmp_path):
    assert settings_for({}, SplitFinder(tmp_path / "missing"))["intensity"] == "auto"


def test_a_damaged_training_image_does_not_decide(both, tmp_path):
    shutil.copytree(both / "dicom", tmp_path / "data")
    (tmp_path / "data/broken.png").write_bytes(b"no picture")
    assert settings_for({}, SplitFinder(tmp_path / "data"))["intensity"] == "ct_soft_tissue"


@pytest.mark.parametrize("scheme", ["ct_soft_tissue", "mr"])
def test_the_same_ct_is_read_alike_from_dicom_and_nifti(both, scheme):
    images = [read(both / path, scheme) for path in ("dicom/ct0", "nifti/ct0.nii.gz")]
    np.testing.assert_array_equal(*(image.numpy() for image in images))
    assert [image.meta["intensity_scheme"] for image in images] == [scheme] * 2


def test_auto_says_by_which_scheme_an_image_was_read(both):
    found = [read(both / path, "auto").meta["intensity_scheme"] for path in ("dicom/ct0", "nifti/ct0.nii.gz")]
    assert found == ["ct_soft_tissue", "mr"]


def test_an_image_of_another_modality_is_told_once(both, caplog):
    scale = ScaleIntensityByModalityd("image", "mr")
    for _ in range(2):
        scale(LoadCased("image")({"image": both / "dicom/ct0"}))
    assert caplog.text.count("is of modality CT, but the model reads intensities as mr: it is read as mr") == 1


@pytest.mark.parametrize("scheme", ["auto", "ct_soft_tissue", "ct_bone"])
def test_an_image_of_the_modality_that_the_model_reads_raises_no_warning(both, caplog, scheme):
    read(both / "dicom/ct0", scheme)
    assert caplog.text == ""


def test_a_picture_of_8_bits_is_not_taken_for_hounsfield_units(tmp_path, caplog):
    Image.new("L", (20, 20), 51).save(tmp_path / "a.png")
    image = read(tmp_path / "a.png", "ct_soft_tissue")
    assert (float(image.max()), image.meta["intensity_scheme"]) == (pytest.approx(0.2), "8bit")
    assert "is an 8-bit picture, but the model reads intensities as ct_soft_tissue" in caplog.text


@pytest.mark.parametrize(("largest", "scheme"), [(255, "8bit"), (4000, "mr"), (1, "mr")])
def test_what_does_not_fit_into_8_bits_is_not_divided_by_255(tmp_path, caplog, largest, scheme):
    values = np.linspace(0, largest, 20 * 20 * 4).round().reshape(20, 20, 4)
    nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    image = read(tmp_path / "a.nii.gz", "8bit")
    assert (float(image.max()), image.meta["intensity_scheme"]) == (1, scheme)
    assert ("is no 8-bit image" in caplog.text) == (scheme != "8bit")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), [("dicom", "ct_soft_tissue"), ("nifti", "mr")])
def test_the_same_ct_has_the_same_map_as_dicom_and_as_nifti(both, tmp_path, kind, scheme):
    quick = {**QUICK, "max_epochs": 1, "tracking_uri": "off"}
    succeed("training", TRAIN, dataset_dir=both / kind, output_dir=tmp_path / "model", **quick)
    assert read_checkpoint(tmp_path / "model/model.pt").identity["intensity"] == scheme
    succeed(
        "inferring",
        INFER,
        dataset_dir=both,
        output_dir=tmp_path / "maps",
        checkpoint=tmp_path / "model/model.pt",
        device="cpu",
        tracking_uri="off",
    )
    maps = [nib.load(tmp_path / f"maps/{path}_map.nii.gz").get_fdata() for path in ("dicom/ct0", "nifti/ct0")]
    assert maps[0].std() > 0.1
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-5)
    scores = {row["name"]: float(row["score"]) for row in csv.DictReader((tmp_path / "maps/scores.csv").open())}
    assert scores["dicom/ct0"] == pytest.approx(scores["nifti/ct0"], abs=1e-5)
