"""The application on MONAI Deploy, in its own environment, where neither the bundle nor its checkout is at hand."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from dicomweb_client import DICOMwebClient
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import BasicTextSRStorage, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from bundle.checkpoint import read_checkpoint
from bundle.dicom.mr import SeriesIdentity, mr_series, write_series
from bundle.dicom.series import read_volume
from bundle.errors import BundleError
from bundle.inferers import SliceBatchInferer
from bundle.model import Settings
from bundle.networks.detector import encode_identity
from bundle.results import heat
from bundle.servers import HOST
from bundle.transforms import OrientSlicesd, ScaleIntensityByModalityd
from scripts.integrations.environments import default_base, environment
from scripts.integrations.monai_deploy.package import APPLICATION, CONFIGS, make_application
from scripts.integrations.monai_deploy.recipe import embedded_configs
from scripts.integrations.monai_deploy.study import StudyDetector

ROOT = Path(__file__).parents[2]
SUBJECT = "sub-0009"
# a name that highdicom warns of, since it has one part
PATIENT_ID, NAME, DESCRIPTION = "SECRET-1", "SecretPerson", "UNCOMMON description"
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.3, 0.1) @ np.diag([-1.0, 1.5, -4.0]), [40, -12, 70])
SAGITTAL = np.array([[0, 0, 4.0, -30], [-1.5, 0, 0, 70], [0, 1.0, 0, -60], [0, 0, 0, 1]])

# the SDK's own operators alone: what anybody can make of model.ts
STOCK = """
import sys
from pathlib import Path
from typing import Any
import numpy as np
from holoscan.conditions import CountCondition
from monai.deploy import operators as sdk
from monai.deploy.core import AppContext, Application, IOType, Operator

study, model, out = map(Path, sys.argv[1:])
context = AppContext({"model": str(model)})

class Keep(Operator):
    def setup(self, spec):
        spec.input("mask")
        spec.input("map")
    def compute(self, op_input, op_output, context):
        np.savez(out, mask=op_input.receive("mask").asnumpy(), map=op_input.receive("map"))

class Stock(Application):
    def compose(self):
        loader = sdk.DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=study, name="loader")
        selector = sdk.DICOMSeriesSelectorOperator(self, rules="", name="selector")
        volume = sdk.DICOMSeriesToVolumeOperator(self, name="volume")
        found = ("mask", "map", "slice_scores", "slice_counts", "score", "unlikeness", "shown")
        inference = sdk.MonaiBundleInferenceOperator(
            self, name="inference", app_context=context,
            input_mapping=[sdk.IOMapping("image", Any, IOType.IN_MEMORY)],
            output_mapping=[sdk.IOMapping(name, Any, IOType.IN_MEMORY) for name in found],
        )
        keep = Keep(self, name="keep")
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, inference, {("image", "image")})
        self.add_flow(inference, keep, {("mask", "mask"), ("map", "map")})
        for name in found[2:]:
            self.add_flow(inference, Drop(self, name=name), {(name, "value")})

class Drop(Operator):
    def setup(self, spec):
        spec.input("value")
    def compute(self, op_input, op_output, context):
        op_input.receive("value")

