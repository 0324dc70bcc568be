"""Networks that the benchmarks of speed time: the bare backbone, the paper's loop, this bundle, peers in plain torch.

Nothing here reads a file, and nothing needs more than torch, timm and safetensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bundle.networks import AnomalyDetector, FeatureNetwork, SpatialARDensity
from bundle.networks.backbones import BACKBONES
from bundle.networks.density import squared_error
from bundle.networks.weights import load_backbone

PAPER_MAP = 240  # pixels; side of the maps that the authors' code evaluates
TRAINING_BATCH = 64  # as in the paper
DISTANCES = 2**26  # that a search in a bank holds at once
NEIGHBORS = 9  # of PatchCore's image score
TOP_SHARE = 0.01  # of the patches, whose mean is AnomalyDINO's image score


def bare_network(backbone: str, weights: str | None, device: str, timm_kwargs: dict[str, Any] | None = None) -> Any:
    """The network as timm makes it, with nothing of this bundle but its weights."""
    network, _, _ = load_backbone(backbone, weights, timm_kwargs=timm_kwargs)
    return network.requires_grad_(False).eval().to(device)


def paper_layers(backbone: str) -> int | None:
    """What is tapped here: the last block of a ViT, as in the paper; of other kinds what the bundle taps by default."""
    return -1 if BACKBONES[backbone].has_blocks else None


def bare_features(network: Any, backbone: str, images: Tensor) -> list[Tensor]:
    """timm's own ``forward_intermediates`` of ``images`` [B, 3, H, W], up to the deepest layer that is tapped."""
    last = paper_layers(backbone)
    layers = list(BACKBONES[backbone].default_layers(network)) if last is None else [last]
    if hasattr(network, "conv_stem"):  # an EfficientNet, where timm counts the stem as block 0
        return network.forward_intermediates(
            images, [layer + 1 for layer in layers], stop_early=True, intermediates_only=True, extra_blocks=True
        )
    return network.forward_intermediates(images, layers, norm=True, stop_early=True, intermediates_only=True)


def paper_embeddings(network: Any, backbone: str, images: Tensor) -> Tensor:
    """The embeddings [B, C, h, w] of normalized ``images`` [B, 3, H, W] as the paper's loop gets them.

    The maps of a convolutional network are averaged to the grid of the backbone's patches.
    """
    patch = BACKBONES[backbone].patch
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    maps = bare_features(network, backbone, images)
    return torch.cat([F.adaptive_avg_pool2d(features, grid) for features in maps], dim=1)


