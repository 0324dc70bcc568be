"""What a file says of the model in it: data, which nothing runs, and numbers that are some."""

import json

import pytest
import torch
from commands import EVALUATE, INFER, error_line, run

from bundle.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, trained_settings
from bundle.errors import BundleError
from bundle.identity import FACTS, check_numbers, checked_identity
from bundle.model import make_detector
from bundle.networks.backbones import BACKBONES
from bundle.networks.detector import encode_identity
from scripts.integrations.dicomweb import infer
from scripts.integrations.monai_deploy.package import make_application
from scripts.integrations.monai_label.__main__ import place_checkpoint

SMALL = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8}
WEIGHTS = "0" * 64
EXPRESSION = "$__import__('os').system('touch MADE')"
COMPONENT = {"_target_": "os.system", "command": "touch MADE"}
HOSTILE = [
    {"mode": EXPRESSION},
    {"slice_plane": COMPONENT},
    {"layers": [[COMPONENT]]},
    {"slice_range": [EXPRESSION, 1.0]},
    {"weights": EXPRESSION},
    {"positions": COMPONENT},
    {"mean": [EXPRESSION] * 3},
    {"likelihood": EXPRESSION},
    {"a later setting": {"nested": [{"deeper": [COMPONENT]}]}},
    {"a later setting": "%configs/train.json::run"},
    {"@checkpoint": 1},
]
DETECTOR = make_detector(SMALL)
READERS = {
    "the settings": lambda path, folder: trained_settings(path),
    "the weights": lambda path, folder: load_checkpoint(DETECTOR, path),
    "MONAI Deploy": make_application,
    "MONAI Label": lambda path, folder: place_checkpoint(folder, path, {}, None),
}
CONFIGS = {
    "inferring": INFER,
    "evaluating": EVALUATE,
    "exporting": "['configs/inference.json','configs/export.json']",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.pt"
    save_checkpoint(DETECTOR, path)
    return read_checkpoint(path)


def altered(good, folder, entries, tensors=None):
    """A checkpoint with other ``entries`` in its identity, in which MADE is the path of a file to make."""
    entries = json.loads(json.dumps(entries).replace("MADE", str(folder / "ran")))
    state = {**good.state, **(tensors or {}), "identity": encode_identity({**good.identity, **entries})}
    torch.save(state, folder / "hostile.pt")
    return folder / "hostile.pt"


def identity(**entries):
    return {**SMALL, "weights": WEIGHTS, **entries}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("entries", HOSTILE)
def test_no_reader_of_a_checkpoint_runs_what_its_identity_holds(good, tmp_path, entries, reader):
    path = altered(good, tmp_path, entries)
    with pytest.raises(BundleError, match="are not evaluated|are not made") as caught:
        READERS[reader](path, tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("entries", [{"mode": EXPRESSION}, {"weights": COMPONENT}])
@pytest.mark.parametrize("command", CONFIGS)
def test_no_command_runs_what_a_checkpoint_holds(good, tmp_path, cohort, entries, command):
    path = altered(good, tmp_path, entries)
    done = run(command, CONFIGS[command], checkpoint=path, output_dir=tmp_path / "out", dataset_dir=cohort / "slices")
    assert "is no checkpoint of this bundle" in error_line(done)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_dicomweb_runs_nothing_that_a_checkpoint_holds(good, tmp_path, cohort):
    path = altered(good, tmp_path, {"mode": EXPRESSION})
    with pytest.raises(BundleError, match="are not evaluated"):
        infer(cohort / "slices", tmp_path / "results", path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"weights": "other"},
        {"weights": WEIGHTS + "\n"},
        {"weights": 1},
        {"positions": "nearest"},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0.5, 0.5, 0.0]},
        {"std": "0.5"},
        {"likelihood": "certain"},
    ],
)
def test_facts_of_the_weights_have_types_lengths_and_ranges(entries):
    assert entries.keys() <= FACTS.keys()
    with pytest.raises(BundleError, match=next(iter(entries))):
        checked_identity(identity(**entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"backbone": "resnet50"},
        {"mode": "nonsense"},
        {"kernel_size": 4},
        {"hidden_channels": 10**9},
        {"guard": 9},
        {"tiles": -5},
        {"orders": 3},
        {"linear_components": -1},
        {"image_score": "best"},
        {"slice_pooling": 1e9},
        {"intensity": "bright"},
        {"blocks": "stacked"},
        {"shrinkage": float("nan")},
        {"image_size": [65, 64]},
    ],
)
def test_choices_and_ranges_are_checked_without_weights(entries):
    with pytest.raises(BundleError, match=next(iter(entries))):
        checked_identity(identity(**entries))


@pytest.mark.parametrize("missing", ["backbone", "weights"])
def test_an_identity_names_backbone_and_weights(missing):
    with pytest.raises(BundleError, match=missing):
        checked_identity({name: value for name, value in identity().items() if name != missing})


def test_an_identity_of_another_kind_is_refused():
    with pytest.raises(BundleError, match="not settings by name"):
        checked_identity(["mode"])


def test_entries_that_nobody_knows_are_refused_or_plain_data():
    with pytest.raises(BundleError, match="peer"):
        checked_identity(identity(peer="padim"))
    assert checked_identity(identity(peer="padim"), with_others=True)["peer"] == "padim"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "dinov2_vits14", "dinov3_vits16"])
def test_what_a_detector_says_of_itself_is_an_identity(name):
    size = 4 * BACKBONES[name].patch
    described = make_detector({**SMALL, "backbone": name, "image_size": size}, "random").describe()
    assert checked_identity(described) == described


@pytest.mark.parametrize(
    "tensors",
    [
        {"threshold": torch.tensor(torch.nan)},
        {"image_threshold": torch.tensor(-torch.inf)},
        {"threshold": torch.tensor(3.0)},  # for a rate of NaN
        {"false_positive_rate": torch.tensor(2.0, dtype=torch.float64)},
        {"patch_score.healthy_std": torch.tensor(torch.nan)},
        {"density.contexts.0.predict.bias": torch.tensor([torch.inf])},
    ],
)
def test_a_checkpoint_of_numbers_that_are_none_is_refused(good, tmp_path, tensors):
    path = altered(good, tmp_path, {}, tensors)
    for reader in ("the settings", "the weights"):
        with pytest.raises(BundleError, match=next(iter(tensors))):
            READERS[reader](path, tmp_path)


def test_a_model_that_is_calibrated_has_thresholds_and_rates():
    calibrated = {"threshold": torch.tensor(3.0), "false_positive_rate": torch.tensor(0.01)}
    check_numbers(calibrated)
    with pytest.raises(BundleError, match="a false_positive_rate of 1.0"):
        check_numbers(calibrated | {"false_positive_rate": torch.tensor(1.0)})
