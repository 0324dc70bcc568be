"""What a detector needs to be built and run: torch with what timm brings, and pydantic for settings."""

import subprocess
import sys

import pytest
from absent import HEAVY, without
from commands import ROOT, environment

NETWORKS = """
import torch
from bundle.compute import Compute
from bundle.networks import AnomalyDetector, FeatureNetwork, SpatialARDensity

features = FeatureNetwork("dinov3_vits16", "random", timm_kwargs={"depth": 1, "embed_dim": 32, "num_heads": 1})
density = SpatialARDensity(features.num_channels, hidden_channels=8)
detector = Compute("cpu", "fp32").place(AnomalyDetector(features, density, image_size=64))
assert detector(torch.rand(1, 1, 64, 64)).shape == (1, 1, 64, 64)
"""
SETTINGS = """
from bundle.model import make_detector

detector = make_detector({"backbone": "dinov3_vits16", "image_size": 64, "hidden_channels": 8}, weights="random")
assert detector.describe()["intensity"] == "auto"
"""
STORE = """
import tempfile
import torch
from bundle.store import EmbeddingStore

with tempfile.TemporaryDirectory() as folder:
    store = EmbeddingStore(folder, folder, {})
    store.add("key", torch.ones(1, 2, 3, 3))
    store.flush()
    assert store.read("key", 0).shape == (2, 3, 3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "blocked"),
    [
        (NETWORKS, HEAVY | {"pydantic"}),
        (SETTINGS, HEAVY),
        (STORE, HEAVY | {"pydantic", "timm"}),
        ("import scripts.benchmarks.gpu", HEAVY | {"pydantic", "PIL", "torchvision"}),
    ],
    ids=["networks", "settings", "feature cache", "benchmark for a card"],
)
def test_a_detector_needs_no_more_than_torch_timm_safetensors_and_for_its_settings_pydantic(program, blocked):
    done = subprocess.run(
        [sys.executable, "-c", without(blocked, program)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