Stock().run()
"""


@pytest.fixture(scope="session")
def deploy_python():
    return environment(APPLICATION / "requirements.txt", default_base(), "monai_deploy")


@pytest.fixture(scope="session")
def packaged(run_python, trained, tmp_path_factory):
    """A folder with the application and model.ts, away from the checkout."""
    folder = tmp_path_factory.mktemp("packaged")
    run_python("-m", "scripts.integrations.monai_deploy", "--checkpoint", trained / "model.pt", "--output_dir", folder)
    return folder


def run_deploy(python, *words, **variables):
    """A Python program in MONAI Deploy's environment, with no folder but its own on the path."""
    clean = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [str(python), *map(str, words)],
        cwd="/",
        env=clean | {key: str(value) for key, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def run_app(deploy_python, packaged):
    def run(study, output, *words, check=True, folder=packaged, **variables):
        model = folder / "model.ts"
        done = run_deploy(
            deploy_python, folder / "application", "-i", study, "-o", output, "-m", model, *words, **variables
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def identity(number=1, description=DESCRIPTION, **of):
    uids = {key: of.get(key) or generate_uid() for key in ("study_uid", "series_uid", "frame_of_reference_uid")}
    return SeriesIdentity(PATIENT_ID, NAME, series_description=description, series_number=number, **uids)


def volume_of(seed=0, shape=(48, 40, 9)):
    """A bright ellipsoid in the dark with random texture."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij"))
    texture = np.random.default_rng(seed).integers(100, 900, shape)
    return np.where((grid**2).sum(0) < 1.2, texture, 0).astype(np.uint16)


def write_shuffled(images, folder):
    """The files of a series with names that say nothing of their order."""
    files = write_series(images, folder)
    for number, file in zip(random.Random(0).sample(range(len(files)), len(files)), files, strict=True):
        file.rename(folder / f"{number:03}.dcm")
    return folder


def as_ct(image):
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    image.Modality = "CT"
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = -500, 1, "HU"
    return image


@dataclass
class Results:
    """What the application left of a study, and what the bundle itself finds."""

    study: Path
    objects: Path
    log: str
    own: Path
    name: str

    @property
    def score(self):
        (row,) = csv.DictReader((self.own / "scores.csv").open())
        return row

    def grid(self, kind):
        """Values and affine of a NIfTI file that the bundle wrote."""
        image = nib.load(self.own / f"{self.name}_{kind}.nii.gz")
        return np.asarray(image.dataobj), image.affine


@pytest.fixture(scope="session")
def examine(run_app, run_bundle, model_knobs, packaged, tmp_path_factory):
    """Both ways of examining one series: ``series`` alone for the bundle, all of ``study`` for the application."""

    def run(study, series, folder=packaged, rules=APPLICATION / "app.yaml", **knobs):
        output = tmp_path_factory.mktemp("examined")
        own = output / "own"
        knobs = {**model_knobs, **knobs}
        run_bundle("inferring", "configs/inference.json", dataset_dir=series, output_dir=own, **knobs)
        done = run_app(study, output / "deploy", folder=folder, HOLOSCAN_CONFIG_PATH=rules)
        (file,) = own.glob("*_map.nii.gz")
        return Results(study, output / "deploy", done.stdout + done.stderr, own, file.name.removesuffix("_map.nii.gz"))

    return run


@pytest.fixture(scope="session")
def examined(examine, cohort_dicom, tmp_path_factory):
    """A subject of the sample cohort in a study with a localizer, a shorter series, a text and an older result."""
    study = tmp_path_factory.mktemp("study")
    series = study / "a" / "series"
    shutil.copytree(cohort_dicom / "test" / SUBJECT, series)
    first = dcmread(next(series.iterdir()))
    of = {"study_uid": first.StudyInstanceUID, "frame_of_reference_uid": first.FrameOfReferenceUID}
    localizer = mr_series(volume_of(shape=(48, 40, 20)), OBLIQUE, identity(7, "localizer", **of))
    shorter = mr_series(volume_of(shape=(48, 40, 3)), SAGITTAL, identity(8, "short", **of))
    for image in chain(localizer, shorter):
        image.PatientID, image.PatientName = first.PatientID, first.PatientName
    for image in localizer:
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series(localizer, study / "localizer")
    write_series(shorter, study / "shorter")
    (study / "notes.txt").write_text("no DICOM")
    older = Dataset()
    older.file_meta = FileMetaDataset()
    older.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    older.SOPClassUID = older.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    older.SOPInstanceUID = older.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    older.StudyInstanceUID, older.SeriesInstanceUID = first.StudyInstanceUID, generate_uid()
    older.Modality, older.SeriesNumber = "SR", None
    older.save_as(study / "older.dcm", enforce_file_format=True)
    return examine(study, series)


def on_grid(values, affine, target, shape):
    """``values`` at the voxels of another grid that has the same points."""
    index = np.linalg.inv(affine) @ target @ np.stack([*np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])
    whole = index[:3].round().astype(int)
    assert np.abs(index[:3] - whole).max() < 0.01
    return values[tuple(whole)].reshape(shape)


def assert_same(results):
    """The application's objects hold the bundle's own mask, map and scores, at the same places in the patient."""
    mask, affine = results.grid("mask")
    anomaly_map, _ = results.grid("map")
    volume = hd.seg.segread(results.objects / "anomaly_seg.dcm").get_volume(combine_segments=True)
    expected = on_grid(mask, affine, volume.get_affine("RAH"), volume.spatial_shape)
    assert 0 < expected.sum() == mask.sum()
    np.testing.assert_array_equal(volume.array, expected)
    volume = hd.imread(results.objects / "anomaly_heatmap.dcm").get_volume()
    expected = on_grid(anomaly_map, affine, volume.get_affine("RAH"), volume.spatial_shape)
    assert np.abs(volume.array - heat(expected, float(results.score["threshold"]))).max() < 1e-4
    assert measured(results, "anomaly-score") == pytest.approx([float(results.score["score"])], abs=0.006)


def measured(results, concept):
    """Numbers of the report under one concept."""

    numbers = _items(dcmread(results.objects / "anomaly_report.dcm"), "NUM")
    coded = [(item.ConceptNameCodeSequence[0], item.MeasuredValueSequence[0].NumericValue) for item in numbers]
    return [float(value) for name, value in coded if concept in (name.get("CodeValue"), name.get("LongCodeValue"))]


def error_line(done):
    """The one line that the application ends with."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def configured(path, **settings):
    """A copy of app.yaml with other settings."""
    path.write_text(yaml.safe_dump(yaml.safe_load((APPLICATION / "app.yaml").read_text()) | settings))
    return path


def chosen(**conditions):
    return [{"name": "mine", "conditions": conditions}]


def selecting(path, **conditions):
    """A copy of app.yaml with one selection."""
    return configured(path, selections=chosen(**conditions))


def test_the_application_finds_what_the_bundle_finds(examined):
    assert_same(examined)


def test_the_command_of_the_docs_sends_all_results_to_an_archive(examined, empty_orthanc):
    (line,) = re.findall(r"^storescu .*", (ROOT / "docs" / "monai_deploy.md").read_text(), re.MULTILINE)
    meant = {"HOST": HOST, "PORT": str(empty_orthanc.dicom_port), "FOUND": str(examined.objects)}
    subprocess.run([meant.get(word, word) for word in line.split()], check=True)
    written = {str(dcmread(file).SOPInstanceUID) for file in examined.objects.rglob("*.dcm")}
    stored = DICOMwebClient(empty_orthanc.dicomweb_url).search_for_instances()
    assert {one["00080018"]["Value"][0] for one in stored} == written
    assert len(written) == 3 + len(list((examined.objects / "anomaly_overlay").iterdir()))


def test_the_report_names_the_worst_slices(examined):
    with (examined.own / "slice_scores.csv").open() as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["rank"]))[:3]
    worst = measured(examined, "slice-anomaly-score")
    assert worst == pytest.approx([float(row["score"]) for row in rows], abs=0.006)  # two decimals
    report = dcmread(examined.objects / "anomaly_report.dcm")
    instances = {dcmread(file).SOPInstanceUID: file.name for file in (examined.study / "a" / "series").iterdir()}
    named = [
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for group in _items(report, "CONTAINER")
        for item in group.get("ContentSequence", ())
        if item.ValueType == "IMAGE"
    ]
    assert [instances[uid] for uid in named] == [f"IM{int(row['instance']):04}.dcm" for row in rows]


