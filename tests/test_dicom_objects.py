"""Results as DICOM: the same voxels at the same places, in the patient's study, with their source and their maker."""

import highdicom as hd
import numpy as np
import pytest
from pydicom import DataElement, dcmread
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.sr.codedict import codes
from pydicom.uid import DigitalXRayImageStorageForPresentation
from test_dicom_series import AFFINES, enhanced_of, identity, jittered, series

from bundle.dicom.mr import mr_series, write_series
from bundle.dicom.objects import Algorithm, write_objects
from bundle.dicom.series import read_headers, read_volume
from bundle.errors import BundleError
from bundle.results import CaseResult, RestoredMap, Unlike, heat

ALGORITHM = Algorithm("1.2.3", "a" * 64, "b" * 64)
THRESHOLD = 1.5


def classic(folder, affine):
    return series(folder, affine)


def enhanced(folder, affine):
    return [enhanced_of(series(folder, affine), folder.with_name("enhanced"))]


def found_in(volume, slice_axis=2, **options):
    """A result of random numbers with the score 4.5, on the axes of ``volume`` or, by slices, along another one."""
    shape = volume.pixels.shape[1:]
    random = np.random.default_rng(0)
    values = random.normal(size=shape).astype(np.float32)
    scores = random.normal(size=shape[slice_axis])
    scores[scores.argmax()] = 4.5
    return CaseResult(
        "a",
        "a.dcm",
        np.moveaxis(values, slice_axis, -1)[None],
        scores,
        np.ones(len(scores), bool),
        **{"threshold": THRESHOLD, "image_threshold": 3.0, **options},
        on_file=RestoredMap(values, slice_axis, tuple(range(len(scores)))),
    )


def pictures_of(volume):
    return np.random.default_rng(1).integers(0, 256, (*volume.pixels.shape[:0:-1], 3)).astype(np.uint8)


def write(stem, files, **options):
    """All objects of a result of the series ``files``; gives its volume and the result."""
    volume = read_volume(files)
    result = found_in(volume, **options)
    write_objects(stem, volume.files.headers(), result, pictures_of(volume), ALGORITHM, worst_slices=2)
    return volume, result


@pytest.fixture(params=[classic, enhanced], ids=["series", "multi-frame"])
def written(request, tmp_path):
    files = request.param(tmp_path / "in", AFFINES["oblique"])
    volume, result = write(tmp_path / "a", files)
    return tmp_path, read_headers(files), volume, result


def as_xyz(volume):
    """Values [x, y, slices] and affine in RAS of a highdicom volume, with slices along the normal."""
    volume = volume.flip_spatial(0)
    return np.asarray(volume.array).T, volume.get_affine("RAH")[:, [2, 1, 0, 3]]


def test_the_segmentation_has_the_voxels_of_the_mask(written):
    folder, _, volume, result = written
    mask, affine = as_xyz(hd.seg.segread(folder / "a_seg.dcm").get_volume(combine_segments=True))
    np.testing.assert_array_equal(mask, result.mask)
    np.testing.assert_allclose(affine, volume.affine, atol=1e-5)


def test_the_parametric_map_has_the_heat_of_the_anomaly_map(written):
    folder, _, volume, result = written
    stored = hd.imread(folder / "a_heatmap.dcm")
    values, affine = as_xyz(stored.get_volume(apply_real_world_transform=True))
    np.testing.assert_allclose(values, heat(result.restored.values, THRESHOLD), atol=1e-6)
    np.testing.assert_array_equal(values > 0.5, result.mask)
    np.testing.assert_allclose(affine, volume.affine, atol=1e-5)
    shared = stored.SharedFunctionalGroupsSequence[0]
    [window] = shared.FrameVOILUTSequence
    assert (window.WindowCenter, window.WindowWidth) == (0.5, 1.0)
    assert "1 - 2^(-z / 1.5)" in shared.RealWorldValueMappingSequence[0].LUTExplanation
    assert shared.FrameAnatomySequence[0].AnatomicRegionSequence[0].CodeMeaning == "Entire body"


def test_frames_of_the_parametric_map_ascend_along_the_normal_and_keep_their_sources(written):
    folder, sources, _, _ = written
    stored = dcmread(folder / "a_heatmap.dcm")
    orientation = stored.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    normal = np.cross(orientation[:3], orientation[3:])
    frames = stored.PerFrameFunctionalGroupsSequence
    places = [np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float) for frame in frames]
    assert (np.diff([normal @ place for place in places]) > 0).all()
    assert [frame.FrameContentSequence[0].DimensionIndexValues for frame in frames] == list(range(1, 7))
    if len(sources) > 1:
        for source, place, frame in zip(sources, places, frames, strict=True):
            [reference] = frame.DerivationImageSequence[0].SourceImageSequence
            assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
            np.testing.assert_allclose(place, np.array(source.ImagePositionPatient, float), atol=1e-3)


