"""The commands of the README, run for real on a tiny cohort, and what they leave behind."""

import csv
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import EVALUATE, INFER, QUICK, ROOT, TRAIN, command, environment, error_line, run, succeed
from PIL import Image

from scripts.benchmarks.image_score import explained

pytestmark = pytest.mark.slow
METRICS = {
    "pixel_auroc",
    "pixel_ap",
    "aupro",
    "pixel_fpr_at_95_tpr",
    "dice",
    "sensitivity",
    "image_auroc",
    "image_ap",
}


def query(database, statement):
    with sqlite3.connect(database) as connection:
        return connection.execute(statement).fetchall()


def test_training_writes_model_metrics_scores_and_figures(trained):
    output, done = trained
    report = json.loads((output / "metrics.json").read_text())
    assert set(report) >= METRICS
    assert report["protocol"]["mask_rule"] == ">0"
    assert report["protocol"]["size"] == "native"
    state = torch.load(output / "model.pt", weights_only=True)
    assert torch.isfinite(state["threshold"]) and torch.isfinite(state["image_threshold"])
    assert (output / "metrics.csv").read_text().startswith("pixel_auroc")
    assert len(list(csv.DictReader((output / "test_scores.csv").open()))) == sum(report["images"].values())
    for name in ("test_examples.png", "test_curves.png"):
        assert min(Image.open(output / name).size) > 200
    assert "pixel_auroc" in done.stdout
    assert str(output) in done.stdout


def test_lesions_score_higher_than_healthy_tissue(trained):
    report = json.loads((trained[0] / "metrics.json").read_text())
    assert report["pixel_auroc"] > 0.9
    assert report["image_auroc"] > 0.6
    assert report["sensitivity"] > 0.2


def test_synthetic_data_are_called_synthetic(trained):
    output, done = trained
    assert "SYNTHETIC" in done.stdout
    assert "SYNTHETIC" in json.loads((output / "metrics.json").read_text())["data"]


def test_the_progress_bar_shows_loss_and_time_left(trained):
    assert "train_loss=" in trained[1].stderr
    assert "training: [8/8]" in trained[1].stderr


def test_what_is_logged_continues_no_line_of_a_progress_bar(trained):
    assert "INFO image threshold" in trained[1].stderr
    assert not re.search(r"\d\d:\d\d:\d\d (INFO|WARNING)", re.sub(r"(?m)^\d\d:\d\d:\d\d", "", trained[1].stderr))


def test_nothing_temporary_is_left(trained):
    left = {path.name for path in trained[0].iterdir()}
    assert left == {
        "model.pt",
        "metrics.json",
        "metrics.csv",
        "test_scores.csv",
        "test_examples.png",
        "test_curves.png",
        "training_report.html",
        "mlflow.db",
        "mlruns",
        "feature_cache",
    }
    assert not [path for path in (trained[0] / "feature_cache").rglob("*") if "partial" in path.name]


def test_a_second_training_gives_the_same_numbers(trained, cohort, tmp_path):
    succeed("training", TRAIN, dataset_dir=cohort / "slices", output_dir=tmp_path, tracking_uri="off", **QUICK)
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (trained[0], tmp_path))
    assert {name: first[name] for name in METRICS} == {name: second[name] for name in METRICS}
    assert not (tmp_path / "mlflow.db").exists()  # tracking was off


def test_an_interrupted_training_goes_on_and_ends_as_if_it_had_not_been(trained, cohort, tmp_path):
    arguments = {"dataset_dir": cohort / "slices", "output_dir": tmp_path, "tracking_uri": "off", **QUICK}
    process = subprocess.Popen(
        command("training", TRAIN, **arguments),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 300
    while not (tmp_path / "training_state.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "goes on after its last whole epoch" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "model.pt").exists()
    done = succeed("training", TRAIN, **arguments)
    assert "resuming after epoch" in done.stderr
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (trained[0], tmp_path))
    assert {name: first[name] for name in METRICS} == {name: second[name] for name in METRICS}


def test_neither_the_test_split_nor_anomalous_images_change_the_model(trained, cohort, tmp_path):
    shutil.copytree(cohort / "slices", tmp_path / "healthy")
    shutil.rmtree(tmp_path / "healthy/test")
    shutil.rmtree(tmp_path / "healthy/valid/Ungood")
    arguments = {"dataset_dir": tmp_path / "healthy", "output_dir": tmp_path / "out", "tracking_uri": "off", **QUICK}
    succeed("training", TRAIN, **arguments)
    with_all, healthy_only = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (trained[0], tmp_path / "out")
    )
    assert with_all.keys() == healthy_only.keys()
    assert all(torch.equal(with_all[key], healthy_only[key]) for key in with_all)