def _items(dataset, kind):
    for child in dataset.get("ContentSequence", ()):
        if child.get("ValueType") == kind:
            yield child
        yield from _items(child, kind)


def test_other_series_and_objects_are_passed_over_and_counted(examined):
    assert "passed over 22 files (" in examined.log
    assert "1 series of 2, 1 passed over" in examined.log


def test_nothing_of_a_patient_is_logged_unless_for_debugging(run_app, tmp_path):
    images = mr_series(volume_of(), OBLIQUE, identity())
    write_series(images, tmp_path / "study")
    rules = selecting(tmp_path / "mine.yaml", SeriesDescription=DESCRIPTION.lower(), Modality="MR")
    quiet = run_app(tmp_path / "study", tmp_path / "out", HOLOSCAN_CONFIG_PATH=rules)
    chatty = run_app(tmp_path / "study", tmp_path / "out", "--log-level", "DEBUG", HOLOSCAN_CONFIG_PATH=rules)
    private = {NAME, PATIENT_ID, DESCRIPTION, images[0].StudyInstanceUID, images[0].SeriesInstanceUID}
    assert not [word for word in private if word in quiet.stdout + quiet.stderr]
    assert images[0].SeriesInstanceUID in chatty.stdout + chatty.stderr


@pytest.mark.parametrize("affine", [OBLIQUE, SAGITTAL], ids=["oblique", "sagittal"])
def test_a_series_in_any_direction_and_order_gets_its_own_slices(examine, tmp_path, affine):
    series = write_shuffled(mr_series(volume_of(), affine, identity()), tmp_path / "series")
    assert_same(examine(series, series))


