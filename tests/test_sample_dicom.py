"""The sample cohort as DICOM: values and geometry are those of the volumes, in any orientation, compressed or not."""

import json

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import UID, MRImageStorage

from bundle.dicom.mr import SeriesIdentity, mr_series, to_stack, write_series
from bundle.errors import BundleError
from bundle.provenance import is_synthetic
from bundle.samples import make_sample_cohort
from bundle.samples.cohort import STEPS
from bundle.transforms.loading import load_case
from scripts.samples.dicom import TRANSFER_SYNTAXES, make_sample_dicom, subject_series

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
IDENTITY = SeriesIdentity("id", "Family^Given", "1.2.3.1", "1.2.3.2", "1.2.3.3", manufacturer="maker")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cohort") / "small"
    return make_sample_cohort(directory, train_subjects=1, valid_subjects=1, test_subjects=2, slices_per_subject=3)


@pytest.fixture(scope="module")
def dicom(cohort, tmp_path_factory):
    return make_sample_dicom(cohort, tmp_path_factory.mktemp("dicom") / "all")


def rotation(degrees, axis):
    a, b = [i for i in range(3) if i != axis]
    matrix, angle = np.eye(3), np.deg2rad(degrees)
    matrix[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def affine_of(directions, spacing, origin=(-31.5, 17.25, 4.125)):
    affine = np.eye(4)
    affine[:3, :3] = directions * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


OBLIQUE = rotation(17, 0) @ rotation(-11, 1) @ rotation(23, 2)
AFFINES = {
    "RAS": affine_of(np.eye(3), (1, 1, 6)),
    "LPS, right-handed": affine_of(np.diag([-1, -1, 1]), (0.5, 0.75, 3)),
    "left-handed": affine_of(np.diag([-1, 1, 1]), (0.5, 0.75, 3)),
    "from head to feet": affine_of(np.diag([1, 1, -1]), (0.9, 0.9, 4)),
    "coronal": affine_of(np.eye(3)[:, [0, 2, 1]], (1, 1.25, 2)),
    "sagittal": affine_of(np.eye(3)[:, [1, 2, 0]], (1, 1.25, 2)),
    "transposed in plane": affine_of(np.eye(3)[:, [1, 0, 2]], (1, 1.25, 2)),
    "oblique": affine_of(OBLIQUE, (1 / 3, 0.7, 2.2)),
    "oblique and left-handed": affine_of(OBLIQUE * [1, -1, 1], (1 / 3, 0.7, 2.2)),
}


def world(volume, affine):
    """Each voxel's value by its place in mm."""
    indices = np.stack(np.indices(volume.shape), -1).reshape(-1, 3)
    places = indices @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(place): value for place, value in zip(places.round(3) + 0.0, volume.reshape(-1), strict=True)}