class AllTapsConv2d(nn.Conv2d):
    """A masked convolution as the authors' code has it: the kernel times its mask, and then every tap is computed."""

    mask: Tensor

    def __init__(self, source: nn.Conv2d, taps: Tensor) -> None:
        dilation = source.dilation[0]
        reach = dilation * (taps.shape[0] // 2)
        super().__init__(source.in_channels, source.out_channels, taps.shape[0], padding=reach, dilation=dilation)
        self.load_state_dict({"weight": source.weight, "bias": source.bias})
        self.register_buffer("mask", taps.expand_as(self.weight).clone())

    def forward(self, features: Tensor) -> Tensor:
        """Convolve ``features`` [B, C_in, H, W] to [B, C_out, H, W]."""
        return self._conv_forward(features, self.weight * self.mask, self.bias)


def paper_density(density: SpatialARDensity) -> nn.Sequential:
    """The network of ``density`` with the same weights, as the authors' code computes it."""
    layers: list[nn.Module] = []
    stack: Any = density.contexts[0]
    for module in stack.net:
        if isinstance(module, nn.Conv2d):
            taps = stack.layer_taps(stack.kernel_size, first=not layers)
            layers.append(AllTapsConv2d(module, taps))
        else:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def paper_map(density: nn.Module, features: Tensor) -> Tensor:
    """The map [B, 1, 240, 240] that the paper's loop makes of embeddings ``features`` [B, C, h, w]."""
    patch_map = squared_error(density(features), features)
    return F.interpolate(patch_map[:, None], (PAPER_MAP, PAPER_MAP), mode="bilinear")


def make_features(backbone: str, weights: str | None, timm_kwargs: dict[str, Any] | None = None) -> FeatureNetwork:
    """The feature network of this bundle, which taps what the paper does."""
    layers = paper_layers(backbone)
    return FeatureNetwork(backbone, weights, layers=layers, detail_layers=[], timm_kwargs=timm_kwargs)


def paper_detector(features: FeatureNetwork, image_size: int) -> AnomalyDetector:
    """This bundle's detector with the paper's density; the same initial weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        density = SpatialARDensity(
            features.num_channels,
            mode="causal",
            hidden_channels=256,
            kernel_size=3,
            linear_components=0,
            covariance="isotropic",
        )
        scores: dict[str, Any] = {
            "score_scale": "squared_error",
            "residual_pooling": 0.0,
            "per_position": False,
            "foreground": "all",
            "image_score": "top_patches",
        }
        return AnomalyDetector(features, density, image_size=image_size, standardize=False, **scores).eval()


class FixedRope(nn.Module):
    """The rotary positions of one grid, in place of timm's, which computes their grid on the CPU in every pass.

    A CUDA graph can hold no copy from there.
    """

    def __init__(self, rope: Any, grid: list[int]) -> None:
        super().__init__()
        self.register_buffer("embedding", rope.get_embed(grid), persistent=False)

    def get_embed(self, shape: list[int]) -> Tensor:
        """The positions [h * w, 2 D] of the grid that they were made for, whatever ``shape`` is."""
        return self.get_buffer("embedding")


class Bank(nn.Module):
    """A bank of healthy patch features, and the nearest of them to each patch, in plain torch.

    The search holds :data:`DISTANCES` distances at once and takes one matrix product for each part of the bank, in the
    precision of the bank. :mod:`scripts.benchmarks.peers` has the same by anomalib, which a test compares.

    Args:
        vectors: [N, C].
    """

    vectors: Tensor
    squares: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.register_buffer("squares", torch.cat([part.square().sum(dim=1) for part in vectors.split(2**14)]))

    def nearest(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to the nearest vector less the square of the patch, and its index, [Q] each.

        Args:
            patches: [Q, C].
        """
        step = max(1, DISTANCES // len(patches))
        best = torch.full((len(patches),), torch.inf, dtype=self.vectors.dtype, device=patches.device)
        places = torch.zeros(len(patches), dtype=torch.long, device=patches.device)
        for start in range(0, len(self.vectors), step):
            values, found = self.gaps(patches, slice(start, start + step)).min(dim=1)
            nearer = values < best
            best = torch.where(nearer, values, best)
            places = torch.where(nearer, found + start, places)
        return best, places

    def gaps(self, patches: Tensor, part: slice = slice(None)) -> Tensor:
        """Squared distances to a ``part`` of the bank less the squares of ``patches`` [Q, C], [Q, n]."""
        with torch.autocast(patches.device.type, enabled=False):
            return torch.addmm(self.squares[part], patches.to(self.vectors.dtype), self.vectors[part].T, alpha=-2)


class PatchCoreBank(Bank):
    """PatchCore's scores: Euclidean distance of averaged patches, and an image score weighted by the neighborhood."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Patch map [B, h, w] and image score [B] of ``features`` [B, C, h, w]."""
        pooled = F.avg_pool2d(features, 3, 1, 1)
        patches = pooled.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * h * w, C]
        gaps, places = self.nearest(patches)
        distances = (gaps.float() + patches.float().square().sum(1)).clamp_min(0).sqrt()
        count = features.shape[2] * features.shape[3]
        rows = distances.view(-1, count)
        worst = rows.argmax(dim=1) + torch.arange(len(rows), device=rows.device) * count
        neighbor = self.vectors[places[worst]]
        near = self.gaps(neighbor).topk(min(NEIGHBORS, len(self.vectors)), dim=1, largest=False).indices
        to_near = (patches[worst].float()[:, None] - self.vectors[near].float()).norm(dim=2)
        weights = 1 - F.softmax(to_near, dim=1)[:, 0]
        return distances.view(-1, *features.shape[2:]), weights * distances[worst]


class CosineBank(Bank):
    """AnomalyDINO's scores: cosine distance to the nearest, whose vectors have length 1; the mean of the top 1 %."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Patch map [B, h, w] and image score [B] of ``features`` [B, C, h, w]."""
        patches = F.normalize(features, dim=1).flatten(2).transpose(1, 2).flatten(0, 1)
        distances = (0.5 * (self.nearest(patches)[0].float() + 1)).clamp(0, 2)
        rows = distances.view(len(features), -1)
        top = rows.topk(max(int(TOP_SHARE * rows.shape[1]), 1), dim=1).values.mean(dim=1)
        return distances.view(-1, *features.shape[2:]), top


class TrainingStep:
    """A step of AdamW on the squared error, without noise.

    Args:
        density: learns.
        autocast: gives the context of the forward pass.
    """

    def __init__(self, density: nn.Module, autocast: Callable[[], Any] = nullcontext) -> None:
        self.density = density.train()
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(density.parameters(), lr=1e-3)

    def __call__(self, features: Tensor) -> float:
        """Learn from ``features`` [B, C, h, w]; returns the loss before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            prediction = self.density(features)
        loss = F.mse_loss(prediction.float(), features)
        loss.backward()
        self.optimizer.step()
        return loss.item()


@torch.inference_mode()
def matrix_peak(device: str, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of the product of two matrices of ``side`` x ``side``, the better of two tries after one to warm up."""
    matrix = torch.rand(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds[1:])


def backbone_flops(network: Any, backbone: str, image: Tensor) -> int:
    """FLOPs of the bare backbone ``network`` for ``image`` [1, 3, H, W], a multiplication and an addition are two."""
    # the fused attention of a CPU is not counted, the plain one is
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        bare_features(network, backbone, image)
    return counter.get_total_flops()


def has_bf16(device: str) -> bool:
    """Whether ``device`` has instructions for products of bf16 matrices."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