def test_the_test_split_is_scored_once_and_not_opened_from_the_first_epoch_to_the_finished_model(cohort, tmp_path):
    # every process writes down what it opens, and whether training has begun and the model is there by then
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, sys
output, tests = {str(tmp_path / "out")!r}, {str(cohort / "slices/test")!r}
def note(event, arguments):
    if event == "open" and str(arguments[0]).startswith(tests) and str(arguments[0]).endswith(".png"):
        begun, done = (os.path.exists(output + name) for name in ("/training_state.pt", "/model.pt"))
        descriptor = os.open({str(tmp_path / "opened")!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{{begun}} {{done}} {{arguments[0]}}\\n".encode())
        os.close(descriptor)
sys.addaudithook(note)
"""
    )
    arguments = {"dataset_dir": cohort / "slices", "output_dir": tmp_path / "out", "tracking_uri": "off", **QUICK}
    environment = {"PYTHONPATH": str(tmp_path)}
    succeed("training", TRAIN, env=environment, **{**arguments, "image_size": 64, "max_epochs": 3})
    opened = [line.split() for line in (tmp_path / "opened").read_text().splitlines()]
    files = [str(file) for file in (cohort / "slices/test").rglob("*.png")]  # images and masks
    before, during, after = (
        Counter(path for begun, done, path in opened if (begun, done) == when)
        for when in (("False", "False"), ("True", "False"), ("True", "True"))
    )
    # to see that all can be read, for the fingerprint of the data, and, where sizes are equal, to find copies
    assert before.keys() == set(files) and set(before.values()) <= {2, 3}
    assert not during
    assert after == dict.fromkeys(files, 1)


def test_evaluation_repeats_the_numbers_of_training(trained, cohort, knobs, tmp_path):
    succeed("evaluating", EVALUATE, dataset_dir=cohort / "slices", output_dir=tmp_path, **knobs)
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (trained[0], tmp_path))
    assert {name: first[name] for name in METRICS} == {name: second[name] for name in METRICS}
    assert query(tmp_path / "mlflow.db", "select count(*) from runs") == [(1,)]


def test_mlflow_has_one_run_with_parameters_metrics_tags_and_artifacts(trained):
    output = trained[0]
    assert query(output / "mlflow.db", "select status from runs") == [("FINISHED",)]
    parameters = dict(query(output / "mlflow.db", "select key, value from params"))
    assert parameters["backbone"] == "efficientnet_lite0"
    assert parameters["learning_rate"] == "0.003"
    metrics = dict(query(output / "mlflow.db", "select key, count(*) from metrics group by key"))
    assert metrics["train_loss"] == metrics["healthy_validation_loss"] == metrics["learning_rate"] == 8
    assert METRICS <= set(metrics)
    tags = dict(query(output / "mlflow.db", "select key, value from tags"))
    assert {"backbone", "weights", "data_fingerprint", "git_commit"} <= set(tags)
    description = tags["mlflow.note.content"]
    assert "| pixel_auroc | 0." in description and "![figures/test_examples.png]" in description
    [(digest, sizes)] = query(output / "mlflow.db", "select digest, dataset_profile from datasets")
    assert tags["data_fingerprint"].startswith(digest)
    assert json.loads(sizes).keys() == {"training", "validation", "test"}
    artifacts = {path.name for path in (output / "mlruns").rglob("*") if path.is_file()}
    expected = {
        "model.pt",
        "metrics.json",
        "test_examples.png",
        "test_curves.png",
        "resolved_config.json",
        "train.json",
    }
    assert expected <= artifacts


@pytest.fixture(scope="session")
def evaluated(cohort, knobs, tmp_path_factory):
    """An evaluation by another protocol, tracked elsewhere."""
    folder = tmp_path_factory.mktemp("evaluated")
    succeed(
        "evaluating",
        EVALUATE,
        env={"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/elsewhere.db"},
        dataset_dir=cohort / "slices",
        output_dir=folder / "out",
        evaluation_size=64,
        mask_via=100,
        mask_rule="==255",
        **knobs,
    )
    return folder


def test_evaluation_follows_the_size_and_mask_rule_of_a_protocol(evaluated, trained):
    report = json.loads((evaluated / "out/metrics.json").read_text())
    assert (report["protocol"]["size"], report["protocol"]["mask_rule"]) == (64, "==255")
    native = json.loads((trained[0] / "metrics.json").read_text())
    assert report["image_auroc"] == native["image_auroc"]
    assert 0 < abs(report["pixel_auroc"] - native["pixel_auroc"]) < 0.05
    assert (report["protocol"]["mask_via"], native["protocol"]["mask_via"]) == (100, None)


def test_another_false_positive_rate_than_that_of_the_checkpoint_is_refused(cohort, knobs, tmp_path):
    given = {"dataset_dir": cohort / "slices", "output_dir": tmp_path / "out", "tracking_uri": "off", **knobs}
    line = error_line(run("evaluating", EVALUATE, false_positive_rate=0.5, **given))
    assert "false_positive_rate is 0.5, but the checkpoint was trained with 0.01" in line


def test_the_false_positive_rate_of_an_evaluation_is_that_of_the_checkpoint(evaluated):
    protocol = json.loads((evaluated / "out/metrics.json").read_text())["protocol"]
    assert (protocol["threshold_false_positive_rate"], protocol["threshold_image_false_positive_rate"]) == (0.01, 0.05)


def test_mlflow_tracking_uri_of_the_environment_is_respected(evaluated):
    assert query(evaluated / "elsewhere.db", "select status from runs") == [("FINISHED",)]
    assert not (evaluated / "out/mlflow.db").exists()


@pytest.fixture(scope="session")
def inferred(cohort, knobs, tmp_path_factory):
    """Inference on a picture, a color JPEG in a subfolder, a 16-bit TIFF and a volume."""
    source, output = tmp_path_factory.mktemp("input"), tmp_path_factory.mktemp("inferred")
    picture = next((cohort / "slices/test/Ungood/img").glob("*.png"))
    (source / "deep").mkdir()
    shutil.copy(picture, source / "slice.png")
    Image.open(picture).convert("RGB").save(source / "deep" / "color.jpg")
    Image.fromarray(np.asarray(Image.open(picture)).astype(np.uint16) * 16).save(source / "sixteen.tiff")
    volume = next((cohort / "volumes/test").glob("*_flair.nii.gz"))
    shutil.copy(volume, source / "volume.nii.gz")
    done = succeed("inferring", INFER, dataset_dir=source, output_dir=output, **knobs)
    return source, output, done


def test_inference_is_a_tracked_run_of_its_own(inferred):
    _, output, _ = inferred
    assert query(output / "mlflow.db", "select status from runs") == [("FINISHED",)]
    assert dict(query(output / "mlflow.db", "select key, value from latest_metrics"))["inputs"] == 4
    [(text,)] = query(output / "mlflow.db", "select value from tags where key = 'mlflow.note.content'")
    assert "4 inputs, highest score" in text


def test_inference_writes_map_mask_overlay_and_score_of_every_input(inferred):
    _, output, _ = inferred
    for name, suffixes in {
        "slice": ("_map.tiff", "_mask.png"),
        "deep/color": ("_map.tiff", "_mask.png"),
        "sixteen": ("_map.tiff", "_mask.png"),
        "volume": ("_map.nii.gz", "_mask.nii.gz"),
    }.items():
        for suffix in (*suffixes, "_overlay.png"):
            assert (output / f"{name}{suffix}").is_file()
    rows = list(csv.DictReader((output / "scores.csv").open()))
    assert {row["name"] for row in rows} == {"slice", "deep/color", "sixteen", "volume"}
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("score", "threshold", "image_threshold"))


def test_maps_of_pictures_have_their_rows_and_columns_and_masks_follow_the_threshold(inferred):
    source, output, _ = inferred
    anomaly_map = np.asarray(Image.open(output / "slice_map.tiff"))
    assert anomaly_map.dtype == np.float32
    assert anomaly_map.shape == np.asarray(Image.open(source / "slice.png")).shape
    row = next(row for row in csv.DictReader((output / "scores.csv").open()) if row["name"] == "slice")
    mask = np.asarray(Image.open(output / "slice_mask.png"))
    np.testing.assert_array_equal(mask, (anomaly_map > float(row["threshold"])) * 255)


def test_maps_of_volumes_keep_shape_affine_and_units(inferred):
    source, output, _ = inferred
    volume = nib.load(source / "volume.nii.gz")
    for name in ("map", "mask"):
        found = nib.load(output / f"volume_{name}.nii.gz")
        assert found.shape == volume.shape
        np.testing.assert_allclose(found.affine, volume.affine, atol=1e-6)
    assert nib.load(output / "volume_map.nii.gz").get_data_dtype() == np.float32
    assert nib.load(output / "volume_mask.nii.gz").get_data_dtype() == np.uint8


def test_random_weights_are_named_in_every_output(cohort, tmp_path):
    quick = {**QUICK, "weights": "random", "max_epochs": 1, "hidden_channels": 8}
    done = succeed("training", TRAIN, dataset_dir=cohort / "slices", output_dir=tmp_path / "out", **quick)
    assert "RANDOM WEIGHTS" in done.stdout
    assert "RANDOM" in json.loads((tmp_path / "out/metrics.json").read_text())["model"]
    assert "RANDOM" in (tmp_path / "out/metrics.csv").read_text()
    tags = dict(query(tmp_path / "out/mlflow.db", "select key, value from tags"))
    assert tags["weights"].startswith("random")
    volume = next((cohort / "volumes/test").glob("*_flair.nii.gz"))
    picture = next((cohort / "slices/test/good/img").glob("*.png"))
    (tmp_path / "in").mkdir()
    shutil.copy(volume, tmp_path / "in/v.nii.gz")
    shutil.copy(picture, tmp_path / "in/p.png")
    del quick["max_epochs"]
    checkpoint = tmp_path / "out/model.pt"
    output = tmp_path / "maps"
    succeed("inferring", INFER, dataset_dir=tmp_path / "in", output_dir=output, checkpoint=checkpoint, **quick)
    assert "RANDOM" in (output / "scores.csv").read_text()
    for name in ("map", "mask"):
        assert b"RANDOM" in nib.load(output / f"v_{name}.nii.gz").header["descrip"].tobytes()
    assert "RANDOM" in Image.open(output / "p_map.tiff").tag_v2[270]
    assert "RANDOM" in Image.open(output / "p_mask.png").text["Description"]


def test_volumes_train_slice_by_slice_and_are_scored_as_studies(cohort, tmp_path):
    quick = {**QUICK, "max_epochs": 4, "tracking_uri": "off"}
    done = succeed("training", TRAIN, dataset_dir=cohort / "volumes/datalist.json", output_dir=tmp_path, **quick)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert sum(report["images"].values()) == 8
    assert report["pixel_auroc"] > 0.85
    assert "SYNTHETIC" in done.stdout


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
MULTI = "['configs/train.json','configs/multi_gpu_train.json']"


def close(first, second, tolerance):
    """Whether two reports have the same metrics."""
    return {name: first[name] for name in METRICS} == pytest.approx(
        {name: second[name] for name in METRICS}, abs=tolerance
    )


@pytest.mark.parametrize("mode", ["zero", "position"])
def test_a_mode_with_nothing_to_learn_is_calibrated_and_scored_as_others(cohort, tmp_path, mode):
    knobs = {"mode": mode, "linear_components": 0, "max_epochs": 1, "backbone": "efficientnet_lite0", "device": "cpu"}
    places = {"dataset_dir": cohort / "slices", "output_dir": tmp_path, "tracking_uri": "off"}
    succeed("training", TRAIN, **places, **knobs, image_size=176)
    first = json.loads((tmp_path / "metrics.json").read_text())
    assert first["pixel_auroc"] > 0.85
    succeed("evaluating", EVALUATE, **places, checkpoint=tmp_path / "model.pt", device="cpu")
    second = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: second[name] for name in METRICS} == {name: first[name] for name in METRICS}


def test_two_processes_learn_what_one_learns(cohort, tmp_path):
    """Without the noise, which each process draws by itself."""
    quick = {**QUICK, "max_epochs": 3, "noise_probability": 0, "dataset_dir": cohort / "slices"}
    together = succeed(
        "training", MULTI, env={"OMP_NUM_THREADS": "1"}, launcher=TWO, output_dir=tmp_path / "two", **quick
    )
    succeed("training", TRAIN, output_dir=tmp_path / "one", tracking_uri="off", **quick)
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert close(two, one, 0.01)
    assert two["images"] == one["images"]
    assert len(list(csv.DictReader((tmp_path / "two/test_scores.csv").open()))) == sum(two["images"].values())
    assert query(tmp_path / "two/mlflow.db", "select status from runs") == [("FINISHED",)]
    assert together.stdout.count("pixel_auroc") == 1


def test_two_processes_score_a_test_split_of_odd_length_exactly_as_one_does(trained, cohort, knobs, tmp_path):
    cases = json.loads((trained[0] / "metrics.json").read_text())["images"]
    assert sum(cases.values()) % 2 == 1  # uneven shards
    folder = cohort / "slices"
    succeed("evaluating", EVALUATE, launcher=TWO, dataset_dir=folder, output_dir=tmp_path, **knobs)
    two, one = (json.loads((at / "metrics.json").read_text()) for at in (tmp_path, trained[0]))
    assert close(two, one, 1e-4)
    assert query(tmp_path / "mlflow.db", "select status from runs") == [("FINISHED",)]


def test_two_processes_infer_a_share_each_and_leave_one_table(inferred, knobs, tmp_path):
    source, alone, _ = inferred
    done = succeed("inferring", INFER, launcher=TWO, dataset_dir=source, output_dir=tmp_path, **knobs)
    two, one = (list(csv.DictReader((at / "scores.csv").open())) for at in (tmp_path, alone))
    assert [row["name"] for row in two] == [row["name"] for row in one]
    assert [float(row["score"]) for row in two] == pytest.approx([float(row["score"]) for row in one], abs=1e-3)
    volume, expected = (nib.load(at / "volume_map.nii.gz").get_fdata() for at in (tmp_path, alone))
    np.testing.assert_allclose(volume, expected, atol=1e-3)
    assert query(tmp_path / "mlflow.db", "select status from runs") == [("FINISHED",)]
    assert "4 inputs" in done.stdout


def test_replicas_that_would_not_learn_from_each_other_are_refused(cohort, tmp_path):
    quick = {**QUICK, "max_epochs": 1, "tracking_uri": "off", "output_dir": tmp_path, "image_size": 64}
    done = run("training", TRAIN, launcher=TWO, dataset_dir=cohort / "slices", **quick)
    assert done.returncode != 0
    assert "append configs/multi_gpu_train.json" in done.stderr
    assert not (tmp_path / "model.pt").exists()


def test_a_second_training_reads_all_features_from_the_cache(trained, cohort, tmp_path):
    arguments = {**QUICK, "dataset_dir": cohort / "slices", "tracking_uri": "off", "max_epochs": 1}
    cache = trained[0] / "feature_cache"
    before = {path: path.stat().st_mtime for path in cache.rglob("*.safetensors")}
    done = succeed("training", TRAIN, output_dir=tmp_path, cache_dir=cache, learning_rate=0.002, **arguments)
    assert done.stderr.count("embedded 0 images") == 2
    assert set(cache.rglob("*.safetensors")) == set(before)
    assert not (tmp_path / "feature_cache").exists()


def test_other_preprocessing_reads_nothing_from_the_cache(trained, cohort, tmp_path):
    arguments = {**QUICK, "dataset_dir": cohort / "slices", "tracking_uri": "off", "max_epochs": 1}
    cache = shutil.copytree(trained[0] / "feature_cache", tmp_path / "cache")
    done = succeed("training", TRAIN, output_dir=tmp_path, cache_dir=cache, min_foreground=0.0, **arguments)
    assert ", 0 were there" in done.stderr
    assert "embedded 0 images" not in done.stderr


@pytest.mark.parametrize("off", ["off", "null"])
def test_the_cache_can_be_turned_off(off, cohort, tmp_path):
    overlay = tmp_path / "off.json"
    overlay.write_text(json.dumps({"cache_dir": "off" if off == "off" else None}))
    arguments = {**QUICK, "dataset_dir": cohort / "slices", "tracking_uri": "off", "max_epochs": 1, "image_size": 64}
    succeed("training", f"['{TRAIN}','{overlay}']", output_dir=tmp_path / "out", **arguments)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.pt" in left
    assert not [name for name in left if "cache" in name or "embeddings" in name]


def test_the_bundle_runs_from_its_root_without_an_installation(knobs, cohort, tmp_path):
    """As a model zoo user has it: the folder alone."""
    shutil.copytree(ROOT / "bundle", tmp_path / "bundle_copy/bundle")
    shutil.copytree(ROOT / "configs", tmp_path / "bundle_copy/configs")
    picture = next((cohort / "slices/test/Ungood/img").glob("*.png"))
    config = str(tmp_path / "bundle_copy/configs/inference.json")
    root = tmp_path / "bundle_copy"
    out = tmp_path / "out"
    succeed("inferring", config, cwd=tmp_path, bundle_root=root, dataset_dir=picture, output_dir=out, **knobs)
    assert (out / f"{picture.stem}_map.tiff").is_file()


BAD = {
    "a misspelled knob": ({"max_epoch": 3}, "--max_epoch is unknown: did you mean 'max_epochs'"),
    "a misspelled backbone": ({"backbone": "dinov3_vits61"}, "did you mean 'dinov3_vits16'"),
    "a named backbone without weights": ({"backbone": "dinov3_vits16"}, "BACKBONE_WEIGHTS"),
    "a misspelled mode": ({"mode": "casual"}, "did you mean 'causal'"),
    "a missing folder": ({"dataset_dir": "/nowhere"}, "no data at '/nowhere'"),
    "text for a number": (
        {"max_epochs": "many"},
        "--max_epochs must be a whole number, got 'many': for example --max_epochs 12",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_end_in_one_line_and_leave_nothing(case, cohort, tmp_path):
    wrong, message = BAD[case]
    arguments = {"dataset_dir": cohort / "slices", **QUICK, **wrong}
    done = run("training", TRAIN, output_dir=tmp_path / "out", **arguments)
    assert message in error_line(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "config"), [("training", TRAIN), ("evaluating", EVALUATE)])
def test_an_output_folder_among_the_data_is_refused_and_nothing_changes_there(command, config, cohort, knobs):
    output = cohort / "slices/test"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    done = run(command, config, dataset_dir=cohort / "slices", output_dir=output, **knobs)
    assert f"lies in output_dir '{output}', where results may overwrite it: give an --output_dir" in error_line(done)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_truncated_training_image_ends_in_one_line_or_is_skipped_and_counted(cohort, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cohort / "slices/train/good", data)
    for path in sorted(data.iterdir())[20:]:
        path.unlink()
    bad = sorted(data.iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:500])
    arguments = {"dataset_dir": data, "output_dir": tmp_path / "out", **QUICK, "max_epochs": 1}
    assert bad.name in error_line(run("training", TRAIN, **arguments))
    assert not (tmp_path / "out").exists()
    done = succeed("training", TRAIN, on_error="skip", **arguments)
    assert bad.name in done.stderr
    assert "skipped 1 of 20 images" in done.stderr
    assert "no test split" in done.stdout
    assert (tmp_path / "out/model.pt").is_file()


@pytest.mark.slow
def test_what_a_training_chose_need_not_be_repeated(cohort, tmp_path):
    """By the paper's recipe, of which fifteen settings differ from the defaults, and more by hand."""
    small = {"backbone": "efficientnet_lite0", "image_size": "[64,96]", "layers": "[4]", "hidden_channels": 8}
    config = f"['{TRAIN}','configs/paper.json']"
    given = {"dataset_dir": cohort / "slices", "tracking_uri": "off", "device": "cpu"}
    model = {"output_dir": tmp_path, "max_epochs": 1, "batch_size": 8}
    succeed("training", config, **given, **model, **small)
    trained = json.loads((tmp_path / "metrics.json").read_text())
    overlaid = config.replace("]", ",'configs/evaluate.json']")
    again = {"checkpoint": tmp_path / "model.pt", "output_dir": tmp_path / "again"}
    succeed("evaluating", overlaid, **given, **again, precision="fp32")
    found = json.loads((tmp_path / "again/metrics.json").read_text())
    assert {name: found[name] for name in METRICS} == pytest.approx({name: trained[name] for name in METRICS})
    assert found["identity"] == trained["identity"]
    assert (found["identity"]["image_size"], found["identity"]["mode"]) == ([64, 96], "causal")
    picture = next((cohort / "slices/test/Ungood/img").glob("*.png"))
    succeed("inferring", INFER, dataset_dir=picture, checkpoint=tmp_path / "model.pt", output_dir=tmp_path / "maps")
    assert (tmp_path / "maps" / f"{picture.stem}_map.tiff").is_file()
    more = {"mode": "guarded", "image_size": 320, "covariance": "full"}
    line = error_line(run("inferring", INFER, dataset_dir=picture, **again, **more))
    assert "covariance 'isotropic', not 'full'; image_size [64, 96], not 320; mode 'causal', not 'guarded'" in line


def test_another_backbones_checkpoint_is_refused_in_one_line(cohort, knobs, tmp_path):
    wrong = {**knobs, "backbone": "dinov3_vits16"}
    done = run("inferring", INFER, dataset_dir=cohort / "slices/test", output_dir=tmp_path / "out", **wrong)
    assert "'efficientnet_lite0'" in error_line(done)
    assert "'dinov3_vits16'" in error_line(done)
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_is_named(cohort, tmp_path):
    done = run("inferring", INFER, dataset_dir=cohort / "slices/test", output_dir=tmp_path)
    assert "no checkpoint at" in error_line(done)


def test_the_benchmark_of_the_image_score_compares_both_scores_on_healthy_images(cohort, knobs):
    words = ["--checkpoint", knobs["checkpoint"], "--data", cohort / "slices", "--knobs", '{"device": "cpu"}']
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.image_score", *map(str, words), "--noise", "0.1"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    healthy = len(list((cohort / "slices/test/good/img").glob("*.png")))
    assert rows[0] == [f"{healthy} healthy test images of slices", "top patches", "image score"]
    assert [row[0].split()[:2] for row in rows[2:]] == [["shift", "by"], ["variance", "that"], ["variance", "that"]]
    assert float(rows[2][1]) > 1  # the top patches follow the noise


def test_the_variance_that_a_parabola_explains():
    cause = np.linspace(-1, 1, 200)
    chance = np.random.default_rng(0).normal(size=200)
    assert explained(3 * cause**2 - cause, cause) == pytest.approx(1)
    assert abs(explained(chance, cause)) < 0.05
    assert explained(cause + chance * cause.std() / chance.std(), cause) == pytest.approx(0.5, abs=0.1)
