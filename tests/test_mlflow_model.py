"""The MLflow model of a checkpoint: what its folder holds, and what it answers, in fresh processes, too."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import small_detector
from commands import INFER, ROOT, environment, succeed
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement
from PIL import Image

from bundle.checkpoint import save_checkpoint
from bundle.errors import BundleError
from bundle.mlflow_database import ready_database
from bundle.mlflow_model import ANSWER, example, requirements, save_model
from bundle.servers import free_ports
from bundle.serving import ServedModel
from bundle.tracking import EXPERIMENT, Tracker, database
from bundle.training import Calibration

SECONDS = 180.0  # that a server may take to start on a busy machine
LOAD = """
import sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"device": "cpu"})
pictures = [open(file, "rb").read() for file in sys.argv[3:]]
model.predict(pd.DataFrame({"image": pictures})).to_pickle(sys.argv[2])
import bundle
print(bundle.__file__)
"""


def picture(height, width, mode="L", kind="PNG", seed=0):
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def read_map(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def asked(*pictures):
    return pd.DataFrame({"image": pictures})


@pytest.fixture(scope="module")
def checkpoint(features, tmp_path_factory):
    file = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    torch.manual_seed(0)
    save_checkpoint(small_detector(features), file)
    return file


@pytest.fixture(scope="module")
def served(checkpoint):
    return ServedModel(str(checkpoint), {"device": "cpu", "max_voxels": 10000})


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, checkpoint, run_id="r")
    return folder


def test_each_picture_has_a_row_with_its_map_on_its_own_grid(served):
    answer = served.predict(asked(picture(40, 60), picture(33, 21, "RGB", "JPEG"), picture(64, 64)))
    assert list(answer) == list(ANSWER)
    assert [read_map(content).shape for content in answer["map"]] == [(40, 60), (33, 21), (64, 64)]
    assert all(read_map(content).dtype == np.float32 for content in answer["map"])
    assert (answer["above_image_threshold"] == (answer["score"] > answer["image_threshold"])).all()


def test_rows_keep_the_index_of_the_question_and_do_not_depend_on_each_other(served):
    first, second = picture(40, 60), picture(40, 60, "RGB", seed=1)
    both = served.predict(asked(second, first).set_index(pd.Index(["b", "a"])))
    alone = served.predict(asked(first)).iloc[0]
    assert list(both.index) == ["b", "a"]
    assert both.loc["a", "score"] == pytest.approx(alone["score"], abs=1e-5)
    assert np.abs(read_map(both.loc["a", "map"]) - read_map(alone["map"])).max() < 1e-5


def test_a_model_that_cannot_tell_what_is_unlike_says_none(served):
    assert served.predict(asked(picture(40, 40)))["in_distribution"].tolist() == [None]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_a_file_of_any_kind_may_come_in_base64(served, kind):
    content = picture(40, 60, kind=kind)
    plain, coded = served.predict(asked(content, base64.encodebytes(content)))["score"]
    assert plain == pytest.approx(coded, abs=1e-5)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"no picture", "cannot read 'row 1' .*: replace the file"),
        (b"", "cannot read 'row 1'"),
        (picture(200, 200), r"'row 1' has 200x200 voxels, more than max_voxels \(10000\)"),
        (picture(8, 8), "'row 1' has slices of 8x8 pixels: at least 16x16 are needed"),
        (picture(60, 60)[:500], "cannot read 'row 1'"),
    ],
)
def test_a_bad_picture_is_one_line_that_names_its_row_and_the_next_request_is_answered(served, bad, words):
    with pytest.raises(MlflowException, match=words) as caught:
        served.predict(asked(picture(40, 40), bad))
    assert caught.value.get_http_status_code() == 400
    assert "\n" not in caught.value.message
    assert "/" not in caught.value.message.replace("<_io", "")
    assert len(served.predict(asked(picture(40, 40)))) == 1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"batch_size": "many"}, "batch_size"), ({"precision": "fp7"}, "fp7"), ({"weights": "/none"}, "/none")],
)
def test_a_knob_that_is_none_is_one_line(checkpoint, knobs, words):
    with pytest.raises(MlflowException, match=words) as caught:
        ServedModel(str(checkpoint), {"device": "cpu", **knobs})
    assert "\n" not in caught.value.message


def test_the_folder_holds_the_checkpoint_and_code_and_no_weights_of_the_backbone(saved, checkpoint):
    files = {file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file()}
    data = {file for file in files if not file.startswith("code/")}
    assert data == {
        "MLmodel",
        "conda.yaml",
        "data/model.pt",
        "input_example.json",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    }
    assert (saved / "data/model.pt").read_bytes() == checkpoint.read_bytes()
    of_reports = {file for file in files - data if file.startswith("code/bundle/report/")}
    assert {file.rpartition(".")[2] for file in files - data - of_reports} == {"py", "json", "conf"}
    assert {file.rpartition(".")[2] for file in of_reports} == {"py", "json", "css", "js", "jinja", "txt"}
    assert {"code/bundle/serving.py", "code/configs/inference.json"} < files


def test_the_model_says_what_it_takes_and_gives_and_where_its_code_begins(saved):
    told = yaml.safe_load((saved / "MLmodel").read_text())
    inputs, outputs = (json.loads(told["signature"][side]) for side in ("inputs", "outputs"))
    assert [(one["name"], one["type"]) for one in inputs] == [("image", "binary")]
    assert {one["name"]: one["type"] for one in outputs} == ANSWER
    assert told["flavors"]["python_function"]["loader_module"] == "bundle.serving"
    assert told["run_id"] == "r"
    assert "SYNTHETIC" in told["metadata"]["input_example"]


def test_the_example_is_a_picture_that_the_model_answers(saved, served):
    [[text]] = json.loads((saved / "serving_input_example.json").read_text())["dataframe_split"]["data"]
    assert base64.b64decode(text) == example()
    assert np.isfinite(served.predict(asked(example()))["score"]).all()


def test_requirements_are_those_of_the_bundle_in_public_versions_of_their_ranges():
    wanted = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    pinned = [line.split("==") for line in requirements()]
    for one, (name, version) in zip(wanted, pinned, strict=True):
        assert name == one.name
        assert version in one.specifier
        assert "+" not in version


@pytest.mark.parametrize(
    ("uri", "knobs", "words"),
    [
        ("sqlite:///x", {"register_model": "a/b"}, "give a name without / and :"),
        ("sqlite:///x", {"register_model": " "}, "give a name without / and :"),
        ("off", {"register_model": "a"}, "needs --log_model true and a --tracking_uri"),
        ("sqlite:///x", {"register_model": "a", "log_model": False}, "needs --log_model true and a --tracking_uri"),
    ],
)
def test_a_registration_that_cannot_be_is_refused_before_the_training(detector, uri, knobs, words):
    with pytest.raises(BundleError, match=words):
        Calibration(detector, None, None, None, "model.pt", Tracker(uri, "training", {}), **knobs)


@pytest.mark.slow
def test_a_model_that_has_gone_costs_a_line_and_is_not_registered(tmp_path, caplog):
    tracker = Tracker(database(tmp_path), "training", {})
    tracker.model(tmp_path / "gone.pt", "probe")
    tracker.log({"aupro": 0.5}, {})
    tracker.finish()
    assert "missing are 2 of models; results are not concerned" in caplog.text
    client = MlflowClient(database(tmp_path))
    assert not client.search_model_versions()
    assert client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])[0].data.metrics


@pytest.mark.slow
def test_a_folder_that_was_moved_keeps_its_models_in_itself(checkpoint, tmp_path):
    tracker = Tracker(database(tmp_path / "old"), "training", {})
    tracker.model(checkpoint, "probe")
    tracker.finish()
    (tmp_path / "old").rename(tmp_path / "new")
    ready_database(tmp_path / "new" / "mlflow.db", EXPERIMENT)
    client, here = MlflowClient(database(tmp_path / "new")), (tmp_path / "new").as_uri()
    registered = client.get_model_version("probe", "1")
    for place in (
        only_model(tmp_path / "new").artifact_location,
        registered.source,
        client.get_model_version_download_uri("probe", "1"),
    ):
        assert place.startswith(here)
    assert mlflow.pyfunc.load_model(place, model_config={"device": "cpu"}).metadata.run_id == registered.run_id


def only_model(folder):
    client = MlflowClient(database(folder))
    [model] = client.search_logged_models([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    return model


def alone(folder):
    """The environment of a process that knows the database, and no clone of the bundle."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # MLflow looks for uvicorn there
    extra = {"MLFLOW_TRACKING_URI": database(folder), "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}
    return {key: value for key, value in environment(**extra).items() if key != "PYTHONPATH"}


@pytest.fixture(scope="module")
def inferred(cohort, trained, tmp_path_factory):
    """Pictures of the cohort, and what the command ``inferring`` finds in them."""
    folder = tmp_path_factory.mktemp("inferred")
    pictures = sorted((cohort / "slices").glob("test/Ungood/**/*.png"))
    pictures = [file for file in pictures if "label" not in file.parts and "mask" not in str(file)][:2]
    (folder / "in").mkdir()
    for file in pictures:
        (folder / "in" / file.name).write_bytes(file.read_bytes())
    knobs = {"checkpoint": trained[0] / "model.pt", "device": "cpu", "tracking_uri": "off"}
    succeed("inferring", INFER, dataset_dir=folder / "in", output_dir=folder / "out", **knobs)
    scores = pd.read_csv(folder / "out" / "scores.csv").set_index("name")
    return [folder / "in" / file.name for file in pictures], folder / "out", scores


def check_same(answer, pictures, out, scores):
    """Whether each row of an ``answer`` is what ``inferring`` found."""
    assert len(answer) == len(pictures) > 0
    for row, file in zip(answer, pictures, strict=True):
        written = np.asarray(Image.open(out / f"{file.stem}_map.tiff"))
        assert np.abs(read_map(row["map"]) - written).max() <= 1e-5
        told = scores.loc[file.stem]
        for name in ("score", "threshold", "image_threshold"):
            assert row[name] == pytest.approx(told[name], abs=1e-4)
        assert row["in_distribution"] == bool(told["in_distribution"])


def test_a_training_logs_its_model_with_settings_tags_and_metrics(trained):
    model = only_model(trained[0])
    assert model.status == "READY"
    assert model.tags["backbone"] == model.params["backbone"] == "efficientnet_lite0"
    assert {"healthy_log_likelihood", "pixel_auroc"} <= {metric.key for metric in model.metrics}


def test_the_model_of_a_training_loads_in_a_fresh_process_and_finds_what_inferring_finds(trained, inferred, tmp_path):
    words = [only_model(trained[0]).model_uri, tmp_path / "answer", *inferred[0]]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, words)],
        cwd=tmp_path,
        env=alone(trained[0]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "/code/bundle/" in done.stdout
    check_same(pd.read_pickle(tmp_path / "answer").to_dict("records"), *inferred)


@contextmanager
def serving(folder, cwd):
    """The address of ``mlflow models serve``, which has ended when the block ends."""
    port = free_ports(model=0)["model"]
    address = f"http://127.0.0.1:{port}"
    words = ["-m", only_model(folder).model_uri, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with (cwd / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *words],
            cwd=cwd,
            env=alone(folder) | {"MLFLOW_PYFUNC_INFERENCE_CONFIG": '{"device": "cpu", "max_voxels": 1000000}'},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (cwd / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield f"{address}/invocations"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def post(address, question):
    request = urllib.request.Request(address, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def refusal(address, text):
    """What the server says of a picture that it does not take."""
    with pytest.raises(HTTPError) as refused:
        post(address, {"dataframe_records": [{"image": text}]})
    assert refused.value.code == 400
    return json.load(refused.value)["message"]


def test_the_served_model_answers_pictures_by_http_and_refuses_others_in_one_line(trained, inferred, tmp_path):
    pictures = [base64.b64encode(file.read_bytes()).decode() for file in inferred[0]]
    large = base64.b64encode(picture(1001, 1001)).decode()
    with serving(trained[0], tmp_path) as address:
        records = post(address, {"dataframe_records": [{"image": text} for text in pictures]})["predictions"]
        table = {"columns": ["image"], "data": [[text] for text in pictures]}
        rows = post(address, {"dataframe_split": table})["predictions"]
        columns = post(address, {"inputs": {"image": pictures}})["predictions"]
        no_picture = refusal(address, base64.b64encode(b"text").decode())
        too_large = refusal(address, large)
    for answer in (records, rows, columns):
        check_same([row | {"map": base64.b64decode(row["map"])} for row in answer], *inferred)
    assert "cannot read 'row 0'" in no_picture
    assert "more than max_voxels (1000000)" in too_large
