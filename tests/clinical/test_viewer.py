"""What a person sees in OHIF, the viewer of many hospitals: in a real browser, from a real archive."""

import io
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from pydicom.uid import generate_uid
from scipy.ndimage import binary_dilation, binary_erosion, label

from bundle.dicom.mr import RAS_TO_LPS, SeriesIdentity, mr_series, write_series
from bundle.dicom.objects import Algorithm, write_objects
from bundle.dicom.series import read_volume
from bundle.errors import BundleError
from bundle.figures import blend_slices
from bundle.networks.foreground import AUTO
from bundle.results import CaseResult, RestoredMap, heat
from scripts.integrations.screenshots import CANVAS, PAGE_SECONDS, browser, new_page, open_object, show_slice
from scripts.integrations.viewer import dicom_files, ohif, viewing

ROOT = Path(__file__).parents[2]
SHAPE = (72, 96, 8)
ODD = (71, 95, 8)  # the bits of such a frame end within a byte
HOT_SLICE = 5  # of the volume, by its place along z
THRESHOLD = 2.0
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1, 0, 40], [0, 0, 4, -10], [0, 0, 0, 1]])  # columns to the left, rows back


def body_and_map(shape):
    """An ellipse in the air, which tells its slice by its size, and a map that is hot in one quarter of two slices."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    body = ((x - 36) / 30) ** 2 + ((y - 48) / 42) ** 2 < 0.6 + 0.05 * z
    distance = np.hypot(x - 24, y - 62)
    z_scores = np.where(body, 8.0 * np.exp(-((distance / 9) ** 2)), -6.0)
    z_scores[..., HOT_SLICE + 1] /= 4
    z_scores[..., [index for index in range(shape[2]) if index not in (HOT_SLICE, HOT_SLICE + 1)]] = -6.0
    return np.where(body, 700, 0).astype(np.int16), z_scores.astype(np.float32)


def written_results(folder, shape):
    """A folder with the DICOM results of a SYNTHETIC series, as inference writes them, and that series."""
    uids = [generate_uid() for _ in range(3)]
    pixels, z_scores = body_and_map(shape)
    images = mr_series(
        pixels, AFFINE, SeriesIdentity(f"ohif-{shape[0]}", "SYNTHETIC^OHIF", *uids, series_description="SYNTHETIC T1")
    )
    files = write_series(images, folder / "in")
    volume = read_volume(files)
    flipped = nib.orientations.apply_orientation(
        z_scores,
        nib.orientations.ornt_transform(
            nib.orientations.io_orientation(AFFINE), nib.orientations.io_orientation(volume.affine)
        ),
    )
    result = CaseResult(
        "a",
        "in",
        flipped[None],
        flipped.max((0, 1)),
        np.ones(shape[2], bool),
        threshold=THRESHOLD,
        image_threshold=3.0,
        on_file=RestoredMap(flipped, 2, tuple(range(shape[2])), volume.instances),
    )
    (folder / "out").mkdir()
    pictures = blend_slices(volume.pixels / 1000, flipped, THRESHOLD, AUTO)
    write_objects(folder / "out/a", volume.files.headers(), result, pictures, Algorithm("1.2.3", "a" * 64, "b" * 64))
    written = sorted(str(file.relative_to(folder / "out")) for file in (folder / "out").rglob("*.dcm"))
    content = {"tables": [], "results": {"a": {"input": str(folder / "in"), "files": written}}}
    (folder / "out/results.json").write_text(json.dumps(content))
    return folder, uids[0], volume, result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return written_results(tmp_path_factory.mktemp("viewed"), SHAPE)


@pytest.fixture(scope="module")
def odd_results(tmp_path_factory):
    return written_results(tmp_path_factory.mktemp("odd"), ODD)


@pytest.fixture(scope="module")
def address(results, odd_results):
    with viewing([folder / "out" for folder, _, _, _ in (results, odd_results)], port=0) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture
def opened(address, chromium, results):
    """``opened(SERIES)``: the page with an object open."""
    with new_page(chromium) as page:

        def open_series(description, study=results[1]):
            open_object(page, address, study, description)
            return page

        yield open_series


def wait_until(page, condition):
    """Wait until ``condition`` holds of the picture in the viewport."""
    deadline = time.monotonic() + PAGE_SECONDS
    while not condition(picture_of(page)):
        assert time.monotonic() < deadline, "the viewer does not show it"
        page.wait_for_timeout(500)


def color_of(shown):
    return shown.max(-1) - shown.min(-1)


def is_cyan(shown):
    """Where a picture has the color of masks, over whatever gray."""
    return np.minimum(shown[..., 1], shown[..., 2]) - shown[..., 0] > 40


def extent_of(body):
    """First row and column, and last ones, of the largest thing in a picture; the viewer writes letters beside it."""
    things, _ = label(body)
    body = things == np.bincount(things.ravel())[1:].argmax() + 1
    rows, columns = (np.flatnonzero(body.any(axis)) for axis in (1, 0))
    return np.array([[rows[0], columns[0]], [rows[-1] + 1, columns[-1] + 1]], float)


def picture_of(page):
    """What is seen in the viewport, [rows, columns, 3]."""
    seen = page.screenshot(clip=page.locator(CANVAS).bounding_box())
    return np.asarray(Image.open(io.BytesIO(seen)).convert("RGB")).astype(int)


def scrolled(page):
    """The pictures of all slices."""
    shown = []
    for number in range(1, SHAPE[2] + 1):
        show_slice(page, number)
        page.wait_for_timeout(300)  # until it is drawn
        shown.append(picture_of(page))
    return shown


def on_voxels(pictures, bodies):
    """Which slice each of ``pictures`` shows, with the value of the picture at the center of every pixel of that slice.

    The bodies tell it: each has another size, and the largest one tells how large a pixel is shown, and where.
    """
    seen, known = ([extent_of(one) for one in found] for found in ([one.max(-1) > 40 for one in pictures], bodies))
    largest, expected = (max(found, key=lambda extent: np.ptp(extent, axis=0).sum()) for found in (seen, known))
    zoom = np.ptp(largest, axis=0) / np.ptp(expected, axis=0)
    shift = largest[0] - zoom * expected[0]
    for picture, extent in zip(pictures, seen, strict=True):
        index = min(range(len(known)), key=lambda index: np.abs(zoom * known[index] + shift - extent).max())
        assert np.abs((extent - shift) / zoom - known[index]).max() < 1.5  # pixels, of which the edge is half a one
        centers = [zoom[axis] * (np.arange(size) + 0.5) + shift[axis] for axis, size in enumerate(bodies[0].shape)]
        # the air at the rim may lie outside of the picture
        rows, columns = (at.astype(int).clip(0, picture.shape[axis] - 1) for axis, at in enumerate(centers))
        yield index, picture[np.ix_(rows, columns)]


def pictures_by_slice(volume):
    """Of each slice of an image [x, y, slices] the picture [rows, columns]."""
    return [volume[..., index].T for index in range(volume.shape[2])]


def center_of(values):
    return np.array([np.average(index, weights=values) for index in np.indices(values.shape)])


def test_the_map_is_colored_where_it_is_hot_and_lies_on_the_image(opened, results):
    _, _, volume, result = results
    page = opened("Anomaly map")
    show_slice(page, SHAPE[2] - HOT_SLICE)
    wait_until(page, lambda shown: (color_of(shown) > 60).sum() > 10_000)
    bodies = pictures_by_slice(volume.pixels[0] > 0)
    hot = pictures_by_slice(heat(result.restored.values, THRESHOLD))
    seen = []
    for index, picture in on_voxels(scrolled(page), bodies):
        seen.append(index)
        colored = (color_of(picture) > 40) & bodies[index]
        assert colored[hot[index] > 0.4].all()
        assert not colored[hot[index] < 0.1].any()
        if hot[index].max() > 0.4:
            assert np.abs(center_of(colored * 1.0) - center_of((hot[index] > 0.25) * 1.0)).max() < 1  # pixel
    assert sorted(seen) == list(range(SHAPE[2]))


@pytest.mark.parametrize("name", ["results", "odd_results"])
def test_the_segmentation_fills_the_lesion_in_the_color_of_all_outlines(opened, name, request):
    _, study, volume, result = request.getfixturevalue(name)
    page = opened("Anomaly mask", study)
    wait_until(page, lambda shown: (is_cyan(shown)).sum() > 1000)
    bodies, masks = pictures_by_slice(volume.pixels[0] > 0), pictures_by_slice(result.mask)
    seen = set()
    for index, picture in on_voxels(scrolled(page), bodies):
        filled = is_cyan(picture) & bodies[index]
        assert filled[binary_erosion(masks[index])].all()
        assert not filled[~binary_dilation(masks[index])].any()
        seen |= {index} if filled.any() else set()
    assert seen == {index for index, mask in enumerate(masks) if mask.any()}


def test_the_overlay_is_shown_as_it_was_made(opened, results):
    _, _, volume, result = results
    page = opened("Anomaly overlay")
    wait_until(page, lambda shown: is_cyan(shown).sum() > 100)
    bodies = pictures_by_slice(volume.pixels[0] > 0)
    expected = blend_slices(volume.pixels / 1000, result.restored.values, THRESHOLD, AUTO)
    for index, picture in on_voxels(scrolled(page), bodies):
        differing = np.abs(picture - expected[index]).max(-1)[binary_erosion(bodies[index], iterations=2)]
        assert np.quantile(differing, 0.9) < 3  # of 255; the outline is interpolated


def test_the_report_is_shown_as_text_with_score_threshold_and_what_to_doubt(opened, results):
    _, _, _, result = results
    page = opened("Anomaly report")
    for line in (
        f"Anomaly score: {round(result.score, 2):g} {{SD}}",
        "Threshold of the anomaly score: 3 {SD}",
        "Score above threshold: Yes",
        "no diagnosis",
    ):
        page.get_by_text(line).wait_for()


def by_dcmqi(program, file, folder):
    """What a program of dcmqi, 3D Slicer's way in, makes of an object."""
    words = ["--inputDICOM", file, "--outputDirectory", folder, "--outputType", "nrrd"]
    subprocess.run([Path(sys.executable).with_name(program), *words], check=True, capture_output=True)
    [made] = folder.glob("*.nrrd")
    return SimpleITK.ReadImage(made)


