"""DICOM files to volumes: any order, compression and class of image; what is no regular volume is refused by name."""

import copy
import json
import logging
import pickle
import random
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from highdicom.legacy import LegacyConvertedEnhancedMRImage
from imagecodecs import jpeg8_encode
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomFileLike
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from bundle.data import find_images, find_splits, keep_readable
from bundle.dicom.mr import SeriesIdentity, mr_series, write_series
from bundle.dicom.series import group_series, is_tilted, read_headers, read_volume
from bundle.errors import BundleError
from bundle.transforms import LoadCased, OrientSlicesd

AFFINES = {
    "RAS": np.diag([1.0, 1.5, 4.0, 1.0]),
    "flipped": np.array([[-1.0, 0, 0, 80], [0, -1.5, 0, 90], [0, 0, -4.0, 50], [0, 0, 0, 1]]),
    "left-handed": np.array([[1.0, 0, 0, 8], [0, 1.5, 0, 9], [0, 0, -4.0, 5], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, 4.0, -30], [-1.5, 0, 0, 70], [0, 1.0, 0, -60], [0, 0, 0, 1]]),
    "oblique": nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.2, -0.3, 0.1) @ np.diag([1.0, 1.5, 4.0]), [-40, 12, 7]
    ),
}


def volume_of(seed=0, shape=(24, 20, 6)):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.uint16)


def identity(patient="p1", number=3):
    return SeriesIdentity(patient, f"Secret^{patient}", *(generate_uid() for _ in range(3)), series_number=number)


def series(folder, affine=None, volume=None, change=None, **of):
    """A series of six slices in ``folder``; ``change`` edits or drops its images before they are written."""
    images = mr_series(
        volume_of() if volume is None else volume, AFFINES["RAS"] if affine is None else affine, identity(**of)
    )
    if change:
        images = change(images) or images
    return write_series(images, folder)


def sampled(image, at):
    """Values of a [C, x, y, slices] image at places ``at`` [3, N] in mm."""
    index = np.linalg.inv(image.affine.numpy()) @ np.vstack([at, np.ones(at.shape[1])])
    x, y, z = np.rint(index[:3]).astype(int)
    assert np.abs(index[:3] - [x, y, z]).max() < 1e-3
    return image.numpy()[0, x, y, z]


@pytest.mark.parametrize("name", AFFINES)
def test_a_series_has_its_values_where_the_affine_says(tmp_path, name):
    values, affine = volume_of(), AFFINES[name]
    series(tmp_path / "s", affine)
    image = LoadCased("image")({"image": str(tmp_path / "s")})["image"]
    index = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij")).reshape(3, -1)
    at = (affine @ np.vstack([index, np.ones(index.shape[1])]))[:3]
    np.testing.assert_array_equal(sampled(image, at), values.reshape(-1))


def test_files_may_have_any_order_and_no_suffix(tmp_path):
    files = series(tmp_path / "s")
    expected = read_volume(files)
    random.Random(1).shuffle(files)
    folder = tmp_path / "export"
    folder.mkdir()
    for number, file in enumerate(files):
        file.rename(folder / f"IM_{number}")
    (folder / "README").write_text("of the hospital")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    [case] = find_images(folder)
    image = LoadCased("image")(case)["image"]
    np.testing.assert_array_equal(image.numpy(), expected.pixels)
    np.testing.assert_allclose(image.affine.numpy(), expected.affine, atol=1e-9)
    assert image.meta["instances"] == tuple(expected.instances)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=lambda uid: uid.name)
def test_compressed_series_have_the_same_pixels(tmp_path, syntax):
    plain = read_volume(series(tmp_path / "plain"))

    def compress(images):
        for image in images:
            image.compress(syntax, generate_instance_uid=False)

    packed = read_volume(series(tmp_path / "packed", change=compress))
    np.testing.assert_array_equal(packed.pixels, plain.pixels)


@pytest.mark.parametrize(
    ("packed", "plain"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ],
)
def test_reads_what_others_have_compressed(packed, plain):
    first, second = (read_volume([get_testdata_file(name)]).pixels for name in (packed, plain))
    np.testing.assert_array_equal(first, second)


def test_jpeg_lossless_of_old_scanners_is_read():
    pixels = read_volume([get_testdata_file("SC_rgb_jpeg_gdcm.dcm")]).pixels
    plain = read_volume([get_testdata_file("SC_rgb_rle.dcm")]).pixels
    assert pixels.shape == (3, 100, 100, 1)
    np.testing.assert_array_equal(pixels, plain)