def test_ct_is_windowed_as_the_bundle_does(examine, tmp_path):
    images = map(as_ct, mr_series(volume_of(), OBLIQUE, identity()))
    series = write_shuffled(images, tmp_path / "series")
    assert_same(examine(series, series))


def answers(report):
    """What a report says in words, as codes."""
    coded = [(item.ConceptNameCodeSequence[0], item.ConceptCodeSequence[0]) for item in _items(dcmread(report), "CODE")]
    code = [[one.get("CodeValue") or one.get("LongCodeValue") for one in pair] for pair in coded]
    return [value for name, value in code if name == "unlike-reason"]


@pytest.fixture(scope="module")
def unlike(examine, model_knobs, tmp_path_factory):
    """A CT whose header tells much, examined with a model of MR, and the folder of that application."""
    folder = tmp_path_factory.mktemp("unlike")
    state = read_checkpoint(model_knobs["checkpoint"]).state
    words = {"modality": {"MR": 6}, "sequence": {"flair": 6}, "kernel": {"soft": 6}, "scheme": {"ct_brain": 6}}
    summary = json.dumps({"cases": words, "patients": 2, "of_volumes": True}).encode()
    knowing = folder / "model.pt"
    torch.save({**state, "case_likeness.summary": torch.tensor(list(summary), dtype=torch.uint8)}, knowing)
    make_application(knowing, folder / "packaged")
    rules = selecting(folder / "any.yaml", Modality="CT")
    images = list(map(as_ct, mr_series(volume_of(), OBLIQUE, identity(description=f"Ax T1 of {NAME}"))))
    for image in images:
        image.ConvolutionKernel = "Br64f"
    series = write_shuffled(images, folder / "series")
    results = examine(series, series, folder / "packaged", rules, checkpoint=knowing, write_dicom="true")
    return results, folder / "packaged"


def doubt_of(results):
    return f"the series is unlike the training data, its map may mean nothing: {results.score['unlike']}"


def test_what_headers_tell_holds_the_segmentation_back_in_the_words_of_the_bundle(run_app, unlike, tmp_path):
    results, folder = unlike
    done = run_app(results.study, tmp_path / "refused", check=False, folder=folder)
    assert "(as learned: modality CT, which the model has not learned from)" in error_line(done)
    assert results.score["unlike"].startswith(
        "modality CT, learned from MR; sequence t1, learned from flair; kernel sharp, learned from soft; "
        "intensities read as mr, learned from ct_brain"
    )
    assert f"{doubt_of(results)}; no segmentation is written\n" in results.log
    assert NAME not in results.log
    own = next(results.own.glob("*_report.dcm"))
    assert answers(results.objects / "anomaly_report.dcm") == answers(own)
    assert answers(own)[:4] == ["other-modality", "other-sequence", "other-kernel", "other-intensities"]
    written = {path.name for path in results.objects.iterdir()}
    assert written == {"anomaly_heatmap.dcm", "anomaly_overlay", "anomaly_report.dcm"}


def test_a_user_gets_the_segmentation_of_what_is_unlike_if_app_yaml_says_so(run_app, unlike, tmp_path):
    results, folder = unlike
    config = configured(tmp_path / "mine.yaml", selections=chosen(Modality="CT"), segment_unlike=True)
    done = run_app(results.study, tmp_path / "out", folder=folder, HOLOSCAN_CONFIG_PATH=config)
    assert f"{doubt_of(results)}\n" in done.stderr
    assert_same(replace(results, objects=tmp_path / "out"))