def values_at(image, voxels, affine):
    """Values of an image of ITK at voxels [N, 3] of an image with ``affine``."""
    places = (np.c_[voxels, np.ones(len(voxels))] @ affine.T)[:, :3] * RAS_TO_LPS
    return np.array([image[image.TransformPhysicalPointToIndex(place.tolist())] for place in places])


def test_3d_slicers_reader_has_the_values_of_the_map_in_their_places(results, tmp_path):
    folder, _, volume, result = results
    image = by_dcmqi("paramap2itkimage", folder / "out/a_heatmap.dcm", tmp_path)
    expected = heat(result.restored.values, THRESHOLD)
    voxels = np.argwhere(expected > 0.05)[::7]
    np.testing.assert_allclose(values_at(image, voxels, volume.affine), expected[tuple(voxels.T)], atol=1e-6)


@pytest.mark.parametrize("name", ["results", "odd_results"])
def test_3d_slicers_reader_has_the_segmentation_in_its_place(name, request, tmp_path):
    folder, _, volume, result = request.getfixturevalue(name)
    image = by_dcmqi("segimage2itkimage", folder / "out/a_seg.dcm", tmp_path)
    voxels = np.argwhere(result.mask)
    assert (values_at(image, voxels, volume.affine) == 1).all()
    assert SimpleITK.GetArrayFromImage(image).sum() == result.mask.sum()


