"""What the tests with real clinical systems share: an Orthanc, a small sample cohort, and a model trained on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bundle.samples import make_sample_cohort
from scripts.integrations.orthanc import running
from scripts.samples.dicom import make_sample_dicom

ROOT = Path(__file__).parents[2]
OF_THIS_MACHINE = ("MLFLOW_TRACKING_URI", "BACKBONE_WEIGHTS", "DINOV3_WEIGHTS")
BACKBONE = "efficientnet_lite0"  # needs no download


def _environment():
    clean = {k: v for k, v in os.environ.items() if k not in OF_THIS_MACHINE}
    return {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **clean, "HF_HUB_OFFLINE": "1"}


def _run_python(*words, check=True, timeout=900):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def _run_bundle(run_id, config, check=True, **knobs):
    words = [f"--{name}={value}" for name, value in knobs.items()]
    return _run_python("-m", "monai.bundle", "run", run_id, "--config_file", config, *words, check=check)


def pytest_collection_modifyitems(items):
    """All tests in this folder are clinical."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("clinical")


@pytest.fixture(scope="session")
def run_python():
    """``run_python("-m", "scripts.x", ...)``: a command that must succeed, unless check=False."""
    return _run_python


@pytest.fixture(scope="session")
def run_bundle():
    """``run_bundle("inferring", "configs/inference.json", dataset_dir=...)``: a command of the bundle."""
    return _run_bundle


@pytest.fixture(scope="session")
def sample_cohort(tmp_path_factory):
    """SYNTHETIC subjects of 12 slices: 1 to 6 train, 7 and 8 valid, 9 to 12 test; sub-0012 is healthy."""
    return make_sample_cohort(
        tmp_path_factory.mktemp("clinical") / "sample_cohort", train_subjects=6, valid_subjects=2, test_subjects=4
    )


@pytest.fixture(scope="session")
def cohort_dicom(sample_cohort):
    """The cohort as MR series: ``SPLIT/sub-NNNN/IM0001.dcm`` to ``IM0012.dcm``."""
    return make_sample_dicom(sample_cohort, sample_cohort.with_name("sample_cohort_dicom"))


@pytest.fixture(scope="session")
def trained(sample_cohort, tmp_path_factory):
    """The output folder of a short training on the volumes: ``model.pt``, of the default settings but BACKBONE."""
    output = tmp_path_factory.mktemp("trained")
    datalist = sample_cohort / "volumes" / "datalist.json"
    _run_bundle(
        "training",
        "configs/train.json",
        dataset_dir=datalist,
        output_dir=output,
        backbone=BACKBONE,
        max_epochs=3,
        device="cpu",
    )
    return output


@pytest.fixture(scope="session")
def model_knobs(trained):
    """What commands on the trained model need."""
    return {"checkpoint": trained / "model.pt", "device": "cpu"}


@pytest.fixture(scope="session")
def orthanc():
    """A server, empty at first, that all tests share: ``.dicomweb_url``, ``.http_url``, ``.dicom_port``, ``.aet``."""
    with running() as server:
        yield server


@pytest.fixture
def empty_orthanc():
    """A server of this test's own."""
    with running() as server:
        yield server
