"""Federated learning by MONAI's client: two sites that never show each other an image train one density."""

import math
import shutil

import numpy as np
import pytest
import torch
from commands import QUICK, ROOT
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

from bundle.checkpoint import load_checkpoint, trained_settings
from bundle.model import make_detector

ROUNDS = 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:executing the bundle config"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


def client(folder, data):
    """A site with its own images and its own output."""
    algorithm = MonaiAlgo(
        str(ROOT),
        local_epochs=2,
        send_weight_diff=False,
        config_train_filename="configs/train.json",
        config_evaluate_filename=None,
        config_filters_filename=None,
        train_kwargs={
            **QUICK,
            "max_epochs": 2 * ROUNDS,
            "dataset_dir": str(data),
            "output_dir": str(folder),
            "tracking_uri": "off",
        },
    )
    algorithm.initialize(extra={ExtraItems.CLIENT_NAME: folder.name})
    return algorithm


def average(states):
    return {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}


@pytest.fixture(scope="module")
def sites(cohort, tmp_path_factory):
    """Two clients on halves of the cohort, after two rounds; the weights that they agreed on after each."""
    root = tmp_path_factory.mktemp("federated")
    images = sorted((cohort / "slices/train/good").iterdir())
    clients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for number in range(2):
            data = root / f"data-{number}"
            data.mkdir()
            for image in images[number::2]:
                shutil.copy(image, data)
            clients.append(client(root / f"site-{number}", data))
        shared = clients[0].get_weights().weights
        agreed, rates = [], []
        for number in range(ROUNDS):
            for one in clients:
                one.train(ExchangeObject(weights=dict(shared)))
            shared = average([one.get_weights().weights for one in clients])
            agreed.append(shared)
            rates.append(clients[0].trainer.optimizer.param_groups[0]["lr"])
            shutil.copy(root / "site-0/model.pt", root / f"round-{number}.pt")
    assert rates == [pytest.approx(0, abs=1e-6)] * ROUNDS  # the cosine ends with each round
    return root, clients, agreed


def test_each_round_gives_every_site_finite_thresholds_and_a_checkpoint_of_its_own(sites):
    root, _, _ = sites
    thresholds = []
    for number in range(2):
        state = torch.load(root / f"site-{number}/model.pt", weights_only=True)
        thresholds.append(float(state["threshold"]))
        assert math.isfinite(float(state["threshold"])) and math.isfinite(float(state["image_threshold"]))
    assert thresholds[0] != thresholds[1]


def test_sites_learn_from_the_average_and_go_on_from_round_to_round(sites):
    _, clients, agreed = sites
    trained = [key for key in agreed[0] if key.startswith("contexts")]
    assert any(not torch.equal(agreed[0][key], agreed[1][key]) for key in trained)
    assert [one.trainer.state.epoch for one in clients] == [2 * ROUNDS] * 2


def test_what_is_fitted_in_closed_form_stays_that_of_the_site(sites):
    root, _, _ = sites
    rounds = [torch.load(root / f"round-{number}.pt", weights_only=True) for number in range(ROUNDS)]
    other = torch.load(root / "site-1/model.pt", weights_only=True)
    for key in ("feature_mean", "feature_std", "density.linear.components", "density.linear.weight"):
        torch.testing.assert_close(rounds[0][key], rounds[-1][key])
        assert not torch.equal(rounds[0][key], other[key])


def test_the_model_of_a_site_gives_maps(sites, monkeypatch):
    root, _, _ = sites
    path = root / "site-0/model.pt"
    detector = make_detector(trained_settings(path))
    load_checkpoint(detector, path)
    found = detector.eval().detect(torch.rand(1, 1, 100, 100))
    assert np.isfinite(found.anomaly_map.detach().numpy()).all()
