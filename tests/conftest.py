"""Few threads and fixed seeds for every test, and a detector that is quick to build."""

import pytest
import torch
from builders import small_detector
from monai.utils import set_determinism

from bundle.networks import FeatureNetwork


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(2)
    set_determinism(seed=0)
    yield
    set_determinism(seed=None)


@pytest.fixture(scope="session")
def features():
    """The real EfficientNet-Lite0, which needs no download."""
    return FeatureNetwork("efficientnet_lite0")


@pytest.fixture
def detector(features):
    torch.manual_seed(0)
    return small_detector(features)