def test_3d_slicers_reader_has_score_and_threshold_of_the_report(results, tmp_path):
    folder, _, _, result = results
    program = Path(sys.executable).with_name("tid1500reader")
    words = ["--inputDICOM", folder / "out/a_report.dcm", "--outputMetadata", tmp_path / "report.json"]
    subprocess.run([program, *words], check=True, capture_output=True)
    study, *_ = json.loads((tmp_path / "report.json").read_text())["Measurements"]
    values = {item["quantity"]["CodeMeaning"]: float(item["value"]) for item in study["measurementItems"]}
    assert values == {"Anomaly score": round(result.score, 2), "Threshold of the anomaly score": 3.0}


def test_only_this_machine_is_answered_and_nothing_is_written(address):
    foreign = urllib.request.Request(address, headers={"Host": "hospital.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign)
    for method in ("POST", "DELETE", "PUT"):
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(urllib.request.Request(f"{address}/dicom-web/studies", method=method, data=b""))
    with urllib.request.urlopen(f"{address}/../../etc/passwd") as answer:
        assert b"root:" not in answer.read()
    with pytest.raises(urllib.error.HTTPError, match="404"):  # Orthanc's own interface
        urllib.request.urlopen(f"{address}/dicom-web/..%2finstances")


def test_an_archive_is_shown_by_its_address_and_one_that_is_silent_is_said(orthanc):
    with viewing(url=orthanc.dicomweb_url, port=0) as url:
        with urllib.request.urlopen(f"{url}/dicom-web/studies") as answer:
            assert isinstance(json.load(answer), list)
    with viewing(url="http://127.0.0.1:9/dicom-web", port=0) as url:
        with pytest.raises(urllib.error.HTTPError, match="502"):
            urllib.request.urlopen(f"{url}/dicom-web/studies")
    with pytest.raises(BundleError, match="is on another machine"), viewing(url="http://archive.example/dicom-web"):
        pass


def test_a_folder_of_results_brings_its_inputs(results):
    folder, _, _, _ = results
    assert {file.parent.name for file in dicom_files([folder / "out"])} == {"in", "out", "a_overlay"}


def test_another_package_than_the_known_one_is_refused(tmp_path):
    (tmp_path / "app.tgz").write_bytes(b"something else")
    with pytest.raises(BundleError, match="is not OHIF"):
        ohif(tmp_path / "cache", tmp_path / "app.tgz")
    assert not (tmp_path / "cache/ohif-3.13.2").exists()


def test_the_command_prints_one_address_and_ends_cleanly(results):
    folder, _, _, _ = results
    command = [sys.executable, "-m", "scripts.integrations.viewer", str(folder / "out"), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        url = next(line for line in running.stdout if line.startswith("OHIF")).split()[1]
        with urllib.request.urlopen(url) as answer:
            assert b"OHIF" in answer.read()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "nothing to show"), (["nowhere"], "no folder 'nowhere'"), (["."], "no DICOM file in '.'")],
)
def test_what_cannot_be_shown_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=message), viewing([Path(word) for word in words], port=0):
        pass
