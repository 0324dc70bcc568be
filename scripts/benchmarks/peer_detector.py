"""A peer in the place of the bundle's detector.

With ``scripts/benchmarks/peers.json`` a peer takes the detector's place in the commands of the bundle:

    python -m monai.bundle run training --peer padim \\
        --config_file "['configs/train.json','scripts/benchmarks/peers.json']"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.compute import Compute
from bundle.data.stream import Slice
from bundle.errors import BundleError, check_choice
from bundle.networks.detector import AFTER_EMBEDDING, AnomalyDetector, Detection, refuse_other
from bundle.networks.foreground import mean_brightness
from bundle.networks.gaussian import moments
from bundle.networks.likeness import CaseLikeness
from bundle.networks.neighbors import SlicePooling
from scripts.benchmarks.dino_peers import DinomalyPeer, InpFormerPeer, SuperAddPeer
from scripts.benchmarks.peers import NearestNeighborPeer, PadimPeer, PatchCorePeer, PeerFeatures

SCORE_SETTINGS = set(AFTER_EMBEDDING) - {"foreground"}
CALIBRATION = ("threshold", "false_positive_rate")
STANDARDIZATION = ("feature_mean", "feature_std")
PEERS = {
    "patchcore": PatchCorePeer,
    "padim": PadimPeer,
    "nearest_neighbor": NearestNeighborPeer,
    "dinomaly": DinomalyPeer,
    "inp_former": InpFormerPeer,
    "super_add": SuperAddPeer,
}


class PeerDetector(nn.Module):
    """A peer in the place of the bundle's detector, for its evaluation engine, checkpoints and reports.

    It resizes and normalizes as the detector does and computes the features in the same precision; distances are
    computed in 32 bits.

    Args:
        peer: a key of :data:`PEERS`.
        detector: whose resizing and features are taken.
        compute: the precision of the features.
        arguments: of the peer.
        standardize: bring every channel of the features to mean 0 and deviation 1 over healthy images first, as the
            bundle does and no author of a peer.
        foreground: leave the map as it is in the foreground of the detector only. Elsewhere it is 0, the smallest
            distance; the image score is then that of the map.

    Attributes:
        threshold: of the map, in units of the peer's distance.
        false_positive_rate: the share of healthy pixels that was wanted above it.
        image_threshold, image_false_positive_rate: infinite, and not a number: peers have none.

    Raises:
        BundleError: if the peer or an argument of it is unknown, or anomalib is not installed.
    """

    threshold: Tensor
    false_positive_rate: Tensor
    image_threshold: Tensor
    image_false_positive_rate: Tensor

    def __init__(
        self,
        peer: str,
        detector: AnomalyDetector,
        compute: Compute,
        arguments: Mapping[str, Any] | None = None,
        standardize: bool = False,
        foreground: bool = False,
    ) -> None:
        super().__init__()
        self.kind = check_choice("peer", peer, PEERS)
        self.arguments = dict(arguments or {})
        self.detector = detector
        self.standardizes = standardize
        self.masks = foreground
        try:
            self.peer: Any = PEERS[peer](PeerFeatures(detector, compute, standardize), **self.arguments)
        except TypeError as error:
            raise BundleError(f"peer_arguments {self.arguments} do not fit {peer}: {error}") from error
        self.slice_pooling = SlicePooling()  # a peer sees each slice alone
        self.case_likeness = CaseLikeness()  # and compares nothing
        for name in ("threshold", "image_threshold"):
            self.register_buffer(name, torch.full((), float("inf")))
        for name in ("false_positive_rate", "image_false_positive_rate"):
            self.register_buffer(name, torch.full((), float("nan"), dtype=torch.float64))

    def resize(self, image: Tensor) -> Tensor:
        """Bring ``image`` [B, C, H, W] to the size that the backbone sees."""
        return self.detector.resize(image)

    def fit(self, batches: Iterable[list[Slice]]) -> None:
        """Store features of healthy, resized slices; ``batches`` are iterated twice where features are standardized."""
        if self.standardizes:
            maps = (self.detector.embed(torch.stack([one.image for one in batch])) for batch in batches)
            mean, covariance = moments(maps)
            self.detector.set_standardization(mean.float(), covariance.diagonal().sqrt().float())
        self.peer.fit(self._normalized(torch.stack([one.image for one in batch])) for batch in batches)

    @torch.no_grad()
    def set_threshold(self, batches: Iterable[list[Slice]], false_positive_rate: float) -> None:
        """Take the value that the share ``false_positive_rate`` of healthy pixels exceeds, one pixel of each patch."""
        stride = self.detector.features.patch_size
        maps = [self.detect(torch.stack([one.image for one in batch])).patch_map for batch in batches]
        values = torch.cat([map_[:, ::stride, ::stride].flatten().cpu() for map_ in maps])
        self.threshold.copy_(values.kthvalue(max(1, round((1 - false_positive_rate) * len(values)))).values)
        self.false_positive_rate.fill_(false_positive_rate)

    def detect(self, image: Tensor, raw: bool = False) -> Detection:
        """Anomaly map, image score and the map at the size that the backbone sees, of ``image`` [B, C, H, W]."""
        with torch.autocast(image.device.type, enabled=False):
            resized = self.resize(image)
            maps, scores = self.peer.detect(self._normalized(resized))
            if self.masks:
                brightness = mean_brightness(resized, self.detector.features.patch_size)[:, 0]
                inside = self.detector.foreground(brightness).to(maps.dtype).unsqueeze(1)
                maps = maps * F.interpolate(inside, maps.shape[-2:], mode="nearest")
                scores = self.peer.score(maps)
        whole = F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False)
        return Detection(whole, scores, maps[:, 0], torch.zeros_like(scores))

    def _normalized(self, image: Tensor) -> Tensor:
        return self.detector.features.normalize(image)

    def describe(self) -> dict[str, Any]:
        """Backbone, hash of its weights, preprocessing and peer."""
        taken = self.detector.density.describe().keys() | SCORE_SETTINGS  # what a peer has not
        own = {
            "peer": self.kind,
            "peer_arguments": self.arguments,
            "peer_standardize": self.standardizes,
            "peer_foreground": self.masks,
        }
        return {key: value for key, value in self.detector.describe().items() if key not in taken} | own

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is stored, the threshold with its rate, and the identity."""
        calibration = {name: getattr(self, name) for name in CALIBRATION}
        return {"identity": self.describe(), **calibration, **self._standardization(), **self.peer.stored}

    def _standardization(self) -> dict[str, Tensor]:
        return {name: getattr(self.detector, name) for name in STANDARDIZATION if self.standardizes}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Take the state of an earlier :meth:`fit`.

        Raises:
            BundleError: if it is of another backbone, preprocessing or peer.
        """
        refuse_other(state_dict["identity"], self.describe())
        for name in CALIBRATION:
            getattr(self, name).copy_(state_dict[name])
        for name, tensor in self._standardization().items():
            tensor.copy_(state_dict[name])
        others = ("identity", *CALIBRATION, *STANDARDIZATION)
        self.peer.stored = {
            name: tensor.to(self.threshold.device) for name, tensor in state_dict.items() if name not in others
        }
