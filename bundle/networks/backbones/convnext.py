"""ConvNeXt: DINOv3.

Sources: Meta's DINOv3 repository (https://github.com/facebookresearch/dinov3), timm (``timm/models/convnext.py``),
transformers (``models/dinov3_convnext``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bundle.networks.backbones.spec import DINOV3_PAGE, BackboneSpec, Layout, State, dinov3_files, rename
from bundle.networks.backbones.stages import Stages

STRIDES = (4, 8, 16, 32)  # pixels, of every stage
META = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
)
TRANSFORMERS = (
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsample_layers\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.pointwise_conv([12])\.", r".mlp.fc\1."),
    (r"\.layer_norm\.", ".norm."),
    (r"^layer_norm\.", "head.norm."),
)


def _from_meta(state: State) -> State:
    return rename({key: value for key, value in state.items() if not key.startswith("norms.")}, META)


def _from_transformers(state: State) -> State:
    return rename(state, TRANSFORMERS)


@dataclass(frozen=True, kw_only=True)
class ConvNext(BackboneSpec):
    """A ConvNeXt. Layers are stages 0 to 3, the last followed by the final norm."""

    license: str = "DINOv3"
    page: str = DINOV3_PAGE
    layers: tuple[int, ...] = (2,)

    strides = STRIDES
    layouts = (
        Layout("meta", "downsample_layers.0.0.weight", _from_meta),
        Layout("transformers", "stages.0.downsample_layers.0.weight", _from_transformers),
    )

    def depth(self, network: Any) -> int:
        """The number of stages."""
        return len(self.strides)

    def default_layers(self, network: Any) -> tuple[int, ...]:
        """See :class:`BackboneSpec`."""
        return self.layers

    def tapped(self, network: Any, layers: list[int], details: list[int], publisher: str, blocks: str) -> nn.Module:
        """See :class:`BackboneSpec`."""
        *stages, last = network.stages
        # Meta norms the last stage, and only it
        stages.append(nn.Sequential(last, network.head.norm))
        return Stages(network.stem, stages, self.strides, layers, details, self.patch)


def _dinov3(name: str, timm_name: str) -> ConvNext:
    timm_name = f"{timm_name}.dinov3_lvd1689m"
    return ConvNext(timm_name=timm_name, files=dinov3_files(name, timm_name))


BACKBONES = {
    "dinov3_convnext_tiny": _dinov3("dinov3_convnext_tiny", "convnext_tiny"),
    "dinov3_convnext_small": _dinov3("dinov3_convnext_small", "convnext_small"),
    "dinov3_convnext_base": _dinov3("dinov3_convnext_base", "convnext_base"),
    "dinov3_convnext_large": _dinov3("dinov3_convnext_large", "convnext_large"),
}