def test_jpeg_of_12_bits_is_read_as_itk_reads_it():
    file = get_testdata_file("JPGExtended.dcm")
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file))
    pixels = read_volume([file]).pixels
    assert pixels.max() > 255
    np.testing.assert_array_equal(pixels[0].T, expected)


def without_scan(image):
    image.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])


def smaller_than_its_header_says(image):
    image.PixelData = encapsulate([jpeg8_encode(np.zeros((8, 8), np.uint16), bitspersample=12)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [(without_scan, "imagecodecs: .+"), (smaller_than_its_header_says, "imagecodecs: the JPEG has 8x8 values.*")],
)
def test_what_no_decoder_reads_is_named_with_codec_reasons_and_remedy(tmp_path, change, reason):
    image = dcmread(get_testdata_file("JPGExtended.dcm"))
    image.PatientName = "Secret^p1"
    change(image)
    image.save_as(tmp_path / "a.dcm")
    with pytest.raises(BundleError) as caught:
        read_volume([tmp_path / "a.dcm"])
    expected = rf"cannot read '.*a.dcm' \(JPEG Extended \(Process 2 and 4\): gdcm: .+; {reason}\): .*dcmdjpeg IN OUT.*"
    assert re.fullmatch(expected, str(caught.value)), str(caught.value)
    assert "Secret" not in str(caught.value)


def test_rescale_slope_and_intercept_give_hounsfield_units():
    data = dcmread(get_testdata_file("CT_small.dcm"))
    volume = read_volume([get_testdata_file("CT_small.dcm")])
    expected = data.pixel_array.T * float(data.RescaleSlope) + float(data.RescaleIntercept)
    np.testing.assert_array_equal(volume.pixels[0, ..., 0], expected)
    assert volume.modality == "CT"


def test_an_enhanced_multi_frame_image_is_the_same_volume(tmp_path):
    files = series(tmp_path / "classic", AFFINES["oblique"])
    classic, whole = read_volume(files), read_volume([enhanced_of(files, tmp_path / "enhanced")])
    np.testing.assert_array_equal(whole.pixels, classic.pixels)
    np.testing.assert_allclose(whole.affine, classic.affine, atol=1e-6)
    assert sorted(whole.instances) == [1, 2, 3, 4, 5, 6]


def test_each_series_of_a_study_is_an_image_of_its_own(tmp_path):
    for number in (3, 5):
        for file in series(tmp_path / str(number), number=number):
            file.rename(tmp_path / f"{number}-{file.name}")
    cases = find_images(tmp_path)
    assert [case["name"] for case in cases] == ["series-3", "series-5"]
    assert [len(case["image"]) for case in cases] == [6, 6]


def test_a_series_alone_in_its_folder_has_the_folders_name(tmp_path):
    series(tmp_path / "a" / "axial")
    series(tmp_path / "b")
    assert [case["name"] for case in find_images(tmp_path)] == ["a/axial", "b"]


def test_an_export_that_was_copied_twice_is_one_series(tmp_path, caplog):
    files = series(tmp_path / "s" / "export")
    enhanced_of(files, tmp_path / "s" / "enhanced")
    (tmp_path / "s" / "enhanced" / "all.dcm").rename(tmp_path / "s" / "export" / "all.dcm")
    shutil.copytree(tmp_path / "s" / "export", tmp_path / "s" / "export (1)")
    with caplog.at_level(logging.WARNING):
        cases = find_images(tmp_path / "s")
    assert [case["name"] for case in cases] == ["export/all", "export/series-3"]
    assert [LoadCased("image")(case)["image"].shape for case in cases] == [(1, 24, 20, 6)] * 2
    [line] = caplog.messages
    assert line.startswith("dropped 7 DICOM files") and "export (1)" in line


def test_a_copy_that_was_edited_is_named_beside_its_original(tmp_path):
    files = series(tmp_path / "s" / "export")
    image = dcmread(files[2])
    image.PatientName = "Other^Secret"
    (tmp_path / "s" / "edited").mkdir()
    image.save_as(tmp_path / "s" / "edited" / files[2].name)
    with pytest.raises(BundleError, match="have one SOPInstanceUID but differ") as caught:
        keep_readable(find_images(tmp_path), LoadCased("image"))
    assert str(files[2]) in str(caught.value) and f"edited/{files[2].name}" in str(caught.value)
    assert "Secret" not in str(caught.value)


def drop(index):
    return lambda images: [image for number, image in enumerate(images) if number != index]


def bump(images):
    for image in images[3:]:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [x, y + 5, z]


def set_first(**values):
    return lambda images: [setattr(images[0], key, value) for key, value in values.items()] and images


def repeat(images):
    images[1].ImagePositionPatient = images[0].ImagePositionPatient


def crop(images):
    images[0].PixelData = images[0].pixel_array[:18].tobytes()
    images[0].Rows = 18


BAD = {
    "missing slice": (drop(2), "lacks slices: .* 8.00 mm apart, others 4.00 mm"),
    "position twice": (repeat, "several slices at one position"),
    "mixed sizes": (crop, "mixes slices of size"),
    "mixed spacings": (set_first(PixelSpacing=[2.0, 2.0]), "mixes slices of pixel spacing"),
    "turned slice": (set_first(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "different orientation"),
    "moved patient": (set_first(FrameOfReferenceUID="1.2.3"), "frames of reference"),
    "moved table": (bump, "no straight stack: 'IM0003.dcm' stands 2.00 mm off the line of the others"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_regular_volume_is_refused(tmp_path, kind):
    change, message = BAD[kind]
    series(tmp_path / "s", change=change)
    with pytest.raises(BundleError, match=message) as caught:
        LoadCased("image")({"image": str(tmp_path / "s")})
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "Secret" not in str(caught.value)


def two_of_each(images):
    """Of each slice another one with its own UID."""
    again = copy.deepcopy(images)
    for image in again:
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.EchoTime = 80
    return images + again


@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_echoes_and_time_points_are_counted_and_told_apart(tmp_path, form):
    files = series(tmp_path / "s", change=two_of_each)
    if form == "enhanced":
        frames = dcmread(enhanced_of(files[:6], tmp_path / "e"))
        later = copy.deepcopy(list(frames.PerFrameFunctionalGroupsSequence))
        for number, frame in enumerate([*frames.PerFrameFunctionalGroupsSequence, *later]):
            frame.FrameContentSequence[0].TemporalPositionIndex = number // 6 + 1
        frames.PerFrameFunctionalGroupsSequence.extend(later)
        frames.NumberOfFrames, frames.PixelData = 12, frames.PixelData * 2
        frames.save_as(tmp_path / "e" / "all.dcm")
        files = [tmp_path / "e" / "all.dcm"]
    keyword = "EchoTime" if form == "classic" else "TemporalPositionIndex"
    with pytest.raises(BundleError, match=f"has 2 images at each of 6 positions .* differ in {keyword}"):
        read_volume(files)


def test_two_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    files = series(tmp_path / "s" / "a")
    image = dcmread(files[2])
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    (tmp_path / "s" / "b").mkdir()
    image.save_as(tmp_path / "s" / "b" / files[2].name)
    with pytest.raises(BundleError, match="'a/IM0003.dcm' and 'b/IM0003.dcm' tell of nothing that sets them apart"):
        keep_readable(find_images(tmp_path), LoadCased("image"))


def test_a_cine_is_called_one(tmp_path):
    [file] = series(tmp_path / "s", volume=volume_of(shape=(24, 20, 1)))
    image = dcmread(file)
    del image.ImagePositionPatient
    image.NumberOfFrames, image.PixelData = 3, image.PixelData * 3
    image.save_as(file)
    with pytest.raises(BundleError, match="is a cine, 3 frames without positions: save the frames"):
        read_volume([file])


def bared(file):
    """Without the preamble, and without what follows it up to the data set."""
    image = dcmread(file)
    with open(file, "wb") as stream:
        write_dataset(DicomIO(stream, image), image)


class DicomIO(DicomFileLike):
    def __init__(self, stream, image):
        super().__init__(stream)
        self.is_implicit_VR, self.is_little_endian = image.original_encoding


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.name)
def test_a_series_without_preamble_is_read_and_named(tmp_path, caplog, syntax):
    def encode(images):
        for image in images:
            image.file_meta.TransferSyntaxUID = syntax

    files = series(tmp_path / "s", change=encode)
    expected = read_volume(files)
    for file in files:
        bared(file)
        assert b"DICM" not in file.read_bytes()[:200]
    with caplog.at_level(logging.WARNING):
        image = LoadCased("image")({"image": str(tmp_path / "s")})["image"]
    np.testing.assert_array_equal(image.numpy(), expected.pixels)
    assert "6 files without DICOM preamble" in caplog.text
    assert len(read_headers(files)) == 6


def test_compressed_pixels_without_a_word_of_how_are_refused(tmp_path):
    def compress(images):
        for image in images:
            image.compress(RLELossless, generate_instance_uid=False)

    file = series(tmp_path / "s", change=compress)[0]
    bared(file)
    with pytest.raises(BundleError, match="compressed pixels, but neither preamble nor transfer syntax"):
        read_volume([file])


def truncate(file):
    file.write_bytes(file.read_bytes()[:700])


def as_localizer(file):
    image = dcmread(file)
    image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    image.save_as(file)


def as_report(file):
    image = dcmread(file)
    for keyword in ("Rows", "Columns", "PixelData"):
        del image[keyword]
    image.SOPClassUID, image.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "SR"
    image.SOPInstanceUID = generate_uid()
    image.save_as(file)


def truncated_early(file):
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (as_localizer, "localizer: 1", "is a localizer"),
        (as_report, "Basic Text SR: 1", r"is no image to examine \(Basic Text SR Storage, modality SR\)"),
    ],
    ids=["localizer", "report"],
)
def test_a_sound_object_that_is_no_image_is_passed_over_in_a_folder_and_refused_by_name(
    tmp_path, caplog, change, kind, message
):
    series(tmp_path / "s")
    [file, *_] = series(tmp_path / "other", patient="p2")
    change(file.rename(tmp_path / "s" / "odd.dcm"))
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "s" / "DICOMDIR").write_text("an index")
    with caplog.at_level(logging.INFO):
        [case] = find_images(tmp_path)
    assert len(case["image"]) == 6
    assert caplog.messages == [f"passed over 2 files ({kind}, another format: 1) in '{tmp_path}'"]
    with pytest.raises(BundleError, match=message):
        keep_readable(find_images(tmp_path / "s" / "odd.dcm"), LoadCased("image"))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    for file in series(tmp_path / "s"):
        as_localizer(file)
    with pytest.raises(BundleError, match=r"no image in '.*', but 6 files \(localizer: 6\): put"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "cannot read|has no pixels"),
        (truncated_early, "has no pixels"),
        (lambda file: file.write_text("not DICOM"), "is no DICOM file"),
    ],
    ids=["truncated", "truncated early", "no DICOM"],
)
def test_a_bad_object_is_an_error_or_a_counted_skip(tmp_path, caplog, change, message):
    series(tmp_path / "good")
    [file, *_] = series(tmp_path / "other", patient="p2")
    change(file.rename(tmp_path / "good" / "odd.dcm"))
    for rest in (tmp_path / "other").iterdir():
        rest.unlink()
    cases = find_images(tmp_path)
    with pytest.raises(BundleError, match=message):
        keep_readable(cases, LoadCased("image"))
    with caplog.at_level(logging.WARNING):
        [kept] = keep_readable(cases, LoadCased("image"), "skip")
    assert len(kept["image"]) == 6
    assert "odd.dcm" in caplog.text and "skipped 1 of 2" in caplog.text
    assert "Secret" not in caplog.text


