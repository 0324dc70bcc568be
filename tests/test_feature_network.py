"""The feature network: what it tells of itself, what a checkpoint holds of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from backbone_files import META_FILE, META_KWARGS, meta_network, random_image, refusal
from torch import Tensor, nn

from bundle.errors import BundleError
from bundle.networks.features import FeatureNetwork

pytestmark = pytest.mark.usefixtures("no_weights_in_reach")

# shape and form


def test_num_channels_and_patch_size_tell_the_shape() -> None:
    network = meta_network((0, 2))
    side = 5 * network.patch_size
    assert network(random_image(side, side)).shape == (2, network.num_channels, 5, 5)


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
