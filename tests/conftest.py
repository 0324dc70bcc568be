"""Few threads and fixed seeds for every test, a quick detector, and a real training on a tiny cohort."""

import signal

import pytest
import torch
from builders import small_detector
from commands import QUICK, TRAIN, succeed
from huggingface_hub import constants
from monai.utils import set_determinism

from bundle.networks import FeatureNetwork
from bundle.networks.weights import FOLDER_VARIABLES
from bundle.samples import make_sample_cohort

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's jobs in the background ignore Ctrl-C, and so would the commands that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW_FIXTURES = {"trained", "exported", "measured_run"}  # a training, exports in every format, a benchmark


def pytest_collection_modifyitems(items):
    """A test that waits for one of these is slow, whatever it does itself."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(2)
    set_determinism(seed=0)
    yield
    set_determinism(seed=None)


@pytest.fixture
def no_weights_in_reach(monkeypatch, tmp_path):
    """Whatever the machine has: no folder of weights, an empty hub cache, no network."""
    for variable in FOLDER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def features():
    """The real EfficientNet-Lite0, which needs no download."""
    return FeatureNetwork("efficientnet_lite0")


@pytest.fixture
def detector(features):
    torch.manual_seed(0)
    return small_detector(features)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    return make_sample_cohort(
        tmp_path_factory.mktemp("data") / "sample_cohort", train_subjects=10, valid_subjects=3, test_subjects=8
    )


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory):
    """A real training on the tiny cohort."""
    output = tmp_path_factory.mktemp("trained")
    done = succeed("training", TRAIN, dataset_dir=cohort / "slices", output_dir=output, **QUICK)
    return output, done


@pytest.fixture(scope="session")
def knobs(trained):
    """What later commands on the trained model need."""
    return {"checkpoint": trained[0] / "model.pt", "device": QUICK["device"]}