def test_a_truncated_slice_spoils_its_series(tmp_path, caplog):
    series(tmp_path / "good")
    truncate(series(tmp_path / "bad", patient="p2")[3])
    with pytest.raises(BundleError, match="IM0004.dcm"):
        keep_readable(find_images(tmp_path), LoadCased("image"))
    with caplog.at_level(logging.WARNING):
        kept = keep_readable(find_images(tmp_path), LoadCased("image"), "skip")
    # the rest of the series has a gap, the truncated header belongs to no series
    assert [case["name"] for case in kept] == ["good"]
    assert "skipped 2 of 3" in caplog.text


@pytest.mark.parametrize("bytes_left", [0, 140, 300, 600, 900])
def test_a_header_damaged_anywhere_is_named_not_a_crash(tmp_path, bytes_left):
    series(tmp_path / "good")
    file = series(tmp_path / "bad", patient="p2")[0]
    for other in sorted((tmp_path / "bad").iterdir())[1:]:
        other.unlink()
    file.rename(tmp_path / "good" / "IM0007")
    file = tmp_path / "good" / "IM0007"
    file.write_bytes(file.read_bytes()[:bytes_left])
    kept = keep_readable(find_images(tmp_path), LoadCased("image"), "skip")
    assert [len(case["image"]) for case in kept] == [6]
    with pytest.raises(BundleError, match="IM0007"):
        keep_readable(find_images(tmp_path), LoadCased("image"))


