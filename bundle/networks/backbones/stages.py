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
        details: stages that are tapped at their own finer stride, ascending.
        patch: stride of the grid, in pixels.

    Attributes:
        tapped: stages of ``layers`` and ``details``, ascending.
        detail_channels: of the details together, at their own stride.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        strides: Sequence[int],
        layers: list[int],
        details: list[int],
        patch: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages[: max(layers + details) + 1])
        self.strides = list(strides)
        self.layers = layers
        self.tapped = sorted({*layers, *details})
        self.is_detail = [index in details for index in range(len(self.stages))]  # an empty list has no type
        self.patch = patch
        _fold_batch_norms(self)
        with torch.no_grad():
            maps = self.maps(torch.zeros(1, 3, 4 * patch, 4 * patch))
        self.detail_channels = sum(int(maps[self.tapped.index(stage)].shape[1]) for stage in details)
        self.to(memory_format=torch.channels_last)  # depthwise convolutions run faster so on a CPU

    def forward(self, image: Tensor) -> Tensor:
        """The joined maps [B, C, H // patch, W // patch] of ``image`` [B, 3, H, W], details space to depth."""
        grid = [image.shape[-2] // self.patch, image.shape[-1] // self.patch]
        maps: list[Tensor] = []
        details: list[Tensor] = []
        for index, features in enumerate(self.maps(image)):
            stage = self.tapped[index]
            if stage in self.layers:
                maps.append(_to_grid(features, self.strides[stage], self.patch, grid))
            if self.is_detail[stage]:
                details.append(F.pixel_unshuffle(features, self.patch // self.strides[stage]))
        return torch.cat(maps + details, dim=1)

    @torch.jit.export
    def maps(self, image: Tensor) -> list[Tensor]:
        """The tapped maps of ``image`` [B, 3, H, W], each at its own stride."""
        features = self.stem(image)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            features = stage(features)
            if index in self.tapped:
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
