"""MONAI Label, really started by its command and driven over HTTP, on a folder and on the DICOMweb of an Orthanc."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from bundle.checkpoint import read_checkpoint, trained_settings
from bundle.errors import BundleError
from bundle.networks.detector import encode_identity
from scripts.checks.model_zoo import MODEL as IN_THE_ZOO
from scripts.checks.model_zoo import pack
from scripts.integrations.monai_label.__main__ import assemble, check_studies
from scripts.integrations.orthanc import running

ROOT = Path(__file__).parents[2]
MODEL = "dinov3_spatial_ar"
# as many slices in a batch as a volume has: batches are the same whether volumes come one by one or together
BATCH = 12
OWN_KNOBS = {"batch_size": BATCH, "channel": 1, "tracking_uri": "off"}


@contextmanager
def serving(studies, log, model_knobs, *options, seconds=3000, root=ROOT, **more):
    """The server that the command starts, until the block ends; the first one may have to install MONAI Label."""
    knobs = {key: value for key, value in model_knobs.items() if key != "checkpoint"}
    words = ["--studies", studies, "--checkpoint", model_knobs["checkpoint"], "--port", 0]
    words += [*(f"--{name}={value}" for name, value in {**knobs, "batch_size": BATCH, **more}.items()), *options]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MONAI_LABEL")}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.integrations.monai_label", *map(str, words)],
            cwd=root,
            env={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **clean, "HF_HUB_OFFLINE": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + seconds
        while "MONAI Label serves" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Server(re.search(r"MONAI Label serves .* at (http\S+)", log.read_text())[1], process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class Server:
    """What a client such as 3D Slicer asks a server for."""

    def __init__(self, url, process):
        self.url = url
        self.process = process

    def get(self, path, **options):
        return requests.get(f"{self.url}{path}", timeout=60, **options)

    def infer(self, image, output, **options):
        answer = requests.post(
            f"{self.url}/infer/{MODEL}", params={"image": image, "output": output}, timeout=600, **options
        )
        assert answer.status_code == 200, answer.text
        return answer

    def mask(self, image, **options):
        return nib.Nifti1Image.from_bytes(_unzipped(self.infer(image, "image", **options).content))

    def save_label(self, image, label):
        content = label.to_bytes()
        answer = requests.put(
            f"{self.url}/datastore/label",
            params={"image": image},
            files={"label": ("label.nii", io.BytesIO(content))},
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def train(self, **params):
        """Start a training in the background, as clients do, and wait for its end."""
        answer = requests.post(f"{self.url}/train/{MODEL}", json=params, timeout=60)
        assert answer.status_code == 200, answer.text
        end = time.monotonic() + 600
        while (task := self.get("/train/").json())["status"] in ("SUBMITTED", "RUNNING"):
            assert time.monotonic() < end, task
            time.sleep(0.5)
        return task


def _unzipped(content):
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _label(image, voxels=()):
    values = np.zeros(image.shape[:3], np.uint8)
    for voxel in voxels:
        values[voxel] = 1
    return nib.Nifti1Image(values, image.affine)


def _assert_own(found, output_dir, name="*", tie=1e-3):
    """The mask that ``inferring`` wrote, neither empty nor full, at the same place.

    Where the map is within ``tie`` of the threshold, other threads and batches may round to the other side.
    """
    own = nib.load(next(output_dir.glob(f"{name}_mask.nii.gz")))
    anomaly_map = nib.load(next(output_dir.glob(f"{name}_map.nii.gz"))).get_fdata()
    with (output_dir / "scores.csv").open() as stream:
        threshold = float(next(csv.DictReader(stream))["threshold"])
    values, expected = np.asarray(found.dataobj), np.asarray(own.dataobj)
    assert values.shape == expected.shape
    assert set(np.unique(values)) == {0, 1}
    clear = np.abs(anomaly_map - threshold) > tie
    np.testing.assert_array_equal(values[clear], expected[clear])
    assert clear.mean() > 0.99
    np.testing.assert_allclose(found.affine, own.affine, atol=1e-3)
    for code in ("qform_code", "sform_code"):
        assert found.header[code] == own.header[code]


def _oriented(image, axcodes):
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axcodes)))


def _turned(image, matrix):
    affine = np.eye(4)
    affine[:3, :3] = matrix
    return nib.Nifti1Image(np.asarray(image.dataobj), affine @ image.affine)


def variants(volume):
    """The volume on other grids."""
    cos, sin = np.cos(0.3), np.sin(0.3)
    about_x, about_z = (
        np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]),
        np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]),
    )
    return {
        "upright": volume,
        "oblique": _turned(volume, about_x @ about_z),
        "left_handed": _oriented(volume, "LAS"),
        "flipped": _oriented(volume, "LPI"),
        "slices_first": _oriented(volume, "SPR"),
        "oblique_left_handed": _turned(_oriented(volume, "ALS"), about_z @ about_x),
        "sheared": _turned(volume, np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]])),
        "anisotropic": _turned(volume, np.diag([1, 0.7, 1.5])),
        "channels": nib.Nifti1Image(np.stack([0 * volume.get_fdata(), volume.get_fdata()], -1), volume.affine),
    }


VARIANTS = ("upright", "oblique", "left_handed", "flipped", "slices_first", "oblique_left_handed", "sheared")
VARIANTS += ("anisotropic", "channels")


@pytest.fixture(scope="module")
def studies(sample_cohort, tmp_path_factory):
    """A folder with one lesioned subject on many grids, and a picture."""
    folder = tmp_path_factory.mktemp("studies")
    volume = nib.load(sample_cohort / "volumes" / "test" / "sub-0009_flair.nii.gz")
    for name, image in variants(volume).items():
        nib.save(image, folder / f"{name}.nii.gz")
    picture = max((sample_cohort / "slices" / "test" / "Ungood" / "img").glob("*.png"))
    Image.open(picture).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def own_masks(studies, model_knobs, run_bundle, tmp_path_factory):
    """What the bundle's own inference writes for the same files and checkpoint."""
    output = tmp_path_factory.mktemp("own")
    run_bundle(
        "inferring", "configs/inference.json", dataset_dir=studies, output_dir=output, **model_knobs, **OWN_KNOBS
    )
    return output