def test_an_empty_folder_is_no_series(tmp_path):
    with pytest.raises(BundleError, match="no image in"):
        find_images(tmp_path)
    with pytest.raises(BundleError, match="holds 0 DICOM series"):
        LoadCased("image")({"image": str(tmp_path)})


def test_headers_come_in_the_order_of_the_slices(tmp_path):
    files = series(tmp_path / "s", AFFINES["flipped"])
    random.Random(0).shuffle(files)
    volume, headers = read_volume(files), read_headers(files)
    assert [str(header.filename) for header in headers] == list(map(str, volume.files.paths))
    for index, header in enumerate(headers):
        x, y, z = header.ImagePositionPatient
        np.testing.assert_allclose((volume.affine @ [0, 0, index, 1])[:3], [-x, -y, z], atol=1e-6)


@pytest.mark.parametrize("form", ["classic", "enhanced", "compressed", "plain picture"])
def test_headers_come_along_with_the_pixels_as_if_read_alone(tmp_path, form):
    files = series(tmp_path / "s", AFFINES["oblique"])
    if form == "enhanced":
        files = [enhanced_of(files, tmp_path / "e")]
    elif form == "compressed":
        files = [get_testdata_file("MR_small_RLE.dcm")]
    elif form == "plain picture":
        files = [get_testdata_file("SC_rgb_rle.dcm")]
    came, expected = read_volume(files).files.headers(), read_headers(files)
    for one, other in zip(came, expected, strict=True):
        assert one.file_meta == other.file_meta
        assert (one.filename, one.original_encoding) == (str(other.filename), other.original_encoding)
        one.decode(), other.decode()
        assert one == other


