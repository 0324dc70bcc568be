"""A real Orthanc: the cohort goes in by C-STORE, is examined by DICOMweb, and results come back in its studies."""

import csv
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from PIL import Image
from pydicom.uid import JPEGLSLossless

from bundle.errors import BundleError
from bundle.results import heat
from scripts.integrations.dicomweb import ANY_SYNTAX, choose_series, connect
from scripts.integrations.orthanc import running
from scripts.integrations.orthanc_demo import fetch_grids, fetch_series, find, rendered
from scripts.samples.dicom import make_sample_dicom

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ROOT = Path(__file__).parents[2]
SUBJECT = "sub-0009"  # has a bright lesion


@dataclass
class Examined:
    """A study with its results in an archive, and what the command left."""

    client: object
    study: str
    series: list
    results: Path
    done: subprocess.CompletedProcess
    leftovers: list


def study_of(client, patient):
    (found,) = client.search_for_studies(search_filters={"PatientID": patient})
    return found["0020000D"]["Value"][0]


def infer(run_python, server, study, knobs, output, *words, check=True):
    options = [f"--{name}={value}" for name, value in knobs.items()]
    command = ["-m", "scripts.integrations.dicomweb", "--url", server.dicomweb_url, "--study", study]
    return run_python(*command, "--output_dir", output, *options, *words, check=check)


def threshold_of(results):
    """The threshold of the maps in a folder of results."""
    return float(next(csv.DictReader((results / "scores.csv").open()))["threshold"])


def volume_of(file):
    """Values of a NIfTI file on the axes left, posterior, superior, and its affine."""
    image = nib.load(file)
    turn = ornt_transform(io_orientation(image.affine), [[0, -1], [1, -1], [2, 1]])
    return apply_orientation(np.asarray(image.dataobj), turn)


def on_axes(array):
    """[slices, rows, columns] of highdicom, stacked against the normal, as left, posterior, superior."""
    return array[::-1].transpose(2, 1, 0)


@pytest.fixture(scope="module")
def archive(cohort_dicom):
    """An Orthanc of this module's own, with the test subjects."""
    with running() as server:
        server.store(cohort_dicom / "test")
        yield server


@pytest.fixture(scope="module")
def examined(archive, model_knobs, run_python, tmp_path_factory):
    """The study of SUBJECT after ``scripts.integrations.dicomweb``."""
    client = connect(archive.dicomweb_url)
    study = study_of(client, SUBJECT)
    output, scratch = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("scratch")
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(scratch)
    try:
        done = infer(run_python, archive, study, model_knobs, output, "--store", "true")
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    (results,) = output.iterdir()
    return Examined(client, study, fetch_series(client, study), results, done, list(scratch.rglob("*infer-dicomweb*")))


def validity_errors(file):
    said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
    return [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]


def test_the_cohort_is_stored_as_one_mr_study_a_subject(archive):
    client = connect(archive.dicomweb_url)
    for subject in ("sub-0009", "sub-0010", "sub-0011", "sub-0012"):
        series = client.search_for_series(study_of(client, subject), search_filters={"Modality": "MR"})
        assert [one["00201209"]["Value"] for one in series] == [[12]]


@pytest.mark.parametrize("options", [{}, {"compress": "rle"}, {"compress": "jpeg-ls"}, {"enhanced": True}])
def test_dciodvfy_finds_no_error_in_the_cohort(sample_cohort, tmp_path, options):
    folder = make_sample_dicom(sample_cohort, tmp_path / "dicom", split="test", **options)
    files = sorted(folder.rglob("*.dcm"))
    assert len(files) == (4 if "enhanced" in options else 48)
    assert {error for file in files for error in validity_errors(file)} == set()


def test_results_lie_in_the_study_of_their_source(examined):
    assert {(one.modality, len(one.instances)) for one in examined.series} == {
        ("MR", 12),
        ("SEG", 1),
        ("OT", 1),
        ("OT", 12),
        ("SR", 1),
    }
    for one in examined.series:
        for instance in one.instances:
            assert instance["00100020"]["Value"] == [SUBJECT]
    source = find(examined.series, "MR").instances[0]
    for one in examined.series:
        if one.modality != "SR":
            assert one.instances[0]["00200052"] == source["00200052"]  # frame of reference
    assert "15 objects stored" in examined.done.stdout