def test_one_scale_serves_weak_and_strong_anomalies():
    values = np.array([-6.0, 0.0, 1.5, 3.0, 15.0])
    np.testing.assert_allclose(heat(values, 1.5), [0, 0, 0.5, 0.75, 1 - 2.0**-10])
    np.testing.assert_array_equal(heat(values, 0.0), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(heat(values, np.inf), 0)


def test_the_overlay_is_a_series_of_color_images_at_the_places_of_the_slices(written):
    folder, _, volume, _ = written
    for index, file in enumerate(sorted((folder / "a_overlay").iterdir())):
        image = dcmread(file)
        np.testing.assert_array_equal(image.pixel_array, pictures_of(volume)[index])
        x, y, z = image.ImagePositionPatient
        np.testing.assert_allclose([-x, -y, z], (volume.affine @ [0, 0, index, 1])[:3], atol=1e-4)
    assert index == 5


def test_the_report_names_score_threshold_and_worst_slices(written):
    folder, sources, volume, result = written
    groups = hd.sr.srread(folder / "a_report.dcm").content.get_image_measurement_groups()
    study, *slices = groups
    values = {measurement.name.meaning: measurement.value for measurement in study.get_measurements()}
    assert values["Anomaly score"] == 4.5
    assert values["Threshold of the anomaly score"] == 3.0
    worst = result.worst(2)
    assert [group.get_measurements()[0].value for group in slices] == [round(named.score, 2) for named in worst]
    assert {group.get_measurements()[0].unit.value for group in groups} == {"{SD}"}
    for group, index in zip(slices, [named.index for named in worst], strict=True):
        [reference] = group.source_images
        source = sources[index] if len(sources) > 1 else sources[0]
        assert reference.referenced_sop_instance_uid == source.SOPInstanceUID
        if len(sources) == 1:
            assert reference.referenced_frame_numbers == [volume.instances[index]]


@pytest.mark.parametrize("unlike", [(), (Unlike("modality", "modality CT, learned from MR"),)])
def test_the_report_says_what_a_score_means_and_what_to_doubt(tmp_path, unlike):
    write(tmp_path / "a", series(tmp_path / "in"), unlike=unlike)
    items = dcmread(tmp_path / "a_report.dcm").ContentSequence
    comments = " ".join(item.TextValue for item in items if item.ValueType == "TEXT")
    assert "standard deviations above the mean of healthy images" in comments
    assert "no diagnosis" in comments
    assert ("modality CT, learned from MR" in comments) == bool(unlike)


def test_viewers_show_the_report_as_one_line_for_each_value(tmp_path):
    write(tmp_path / "a", series(tmp_path / "in"))
    stored = dcmread(tmp_path / "a_report.dcm")
    # by that title OHIF looks for drawings, and finds none
    assert stored.ConceptNameCodeSequence[0].CodeValue != codes.DCM.ImagingMeasurementReport.value
    assert stored.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert set(continuities(stored)) == {"SEPARATE"}


def continuities(item):
    """How each container wants its content shown."""
    if item.ValueType == "CONTAINER":
        yield item.ContinuityOfContent
    for child in item.get("ContentSequence", []):
        yield from continuities(child)


def test_objects_belong_to_patient_study_and_frame_of_reference(written):
    folder, sources, _, _ = written
    files = [*folder.glob("a_*.dcm"), *(folder / "a_overlay").iterdir()]
    series_uids = set()
    for written_object in map(dcmread, files):
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID"):
            assert written_object[keyword].value == sources[0][keyword].value
        if written_object.Modality != "SR":
            assert written_object.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
        assert written_object.SoftwareVersions == "1.2.3"
        assert written_object.DeviceSerialNumber == "b" * 16
        series_uids.add(written_object.SeriesInstanceUID)
    assert len(series_uids) == 4 and sources[0].SeriesInstanceUID not in series_uids


def test_the_segmentation_refers_to_its_sources_and_its_algorithm(written):
    folder, sources, _, _ = written
    mask = dcmread(folder / "a_seg.dcm")
    referred = {
        image.ReferencedSOPInstanceUID
        for item in mask.ReferencedSeriesSequence
        for image in item.ReferencedInstanceSequence
    }
    assert referred == {source.SOPInstanceUID for source in sources}
    [segment] = mask.SegmentSequence
    assert segment.SegmentLabel == "anomaly"
    [algorithm] = segment.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmVersion == "1.2.3"
    assert "a" * 64 in algorithm.AlgorithmParameters and "b" * 64 in algorithm.AlgorithmParameters


@pytest.mark.parametrize(
    ("shape", "bits"), [((8, 6, 4), 1), ((8, 7, 5), 1), ((6, 10, 3), 8), ((7, 9, 4), 8), ((7, 9, 5), 8)]
)
def test_no_frame_of_a_segmentation_begins_within_a_byte(tmp_path, shape, bits):
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    _, result = write(tmp_path / "a", series(tmp_path / "in", AFFINES["oblique"], values))
    stored = hd.seg.segread(tmp_path / "a_seg.dcm")
    assert stored.BitsAllocated == bits
    if (length := -(-result.mask.any((0, 1)).sum() * shape[0] * shape[1] * bits // 8)) % 2:
        assert stored.PixelData[length:] == b"\0"
    mask, _ = as_xyz(stored.get_volume(combine_segments=True))
    np.testing.assert_array_equal(mask, result.mask)


def test_images_of_an_odd_number_of_pixels_get_an_overlay(tmp_path):
    values = np.arange(7 * 9 * 4, dtype=np.int16).reshape(7, 9, 4)
    volume, _ = write(tmp_path / "a", series(tmp_path / "in", volume=values))
    shown = [dcmread(file).pixel_array for file in sorted((tmp_path / "a_overlay").iterdir())]
    np.testing.assert_array_equal(shown, pictures_of(volume))


def test_an_empty_mask_is_a_segmentation_too(tmp_path):
    write(tmp_path / "a", series(tmp_path / "in"), threshold=100.0)
    mask = hd.seg.segread(tmp_path / "a_seg.dcm").get_volume(combine_segments=True)
    assert mask.array.shape[0] == 6 and not mask.array.any()


def test_results_are_no_input(tmp_path):
    write(tmp_path / "a", series(tmp_path / "in"))
    for file in (*tmp_path.glob("a_*.dcm"), *(tmp_path / "a_overlay").iterdir()):
        with pytest.raises(BundleError, match="is no image to examine"):
            read_volume([file])


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.0, 0.001, 0.05])
@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_each_frame_refers_to_its_source_even_where_positions_are_rounded(tmp_path, size, form):
    files = series(tmp_path / "in", change=jittered(size))
    files = files if form == "classic" else [enhanced_of(files, tmp_path / "enhanced")]
    volume, result = write(tmp_path / "a", files)
    sources = read_headers(files)
    for name in ("a_seg.dcm", "a_heatmap.dcm"):
        written_object = dcmread(tmp_path / name)
        for frame in written_object.PerFrameFunctionalGroupsSequence:
            [derived] = frame.DerivationImageSequence
            [source] = derived.SourceImageSequence
            _, _, z = frame.PlanePositionSequence[0].ImagePositionPatient
            index = round((float(z) - volume.affine[2, 3]) / volume.affine[2, 2])
            expected = sources[index if form == "classic" else 0]
            assert source.ReferencedSOPInstanceUID == expected.SOPInstanceUID
            if form == "enhanced":
                assert source.ReferencedFrameNumber == volume.instances[index]
    mask, _ = as_xyz(hd.seg.segread(tmp_path / "a_seg.dcm").get_volume(combine_segments=True, rtol=0.05))
    np.testing.assert_array_equal(mask, result.mask)


HEADERS = {
    "no name": {"PatientName": None},
    "an empty name": {"PatientName": ""},
    "nothing known": {
        keyword: None
        for keyword in ("PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")
    },
    "a name without caret": {"PatientName": "Secret John"},
    "an unknown sex": {"PatientSex": "U"},
    "a year for a birth date": {"PatientBirthDate": "1960"},
    "a time of day": {"StudyTime": "9:30"},
    "Latin letters": {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"},
    "Japanese": {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
    "no character set": {"SpecificCharacterSet": ""},
    "a large series number": {"SeriesNumber": 30000001},
    "a negative series number": {"SeriesNumber": -1},
    "no thickness": {"SliceThickness": None},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:A value of type", "ignore:The value")
@pytest.mark.parametrize("name", HEADERS)
def test_headers_as_hospitals_have_them_get_results(tmp_path, name, capsys, caplog):
    def change(images):
        for image in images:
            for keyword, value in HEADERS[name].items():
                if value is None:
                    delattr(image, keyword)
                else:
                    image.add(DataElement(keyword, dictionary_VR(keyword), value, validation_mode=IGNORE))

    files = series(tmp_path / "in", change=change)
    capsys.readouterr(), caplog.clear()
    write(tmp_path / "a", files)
    assert "Secret" not in caplog.text + "".join(capsys.readouterr())
    for file in (*tmp_path.glob("a_*.dcm"), tmp_path / "a_overlay" / "IM0001.dcm"):
        written_object = dcmread(file)
        written_object.decode()
        assert str(written_object.PatientName) == (HEADERS[name].get("PatientName", "Secret^p1") or "")
        assert 0 < written_object.SeriesNumber < 2**31


def test_every_object_tells_the_hashes_of_weights_and_model(written):
    folder, _, _, _ = written
    for file in (*folder.glob("a_*.dcm"), folder / "a_overlay" / "IM0001.dcm"):
        content = file.read_bytes()
        assert b"a" * 64 in content and b"b" * 64 in content, file.name


def test_a_model_without_threshold_does_not_judge(tmp_path):
    write(tmp_path / "a", series(tmp_path / "in"), image_threshold=np.inf)
    study, *_ = hd.sr.srread(tmp_path / "a_report.dcm").content.get_image_measurement_groups()
    assert not study.get_qualitative_evaluations()


def radiograph(folder, modality="DX"):
    image = mr_series(np.arange(480, dtype=np.uint16).reshape(24, 20, 1), AFFINES["RAS"], identity())[0]
    del image.ImagePositionPatient, image.ImageOrientationPatient, image.FrameOfReferenceUID
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    image.Modality, image.PatientOrientation = modality, ["L", "F"]
    return write_series([image], folder)


@pytest.mark.parametrize("modality", ["CR", "DX", "MG", "US", "XA", "ES", "OT"])
def test_a_radiograph_or_photograph_gets_report_and_overlay_and_a_line_on_what_it_lacks(tmp_path, caplog, modality):
    files = radiograph(tmp_path / "in", modality)
    with caplog.at_level("WARNING"):
        volume, _ = write(tmp_path / "a", files)
    assert sorted(file.name for file in tmp_path.glob("a_*")) == ["a_overlay", "a_report.dcm"]
    [line] = caplog.messages
    assert "has no position, which segmentation and parametric map need" in line
    [source] = read_headers(files)
    image = dcmread(tmp_path / "a_overlay" / "IM0001.dcm")
    np.testing.assert_array_equal(image.pixel_array, pictures_of(volume)[0])
    assert image.PatientOrientation == ["L", "F"] and image.PixelSpacing == source.PixelSpacing
    assert "ImagePositionPatient" not in image and "FrameOfReferenceUID" not in image
    [reference] = image.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    study, *slices = hd.sr.srread(tmp_path / "a_report.dcm").content.get_image_measurement_groups()
    assert {m.name.meaning: m.value for m in study.get_measurements()}["Anomaly score"] == 4.5
    assert [group.source_images[0].referenced_sop_instance_uid for group in slices] == [source.SOPInstanceUID]


@pytest.mark.parametrize("form", [classic, enhanced], ids=["series", "multi-frame"])
def test_a_series_without_frame_of_reference_gets_report_and_overlay(tmp_path, caplog, form):
    files = form(tmp_path / "in", AFFINES["oblique"])
    for file in files:
        image = dcmread(file)
        del image.FrameOfReferenceUID
        image.save_as(file)
    with caplog.at_level("WARNING"):
        volume, _ = write(tmp_path / "a", files)
    assert sorted(file.name for file in tmp_path.glob("a_*")) == ["a_overlay", "a_report.dcm"]
    assert "has no FrameOfReferenceUID" in caplog.text
    for picture, file in zip(pictures_of(volume), sorted((tmp_path / "a_overlay").iterdir()), strict=True):
        np.testing.assert_array_equal(dcmread(file).pixel_array, picture)


def test_the_report_names_no_slices_where_the_network_saw_those_of_another_plane(tmp_path):
    write(tmp_path / "a", series(tmp_path / "in"), slice_axis=0)
    groups = hd.sr.srread(tmp_path / "a_report.dcm").content.get_image_measurement_groups()
    assert len(groups) == 1