def test_headers_stay_in_this_process_and_out_of_sight(tmp_path, monkeypatch):
    image = LoadCased("image")({"image": series(tmp_path / "s")})["image"]
    assert "Secret" not in repr(image.meta)
    packed = pickle.dumps(image)
    assert b"Secret" not in packed
    again = pickle.loads(packed).meta["files"]
    assert [str(header.PatientName) for header in again.headers()] == ["Secret^p1"] * 6
    monkeypatch.setattr("bundle.dicom.series.dcmread", None)  # nothing is read again
    assert copy.deepcopy(image).meta["files"].headers() is image.meta["files"].headers()


def test_slices_are_cut_as_they_were_acquired(tmp_path):
    series(tmp_path / "s", AFFINES["sagittal"])
    loaded = LoadCased("image")({"image": str(tmp_path / "s")})
    assert OrientSlicesd("image")(dict(loaded))["image"].shape[-1] == 6
    assert OrientSlicesd("image", "axial")(dict(loaded))["image"].shape[-1] == 20


def test_a_single_slice_of_another_plane_than_asked_is_refused(tmp_path):
    series(tmp_path / "s", AFFINES["sagittal"], volume=volume_of(shape=(24, 20, 1)))
    loaded = LoadCased("image")({"image": str(tmp_path / "s")})
    with pytest.raises(BundleError, match="single slice of another plane than slice_plane 'axial'"):
        OrientSlicesd("image", "axial")(loaded)


def test_a_patient_is_in_one_split(tmp_path):
    for patient in range(6):
        for scan in range(3):
            series(tmp_path / f"{patient}-{scan}", patient=f"id{patient}")
    splits = find_splits(tmp_path, needed=("training", "validation"))
    owner = {split: {case["name"][0] for case in cases} for split, cases in splits.items()}
    assert owner["training"].isdisjoint(owner["validation"])
    assert len(splits["validation"]) % 3 == 0 and splits["validation"]
    assert sum(map(len, splits.values())) == 18


def test_images_of_one_patient_alone_cannot_be_split(tmp_path):
    for scan in range(3):
        series(tmp_path / str(scan))
    with pytest.raises(BundleError, match="of one patient"):
        find_splits(tmp_path)


