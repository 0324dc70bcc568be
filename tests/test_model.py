"""What a model is: settings that its checkpoint holds, and that are data."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from builders import small_detector
from safetensors.torch import load_file

from bundle import model
from bundle.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, trained_settings
from bundle.errors import BundleError
from bundle.model import Settings, known_settings, make_detector, settings_in
from bundle.networks.context import CONTEXTS
from bundle.networks.detector import AnomalyDetector, encode_identity
from bundle.networks.settings import remembers_settings

ROOT = Path(__file__).parents[1]
SMALL = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8}
MODEL = json.loads((ROOT / "configs/train.json").read_text())["model"]


def rewritten(path, **entries):
    """A checkpoint whose identity has other ``entries``; None removes one."""
    checkpoint = read_checkpoint(path)
    identity = {name: value for name, value in (checkpoint.identity | entries).items() if entries.get(name, 0) != "-"}
    torch.save({**checkpoint.state, "identity": encode_identity(identity)}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(make_detector(SMALL), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_the_config_of_training_lists_every_setting_with_the_default_that_its_part_has():
    assert MODEL.keys() == known_settings().keys()
    assert {name: MODEL[name] for name in MODEL} == json.loads(json.dumps(dict(Settings())))


@pytest.mark.parametrize("mode", CONTEXTS)
def test_an_identity_holds_the_settings_that_its_mode_uses_and_no_others(mode):
    described = make_detector({**SMALL, "mode": mode, "linear_components": 0}).describe()
    own = set(CONTEXTS[mode].known_settings())
    of_other_modes = {name for other in CONTEXTS.values() for name in other.known_settings()} - own
    assert own <= described.keys()
    assert not of_other_modes & described.keys()
    assert not {"rank", "share_orders"} & described.keys()


def test_a_checkpoint_makes_the_detector_that_was_trained(checkpoint):
    settings = trained_settings(checkpoint)
    detector = make_detector(settings)
    load_checkpoint(detector, checkpoint)
    assert detector.describe() == read_checkpoint(checkpoint).identity
    assert {name: settings[name] for name in ("hidden_channels", "image_size")} == {
        "hidden_channels": 8,
        "image_size": [64, 64],
    }


def test_all_differences_are_told_at_once(checkpoint):
    with pytest.raises(BundleError) as caught:
        trained_settings(checkpoint, {"mode": "causal", "image_size": 80, "kernel_size": 7})
    message = "trained with image_size [64, 64], not 80; mode 'guarded', not 'causal': leave these out"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"image_size": 64},
        {"image_size": [64, 64]},
        {"image_size": None, "layers": None, "backbone": "auto"},
        {"guard": 1},
        {"rank": 32},
    ],
)
def test_what_means_the_same_is_no_difference(checkpoint, given):
    assert trained_settings(checkpoint, given)["image_size"] == [64, 64]


@pytest.mark.parametrize("given", [{"rank": 8}, {"dilations": [4]}, {"share_orders": False}])
def test_a_setting_that_has_no_part_in_the_model_is_refused(checkpoint, given):
    with pytest.raises(BundleError, match=f"{next(iter(given))} has no part in this model: leave it out"):
        trained_settings(checkpoint, given)


def test_what_an_earlier_checkpoint_lacks_cannot_be_changed(checkpoint):
    rewritten(checkpoint, feature_pooling="-")
    with pytest.raises(BundleError, match="feature_pooling has no part in this model"):
        trained_settings(checkpoint, {"feature_pooling": 3})


def test_auto_stands_for_what_training_chose_and_for_nothing_else(checkpoint):
    rewritten(checkpoint, intensity="8bit", foreground="all")
    assert trained_settings(checkpoint, {"backbone": "auto", "intensity": "auto"})["intensity"] == "8bit"
    with pytest.raises(BundleError, match="foreground 'all', not 'auto'"):
        trained_settings(checkpoint, {"foreground": "auto"})


def test_other_weights_have_a_remedy_of_their_own(checkpoint):
    with pytest.raises(BundleError, match="give --weights those of the training"):
        load_checkpoint(make_detector(trained_settings(checkpoint), "random"), checkpoint)


def test_parts_that_share_a_setting_agree_on_its_type_and_default(monkeypatch):
    def other(*, kernel_size: int = 5):
        pass

    monkeypatch.setattr(model, "PARTS", (*model.PARTS, other))
    known_settings.cache_clear()
    with pytest.raises(TypeError, match="another type or default of kernel_size"):
        known_settings()
    monkeypatch.undo()
    known_settings.cache_clear()


def test_an_absent_entry_means_its_default_so_that_earlier_checkpoints_load(checkpoint):
    rewritten(checkpoint, position_code="-", score_scale="-")
    detector = make_detector(trained_settings(checkpoint))
    load_checkpoint(detector, checkpoint)
    assert (detector.describe()["position_code"], detector.describe()["score_scale"]) == (False, "log_radius")


def test_entries_that_a_mode_does_not_use_are_no_obstacle(checkpoint):
    """As version 0.5 wrote them."""
    rewritten(checkpoint, dilations=[4, 4], rank=7, share_orders=False, likelihood="pseudo")
    load_checkpoint(make_detector(trained_settings(checkpoint)), checkpoint)


TINY_VIT = {"backbone": "dinov2_vits14", "image_size": 56, "hidden_channels": 8}


@pytest.fixture
def of_a_vit(tmp_path):
    """A checkpoint of version 0.5: every layer was normed, and the default was the last block."""
    save_checkpoint(make_detector({**TINY_VIT, "layers": [-1], "blocks": "normed"}, "random"), tmp_path / "vit.pt")
    return rewritten(tmp_path / "vit.pt", blocks="-")


def test_an_earlier_checkpoint_of_a_vit_keeps_its_layers_and_norms_each(of_a_vit):
    assert read_checkpoint(of_a_vit).identity["layers"] == [11]
    detector = make_detector(trained_settings(of_a_vit, {"layers": None}), "random")
    load_checkpoint(detector, of_a_vit)
    assert (detector.features.layers, detector.features.blocks) == ([11], "normed")


def test_an_earlier_checkpoint_of_a_vit_is_refused_by_a_detector_that_taps_it_otherwise(of_a_vit):
    with pytest.raises(BundleError, match=r"blocks 'normed', not 'averaged'; layers \[11\], not \[4, 6\]"):
        load_checkpoint(make_detector(TINY_VIT, "random"), of_a_vit)


def test_an_entry_of_a_later_version_is_refused_by_name(checkpoint):
    rewritten(checkpoint, slice_mixing=3)
    with pytest.raises(BundleError, match="has 'slice_mixing' in its identity, which this version does not know"):
        load_checkpoint(make_detector(trained_settings(checkpoint)), checkpoint)


def test_a_setting_that_the_checkpoint_leaves_open_can_be_given(checkpoint):
    assert "channel" not in read_checkpoint(checkpoint).identity
    assert trained_settings(checkpoint, {"channel": 1})["channel"] == 1


def test_a_model_of_one_channel_is_not_used_on_another(tmp_path):
    save_checkpoint(make_detector({**SMALL, "channel": 0}), tmp_path / "model.pt")
    with pytest.raises(BundleError, match="channel 0, not 1"):
        trained_settings(tmp_path / "model.pt", {"channel": 1})


HOSTILE = "$__import__('pathlib').Path('{}').touch()"


@pytest.mark.parametrize(
    "entry",
    [
        {"mode": HOSTILE},
        {"intensity": HOSTILE},
        {"slice_range": [HOSTILE, 1.0]},
        {"layers": [HOSTILE]},
        {"backbone": "%configs/train.json::run"},
        {"slice_plane": {"_target_": "os.system", "command": "touch {}"}},
        {"channel": {"_target_": "os.system", "command": "touch {}"}},
        {"tiles": "@checkpoint"},
    ],
)
def test_values_of_a_checkpoint_are_data_that_are_refused_and_never_run(checkpoint, tmp_path, entry):
    entry = json.loads(json.dumps(entry).replace("{}", str(tmp_path / "ran")))
    rewritten(checkpoint, **entry)
    with pytest.raises(BundleError, match=next(iter(entry))):
        make_detector(trained_settings(checkpoint))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"kernel_size": 10**9 + 1},
        {"hidden_channels": 10**9},
        {"image_size": [16 * 10**30, 16]},
        {"residual_pooling": 1e9},
        {"feature_pooling": 10**9 + 1},
        {"mode": "causal", "dilations": [1] * 10**6},
        {"mode": "causal", "dilations": [10**9]},
        {"mode": "cau\nsal"},
    ],
)
def test_numbers_that_no_model_has_are_refused_at_once_and_in_one_short_line(checkpoint, entry):
    rewritten(checkpoint, **entry)
    with pytest.raises(BundleError) as caught:
        make_detector(trained_settings(checkpoint))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_setting_that_the_mode_does_not_use_is_named(caplog):
    make_detector({**SMALL, "mode": "causal", "guard": 2, "linear_components": 0})
    assert "guard 2 has no part in a model of mode 'causal'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"), [({"moed": 1}, "did you mean 'mode'"), ({"guard": "1"}, "whole number")]
)
def test_unknown_settings_and_other_types_are_refused(settings, message):
    with pytest.raises(BundleError, match=message):
        Settings(settings)


def test_a_new_setting_is_one_argument_and_nothing_else_in_python(features, tmp_path, monkeypatch):
    """A subclass has one argument more: it is typed, travels in the checkpoint, and is compared, by that alone."""

    class Extended(AnomalyDetector):
        @remembers_settings
        def __init__(self, features, density, preprocessing=None, *, temperature: float = 0.5, **settings):
            super().__init__(features, density, preprocessing, **settings)

    monkeypatch.setattr(model, "AnomalyDetector", Extended)
    monkeypatch.setattr(model, "PARTS", (*model.PARTS, Extended))
    known_settings.cache_clear()
    try:
        with pytest.raises(BundleError, match="--temperature must be a number, got 'warm': for example"):
            Settings({"temperature": "warm"})
        save_checkpoint(make_detector({**SMALL, "temperature": 2}), tmp_path / "model.pt")
        assert trained_settings(tmp_path / "model.pt")["temperature"] == 2.0
        with pytest.raises(BundleError, match=r"temperature 2.0, not 3.0"):
            trained_settings(tmp_path / "model.pt", {"temperature": 3})
    finally:
        monkeypatch.undo()
        known_settings.cache_clear()


def test_every_setting_is_a_line_of_one_config():
    configs = {path.name: json.loads(path.read_text()) for path in (ROOT / "configs").glob("*.json")}
    for name in known_settings():
        assert [file for file, config in configs.items() if name in config.get("model", {})] == ["train.json"]
        assert [file for file, config in configs.items() if name in config] == []


def test_settings_of_a_detector_make_an_equal_one(features):
    detector = small_detector(
        features, mode="causal", dilations=[1, 2], orders=2, share_orders=False, covariance="low_rank"
    )
    again = make_detector(settings_in(detector.describe()))
    assert again.describe() == detector.describe() | {
        name: value for name, value in again.describe().items() if name not in detector.describe()
    }
    assert inspect.signature(make_detector).parameters.keys() == {"settings", "weights", "weights_sha256"}


def test_a_checkpoint_of_version_0_5_gives_the_map_that_it_gave_there():
    """Both files were made by version 0.5.0: settings of other modes in the identity, no ``channel``."""
    golden = load_file(ROOT / "tests/data/golden/checkpoint_0_5.safetensors")
    path = ROOT / "tests/data/golden/checkpoint_0_5.pt"
    assert {"dilations", "rank", "likelihood"} <= read_checkpoint(path).identity.keys()
    detector = make_detector(trained_settings(path)).eval()
    load_checkpoint(detector, path)
    with torch.inference_mode():
        found = detector.detect(golden["image"])
    torch.testing.assert_close(found.anomaly_map, golden["anomaly_map"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.image_score, golden["image_score"], atol=1e-5, rtol=0)


def test_an_earlier_checkpoint_has_no_details_and_no_air(tmp_path):
    path = ROOT / "tests/data/golden/checkpoint_0_5.pt"
    settings = trained_settings(path)
    assert (settings["foreground"], settings["detail_layers"]) == ("all", [])
    for given in ({"detail_layers": [2]}, {"foreground": "auto"}):
        with pytest.raises(BundleError, match=f"{next(iter(given))} .*, not "):
            trained_settings(path, given)