@pytest.fixture(scope="module")
def server(studies, own_masks, model_knobs, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(studies, log, model_knobs, channel=1) as started:
        started.log = log
        yield started


def test_the_server_offers_a_segmentation_of_anomaly(server):
    info = server.get("/info/").json()
    assert info["labels"] == ["anomaly"]
    assert list(info["models"]) == list(info["trainers"]) == [MODEL]
    model = info["models"][MODEL]
    assert (model["type"], model["labels"], model["dimension"]) == ("segmentation", {"anomaly": 1}, 3)
    assert info["datastore"]["total"] == len(VARIANTS) + 1


@pytest.mark.parametrize("name", VARIANTS)
def test_the_mask_is_the_bundles_own_on_every_grid(server, own_masks, name):
    _assert_own(server.mask(name), own_masks, name)


def test_the_mask_of_a_picture_is_the_bundles_own(server, own_masks):
    found = np.asarray(Image.open(io.BytesIO(server.infer("picture", "image").content)))
    own = np.asarray(Image.open(own_masks / "picture_mask.png"))
    assert own.any()
    np.testing.assert_array_equal(found > 0, own > 0)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists what is packed")
def test_the_unpacked_zip_of_the_zoo_serves_its_own_model(studies, own_masks, model_knobs, tmp_path):
    shutil.unpack_archive(pack(tmp_path, model_knobs["checkpoint"]), tmp_path)
    knobs = {**model_knobs, "checkpoint": IN_THE_ZOO}
    with serving(studies, tmp_path / "server.log", knobs, channel=1, root=tmp_path / MODEL) as server:
        _assert_own(server.mask("oblique"), own_masks, "oblique")


def test_scores_come_with_the_mask(server, own_masks, trained):
    result = server.infer("left_handed", "json").json()
    lines = (own_masks / "scores.csv").read_text().splitlines()
    own = dict(
        zip(
            lines[0].split(","),
            next(line for line in lines if line.startswith("left_handed,")).split(","),
            strict=False,
        )
    )
    state = torch.load(trained / "model.pt", weights_only=True)
    assert result["threshold"] == float(state["threshold"])
    assert result["image_threshold"] == float(state["image_threshold"])
    assert result["score"] == pytest.approx(float(own["score"]), rel=1e-5)
    assert result["worst_slices"] == [int(index) for index in own["worst_slices"].split()]
    assert result["slice_scores"][result["worst_slices"][0]] == result["score"]


def test_a_viewer_may_ask_for_another_format(server, own_masks, tmp_path):
    content = server.infer("oblique", "image", data={"params": json.dumps({"result_extension": ".nrrd"})}).content
    assert content.startswith(b"NRRD")


def test_an_unknown_image_is_said_in_one_line(server):
    answer = requests.post(f"{server.url}/infer/{MODEL}", params={"image": "nonesuch"}, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("no image 'nonesuch'")


def test_an_unreadable_image_is_said_in_one_line(server, studies):
    files = {"file": ("broken.nii.gz", b"no image")}
    answer = requests.post(f"{server.url}/infer/{MODEL}", params={"output": "image"}, files=files, timeout=60)
    assert answer.status_code == 422
    assert "cannot read" in answer.json()["detail"] and "\n" not in answer.json()["detail"]


def test_a_training_without_healthy_images_says_so(server, studies):
    server.save_label("flipped", _label(nib.load(studies / "flipped.nii.gz"), [(80, 90, 6)]))
    task = server.train(max_epochs=1)
    assert task["status"] == "ERROR"
    assert task["details"][-1].startswith("error: 0 of 1 labeled images have an empty label: save one for")
    answer = requests.post(f"{server.url}/train/{MODEL}", params={"run_sync": True}, json={}, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("0 of 1 labeled images")


def test_a_request_cannot_make_the_config_evaluate_text(server):
    params = {"max_epochs": "$__import__('os').abort()"}
    answer = requests.post(f"{server.url}/train/{MODEL}", params={"run_sync": True}, json=params, timeout=60)
    assert answer.status_code == 422
    assert "give one of" in answer.json()["detail"]


def test_only_this_machine_and_its_own_pages_are_answered(server):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass
    assert server.get("/info/", headers={"Origin": server.url}).status_code == 200
    assert server.get("/info/", headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert server.get("/info/", headers={"Host": "elsewhere.example"}).status_code == 400


def test_no_name_of_an_image_is_logged(server):
    server.mask("oblique_left_handed")
    assert "oblique_left_handed" not in server.log.read_text()


FORGED = "2026-01-01 00:00:00,000 ERROR root: forged"
FORGING = f"flair\n{FORGED}\r{FORGED}\x1b[31m\u2028{FORGED}"


def test_names_of_files_forge_no_line_of_a_log(sample_cohort, model_knobs, tmp_path):
    studies, apps = tmp_path / "studies", tmp_path / "apps"
    studies.mkdir()
    names = [f"{number}{FORGING}" for number in (1, 2)]
    for number, name in enumerate(names, start=1):
        volume = nib.load(sample_cohort / "volumes" / "train" / f"sub-000{number}_flair.nii.gz")
        volume.set_sform(None, 0)
        volume.set_qform(None, 0)  # of which a training warns
        nib.save(volume, studies / f"{name}.nii.gz")
    (studies / f"broken{FORGING}.nii.gz").write_bytes(b"no image")
    with serving(studies, tmp_path / "log", model_knobs, "--apps", apps, "--verbose") as server:
        for name in names:
            server.infer(name, "json")
            server.save_label(name, _label(nib.load(studies / f"{name}.nii.gz")))
        for name in (f"broken{FORGING}", f"nowhere{FORGING}"):
            answer = requests.post(f"{server.url}/infer/{MODEL}", params={"image": name}, timeout=60)
            assert answer.status_code == 422
        task = server.train(max_epochs=1)
        assert task["status"] == "DONE", task
    for log in ((tmp_path / "log").read_text(), (apps / "logs" / "app.log").read_text()):
        assert "Adding New Image: 1flair\\n2026" in log and "Adding Label: 1flair\\n2026" in log
        assert [line for line in log.splitlines() if "task_train" in line and FORGED in line]
        assert "\x1b" not in log
        assert not [line for line in log.splitlines() if line.startswith(FORGED)]
    assert not [line for line in task["details"] if line.startswith(FORGED)]


def test_healthy_labels_make_a_new_model_that_serves_the_next_request(sample_cohort, model_knobs, run_bundle, tmp_path):
    studies, apps = tmp_path / "studies", tmp_path / "apps"
    studies.mkdir()
    volumes = sample_cohort / "volumes"
    healthy = [f"sub-000{number}_flair" for number in (1, 2, 3)]
    files = {name: volumes / "train" / f"{name}.nii.gz" for name in healthy}
    files["sub-0009_flair"] = volumes / "test" / "sub-0009_flair.nii.gz"
    for name, file in files.items():
        (studies / f"{name}.nii.gz").write_bytes(file.read_bytes())
    with serving(studies, tmp_path / "log", model_knobs, "--apps", apps) as server:
        before = server.mask("sub-0009_flair")
        for name, file in files.items():
            voxels = [] if name in healthy else [(80, 90, 6)]
            assert server.save_label(name, _label(nib.load(file), voxels)) == {"image": name, "label": name}
        assert server.get("/datastore/").json() == {"total": 4, "completed": 4, "label_tags": {"final": 4}}
        task = server.train(max_epochs=2)
        assert task["status"] == "DONE", task
        after = server.mask("sub-0009_flair")
    assert not np.array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))

    bundle = apps / "model" / MODEL
    learned_from = json.loads((bundle / "healthy.json").read_text())["training"]
    assert sorted(Path(item["image"]).name.split(".")[0] for item in learned_from) == healthy
    knobs = {**model_knobs, "checkpoint": bundle / "models" / "model.pt", "batch_size": BATCH, "tracking_uri": "off"}
    source = files["sub-0009_flair"]
    run_bundle("inferring", "configs/inference.json", dataset_dir=source, output_dir=tmp_path / "own", **knobs)
    _assert_own(after, tmp_path / "own", "sub-0009_flair")

    # and it is the model that the command line makes of the same images
    knobs = {**knobs, "checkpoint": tmp_path / "trained" / "model.pt", "max_epochs": 2}
    data = {"dataset_dir": bundle / "healthy.json", "output_dir": tmp_path / "trained"}
    run_bundle("training", "configs/train.json", **data, **knobs)
    served, own = (torch.load(path, weights_only=True) for path in (bundle / "models/model.pt", knobs["checkpoint"]))
    assert served.keys() == own.keys()
    # Adam turns a rounding of a gradient near zero into a step of its own; directions of about equal variance may turn
    for key in served.keys() - {"slice_likeness.directions"}:
        torch.testing.assert_close(served[key], own[key], rtol=1e-2, atol=1e-2)

    # which the same folder goes on with, and no other replaces unasked
    with serving(
        studies, tmp_path / "log2", {**model_knobs, "checkpoint": bundle / "models/model.pt"}, "--apps", apps
    ) as server:
        _assert_own(server.mask("sub-0009_flair"), tmp_path / "own", "sub-0009_flair")


def test_a_model_that_was_trained_is_not_replaced_unasked(model_knobs, trained, run_python, tmp_path):
    models = tmp_path / "apps" / "model" / MODEL / "models"
    models.mkdir(parents=True)
    (models / "model.pt").write_bytes(b"another model")
    done = run_python(*_words(tmp_path, trained / "model.pt"), "--apps", tmp_path / "apps", check=False)
    assert "is another model, maybe trained there: leave --checkpoint out" in _error(done)
    assert (models / "model.pt").read_bytes() == b"another model"


@dataclass
class Archived:
    """MONAI Label on an Orthanc whose series are known by names of this file."""

    server: Server
    series: dict
    log: Path


def _changed(source, folder, change):
    """A copy of a series with another header."""
    folder.mkdir()
    for file in sorted(source.glob("*.dcm")):
        image = dcmread(file)
        change(image)
        image.save_as(folder / file.name)
    return folder


def _stored(folder, orthanc):
    orthanc.store(folder)
    return str(dcmread(next(folder.glob("*.dcm"))).SeriesInstanceUID)


def _of_other_words(image):
    image.SeriesDescription, image.ContrastBolusAgent = "Ax T1 of SecretPerson", "Gadovist"
    image.SeriesInstanceUID = f"{image.SeriesInstanceUID}.1"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{image.SOPInstanceUID}.1"


def _as_ct(image):
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    image.Modality = "CT"
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = -500, 1, "HU"


@pytest.fixture(scope="module")
def folders(cohort_dicom, tmp_path_factory):
    """Series by name: one of the cohort, one that says other words of itself, one that lacks a slice."""
    folder = tmp_path_factory.mktemp("archived")
    lesioned = cohort_dicom / "test" / "sub-0009"
    lacking = folder / "lacking"
    shutil.copytree(cohort_dicom / "test" / "sub-0010", lacking)
    sorted(lacking.glob("*.dcm"))[5].unlink()
    return {
        "lesioned": lesioned,
        "other_words": _changed(lesioned, folder / "other_words", _of_other_words),
        "lacking": lacking,
    }


@pytest.fixture(scope="module")
def archived(folders, model_knobs, tmp_path_factory):
    """A server for :func:`folders`, in half precision."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running() as orthanc:
        series = {name: _stored(folder, orthanc) for name, folder in folders.items()}
        with serving(orthanc.dicomweb_url, log, model_knobs, precision="bf16") as server:
            yield Archived(server, series, log)


def _own_result(run_bundle, knobs, source, output):
    """What the bundle's own inference writes of a series, and its row of scores."""
    knobs = {**knobs, "batch_size": BATCH, "tracking_uri": "off"}
    run_bundle("inferring", "configs/inference.json", dataset_dir=source, output_dir=output, **knobs)
    with (output / "scores.csv").open() as stream:
        return next(csv.DictReader(stream))


def _dicom_seg(server, series):
    params = json.dumps({"label_info": [{"name": "anomaly"}]})
    return dcmread(io.BytesIO(server.infer(series, "dicom_seg", data={"params": params}).content))


def test_a_series_of_a_dicomweb_server_gets_the_mask_of_the_bundle(
    archived, folders, model_knobs, run_bundle, tmp_path
):
    _own_result(run_bundle, {**model_knobs, "precision": "bf16"}, folders["lesioned"], tmp_path / "own")
    series = archived.series["lesioned"]
    _assert_own(archived.server.mask(series), tmp_path / "own")
    seg = _dicom_seg(archived.server, series)
    assert seg.Modality == "SEG"
    assert seg.SegmentSequence[0].SegmentLabel == "anomaly"
    assert series not in archived.log.read_text()


def test_what_headers_of_a_series_tell_is_compared_in_the_words_of_the_bundle(
    archived, folders, model_knobs, run_bundle, tmp_path
):
    own = _own_result(run_bundle, {**model_knobs, "precision": "bf16"}, folders["other_words"], tmp_path / "own")
    assert own["unlike"].startswith("sequence t1, learned from flair")
    doubt = f"the image is unlike the training data, its map may mean nothing: {own['unlike']}"
    server, series = archived.server, archived.series["other_words"]
    assert server.infer(series, "json").json()["unlike"] == own["unlike"]
    asked = {"params": {"image": series, "output": "dicom_seg"}, "timeout": 60}
    answer = requests.post(f"{server.url}/infer/{MODEL}", **asked)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(doubt)
    assert np.asarray(server.mask(series).dataobj).any()
    log = archived.log.read_text()
    assert doubt in log
    assert "SecretPerson" not in log and series not in log


def test_a_series_that_lacks_a_slice_is_refused(archived):
    params = {"image": archived.series["lacking"]}
    answer = requests.post(f"{archived.server.url}/infer/{MODEL}", params=params, timeout=60)
    assert answer.status_code == 422
    assert "lacks slices" in answer.json()["detail"]


@pytest.fixture(scope="module")
def ct_folders(cohort_dicom, tmp_path_factory):
    """Two series as CT."""
    folder = tmp_path_factory.mktemp("ct")
    return [_changed(cohort_dicom / "test" / name, folder / name, _as_ct) for name in ("sub-0009", "sub-0010")]


@pytest.fixture(scope="module")
def telling(model_knobs, tmp_path_factory):
    """A model of which kind an image is, its header tells."""
    state = read_checkpoint(model_knobs["checkpoint"])
    checkpoint = tmp_path_factory.mktemp("telling") / "model.pt"
    torch.save({**state.state, "identity": encode_identity(state.identity | {"intensity": "auto"})}, checkpoint)
    return {**model_knobs, "checkpoint": checkpoint}


@pytest.fixture(scope="module")
def archived_ct(ct_folders, telling, tmp_path_factory):
    """A server for :func:`ct_folders`, which segments what is unlike the training data, too."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running() as orthanc:
        series = {folder.name: _stored(folder, orthanc) for folder in ct_folders}
        with serving(orthanc.dicomweb_url, log, telling, "--modality", "CT", segment_unlike="true") as server:
            yield Archived(server, series, log)


@pytest.fixture(scope="module")
def own_ct(ct_folders, telling, run_bundle, tmp_path_factory):
    output = tmp_path_factory.mktemp("own_ct")
    return output, _own_result(run_bundle, telling, ct_folders[0], output)["unlike"]


def test_a_ct_series_of_a_dicomweb_server_is_windowed_as_the_bundle_does(archived_ct, own_ct):
    output, unlike = own_ct
    assert "intensities read as ct_soft_tissue" in unlike
    series = archived_ct.series["sub-0009"]
    _assert_own(archived_ct.server.mask(series), output)
    assert archived_ct.server.infer(series, "json").json()["unlike"] == unlike


def test_what_is_unlike_is_segmented_by_a_server_that_was_told_so(archived_ct, own_ct):
    _, unlike = own_ct
    assert unlike
    assert _dicom_seg(archived_ct.server, archived_ct.series["sub-0009"]).Modality == "SEG"


def test_a_training_on_ct_by_what_headers_tell_is_refused(archived_ct):
    server = archived_ct.server
    for name in archived_ct.series.values():
        server.save_label(name, _label(server.mask(name)))
    task = server.train(max_epochs=1)
    assert task["status"] == "ERROR"
    assert task["details"][-1].startswith("error: the model was trained with intensity auto, but MONAI Label hands")


def test_series_of_a_dicomweb_server_train_a_new_model(empty_orthanc, cohort_dicom, model_knobs, run_bundle, tmp_path):
    folders = [cohort_dicom / "train" / f"sub-000{number}" for number in (1, 2, 3)]
    lesioned = cohort_dicom / "test" / "sub-0009"
    series = {}
    for folder in (*folders, lesioned):
        empty_orthanc.store(folder)
        series[folder] = str(dcmread(next(folder.glob("*.dcm"))).SeriesInstanceUID)
    apps = tmp_path / "apps"
    with serving(empty_orthanc.dicomweb_url, tmp_path / "log", model_knobs, "--apps", apps) as server:
        before = server.mask(series[lesioned])
        for folder in folders:
            server.save_label(series[folder], _label(server.mask(series[folder])))
        server.save_label(series[lesioned], _label(before, [(80, 90, 6)]))
        assert server.get("/datastore/").json()["label_tags"] == {"healthy": 3, "final": 1}
        task = server.train(max_epochs=2)
        assert task["status"] == "DONE", task
        after = server.mask(series[lesioned])
    assert not np.array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    bundle = apps / "model" / MODEL
    learned_from = json.loads((bundle / "healthy.json").read_text())["training"]
    assert {Path(item["image"]).name.removesuffix(".nii.gz") for item in learned_from} == {series[f] for f in folders}
    assert len({item["patient"] for item in learned_from}) == 3
    patient = str(dcmread(next(lesioned.glob("*.dcm"))).PatientID)
    assert patient not in json.dumps(learned_from)
    found = requests.get(f"{empty_orthanc.dicomweb_url}/series", params={"Modality": "SEG"}, timeout=60).json()
    assert len(found) == 1
    knobs = {**model_knobs, "checkpoint": bundle / "models" / "model.pt", "batch_size": BATCH, "tracking_uri": "off"}
    run_bundle("inferring", "configs/inference.json", dataset_dir=lesioned, output_dir=tmp_path / "own", **knobs)
    _assert_own(after, tmp_path / "own")


def test_ctrl_c_ends_server_and_training_and_leaves_nothing(sample_cohort, model_knobs, tmp_path, monkeypatch):
    studies, temporary = tmp_path / "studies", tmp_path / "temporary"
    studies.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    names = ("sub-0001_flair", "sub-0002_flair")
    for name in names:
        shutil.copy(sample_cohort / "volumes" / "train" / f"{name}.nii.gz", studies)
    with serving(studies, tmp_path / "log", model_knobs, patience=0) as server:
        for name in names:
            server.save_label(name, _label(nib.load(studies / f"{name}.nii.gz")))
        answer = requests.post(f"{server.url}/train/{MODEL}", json={"max_epochs": 100000}, timeout=60)
        assert answer.status_code == 200
        while len(processes := _children(server.process.pid)) < 2:
            time.sleep(0.2)
        while server.get("/train/").json()["status"] == "SUBMITTED":
            time.sleep(0.2)
        assert server.get("/train/").json()["status"] == "RUNNING"
        assert list(temporary.iterdir())
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
        with pytest.raises(requests.ConnectionError):
            server.get("/info/")
    assert server.process.returncode == 0
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert not list(temporary.iterdir())


def _children(pid):
    """All that a process has started, and what these have."""
    own = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return own + [child for one in own for child in _children(one)]


def _words(studies, checkpoint):
    return ["-m", "scripts.integrations.monai_label", "--studies", studies, "--checkpoint", checkpoint, "--port", 0]


def _error(done):
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_checkpoint_of_another_detector_is_refused_before_anything_starts(trained, run_python, tmp_path):
    done = run_python(*_words(tmp_path, trained / "model.pt"), "--slice_plane=coronal", check=False)
    assert _error(done).startswith("error: the model was trained with slice_plane 'acquired', not 'coronal'")


def test_wrong_studies_are_said_in_one_line(tmp_path):
    for studies, modality, line in (
        (tmp_path / "nowhere", "MR", "no folder at"),
        ("http://127.0.0.1:1/dicom-web", "MR", "no DICOMweb at"),
    ):
        with pytest.raises(BundleError, match=line):
            check_studies(str(studies), modality)


def test_the_bundle_that_is_served_trains_with_the_settings_of_its_model(model_knobs, tmp_path):
    copy = assemble(tmp_path, model_knobs["checkpoint"], {"batch_size": "3", "patience": "0", "model::channel": "1"})
    training, inference = (json.loads((copy / f"configs/{name}.json").read_text()) for name in ("train", "inference"))
    assert training["model"] == dict(trained_settings(model_knobs["checkpoint"], {"channel": 1}))
    assert (inference["model"], inference["batch_size"], training["patience"]) == ({"channel": 1}, 3, 0)


HOSTILE = "$__import__('pathlib').Path('ran').touch()"


def test_a_hostile_checkpoint_is_refused_before_a_config_holds_its_values(model_knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    state = read_checkpoint(model_knobs["checkpoint"])
    torch.save({**state.state, "identity": encode_identity(state.identity | {"mode": HOSTILE})}, tmp_path / "bad.pt")
    with pytest.raises(BundleError, match="mode"):
        assemble(tmp_path / "apps", tmp_path / "bad.pt", {})
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "apps").exists()


def test_wrong_checkpoints_and_knobs_are_said_in_one_line(model_knobs, tmp_path):
    checkpoint = model_knobs["checkpoint"]
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(1)}, other)
    for file, more, line in (
        (tmp_path / "nowhere.pt", {}, "no checkpoint at"),
        (None, {}, "no model in"),
        (other, {}, "is no checkpoint of this bundle"),
        (checkpoint, {"slice_plain": "axial"}, "did you mean 'slice_plane'"),
        (checkpoint, {"output_dir": "x"}, "is set by this command"),
    ):
        with tempfile.TemporaryDirectory(dir=tmp_path) as apps, pytest.raises(BundleError, match=line):
            assemble(Path(apps), file, more)
