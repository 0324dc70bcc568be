"""Tiny files of backbones, and networks made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from bundle.errors import BundleError
from bundle.networks.backbones import BACKBONES
from bundle.networks.features import FeatureNetwork

DATA = Path(__file__).parent / "data"
META_FILE = DATA / "golden" / "dinov3_meta_tiny.pth"
META_KWARGS = {"embed_dim": 64, "depth": 3, "num_heads": 4}
LEARNED_KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 70}
HF_KWARGS = {
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit_gated": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
    "dinov2": LEARNED_KWARGS,
    "dinov2_gated": {**LEARNED_KWARGS, "mlp_ratio": 6},
    "dinov2_registers": LEARNED_KWARGS,
}
HF_BACKBONES = {
    "vit": "dinov3_vits16",
    "vit_gated": "dinov3_vits16plus",
    "convnext": "dinov3_convnext_tiny",
    "dinov2": "dinov2_vits14",
    "dinov2_gated": "dinov2_vitg14",
    "dinov2_registers": "dinov2_vits14_reg",
}


def meta_network(layers: tuple[int, ...] | None = None, blocks: str = "joined") -> FeatureNetwork:
    return FeatureNetwork("dinov3_vits16", META_FILE, layers=layers, timm_kwargs=META_KWARGS, blocks=blocks)


def hf_network(name: str, layers: tuple[int, ...] | None = None, blocks: str = "joined") -> FeatureNetwork:
    return FeatureNetwork(
        HF_BACKBONES[name],
        DATA / "hf" / name,
        layers=layers,
        timm_kwargs=HF_KWARGS[name],
        blocks=blocks,
    )


def timm_network(backbone: str, **kwargs: object) -> nn.Module:
    """A timm network with random values in all its tensors, also those that begin as zero or one."""
    spec = BACKBONES[backbone]
    network = timm.create_model(spec.timm_name, num_classes=0, **spec.timm_kwargs, **kwargs).eval()
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