@pytest.mark.parametrize(("value", "words"), [("'false'", "is false: give true or false"), ("", "has no 'segment_un")])
def test_a_wrong_setting_is_one_line_and_no_result(run_app, unlike, tmp_path, value, words):
    config = tmp_path / "mine.yaml"
    shipped = (APPLICATION / "app.yaml").read_text()
    config.write_text(shipped.replace("segment_unlike: false", f"segment_unlike: {value}"))
    results, folder = unlike
    done = run_app(results.study, tmp_path / "out", folder=folder, check=False, HOLOSCAN_CONFIG_PATH=config)
    assert words in error_line(done)
    assert not list(tmp_path.glob("out/*"))


FORGED = "[2026-01-01 00:00:00,000] [ERROR] (root) - forged"
HOSTILE = f"flair\n{FORGED}\r{FORGED}\x1b[31m\u2028{FORGED}"


def assert_nothing_forged(log):
    assert "forged" in log and "\x1b" not in log
    assert not [line for line in log.splitlines() if line.startswith(FORGED)]


def test_headers_and_names_of_files_forge_no_line_of_the_log(run_app, tmp_path):
    study = tmp_path / "study"
    with disable_value_validation():
        files = write_series(mr_series(volume_of(), OBLIQUE, identity(description=HOSTILE)), study)
    localizer = mr_series(volume_of(), OBLIQUE, identity())[0]
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series([localizer], tmp_path / "localizer")[0].rename(study / f"{HOSTILE}.dcm")
    rules = selecting(tmp_path / "mine.yaml", SeriesDescription="flair")
    done = run_app(study, tmp_path / "out", "-l", "DEBUG", HOLOSCAN_CONFIG_PATH=rules)
    assert f"passed over: '{study}/flair\\n[2026" in done.stderr
    assert_nothing_forged(done.stdout + done.stderr)
    files[0].write_bytes(files[0].read_bytes()[:-500])
    files[0].rename(study / f"{HOSTILE}.dcm")
    done = run_app(study, tmp_path / "out", "-l", "DEBUG", check=False, HOLOSCAN_CONFIG_PATH=rules)
    assert "cannot read" in error_line(done) and "forged" in error_line(done)
    assert_nothing_forged(done.stdout + done.stderr)


def test_a_user_chooses_the_series_without_touching_python(run_app, tmp_path):
    study = generate_uid()
    wanted = mr_series(volume_of(), OBLIQUE, identity(1, "Ax T2 FLAIR", study_uid=study))
    write_series(wanted, tmp_path / "study" / "a")
    write_series(
        mr_series(volume_of(shape=(48, 40, 12)), OBLIQUE, identity(2, "T1", study_uid=study)), tmp_path / "study" / "b"
    )
    rules = selecting(tmp_path / "mine.yaml", Modality="MR", SeriesDescription="flair")
    run_app(tmp_path / "study", tmp_path / "out", HOLOSCAN_CONFIG_PATH=rules)
    found = dcmread(tmp_path / "out" / "anomaly_seg.dcm")
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == wanted[0].SeriesInstanceUID
    rules = selecting(tmp_path / "any.yaml", Modality="MR")
    run_app(tmp_path / "study", tmp_path / "others", HOLOSCAN_CONFIG_PATH=rules)
    found = dcmread(tmp_path / "others" / "anomaly_heatmap.dcm")
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID != wanted[0].SeriesInstanceUID


def test_no_matching_series_is_one_line_and_no_result(run_app, examined, tmp_path):
    rules = selecting(tmp_path / "mine.yaml", Modality="PT")
    done = run_app(examined.study, tmp_path / "out", check=False, HOLOSCAN_CONFIG_PATH=rules)
    assert "none of 2 series matches the selections of app.yaml (mine: Modality without 'PT')" in error_line(done)
    assert not list((tmp_path / "out").iterdir())


def drop_third(images):
    return images[:2] + images[3:]


def two_at_one_position(images):
    images[4].ImagePositionPatient = images[3].ImagePositionPatient
    return images


def tilt(images):
    for number, image in enumerate(images):
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [x, round(float(y) + number, 4), z]
    return images


def only_one(images):
    return images[:1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_third, "lacks slices"),
        (two_at_one_position, "several slices at one position"),
        (only_one, "has one slice"),
        (tilt, "tilted gantry"),
    ],
)
def test_a_series_that_is_no_volume_is_one_line_and_no_result(run_app, tmp_path, damage, words):
    write_series(damage(mr_series(volume_of(), OBLIQUE, identity())), tmp_path / "study")
    done = run_app(tmp_path / "study", tmp_path / "out", check=False)
    assert words in error_line(done)
    assert not list((tmp_path / "out").iterdir())


