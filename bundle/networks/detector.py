"""The anomaly detector: an image goes in, an anomaly map of its size comes out, in one forward pass.

image -> resize -> normalize (3 channels, backbone's mean and deviation) -> patch embeddings -> standardize
      -> density -> patch map -> calibrate -> anomaly map and image score
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError
from bundle.networks.density import SpatialARDensity, squared_error
from bundle.networks.features import FeatureNetwork


class Detection(NamedTuple):
    """What the detector says of a batch of images."""

    anomaly_map: Tensor
    """[B, 1, H, W], the size of the images."""
    image_score: Tensor
    """[B]."""
    patch_map: Tensor
    """[B, h, w], one value per patch."""


class Detector(Protocol):
    """What inference needs: an :class:`AnomalyDetector`, or a file that was exported from one."""

    threshold: Tensor

    def resize(self, image: Tensor) -> Tensor:
        """Bring ``image`` [B, C, H, W] to the size that the backbone sees."""

    def detect(self, image: Tensor, raw: bool = False) -> Detection:
        """Anomaly map, image score and patch map of ``image`` [B, C, H, W] in [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """Backbone, hash of its weights, preprocessing and density."""


class AnomalyDetector(nn.Module):
    """A frozen feature network, a density of its patch embeddings, and a calibration on healthy images.

    Scores are in deviations above the mean of healthy validation patches ('z'), the background included, so that 3
    means: three standard deviations more surprising than the mean healthy patch; ``raw=True`` gives the squared error
    of the paper. Before :meth:`calibrate` the two are the same and the threshold is infinite.

    What decides an output travels in the state dict: density, standardization, calibration, threshold and
    ``identity`` (backbone, hash of its weights, preprocessing, density hyper-parameters). The weights of the backbone
    do not. Loading the state of another identity is refused. Scriptable by ``torch.jit.script``, at every image size.

    Args:
        features: the frozen feature network.
        image_size: side, or [height, width], that images are resized to; divisible by the patch size.
        hidden_channels, dilations, kernel_size, mode: of the density, see :class:`SpatialARDensity`.
        standardize: bring every channel of the embeddings to mean 0 and deviation 1 over healthy training patches, so
            that channels of much natural variance do not drown the others. The paper does not.
        preprocessing: how images are read before they come here (plain JSON values), a part of the identity.

    Raises:
        BundleError: if ``image_size`` is not divisible by the patch size.
    """

    feature_mean: Tensor
    feature_std: Tensor
    healthy_mean: Tensor
    healthy_std: Tensor
    threshold: Tensor
    identity: Tensor

    def __init__(
        self,
        features: FeatureNetwork,
        image_size: int | Sequence[int] = 320,
        hidden_channels: int = 128,
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        kernel_size: int = 3,
        mode: str = "causal",
        standardize: bool = True,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.image_size = _checked_size(image_size, features.patch_size)
        self.features = features
        self.density = SpatialARDensity(features.num_channels, hidden_channels, dilations, kernel_size, mode)
        self.standardizes = standardize
        self.top_share = 0.01  # of the patches, the most anomalous ones, whose mean is the image score
        self.register_buffer("feature_mean", torch.zeros(1, features.num_channels, 1, 1))
        self.register_buffer("feature_std", torch.ones(1, features.num_channels, 1, 1))
        self.register_buffer("healthy_mean", torch.zeros(()))
        self.register_buffer("healthy_std", torch.ones(()))
        self.register_buffer("threshold", torch.full((), float("inf")))
        identity = {
            **features.describe(),
            "image_size": self.image_size,
            "standardize": standardize,
            **self.density.describe(),
            **(preprocessing or {}),
        }
        self.register_buffer("identity", _encode(identity))

    @torch.jit.export
    def resize(self, image: Tensor) -> Tensor:
        """Resize ``image`` [B, 1 or 3, H, W] to ``image_size``."""
        if image.shape[-2] != self.image_size[0] or image.shape[-1] != self.image_size[1] or torch.jit.is_tracing():
            image = F.interpolate(image, self.image_size, mode="bilinear", align_corners=False, antialias=True)
        return image

    @torch.jit.export
    def embed(self, image: Tensor) -> Tensor:
        """The patch embeddings [B, C, h, w] of ``image`` [B, 1 or 3, H, W] in [0, 1], as the backbone gives them."""
        return self.features(self.features.normalize(self.resize(image)))

    @torch.jit.export
    def standardize(self, embeddings: Tensor) -> Tensor:
        """Bring every channel of ``embeddings`` [B, C, h, w] to the scale of healthy training patches."""
        return (embeddings - self.feature_mean) / self.feature_std

    @torch.jit.export
    def score_patches(self, embeddings: Tensor, raw: bool = False) -> Tensor:
        """The patch map [B, h, w] of ``embeddings`` [B, C, h, w]."""
        embeddings = self.standardize(embeddings)
        patch_map = squared_error(self.density(embeddings), embeddings)
        return patch_map if raw else (patch_map - self.healthy_mean) / self.healthy_std

    @torch.jit.export
    def detect(self, image: Tensor, raw: bool = False) -> Detection:
        """Anomaly map, image score (mean of the top 1 % of patches) and patch map of ``image``.

        Args:
            image: [B, 1 or 3, H, W] in [0, 1], any H and W.
            raw: squared errors instead of deviations above healthy patches.
        """
        patch_map = self.score_patches(self.embed(image), raw)
        anomaly_map = F.interpolate(
            patch_map.unsqueeze(1), [image.shape[-2], image.shape[-1]], mode="bilinear", align_corners=False
        )
        patches = patch_map.flatten(1)
        top = max(1, int(self.top_share * patches.shape[1] + 0.5))
        return Detection(anomaly_map, patches.topk(top, dim=1).values.mean(dim=1), patch_map)

    def forward(self, image: Tensor, raw: bool = False) -> Tensor:
        """The anomaly map [B, 1, H, W] of ``image`` [B, 1 or 3, H, W] in [0, 1]."""
        return self.detect(image, raw).anomaly_map

    @torch.no_grad()
    def set_standardization(self, mean: Tensor, deviation: Tensor) -> None:
        """Take ``mean`` and ``deviation`` [C] of every channel over healthy training patches."""
        if not self.standardizes:
            return
        # a channel that hardly varies on healthy images must not be blown up
        floor = 1e-3 * deviation.mean().clamp_min(1e-12)
        self.feature_mean.copy_(mean.view_as(self.feature_mean))
        self.feature_std.copy_(deviation.clamp_min(floor).view_as(self.feature_std))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], false_positive_rate: float = 0.01) -> None:
        """Set scale and threshold from healthy validation embeddings, batches of [B, C, h, w].

        The threshold is the value that the share ``false_positive_rate`` of healthy patches exceeds, in calibrated
        units.

        Raises:
            BundleError: if the rate is not in (0, 1), or no patch is given.
        """
        if not 0 < false_positive_rate < 1:
            raise BundleError(f"false_positive_rate must be in (0, 1), got {false_positive_rate}: try 0.01")
        device = self.feature_mean.device
        raw = [self.score_patches(batch.to(device), raw=True).flatten().double().cpu() for batch in batches]
        if not raw:
            raise BundleError("no healthy validation image to calibrate on: add some to the valid/good folder")
        healthy = torch.cat(raw)
        self.healthy_mean.copy_(healthy.mean())
        self.healthy_std.copy_(healthy.std().clamp_min(1e-12))
        # numpy-like quantile of any length; torch.quantile stops at 16 million values
        rank = min(len(healthy) - 1, int((1 - false_positive_rate) * len(healthy)))
        cut = healthy.kthvalue(rank + 1).values
        self.threshold.copy_((cut - healthy.mean()) / healthy.std().clamp_min(1e-12))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with: backbone, hash of its weights, preprocessing and density."""
        return _decode(self.identity)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "identity")
        if stored is not None:
            refuse_other(_decode(stored), self.describe())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _checked_size(image_size: int | Sequence[int], patch: int) -> list[int]:
    size = [image_size, image_size] if isinstance(image_size, int) else [int(side) for side in image_size]
    if len(size) != 2 or any(side < patch or side % patch for side in size):
        near = [max(patch, round(side / patch) * patch) for side in size]
        raise BundleError(f"image_size {image_size} must be one or two multiples of the patch size {patch}: try {near}")
    return size


def _encode(identity: dict[str, Any]) -> Tensor:
    """JSON as bytes in a tensor, which every checkpoint format and TorchScript can hold."""
    return torch.tensor(list(json.dumps(identity, sort_keys=True).encode()), dtype=torch.uint8)


def _decode(identity: Tensor) -> dict[str, Any]:
    return json.loads(bytes(identity.tolist()).decode())


def refuse_other(stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise the first difference between the identity of a checkpoint and that of this detector."""
    for key in ["backbone", *sorted(own.keys() | stored.keys())]:
        theirs, ours = stored.get(key), own.get(key)
        if theirs != ours:
            what = (
                f"{key} {theirs!r}" if key == "backbone" else f"{key} {theirs!r} (backbone {stored.get('backbone')!r})"
            )
            remedy = (
                f"give --{key} '{theirs}', or another checkpoint"
                if key != "weights"
                else "give the weights it was trained with"
            )
            raise BundleError(f"the checkpoint was trained with {what}, but this detector has {key} {ours!r}: {remedy}")
