"""What the tests with real clinical systems share: an Orthanc, a small sample cohort, and a model trained on it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from bundle.samples import make_sample_cohort
from scripts.integrations.orthanc import running
from scripts.samples.dicom import make_sample_dicom

ROOT = Path(__file__).parents[2]
OF_THIS_MACHINE = ("MLFLOW_TRACKING_URI", "BACKBONE_WEIGHTS", "DINOV3_WEIGHTS")
LONGEST_FIRST = ("test_monai_label", "test_monai_deploy", "test_orthanc", "test_viewer", "test_environments")
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
    """All tests in this folder are clinical; the longest files are begun first, so that no process waits at the end."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("clinical")
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else -1)


@pytest.fixture(scope="session")
def run_python():
    """``run_python("-m", "scripts.x", ...)``: a command that must succeed, unless check=False."""
    return _run_python


@pytest.fixture(scope="session")
def run_bundle():
    """``run_bundle("inferring", "configs/inference.json", dataset_dir=...)``: a command of the bundle."""
    return _run_bundle


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(NAME, make)``: the folder that ``make(folder)`` wrote, for all processes of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name, make):
        folder, mark = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not mark.exists():
                make(folder)
                mark.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def sample_cohort(made_once):
    """SYNTHETIC subjects of 12 slices: 1 to 6 train, 7 and 8 valid, 9 to 12 test; sub-0012 is healthy."""
    subjects = {"train_subjects": 6, "valid_subjects": 2, "test_subjects": 4}
    return made_once("sample_cohort", partial(make_sample_cohort, **subjects))


@pytest.fixture(scope="session")
def cohort_dicom(sample_cohort, made_once):
    """The cohort as MR series: ``SPLIT/sub-NNNN/IM0001.dcm`` to ``IM0012.dcm``."""
    return made_once("sample_cohort_dicom", partial(make_sample_dicom, sample_cohort))


@pytest.fixture(scope="session")
def trained(sample_cohort, made_once):
    """The output folder of a short training on the volumes: ``model.pt``, of the default settings but BACKBONE."""

    def train(output):
        _run_bundle(
            "training",
            "configs/train.json",
            dataset_dir=sample_cohort / "volumes" / "datalist.json",
            output_dir=output,
            backbone=BACKBONE,
            max_epochs=3,
            device="cpu",
        )

    return made_once("trained", train)


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