def test_a_truncated_slice_is_one_line_and_no_result(run_app, tmp_path):
    files = write_series(mr_series(volume_of(), OBLIQUE, identity()), tmp_path / "study")
    files[-1].write_bytes(files[-1].read_bytes()[:-500])
    done = run_app(tmp_path / "study", tmp_path / "out", check=False)
    assert "cannot read" in error_line(done)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_of_another_hash_is_not_run(run_app, packaged, examined, tmp_path):
    (tmp_path / "model.ts").write_bytes((packaged / "model.ts").read_bytes() + b" ")
    done = run_app(examined.study, tmp_path / "out", "-m", tmp_path / "model.ts", check=False)
    assert "is not the model that this application was made with" in error_line(done)
    assert not list(tmp_path.glob("out/*"))


def test_two_studies_are_refused(run_app, tmp_path):
    for number in (1, 2):
        write_series(mr_series(volume_of(), OBLIQUE, identity(number)), tmp_path / "study" / f"{number}")
    done = run_app(tmp_path / "study", tmp_path / "out", check=False)
    assert "series of 2 studies match" in error_line(done)


def test_results_go_to_the_archive_and_are_found_there(examined, orthanc):
    orthanc.store(examined.study / "a" / "series")
    orthanc.store(examined.objects)
    source = dcmread(next((examined.study / "a" / "series").iterdir()))
    client = DICOMwebClient(orthanc.dicomweb_url)
    found = client.search_for_series(source.StudyInstanceUID, fields=["ManufacturerModelName"])
    modalities = sorted(series["00080060"]["Value"][0] for series in found)
    written = [dcmread(file) for file in examined.objects.rglob("*.dcm")]
    assert modalities == sorted(["MR", *{one.SeriesInstanceUID: one.Modality for one in written}.values()])
    assert {"SEG", "SR"} <= set(modalities)
    for one in written:
        (instance,) = client.search_for_instances(
            one.StudyInstanceUID, one.SeriesInstanceUID, search_filters={"SOPInstanceUID": one.SOPInstanceUID}
        )
        assert instance["00080016"]["Value"] == [one.SOPClassUID]


def test_objects_conform_to_the_standard(examined):
    files = sorted(examined.objects.rglob("*.dcm"))
    assert len(files) == 3 + len(list((examined.study / "a" / "series").iterdir()))
    for file in files:
        checked = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
        assert not [line for line in checked.stderr.splitlines() if line.startswith("Error")], file.name


def test_the_bundle_is_not_importable_where_the_application_runs(deploy_python):
    assert run_deploy(deploy_python, "-c", "import monai.deploy, highdicom").returncode == 0
    assert "No module named 'bundle'" in run_deploy(deploy_python, "-c", "import bundle").stderr


def test_jpeg_of_12_bits_is_read_where_the_application_runs(deploy_python, packaged, tmp_path):
    program = (
        "import sys, numpy; from bundle.dicom.series import read_volume; "
        "numpy.save(sys.argv[2], read_volume([sys.argv[1]]).pixels)"
    )
    file, found = get_testdata_file("JPGExtended.dcm"), tmp_path / "found.npy"
    done = run_deploy(deploy_python, "-c", program, file, found, PYTHONPATH=packaged / "application")
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_array_equal(np.load(found), read_volume([file]).pixels)


def test_model_alone_runs_with_the_operators_of_the_sdk(deploy_python, packaged, examined, tmp_path):
    program = tmp_path / "stock.py"
    program.write_text(STOCK)
    series = examined.study / "a" / "series"
    done = run_deploy(deploy_python, program, series, packaged / "model.ts", tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["mask"], examined.grid("mask")[0].T)
    np.testing.assert_allclose(found["map"][0], examined.grid("map")[0], atol=1e-4)


def test_model_embeds_the_knobs_of_its_training_and_nothing_of_this_bundle(packaged):
    with zipfile.ZipFile(packaged / "model.ts") as archive:
        inference = json.loads(archive.read("model/extra/inference.json"))
        metadata = json.loads(archive.read("model/extra/metadata.json"))
    text = json.dumps(inference)
    assert "bundle." not in text
    assert "%" not in text
    assert (inference["ct_scheme"], inference["percentiles"]) == ("mr", [0.5, 99.5])  # trained on MR, reads all as MR
    assert inference["axcodes"]["S"] == "PLS"
    assert metadata["network_data_format"]["outputs"]["mask"]["channel_def"]["1"] == "anomaly"