def without_places(modality):
    def change(images):
        for image in images:
            image.Modality = modality
            del image.ImagePositionPatient, image.ImageOrientationPatient

    return change


@pytest.mark.parametrize("modality", ["CR", "DX", "MG", "XA", "RF", "US", "ES", "XC", "OP", "OT"])
def test_views_and_photographs_of_a_series_are_images_of_their_own(tmp_path, modality):
    one, two = series(tmp_path / "s", volume=volume_of(shape=(24, 20, 2)), change=without_places(modality))
    assert [case["name"] for case in find_images(tmp_path)] == ["s/IM0001", "s/IM0002"]
    two.rename(one.with_suffix(".ima"))
    cases = find_images(tmp_path)
    assert [case["name"] for case in cases] == ["s/IM0001_dcm", "s/IM0001_ima"]
    assert [LoadCased("image")(case)["image"].shape for case in cases] == [(1, 24, 20, 1)] * 2


def test_views_with_a_place_are_slices_of_a_volume(tmp_path):
    series(tmp_path / "s", change=lambda images: [setattr(image, "Modality", "XA") for image in images] and images)
    [case] = find_images(tmp_path)
    assert LoadCased("image")(case)["image"].shape == (1, 24, 20, 6)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT", "NM", ""])
def test_slices_that_lost_their_places_are_no_images_of_their_own(tmp_path, modality):
    series(tmp_path / "s", change=without_places(modality))
    [case] = find_images(tmp_path)
    expected = f"has 6 images without positions in one series of modality {modality or '.'}, whose slices"
    with pytest.raises(BundleError, match=expected):
        LoadCased("image")(case)


def test_photographs_in_color_are_read(tmp_path):
    def in_color(images):
        without_places("US")(images)
        for image in images:
            gray = image.pixel_array.astype(np.uint8)
            image.SamplesPerPixel, image.PlanarConfiguration, image.PhotometricInterpretation = 3, 0, "RGB"
            image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
            image.PixelData = np.stack([gray, gray, gray + 1], axis=-1).tobytes()

    series(tmp_path / "s", volume=volume_of(shape=(24, 20, 2)), change=in_color)
    assert [LoadCased("image")(case)["image"].shape for case in find_images(tmp_path)] == [(3, 24, 20, 1)] * 2


def enhanced_of(files, folder):
    """The series ``files`` as one multi-frame image."""
    image = LegacyConvertedEnhancedMRImage([dcmread(file) for file in files], generate_uid(), 9, generate_uid(), 1)
    folder.mkdir()
    image.save_as(folder / "all.dcm")
    return folder / "all.dcm"


def test_a_multi_frame_image_and_a_series_are_grouped_apart(tmp_path):
    files = series(tmp_path / "s")
    whole = enhanced_of(files, tmp_path / "e")
    assert [len(group.files) for group in group_series([*files, whole])] == [6, 1]


@pytest.mark.parametrize("frames", [1, 6])
def test_a_multi_frame_image_has_its_place_even_with_one_frame(tmp_path, frames):
    files = series(tmp_path / "s", AFFINES["sagittal"], volume=volume_of(shape=(24, 20, frames)))
    classic, whole = read_volume(files), read_volume([enhanced_of(files, tmp_path / "e")])
    np.testing.assert_allclose(whole.affine, classic.affine, atol=1e-6)
    np.testing.assert_array_equal(whole.pixels, classic.pixels)
    assert whole.positioned


def tilted(by):
    """By degrees, as a gantry is."""

    def change(images):
        for number, image in enumerate(images):
            x, y, z = image.ImagePositionPatient
            image.ImagePositionPatient = [x, round(float(y) + np.tan(np.radians(by)) * 4 * number, 4), z]

    return change


steep = tilted(50)  # as no gantry can


def drifting(images):
    """Slices 2 % nearer to each other in one half than in the other."""
    x, y, z = map(float, images[0].ImagePositionPatient)
    for number, image in enumerate(images):
        image.ImagePositionPatient = [x, y, round(z, 4)]
        z += 4.08 if number < len(images) // 2 else 3.92


def shifted(images):
    """One slice beside the line of the others."""
    x, y, z = images[2].ImagePositionPatient
    images[2].ImagePositionPatient = [float(x) + 4, y, z]