def test_seg_and_parametric_map_hold_what_the_bundle_wrote(examined):
    grids = fetch_grids(examined.client, examined.series)
    mask = volume_of(examined.results / "series_mask.nii.gz")
    anomaly_map = volume_of(examined.results / "series_map.nii.gz")
    assert mask.any()
    assert np.array_equal(on_axes(grids.mask), mask > 0)
    assert np.abs(on_axes(grids.heat) - heat(anomaly_map, threshold_of(examined.results))).max() < 1e-5


def test_seg_lies_where_the_volume_of_the_same_subject_has_its_mask(
    examined, sample_cohort, model_knobs, run_bundle, tmp_path
):
    name = f"{SUBJECT}_flair"
    run_bundle(
        "inferring",
        "configs/inference.json",
        dataset_dir=sample_cohort / "volumes" / "test" / f"{name}.nii.gz",
        output_dir=tmp_path,
        tracking_uri="off",
        **model_knobs,
    )
    grids = fetch_grids(examined.client, examined.series)
    anomaly_map = volume_of(tmp_path / f"{name}_map.nii.gz")
    assert np.abs(on_axes(grids.heat) - heat(anomaly_map, threshold_of(tmp_path))).max() < 0.005
    differing = on_axes(grids.mask) != (volume_of(tmp_path / f"{name}_mask.nii.gz") > 0)
    assert differing.sum() <= 0.01 * grids.mask.sum()


def test_results_overlap_the_lesion(examined, sample_cohort):
    lesion = volume_of(sample_cohort / "volumes" / "test" / f"{SUBJECT}_lesion.nii.gz") > 0
    found = on_axes(fetch_grids(examined.client, examined.series).mask)
    assert (lesion & found).sum() > 0.5 * lesion.sum()


def test_the_server_renders_every_frame_as_png(examined):
    for one in examined.series:
        for instance, frame in one.frames():
            png = examined.client.retrieve_instance_frames_rendered(
                one.study, one.uid, instance, [frame], media_types=("image/png",)
            )
            assert png.startswith(PNG_SIGNATURE)
            assert Image.open(io.BytesIO(png)).size == (176, 208)


def test_the_rendered_overlay_is_the_stored_picture(examined):
    overlay = find(examined.series, "OT", "Anomaly overlay")
    stored = {image.SOPInstanceUID: image for image in examined.client.retrieve_series(overlay.study, overlay.uid)}
    for instance, _ in overlay.frames():
        assert np.array_equal(rendered(examined.client, overlay, instance), stored[instance].pixel_array)


def test_the_overlay_stands_where_its_source_stands(examined):
    overlay = find(examined.series, "OT", "Anomaly overlay")
    source = {one["00080018"]["Value"][0]: one for one in find(examined.series, "MR").instances}
    for instance in overlay.instances:
        reference = source[instance["00082112"]["Value"][0]["00081155"]["Value"][0]]
        for tag in ("00200032", "00200037", "00280030"):  # position, orientation, pixel spacing
            assert np.allclose(instance[tag]["Value"], reference[tag]["Value"], atol=1e-4)


def test_the_report_tells_the_score(examined):
    (report,) = examined.client.retrieve_series(examined.study, find(examined.series, "SR").uid)
    (row,) = csv.DictReader((examined.results / "scores.csv").open())
    numbers = _numbers(report)
    assert any(abs(number - float(row["score"])) < 0.006 for number in numbers)


def _numbers(dataset):
    found = []
    for item in dataset.get("ContentSequence", []):
        if "MeasuredValueSequence" in item:
            found.append(float(item.MeasuredValueSequence[0].NumericValue))
        found += _numbers(item)
    return found


def test_dciodvfy_finds_no_error_in_the_results(examined):
    files = sorted(examined.results.rglob("*.dcm"))
    assert len(files) == 15
    assert {error for file in files for error in validity_errors(file)} == set()


def test_results_of_synthetic_images_are_called_synthetic(examined):
    (row,) = csv.DictReader((examined.results / "scores.csv").open())
    assert row["data"].startswith("SYNTHETIC")
    assert all(
        str(one.instances[0]["00100010"]["Value"][0]["Alphabetic"]).startswith("SYNTHETIC") for one in examined.series
    )


