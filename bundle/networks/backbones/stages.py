"""The stages of a convolutional network, brought to one grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights


class Stages(nn.Module):
    """The stages up to the deepest tapped one, brought to the grid of stride ``patch``.

    Args:
        stem: what comes before the first stage.
        stages: of the network, in its order.
        strides: of every stage, in pixels.
        layers: the tapped stages, ascending.
        patch: stride of the grid, in pixels.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], strides: Sequence[int], layers: list[int], patch: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages[: layers[-1] + 1])
        self.strides = list(strides)
        self.layers = layers
        self.patch = patch
        _fold_batch_norms(self)
        self.to(memory_format=torch.channels_last)  # depthwise convolutions run faster so on a CPU

    def forward(self, image: Tensor) -> Tensor:
        """The joined maps [B, C, H // patch, W // patch] of ``image`` [B, 3, H, W]."""
        grid = [image.shape[-2] // self.patch, image.shape[-1] // self.patch]
        maps: list[Tensor] = []
        for index, features in enumerate(self.maps(image)):
            maps.append(_to_grid(features, self.strides[self.layers[index]], self.patch, grid))
        return torch.cat(maps, dim=1)

    @torch.jit.export
    def maps(self, image: Tensor) -> list[Tensor]:
        """The tapped maps of ``image`` [B, 3, H, W], each at its own stride."""
        features = self.stem(image)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            features = stage(features)
            if index in self.layers:
                maps.append(features)
        return maps


def _fold_batch_norms(module: nn.Module) -> None:
    """Move each batch normalization, which is a fixed affine map here, into the convolution before it."""
    before: nn.Module | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            assert child.running_mean is not None and child.running_var is not None
            before.weight, bias = fuse_conv_bn_weights(
                before.weight, before.bias, child.running_mean, child.running_var, child.eps, child.weight, child.bias
            )
            before.bias = bias
            setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's layer holds an activation as well
        else:
            _fold_batch_norms(child)
        before = child


def _to_grid(features: Tensor, stride: int, patch: int, grid: list[int]) -> Tensor:
    """Bring ``features`` of any ``stride`` (pixels) to ``grid``, height and width at stride ``patch``."""
    if stride < patch:
        return F.avg_pool2d(features, patch // stride)
    if stride > patch:
        return F.interpolate(features, grid, mode="bilinear", align_corners=False)
    return features