def jittered(size):
    def change(images):
        random = np.random.default_rng(0)
        for image in images:
            x, y, z = image.ImagePositionPatient
            image.ImagePositionPatient = [x, y, round(float(z) + random.uniform(-size, size), 4)]

    return change


@pytest.mark.slow
@pytest.mark.parametrize("change", [drifting, shifted, steep])
@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_slices_off_a_straight_even_stack_are_refused(tmp_path, change, form):
    files = series(tmp_path / "s", volume=volume_of(shape=(24, 20, 60)), change=change)
    with pytest.raises(BundleError, match="is no straight stack"):
        read_volume(files if form == "classic" else [enhanced_of(files, tmp_path / "e")])


@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_positions_that_a_scanner_rounded_are_a_stack(tmp_path, form):
    exact = read_volume(series(tmp_path / "exact"))
    files = series(tmp_path / "s", change=jittered(0.05))
    volume = read_volume(files if form == "classic" else [enhanced_of(files, tmp_path / "e")])
    np.testing.assert_array_equal(volume.pixels, exact.pixels)
    np.testing.assert_allclose(volume.affine, exact.affine, atol=0.1)


@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_slices_of_a_tilted_gantry_are_a_sheared_stack(tmp_path, form):
    files = series(tmp_path / "s", change=tilted(20))
    volume = read_volume(files if form == "classic" else [enhanced_of(files, tmp_path / "e")])
    np.testing.assert_array_equal(volume.pixels, read_volume(series(tmp_path / "exact")).pixels)
    assert is_tilted(volume.affine, 6)
    for index, header in enumerate(read_headers(files)):
        left, posterior, superior = header.ImagePositionPatient
        np.testing.assert_allclose((volume.affine @ [0, 0, index, 1])[:3], [-left, -posterior, superior], atol=1e-3)


def test_a_single_slice_is_as_thick_as_it_says(tmp_path):
    files = series(tmp_path / "s", volume=volume_of(shape=(24, 20, 1)), change=set_first(SpacingBetweenSlices=None))
    assert read_volume(files).affine[2, 2] == pytest.approx(4.0)


def test_padding_is_no_tissue(tmp_path):
    values = volume_of() + 10
    values[0] = 4095

    def pad(images):
        for image in images:
            image.PixelPaddingValue = 4095

    pixels = read_volume(series(tmp_path / "s", volume=values.astype(np.uint16), change=pad)).pixels
    assert pixels.max() < 1100 and (pixels == 10).sum() >= values[0].size


def test_a_screen_save_in_a_study_is_no_image_to_examine(tmp_path):
    files = series(tmp_path / "s", change=set_first(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]))
    with pytest.raises(BundleError, match="is no image to examine"):
        read_volume(files[:1])


def test_a_volume_can_be_demanded(tmp_path):
    series(tmp_path / "s", volume=volume_of(shape=(24, 20, 1)))
    with pytest.raises(BundleError, match="has 1 slices, but min_slices is 2"):
        LoadCased("image", min_slices=2)({"image": str(tmp_path / "s")})


def test_patients_of_a_datalist_of_folders_stay_in_one_split(tmp_path):
    for scan in range(6):
        series(tmp_path / str(scan), patient=f"p{scan // 3}")
        (tmp_path / str(scan) / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    items = [{"image": str(scan), "patient": None} for scan in range(6)]
    (tmp_path / "list.json").write_text(json.dumps({"training": items}))
    splits = find_splits(tmp_path / "list.json", needed=("training", "validation"))
    assert {len(splits["training"]), len(splits["validation"])} == {3}
    listed = {"training": items[:2], "validation": items[2:]}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    with pytest.raises(BundleError, match="are of one patient") as caught:
        find_splits(tmp_path / "list.json")
    assert "p0" not in str(caught.value).replace(str(tmp_path), "")


def test_a_series_is_found_from_its_own_folder(tmp_path, monkeypatch):
    series(tmp_path / "axial")
    monkeypatch.chdir(tmp_path / "axial")
    [case] = find_images(".")
    assert case["name"] == "axial"


def test_values_of_a_header_are_not_warned_of(tmp_path, capsys, caplog):
    series(tmp_path / "s", change=set_first(StudyTime="9:30", PatientBirthDate="Secret"))
    LoadCased("image")({"image": str(tmp_path / "s")})
    assert "Secret" not in caplog.text + "".join(capsys.readouterr())