def test_nothing_of_the_patient_is_left_or_said(examined):
    assert examined.leftovers == []
    assert SUBJECT not in examined.done.stdout + examined.done.stderr


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_an_interrupted_examination(ending, archive, model_knobs, tmp_path):
    study = study_of(connect(archive.dicomweb_url), SUBJECT)
    options = [f"--{name}={value}" for name, value in model_knobs.items()]
    command = [sys.executable, "-m", "scripts.integrations.dicomweb", "--url", archive.dicomweb_url, "--study", study]
    process = subprocess.Popen(
        [*command, "--store", "true", *options],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "12 objects retrieved\n"
    assert len(list(tmp_path.glob("infer-dicomweb-*/images/series/*.dcm"))) == 12
    process.send_signal(ending)
    assert process.wait(60) == 128 + ending
    assert list(tmp_path.glob("infer-dicomweb-*")) == []


@pytest.mark.parametrize("options", [{"compress": "jpeg-ls"}, {"enhanced": True}], ids=["jpeg-ls", "enhanced"])
def test_compressed_and_multi_frame_series_give_the_same_mask(
    options, examined, sample_cohort, empty_orthanc, model_knobs, run_python, tmp_path
):
    folder = make_sample_dicom(sample_cohort, tmp_path / "dicom", split="test", **options)
    empty_orthanc.store(folder / "test" / SUBJECT)
    client = connect(empty_orthanc.dicomweb_url)
    study = study_of(client, SUBJECT)
    infer(run_python, empty_orthanc, study, model_knobs, tmp_path / "results", "--store", "true")
    (mask,) = (tmp_path / "results").rglob("*_mask.nii.gz")
    assert np.array_equal(volume_of(mask), volume_of(examined.results / "series_mask.nii.gz"))
    (seg,) = client.retrieve_series(study, find(fetch_series(client, study), "SEG").uid)
    assert hd.seg.Segmentation.from_dataset(seg).get_volume(combine_segments=True).array.sum() == volume_of(mask).sum()


def test_compressed_objects_are_retrieved_as_they_are(sample_cohort, empty_orthanc, tmp_path):
    folder = make_sample_dicom(sample_cohort, tmp_path / "dicom", split="test", compress="jpeg-ls")
    empty_orthanc.store(folder / "test" / SUBJECT)
    client = connect(empty_orthanc.dicomweb_url)
    study = study_of(client, SUBJECT)
    images = client.retrieve_series(study, choose_series(client, study), media_types=ANY_SYNTAX)
    assert {image.file_meta.TransferSyntaxUID for image in images} == {JPEGLSLossless}


def test_a_study_with_two_series_wants_a_choice(sample_cohort, cohort_dicom, empty_orthanc, tmp_path):
    enhanced = make_sample_dicom(sample_cohort, tmp_path / "dicom", split="test", enhanced=True)
    empty_orthanc.store(cohort_dicom / "test" / SUBJECT)
    empty_orthanc.store(enhanced / "test" / SUBJECT)
    client = connect(empty_orthanc.dicomweb_url)
    with pytest.raises(BundleError, match="has 2 series: give --series one of .*SYNTHETIC FLAIR"):
        choose_series(client, study_of(client, SUBJECT))


def test_results_are_no_candidates_for_examination(examined):
    assert choose_series(examined.client, examined.study) == find(examined.series, "MR").uid


def test_an_unknown_study_is_one_line(archive, model_knobs, run_python, tmp_path):
    done = infer(run_python, archive, "1.2.3.4", model_knobs, tmp_path / "results", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_what_the_bundle_refuses_is_one_line(archive, model_knobs, run_python, tmp_path):
    study = study_of(connect(archive.dicomweb_url), SUBJECT)
    done = infer(run_python, archive, study, model_knobs, tmp_path / "results", "--batch_sise=2", check=False)
    assert done.stderr.splitlines()[-1].startswith("error: knob --batch_sise is unknown: did you mean 'batch_size'?")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "url", ["http://192.0.2.7/dicom-web", "https://pacs.example.org/dicom-web", "http://127.0.0.1.example.org:8042/"]
)
def test_another_machine_is_refused_unless_allowed(url):
    with pytest.raises(BundleError, match="another machine.*--allow_remote true"):
        connect(url)
    assert connect(url, allow_remote=True).base_url == url.rstrip("/")


@pytest.mark.parametrize("url", ["http://127.0.0.1@example.org/", "http://example.org\\@127.0.0.1/", "127.0.0.1:8042"])
def test_a_url_that_could_be_read_in_two_ways_is_refused(url):
    with pytest.raises(BundleError, match="no DICOMweb URL"):
        connect(url)


@contextmanager
def web_server(answer):
    """A server at whose requests ``answer(handler)`` is called; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_cannot_send_us_elsewhere():
    asked = []

    def redirect(handler):
        asked.append(handler.path)
        handler.send_response(307)
        handler.send_header("Location", f"http://localhost:{handler.server.server_port}/elsewhere")
        handler.end_headers()

    with web_server(redirect) as url, pytest.raises(BundleError, match="elsewhere"):
        choose_series(connect(f"{url}/dicom-web"), "1.2.3")
    assert asked and not any(path.startswith("/elsewhere") for path in asked)


def test_a_proxy_of_the_environment_is_not_asked(archive, monkeypatch):
    asked = []
    with web_server(lambda handler: asked.append(handler.path)) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert len(connect(archive.dicomweb_url).search_for_studies()) == 4
    assert asked == []


def test_name_and_password_come_from_netrc(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    given = []

    def answer(handler):
        given.append(handler.headers["Authorization"])
        handler.send_response(204)
        handler.end_headers()

    with web_server(answer) as url:
        connect(f"{url}/dicom-web").search_for_studies()
    assert given == ["Basic " + b64encode(b"someone:secret").decode()]


def test_orthanc_answers_this_machine_alone(empty_orthanc):
    def status(source):
        connection = http.client.HTTPConnection(
            "127.0.0.1", empty_orthanc.http_port, timeout=10, source_address=(source, 0)
        )
        connection.request("GET", "/dicom-web/studies")
        return connection.getresponse().status

    assert status("127.0.0.1") == 200
    assert status("127.0.0.2") in (401, 403)  # of any address but one it takes the asker for a stranger


def test_orthanc_refuses_unknown_dicom_callers(empty_orthanc):
    def echo(title):
        command = ["echoscu", "--aetitle", title, "--call", empty_orthanc.aet, "127.0.0.1"]
        return subprocess.run([*command, str(empty_orthanc.dicom_port)], capture_output=True, check=False).returncode

    assert echo("ECHOSCU") == 0
    assert echo("STRANGER") != 0


def test_orthanc_has_ended_when_its_block_ends():
    with running() as server:
        assert _is_open(server.http_port) and _is_open(server.dicom_port)
    assert not _is_open(server.http_port) and not _is_open(server.dicom_port)


def test_what_is_stored_outlives_a_named_storage(cohort_dicom, tmp_path):
    with running(tmp_path / "storage") as server:
        server.store(cohort_dicom / "test" / SUBJECT)
    with running(tmp_path / "storage") as server:
        assert len(connect(server.dicomweb_url).search_for_studies()) == 1


def test_a_port_in_use_is_one_line(empty_orthanc):
    with (
        pytest.raises(BundleError, match=f"port {empty_orthanc.http_port} is in use"),
        running(http_port=empty_orthanc.http_port),
    ):
        pass


def test_a_missing_orthanc_is_one_line_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("scripts.integrations.orthanc.PLACES", (str(tmp_path),))
    with pytest.raises(BundleError, match="no Orthanc on this machine: apt-get install orthanc orthanc-dicomweb"):
        with running():
            pass


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_runs_until_it_is_interrupted(ending):
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.integrations.orthanc", "--http_port", "0", "--dicom_port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline() for _ in range(4)]
    url = lines[1].split()[1]
    port = int(url.split(":")[2].split("/")[0])
    assert connect(url).search_for_studies() == []
    process.send_signal(ending)
    assert process.wait(60) == 0
    assert not _is_open(port)


def test_the_demo_goes_the_whole_way(sample_cohort, model_knobs, run_python, tmp_path):
    picture = tmp_path / "overlay.png"
    options = [f"--{name}={value}" for name, value in model_knobs.items()]
    done = run_python(
        "-m",
        "scripts.integrations.orthanc_demo",
        "--cohort",
        sample_cohort,
        "--subjects",
        1,
        "--picture",
        picture,
        *options,
    )
    for words in ("holds 1 studies", "MR   SYNTHETIC FLAIR", "SEG  Anomaly mask", "12 frames rendered"):
        assert words in done.stdout
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[1] > 800
    cyan = (pixels[..., 1] > 200) & (pixels[..., 2] > 200) & (pixels[..., 0] < 90)
    assert cyan.sum() > 50  # the outline of the SEG


def _is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