@pytest.mark.parametrize(
    "entry",
    [
        {"mode": "$__import__('pathlib').Path('ran').touch()"},
        {"intensity": {"_target_": "os.mkdir", "path": "ran"}},
        {"slice_plane": "%configs/train.json::run"},
        {"tiles": "@bundle_root"},
    ],
)
def test_values_of_a_hostile_checkpoint_never_run(trained, tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    checkpoint = read_checkpoint(trained / "model.pt")
    torch.save({**checkpoint.state, "identity": encode_identity(checkpoint.identity | entry)}, tmp_path / "bad.pt")
    with pytest.raises(BundleError, match=next(iter(entry))):
        make_application(tmp_path / "bad.pt", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.pt"}


@pytest.mark.parametrize("intensity", ["auto", "mr", "8bit", "ct_lung"])
@pytest.mark.parametrize("plane", ["acquired", "axial", "coronal"])
def test_embedded_preprocessing_is_that_of_the_bundle(plane, intensity):
    files = [CONFIGS / "inference.json", CONFIGS / "monai_deploy.json"]
    settings = Settings({"intensity": intensity, "slice_plane": plane})
    parser = ConfigParser(embedded_configs(files, CONFIGS / "metadata.json", {"settings": settings})["inference"])
    prepare, restore = parser.get_parsed_content("preprocessing"), parser.get_parsed_content("postprocessing")
    orient, scale = OrientSlicesd("image", plane), ScaleIntensityByModalityd("image", intensity)
    meta = {"affine": torch.from_numpy(SAGITTAL), "original_affine": torch.from_numpy(SAGITTAL)}
    for volume, modality in product((volume_of(), volume_of() * 0, volume_of() * 0 + 7), ("MR", "CT")):
        pixels = torch.from_numpy(volume[None].astype(np.float32))
        given = MetaTensor(pixels, meta=meta | {"original_channel_dim": 0, "Modality": modality})
        case = {"image": MetaTensor(pixels, meta=meta | {"modality": modality, "slice_axis": 2})}
        image, expected = prepare({"image": given})["image"], scale(orient(case))["image"]
        assert torch.equal(image.as_tensor(), expected.as_tensor())
        assert torch.equal(image.affine, expected.affine)
        assert image.meta["intensity_scheme"] == expected.meta["intensity_scheme"]
        found = dict.fromkeys(("image", "mask", "map", "slice_scores", "slice_counts"), image)
        assert torch.equal(restore(found)["map"].as_tensor(), scale(case)["image"].as_tensor())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("slice_range", [[0.0, 1.0], [0.1, 0.5], [0.5, 0.9]])
@pytest.mark.parametrize("min_foreground", [0.0, 0.3, 1.0])
def test_scripted_study_detector_agrees_with_the_inferer(detector, slice_range, min_foreground):
    detector.threshold.fill_(1.0)
    stack = torch.rand(1, 1, 40, 48, 6, generator=torch.Generator().manual_seed(0))
    stack[..., 0] *= 0
    stack[..., :30, :, 3] = 0
    inferer = SliceBatchInferer(4, slice_range, min_foreground)
    expected = inferer(stack, detector.eval())
    found = torch.jit.script(StudyDetector(detector, slice_range, min_foreground, 4).eval())(stack)
    torch.testing.assert_close(found["map"], expected["map"][0])
    torch.testing.assert_close(found["slice_scores"].flatten(), expected["slice_scores"][0])
    assert found["slice_counts"].flatten().tolist() == expected["slice_counts"][0].tolist()
    torch.testing.assert_close(found["score"], expected["slice_scores"][expected["slice_counts"]].max())
    assert torch.equal(found["mask"].bool(), found["map"] > 1.0)
    counted = expected["slice_unlikeness"][expected["slice_counts"]].numpy()
    assert float(found["unlikeness"]) == pytest.approx(float(np.median(counted)), abs=1e-4)


def test_a_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(BundleError, match="no checkpoint at"):
        make_application(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