def read_back(images):
    """Pixels [columns, rows, slices] of single-frame objects and their affine in RAS, from the headers alone."""
    row_cosine, column_cosine = np.array(images[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    row_spacing, column_spacing = map(float, images[0].PixelSpacing)
    positions = np.array([image.ImagePositionPatient for image in images], dtype=float)
    affine = np.eye(4)
    affine[:3, 0] = row_cosine * column_spacing
    affine[:3, 1] = column_cosine * row_spacing
    affine[:3, 2] = positions[1] - positions[0]
    affine[:3, 3] = positions[0]
    return np.stack([image.pixel_array.T for image in images], -1), RAS_FROM_LPS @ affine


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_every_voxel_comes_back_at_its_place(affine, tmp_path):
    volume = np.random.default_rng(0).integers(0, 4000, (7, 5, 4)).astype(np.int16)
    files = write_series(mr_series(volume, affine, IDENTITY), tmp_path / "series")
    found, geometry = read_back([dcmread(file) for file in files])
    assert world(found, geometry) == world(volume, affine)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_slices_are_numbered_along_the_normal_of_rows_and_columns(affine):
    images = mr_series(np.zeros((4, 5, 6), np.uint8), affine, IDENTITY)
    cosines = np.array(images[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(*cosines)
    heights = [float(np.array(image.ImagePositionPatient, dtype=float) @ normal) for image in images]
    step = np.linalg.norm(affine[:3, 2])
    assert np.allclose(np.diff(heights), step, atol=1e-6)
    assert [image.InstanceNumber for image in images] == [1, 2, 3, 4, 5, 6]
    assert np.allclose([float(image.SpacingBetweenSlices) for image in images], step)
    assert np.allclose(np.linalg.norm(cosines, axis=1), 1) and abs(cosines[0] @ cosines[1]) < 1e-9


@pytest.mark.parametrize(
    ("plane", "rows", "columns"),
    [("RAS", "P", "L"), ("transposed in plane", "P", "L"), ("coronal", "I", "L"), ("sagittal", "I", "P")],
)
def test_images_are_in_radiological_display_order(plane, rows, columns):
    stack = to_stack(np.zeros((4, 5, 6), np.uint8), AFFINES[plane])
    codes = nib.orientations.aff2axcodes(RAS_FROM_LPS @ stack.affine)
    assert codes[:2] == (columns, rows)


def test_highdicom_reads_the_oblique_series_as_a_volume():
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = AFFINES["oblique and left-handed"]
    read = hd.get_volume_from_series(mr_series(volume, affine, IDENTITY))
    assert world(read.array, RAS_FROM_LPS @ read.affine) == world(volume, affine)


def test_numbers_are_stored_in_multiples_of_the_scale():
    volume = np.random.default_rng(0).uniform(-1, 1, (4, 5, 6))
    images = mr_series(volume, AFFINES["RAS"], IDENTITY, scale=1e-4)
    stored, geometry = read_back(images)
    assert np.issubdtype(stored.dtype, np.signedinteger)
    slope, intercept = float(images[0].RescaleSlope), float(images[0].RescaleIntercept)
    found, wanted = world(stored * slope + intercept, geometry), world(volume, AFFINES["RAS"])
    assert found.keys() == wanted.keys()
    assert max(abs(found[place] - wanted[place]) for place in wanted) <= 0.5e-4 + 1e-9


@pytest.mark.parametrize(
    ("volume", "scale", "words"),
    [
        (np.zeros((4, 5, 6)), None, "has no stored integers: give a scale"),
        (np.full((4, 5, 6), 70000), None, "do not fit into 16 bits"),
        (np.full((4, 5, 6), 2.0), 1e-5, "do not fit into 16 bits"),
    ],
)
def test_pixels_that_cannot_be_stored_are_refused(volume, scale, words):
    with pytest.raises(BundleError, match=words):
        mr_series(volume, np.eye(4), IDENTITY, scale)


def test_a_sheared_volume_is_refused():
    sheared = np.eye(4)
    sheared[0, 2] = 0.1
    with pytest.raises(BundleError, match="not orthogonal"):
        mr_series(np.zeros((4, 5, 6), np.uint8), sheared, IDENTITY)


def test_the_cohort_holds_the_voxels_of_its_volumes(cohort, dicom):
    volume = nib.load(cohort / "volumes/test/sub-0003_flair.nii.gz")
    images = [dcmread(file) for file in sorted((dicom / "test/sub-0003").iterdir())]
    found, geometry = read_back(images)
    wanted = np.rint(volume.get_fdata() * STEPS)
    assert np.abs(volume.get_fdata() * STEPS - wanted).max() < 0.02  # integers, up to what nibabel rounds
    assert world(found, geometry) == world(wanted, volume.affine)
    assert {image.SOPClassUID for image in images} == {MRImageStorage}


def test_the_bundle_reads_volume_and_series_alike(cohort, dicom):
    volume = load_case(cohort / "volumes/test/sub-0003_flair.nii.gz")
    series = load_case(dicom / "test/sub-0003")
    found = world(series[0].numpy(), series.affine.numpy())
    wanted = world((volume[0] * STEPS).round().numpy(), volume.affine.numpy())
    assert found == wanted


@pytest.mark.parametrize("compress", [name for name in TRANSFER_SYNTAXES if name != "none"])
def test_compression_loses_nothing(compress, cohort, dicom, tmp_path):
    folder = make_sample_dicom(cohort, tmp_path / "dicom", split="test", compress=compress)
    for file in sorted((folder / "test/sub-0003").iterdir()):
        image, plain = dcmread(file), dcmread(dicom / "test/sub-0003" / file.name)
        assert image.file_meta.TransferSyntaxUID == TRANSFER_SYNTAXES[compress]
        assert image.SOPInstanceUID == plain.SOPInstanceUID
        assert np.array_equal(image.pixel_array, plain.pixel_array)


@pytest.mark.parametrize("compress", ["none", "rle"])
def test_an_enhanced_object_holds_the_series(compress, cohort, dicom, tmp_path):
    folder = make_sample_dicom(cohort, tmp_path / "dicom", split="test", compress=compress, enhanced=True)
    (file,) = (folder / "test/sub-0003").iterdir()
    image, series = hd.imread(file), [dcmread(one) for one in sorted((dicom / "test/sub-0003").iterdir())]
    volume, expected = image.get_volume(), hd.get_volume_from_series(series)
    assert np.array_equal(volume.array, expected.array)
    assert np.allclose(volume.affine, expected.affine)
    assert image.StudyInstanceUID == series[0].StudyInstanceUID
    assert image.SeriesInstanceUID != series[0].SeriesInstanceUID
    converted = {
        frame.ConversionSourceAttributesSequence[0].ReferencedSOPInstanceUID
        for frame in image.PerFrameFunctionalGroupsSequence
    }
    assert converted == {one.SOPInstanceUID for one in series}


@pytest.mark.parametrize("options", [{}, {"compress": "rle"}], ids=["plain", "rle"])
def test_the_same_cohort_gives_the_same_files(options, cohort, tmp_path):
    first, second = (make_sample_dicom(cohort, tmp_path / name, split="test", **options) for name in ("a", "b"))
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_the_same_cohort_gives_the_same_enhanced_objects(cohort, tmp_path):
    name = "test/sub-0003/IM0001.dcm"
    first, second = (
        dcmread(make_sample_dicom(cohort, tmp_path / folder, split="test", enhanced=True) / name) for folder in "ab"
    )
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "PixelData"):
        assert first[keyword].value == second[keyword].value


def test_the_same_subject_of_another_seed_is_another_study(cohort, tmp_path):
    other = make_sample_cohort(
        tmp_path / "other", seed=1, train_subjects=1, valid_subjects=0, test_subjects=0, slices_per_subject=3
    )
    name = "volumes/train/sub-0001_flair.nii.gz"
    first, second = subject_series(cohort / name), subject_series(other / name)
    assert first[0].StudyInstanceUID != second[0].StudyInstanceUID
    assert {image.SOPInstanceUID for image in first}.isdisjoint(image.SOPInstanceUID for image in second)


def test_identifiers_are_valid_and_each_subject_has_its_own(dicom):
    images = [dcmread(file, stop_before_pixels=True) for file in dicom.rglob("*.dcm")]
    assert len({image.SOPInstanceUID for image in images}) == len(images) == 12
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({image[keyword].value for image in images}) == 4
    assert all(UID(image.SOPInstanceUID).is_valid for image in images)


def test_everything_says_synthetic(dicom):
    assert is_synthetic(dicom / "test" / "sub-0003")
    for file in dicom.rglob("*.dcm"):
        image = dcmread(file, stop_before_pixels=True)
        for keyword in ("PatientName", "StudyDescription", "SeriesDescription", "ImageComments"):
            assert str(image[keyword].value).startswith("SYNTHETIC")


def test_the_datalist_names_every_series_with_its_label(cohort, dicom):
    lists = json.loads((dicom / "datalist.json").read_text())
    assert {name: len(items) for name, items in lists.items()} == {"training": 1, "validation": 1, "test": 2}
    assert all((dicom / item["image"]).is_dir() for items in lists.values() for item in items)
    assert [item["label"] for item in lists["test"]] == [1, 1]


def test_one_split_alone(cohort, tmp_path):
    folder = make_sample_dicom(cohort, tmp_path / "dicom", split="valid")
    assert sorted(path.name for path in folder.iterdir()) == ["cohort.json", "datalist.json", "valid"]


def test_an_earlier_cohort_is_replaced_and_nothing_else_is(cohort, tmp_path):
    folder = make_sample_dicom(cohort, tmp_path / "dicom", split="valid")
    make_sample_dicom(cohort, folder, split="train")
    assert not (folder / "valid").exists() and (folder / "train/sub-0001/IM0003.dcm").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(BundleError, match="holds something else"):
        make_sample_dicom(cohort, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"dicom", "other"}


def test_what_is_no_cohort_is_refused(tmp_path):
    with pytest.raises(BundleError, match="give a folder that python -m scripts.samples.cohort made"):
        make_sample_dicom(tmp_path, tmp_path / "dicom")
    assert not (tmp_path / "dicom").exists()
