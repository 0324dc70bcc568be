"""Every kind of backbone: parity with the published code, layouts of files, scripts and exports."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbone_files import (
    DATA,
    HF_BACKBONES,
    HF_KWARGS,
    LEARNED_KWARGS,
    META_KWARGS,
    hf_network,
    meta_network,
    random_image,
    timm_network,
)
from builders import small_detector
from safetensors.torch import load_file, save_file
from timm.models import convnext, eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError
from bundle.exports import export_all
from bundle.networks.backbones import BACKBONES
from bundle.networks.backbones.learned_vit import INTERPOLATIONS, Positions
from bundle.networks.features import FeatureNetwork

pytestmark = pytest.mark.usefixtures("no_weights_in_reach")

# parity


@pytest.mark.parametrize("layers", [(2,), (0,), (0, 2)])
def test_meta_file_gives_the_features_of_meta_code(layers: tuple[int, ...]) -> None:
    golden = load_file(DATA / "golden" / "dinov3_meta_tiny_io.safetensors")
    expected = torch.cat([golden["features_last" if layer == 2 else "features_block0"] for layer in layers], dim=1)
    torch.testing.assert_close(meta_network(layers, blocks="normed")(golden["image"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "vit_gated"])
@pytest.mark.parametrize(("layer", "key"), [(1, "last"), (0, "block0")])
def test_transformers_vit_file_gives_the_features_of_transformers(name: str, layer: int, key: str) -> None:
    golden = load_file(DATA / "hf" / name / "io.safetensors")
    network = hf_network(name, (layer,), blocks="normed")
    torch.testing.assert_close(network(golden["image"]), golden[key], rtol=0, atol=1e-5)


def test_transformers_convnext_file_gives_the_features_of_transformers() -> None:
    golden = load_file(DATA / "hf" / "convnext" / "io.safetensors")
    torch.testing.assert_close(hf_network("convnext")(golden["image"]), golden["stage2"], rtol=0, atol=1e-5)


def test_last_convnext_stage_is_normed_and_brought_to_stride_16() -> None:
    golden = load_file(DATA / "hf" / "convnext" / "io.safetensors")
    expected = F.interpolate(golden["last"], (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(hf_network("convnext", (3,))(golden["image"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
def test_vit_blocks_equal_forward_intermediates_of_timm(normed: bool, tmp_path: Path) -> None:
    reference = timm_network("dinov3_vits16", **META_KWARGS)
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    network = FeatureNetwork(
        "dinov3_vits16",
        tmp_path / "timm.safetensors",
        layers=(0, 1),
        timm_kwargs=META_KWARGS,
        blocks="normed" if normed else "joined",
    )
    image = random_image(48, 80)
    maps = reference.forward_intermediates(image, indices=[0, 1], norm=normed, intermediates_only=True)
    torch.testing.assert_close(network(image), torch.cat(maps, dim=1), rtol=0, atol=0)


VITS = pytest.mark.parametrize("network", [meta_network, partial(hf_network, "dinov2")], ids=["rotary", "learned"])


def picture_for(network: FeatureNetwork) -> Tensor:
    return random_image(5 * network.patch_size, 5 * network.patch_size)


@VITS
def test_the_final_norm_follows_the_last_block_always_and_others_if_wanted(network: Any) -> None:
    image = picture_for(network())
    last = network().backbone.norm_from
    assert torch.equal(network((last,))(image), network((last,), blocks="normed")(image))
    first, normed = network((0,))(image), network((0,), blocks="normed")(image)
    expected = network().backbone.norm(first.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(normed, expected)
    assert not torch.allclose(first, normed, atol=0.1)


@VITS
def test_averaged_blocks_are_the_mean_of_each(network: Any) -> None:
    image = picture_for(network())
    averaged = network((0, 1), blocks="averaged")
    torch.testing.assert_close(averaged(image), (network((0,))(image) + network((1,))(image)) / 2)
    assert averaged.num_channels == network((0,)).num_channels


def test_a_word_that_says_nothing_of_blocks_is_refused() -> None:
    with pytest.raises(BundleError, match="blocks 'average' is unknown: did you mean 'averaged'"):
        meta_network(blocks="average")


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


def as_meta_does(network: nn.Module, image: Tensor) -> Tensor:
    """The last features of a timm ViT with learned positions, interpolated as ``interpolate_pos_encoding`` of DINOv2.

    As ``dinov2_vits14`` of Meta's hub is without registers: no antialiasing, 0.1 patches added to the new side.
    """
    patches = network.patch_embed(image)
    height, width = patches.shape[1:3]
    own, learned = network.pos_embed[:, :1], network.pos_embed[:, 1:]
    side = int(learned.shape[1] ** 0.5)
    if (height, width) != (side, side):
        grid = learned.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = (float(height + 0.1) / side, float(width + 0.1) / side)
        learned = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
    tokens = torch.cat([network.cls_token.expand(len(image), -1, -1), patches.flatten(1, 2)], dim=1)
    tokens = tokens + torch.cat([own, learned], dim=1)
    tokens = network.norm(network.blocks(tokens))
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))


def to_meta_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of timm's DINOv2 as Meta's file has them; the class token gets its position back."""
    renamed = {key.replace("reg_token", "register_tokens"): value for key, value in state.items()}
    renamed["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    if "reg_token" in state:
        own = torch.ones_like(state["cls_token"])
        renamed["cls_token"] = state["cls_token"] - own
        renamed["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
    return renamed


LEARNED_SIZES = [(70, 70), (56, 56), (112, 112), (42, 98)]  # pixels; the first is that of training


@pytest.mark.parametrize("size", LEARNED_SIZES)
def test_meta_dinov2_file_gives_the_features_of_meta_code(size: tuple[int, int], tmp_path: Path) -> None:
    reference = timm_network("dinov2_vits14", **LEARNED_KWARGS)
    torch.save(to_meta_dinov2(reference.state_dict()), tmp_path / "meta.pth")
    network = FeatureNetwork("dinov2_vits14", tmp_path / "meta.pth", layers=-1, timm_kwargs=LEARNED_KWARGS)
    image = random_image(*size)
    torch.testing.assert_close(network(image), as_meta_does(reference, image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["timm", "meta"])
@pytest.mark.parametrize("size", LEARNED_SIZES)
def test_dinov2_with_registers_gives_the_features_of_timm_in_every_layout(
    size: tuple[int, int], layout: str, tmp_path: Path
) -> None:
    reference = timm_network("dinov2_vits14_reg", **LEARNED_KWARGS)
    state = reference.state_dict() if layout == "timm" else to_meta_dinov2(reference.state_dict())
    save_file(state, tmp_path / "file.safetensors")
    network = FeatureNetwork(
        "dinov2_vits14_reg",
        tmp_path / "file.safetensors",
        layers=(0, 1),
        timm_kwargs=LEARNED_KWARGS,
        blocks="normed",
    )
    assert network.publisher == layout
    image = random_image(*size)
    maps = reference.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True)
    torch.testing.assert_close(network(image), torch.cat(maps, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", LEARNED_SIZES)
def test_timm_dinov2_file_gives_the_features_of_timm(size: tuple[int, int], tmp_path: Path) -> None:
    reference = timm_network("dinov2_vits14", **LEARNED_KWARGS)
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    network = FeatureNetwork("dinov2_vits14", tmp_path / "timm.safetensors", layers=-1, timm_kwargs=LEARNED_KWARGS)
    image = random_image(*size)
    (expected,) = reference.forward_intermediates(image, indices=[1], norm=True, intermediates_only=True)
    torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["56x56", "84x84", "42x98"])
@pytest.mark.parametrize(("layer", "key"), [(1, "last"), (0, "block0")])
@pytest.mark.parametrize("name", ["dinov2", "dinov2_gated", "dinov2_registers"])
def test_transformers_dinov2_file_gives_the_features_of_transformers(
    name: str, layer: int, key: str, size: str
) -> None:
    image = load_file(DATA / "hf" / "dinov2_images.safetensors")[size].float()
    expected = load_file(DATA / "hf" / name / "io.safetensors")[f"{size}_{key}"]
    network = hf_network(name, (layer,), blocks="normed")
    torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-5)


def test_without_registers_the_publishers_interpolate_positions_differently(tmp_path: Path) -> None:
    state = timm_network("dinov2_vits14", **LEARNED_KWARGS).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    torch.save(to_meta_dinov2(state), tmp_path / "meta.pth")
    kwargs = {"timm_kwargs": LEARNED_KWARGS}
    meta = FeatureNetwork("dinov2_vits14", tmp_path / "meta.pth", **kwargs)
    ours = FeatureNetwork("dinov2_vits14", tmp_path / "timm.safetensors", **kwargs)
    assert meta.weights_id == ours.weights_id
    assert meta.describe()["positions"] == "bicubic, 0.1 patches larger"
    assert ours.describe()["positions"] == "bicubic, antialiased"
    image = random_image(42, 98)
    assert float((meta(image) - ours(image)).abs().max()) > 1e-4


def test_positions_keep_all_bits_under_an_automatic_cast() -> None:
    network = hf_network("dinov2")
    expected = network.backbone.positions(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network.backbone.positions(3, 7), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_positions_in_onnx_are_right_at_every_grid(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    places = AtGridOf(Positions(torch.randn(5, 5, 8), INTERPOLATIONS[name]).requires_grad_(False)).eval()
    axes = ({0: "height", 1: "width"},)
    program = torch.onnx.export(
        places, (torch.zeros(3, 7),), dynamo=True, input_names=["grid"], dynamic_shapes=axes, verbose=False
    )
    program.save(tmp_path / "positions.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "positions.onnx", providers=["CPUExecutionProvider"])
    for size in [(5, 5), (3, 7), (9, 9), (5, 6)]:
        grid = torch.zeros(size)
        found = torch.from_numpy(session.run(None, {"grid": grid.numpy()})[0])
        torch.testing.assert_close(found, places(grid), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_detector_with_learned_positions_can_be_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = FeatureNetwork("dinov2_vits14", "random", layers=(0, 1), timm_kwargs=LEARNED_KWARGS)
    rows = export_all(small_detector(network, image_size=[56, 84]).eval(), tmp_path, "onnx", batch_size=1)
    assert rows[1]["max_difference"] < 1e-4


class AtGridOf(nn.Module):
    """Positions at the height and width of what is given."""

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, grid: Tensor) -> Tensor:
        return self.positions(grid.shape[0], grid.shape[1])


def test_blocks_that_training_grouped_are_read(tmp_path: Path) -> None:
    reference = timm_network("dinov2_vits14", **LEARNED_KWARGS)
    state = to_meta_dinov2(reference.state_dict())
    grouped = {f"backbone.{key.replace('blocks.', 'blocks.0.')}": value for key, value in state.items()}
    torch.save({"teacher": {**grouped, "dino_head.last_layer.weight": torch.zeros(1)}}, tmp_path / "training.pth")
    torch.save(state, tmp_path / "released.pth")
    networks = [
        FeatureNetwork("dinov2_vits14", tmp_path / file, timm_kwargs=LEARNED_KWARGS)
        for file in ("training.pth", "released.pth")
    ]
    assert networks[0].describe() == networks[1].describe()


def test_gated_dinov2_of_meta_gets_the_names_that_timm_gives() -> None:
    network = timm_network("dinov2_vitg14_reg", **HF_KWARGS["dinov2_gated"])
    state = to_meta_dinov2(network.state_dict())
    state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in state.items()}
    expected = vision_transformer.checkpoint_filter_fn(dict(state), network)
    _, converted = BACKBONES["dinov2_vitg14_reg"].to_timm(state, network.state_dict())
    assert converted.keys() == expected.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


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
    publisher, converted = BACKBONES[HF_BACKBONES[name]].to_timm(state, network.state_dict())
    assert publisher == "meta"
    assert converted.keys() == expected.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_dinov3_that_was_trained_without_biases_is_read(tmp_path: Path) -> None:
    reference = timm.create_model("vit_base_patch16_dinov3", num_classes=0, **META_KWARGS).eval()
    assert not [key for key in reference.state_dict() if key.endswith("q_bias")]
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    network = FeatureNetwork("dinov3_vitb16", tmp_path / "timm.safetensors", layers=-1, timm_kwargs=META_KWARGS)
    image = random_image(48, 80)
    (expected,) = reference.forward_intermediates(image, indices=[2], norm=True, intermediates_only=True)
    torch.testing.assert_close(network(image), expected)


# shape and form


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_every_backbone_is_known_to_timm(backbone: str) -> None:
    assert timm.is_model(BACKBONES[backbone].timm_name.split(".")[0])


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_default_image_size_of_every_backbone_is_a_multiple_of_its_patch(backbone: str) -> None:
    spec = BACKBONES[backbone]
    assert spec.image_size % spec.patch == 0


def test_every_backbone_is_in_the_docs_with_its_license() -> None:
    rows = (DATA.parents[1] / "docs" / "backbones.md").read_text().splitlines()
    for name, spec in BACKBONES.items():
        assert any(row.startswith("|") and f"`{name}`" in row and spec.license in row for row in rows), name


def test_efficientnet_default_has_40_and_112_channels_at_stride_16() -> None:
    network = FeatureNetwork("efficientnet_lite0")
    assert network.num_channels == 40 + 112
    assert network(random_image(64, 96)).shape == (2, 152, 4, 6)


def test_blocks_after_the_deepest_layer_are_dropped() -> None:
    assert len(meta_network((1,)).backbone.blocks) == 2


def test_stages_after_the_deepest_layer_are_dropped() -> None:
    assert len(FeatureNetwork("efficientnet_lite0", "random", layers=(1,)).backbone.stages) == 2


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0]), (3, [0, 1]), (12, [4, 6]), (24, [9, 13]), (32, [12, 18]), (40, [16, 22])]
)
@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov2_vits14", "rad_dino"])
def test_a_vit_is_tapped_after_five_and_seven_twelfths_of_its_depth(name: str, depth: int, layers: list[int]) -> None:
    kwargs = {"embed_dim": 16, "num_heads": 2, "depth": depth}
    assert FeatureNetwork(name, "random", timm_kwargs=kwargs).layers == layers


# TorchScript


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "name", ["vit", "vit_gated", "convnext", "dinov2", "dinov2_gated", "dinov2_registers", "efficientnet"]
)
def test_saved_script_is_right_at_every_size(name: str, tmp_path: Path) -> None:
    if name == "efficientnet":
        network = FeatureNetwork("efficientnet_lite0")
    else:
        network = hf_network(name, (0, 1, 2, 3) if name == "convnext" else (0, 1))
    torch.jit.save(torch.jit.script(network), tmp_path / "network.ts")
    scripted = torch.jit.load(tmp_path / "network.ts")
    for rows, columns in [(5, 5), (2, 7), (6, 3)]:
        image = random_image(rows * network.patch_size, columns * network.patch_size, batch=1)
        torch.testing.assert_close(scripted(image), network(image))
        torch.testing.assert_close(scripted.normalize(image), network.normalize(image))
