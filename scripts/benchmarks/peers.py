"""Peers of the detector on the same frozen features: memory banks and Gaussians, by the torch models of anomalib.

Sources: Roth et al., 'Towards Total Recall in Industrial Anomaly Detection' (PatchCore), arXiv 2106.08265; Damm et al.,
'AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2', arXiv 2405.14529; Defard et al., 'PaDiM: a
Patch Distribution Modeling Framework for Anomaly Detection and Localization', arXiv 2011.08785; all as anomalib 2.7
implements them (``anomalib/models/image/patchcore``, ``.../anomaly_dino``, ``.../padim``).

With ``scripts/benchmarks/peers.json`` a peer takes the detector's place in the commands of the bundle:

    python -m monai.bundle run training --peer padim \\
        --config_file "['configs/train.json','scripts/benchmarks/peers.json']"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.compute import Compute
from bundle.data.stream import Slice
from bundle.errors import BundleError, check_choice
from bundle.networks.backbones.stages import Stages
from bundle.networks.detector import AnomalyDetector, Detection, refuse_other
from bundle.networks.gaussian import moments

SCORE_SETTINGS = {"standardize", "feature_components", "score_scale", "residual_pooling", "per_position", "image_score"}
CALIBRATION = ("threshold", "false_positive_rate")
LAYER = "blocks.11"  # what AnomalyDINO calls its features; PatchCore takes any name


class Peer(ABC):
    """A method that stores what it needs of healthy features and scores by the distance to it.

    anomalib's model computes everything after the features: what is stored, the search, the scores and the map, which
    it brings to the size of the images and smooths by a Gaussian of 4 pixels. It runs where the images are.

    Attributes:
        name: for tables.
        stored_names: the buffers of anomalib's model that are all that :meth:`fit` leaves.
        kept_name: its list of features that waits to be turned into them.
        model: anomalib's torch model.
    """

    name: str
    stored_names: tuple[str, ...] = ("memory_bank",)
    kept_name = "embedding_store"

    def __init__(self, extractor: _Extractor, package: str, model_class: str, **arguments: Any) -> None:
        try:
            module = import_module(f"anomalib.models.image.{package}.torch_model")
        except ImportError as error:
            raise BundleError(
                f'the peers need the package anomalib ({error}): pip install -e ".[benchmark]"'
            ) from error
        self._extractor = extractor
        # the constructors make a timm network by its name, AnomalyDINO's with weights from the hub, and take no other
        with patch.object(module, "TimmFeatureExtractor", return_value=extractor):
            self.model: Any = getattr(module, model_class)(**arguments)

    def fit(self, images: Iterable[Tensor]) -> None:
        """Store features of healthy ``images``, batches of [B, 3, H, W], normalized as the features need it."""
        self.keep(images)
        self._fill_bank()

    @torch.no_grad()
    def keep(self, images: Iterable[Tensor]) -> int:
        """The first half of :meth:`fit`: keep all features, in memory as anomalib does; returns their bytes."""
        kept = getattr(self.model, self.kept_name)
        kept.clear()
        self.model.train()  # anomalib's sign for 'keep the features, do not score'
        self._extractor.eval()
        for batch in images:
            self.model.to(batch.device)(batch)
        if not kept:
            raise BundleError(f"{self.name} has no healthy image to store: give at least one")
        return _bytes(kept)

    @abstractmethod
    def _fill_bank(self) -> None:
        """Turn the features that were kept into what is stored."""

    @torch.no_grad()
    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, 1, H, W] and image score [B] of ``images`` [B, 3, H, W], normalized; distances, no units.

        Raises:
            BundleError: before :meth:`fit`.
        """
        if not all(tensor.numel() for tensor in self.stored.values()):
            raise BundleError(f"{self.name} has nothing stored: call fit with healthy images first")
        found = self.model.eval()(images)
        return found.anomaly_map, found.pred_score.flatten()

    def score(self, maps: Tensor) -> Tensor:
        """The image scores [B] of ``maps`` [B, 1, H, W] that were restricted to a part of the images."""
        return maps.flatten(1).amax(dim=1)

    @property
    def stored(self) -> dict[str, Tensor]:
        """What :meth:`fit` has stored, by name; set it to go on with that of an earlier one."""
        return {name: self.model.get_buffer(name) for name in self.stored_names}

    @stored.setter
    def stored(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self.stored_names:
            module, _, buffer = name.rpartition(".")
            setattr(self.model.get_submodule(module), buffer, tensors[name])
            self.model.to(tensors[name].device)

    @property
    def stored_bytes(self) -> int:
        """Size of what is stored."""
        return _bytes(self.stored.values())


class BankPeer(Peer):
    """A peer whose model is a bank of healthy features."""

    @property
    def memory_bank(self) -> Tensor:
        """The stored features [N, C]; set it to go on with those of an earlier :meth:`fit`."""
        return self.stored["memory_bank"]

    @memory_bank.setter
    def memory_bank(self, bank: Tensor) -> None:
        self.stored = {"memory_bank": bank}


class PatchCorePeer(BankPeer):
    """PatchCore: a coreset of healthy features, each averaged over 3x3 patches; Euclidean distance to the nearest.

    The image score is the largest patch distance, weighted by the neighborhood of the nearest stored feature. The
    coreset depends on the global random states of torch and numpy.

    Args:
        features: from normalized images [B, 3, H, W] to patch embeddings [B, C, h, w], as
            :class:`bundle.networks.FeatureNetwork`.
        coreset_ratio: share of the features that is stored, in (0, 1].
        num_neighbors: stored features that the weight of the image score looks at.
        own_strides: take each stage of a convolutional backbone at its own stride, as the authors do; the coarser ones
            are enlarged to the finest after the average. ``features`` must have ``stages``, see :class:`PeerFeatures`.

    Raises:
        BundleError: if anomalib is not installed.
    """

    name = "PatchCore"

    def __init__(
        self, features: Any, coreset_ratio: float = 0.1, num_neighbors: int = 9, own_strides: bool = False
    ) -> None:
        extractor = _StageExtractor(features) if own_strides else _Extractor(features)
        super().__init__(extractor, "patchcore", "PatchcoreModel", layers=extractor.layers, num_neighbors=num_neighbors)
        self.coreset_ratio = coreset_ratio

    def _fill_bank(self) -> None:
        self.model.subsample_embedding(self.coreset_ratio)


class NearestNeighborPeer(BankPeer):
    """AnomalyDINO's scoring: every healthy feature is stored; cosine distance to the nearest.

    It is anomalib's ``AnomalyDINOModel`` itself, which asks its extractor for nothing but patch tokens, so that any
    features go in; without coreset. The image score is the mean of the top 1 % of patches.

    Args:
        features: from normalized images [B, 3, H, W] to patch embeddings [B, C, H // patch_size, W // patch_size].
        patch_size: stride of the features, in pixels.
        search_bytes: anomalib holds three matrices of all patches of a batch times all stored features; a batch that
            would need more than this is scored in parts, at least one image each.
        masking: leave out the background as AnomalyDINO does: patches whose first principal component within their
            image is small. Its threshold is made for the last block of DINOv2.

    Raises:
        BundleError: if anomalib is not installed.
    """

    name = "nearest neighbor"

    def __init__(
        self, features: nn.Module, patch_size: int = 16, search_bytes: int = 2**31, masking: bool = False
    ) -> None:
        super().__init__(_TokenExtractor(features, patch_size), "anomaly_dino", "AnomalyDINOModel", masking=masking)
        self.patch_size = patch_size
        self.search_bytes = search_bytes

    def _fill_bank(self) -> None:
        self.model.fit()

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, 1, H, W] and image score [B] of ``images`` [B, 3, H, W], normalized; distances in [0, 2]."""
        patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        matrices = 3 * patches * len(self.memory_bank) * self.memory_bank.element_size()
        parts = images.split(max(1, self.search_bytes // max(1, matrices)))
        maps, scores = zip(*map(super().detect, parts), strict=True)
        return torch.cat(maps), torch.cat(scores)

    def score(self, maps: Tensor) -> Tensor:
        """The mean of the top 1 % of each map [B, 1, H, W], [B]."""
        return self.model.mean_top1p(maps.flatten(1)).flatten()


class PadimPeer(Peer):
    """PaDiM: a Gaussian of healthy features at every position of the map; Mahalanobis distance to its mean.

    Features lose all but some randomly chosen channels first, which depend on the global random state of torch. All
    images must have the size of those that it was fitted to. The image score is the largest value of the map.

    Args:
        features: from normalized images [B, 3, H, W] to patch embeddings [B, C, h, w].
        num_features: channels that are kept, C at most; the default is that of the authors for ResNet-18 (section 4.1),
            whose 448 channels are the closest to those of the bundle's backbones.

    Raises:
        BundleError: if anomalib is not installed.
    """

    name = "PaDiM"
    stored_names = ("gaussian.mean", "gaussian.inv_covariance", "idx")
    kept_name = "memory_bank"  # anomalib's word here for features that wait

    def __init__(self, features: nn.Module, num_features: int = 100) -> None:
        extractor = _Extractor(features)
        super().__init__(
            extractor,
            "padim",
            "PadimModel",
            layers=[LAYER],
            n_features=min(num_features, *extractor.out_dims),
        )

    def _fill_bank(self) -> None:
        self.model.fit()


PEERS = {"patchcore": PatchCorePeer, "padim": PadimPeer, "nearest_neighbor": NearestNeighborPeer}


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
        foreground: from resized images [B, C, H, W] in [0, 1] to patches [B, h, w], 1 in the foreground. Elsewhere the
            map is 0, the smallest distance; the image score is then that of the map. None: the whole map.

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
        foreground: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kind = check_choice("peer", peer, PEERS)
        self.arguments = dict(arguments or {})
        self.detector = detector
        self.standardizes = standardize
        self.foreground = foreground
        try:
            self.peer: Any = PEERS[peer](PeerFeatures(detector, compute, standardize), **self.arguments)
        except TypeError as error:
            raise BundleError(f"peer_arguments {self.arguments} do not fit {peer}: {error}") from error
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
            embeddings = (self.detector.embed(torch.stack([one.image for one in batch])) for batch in batches)
            mean, covariance = moments(embeddings)
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
            if self.foreground is not None:
                inside = self.foreground(resized).to(maps.dtype).unsqueeze(1)
                maps = maps * F.interpolate(inside, maps.shape[-2:], mode="nearest")
                scores = self.peer.score(maps)
        whole = F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False)
        return Detection(whole, scores, maps[:, 0])

    def _normalized(self, image: Tensor) -> Tensor:
        return self.detector.features.normalize(image)

    def describe(self) -> dict[str, Any]:
        """Backbone, hash of its weights, preprocessing and peer."""
        taken = self.detector.density.describe().keys() | SCORE_SETTINGS  # what a peer has not
        own = {
            "peer": self.kind,
            "peer_arguments": self.arguments,
            "peer_standardize": self.standardizes,
            "peer_foreground": None if self.foreground is None else str(self.foreground),
        }
        return {key: value for key, value in self.detector.describe().items() if key not in taken} | own

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is stored, the threshold with its rate, and the identity."""
        calibration = {name: getattr(self, name) for name in CALIBRATION}
        return {"identity": self.describe(), **calibration, **self._standardization(), **self.peer.stored}

    def _standardization(self) -> dict[str, Tensor]:
        names = ("feature_mean", "feature_std") if self.standardizes else ()
        return {name: getattr(self.detector, name) for name in names}

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
        self.peer.stored = {name: state_dict[name].to(self.threshold.device) for name in self.peer.stored_names}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PeerFeatures(nn.Module):
    """The features of ``detector`` in the precision of ``compute``, given in float32.

    Args:
        detector: whose features are taken, in tiles and pooled as its settings say.
        compute: the precision.
        standardize: as the detector does, once its standardization was set.
    """

    def __init__(self, detector: AnomalyDetector, compute: Compute, standardize: bool = False) -> None:
        super().__init__()
        self.detector = detector
        self.compute = compute
        self.standardizes = standardize
        self.layers = detector.features.layers

    def forward(self, images: Tensor) -> Tensor:
        """From normalized images [B, 3, H, W] to patch embeddings [B, C, h, w]."""
        with self.compute.autocast():
            embeddings = self.detector.embed_tiles(images).float()
        return self.detector.standardize(embeddings) if self.standardizes else embeddings

    def stages(self, images: Tensor) -> list[Tensor]:
        """The tapped maps of a convolutional backbone, each at its own stride, as they are.

        Raises:
            BundleError: if the backbone has no stages.
        """
        backbone: nn.Module = self.detector.features.backbone
        if not isinstance(backbone, Stages):
            name = self.detector.features.backbone_name
            raise BundleError(f"own_strides is true, but {name} has the same stride everywhere: leave it out")
        with self.compute.autocast():
            return [one.float() for one in backbone.maps(images)]


class _Extractor(nn.Module):
    """The features in the shape in which PatchCore's extractor gives them: by layer, [B, C, h, w]."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features: Any = features
        self.layers = [LAYER]

    @property
    def out_dims(self) -> list[int]:
        """Channels of every layer, as anomalib asks for them."""
        device = next(chain(self.features.parameters(), self.features.buffers())).device
        return [self.features(torch.zeros(1, 3, 192, 192, device=device)).shape[1]]  # of 1 to 4 tiles and more

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {LAYER: self.features(images)}


class _StageExtractor(_Extractor):
    """The same of several stages, each at its own stride."""

    def __init__(self, features: Any) -> None:
        super().__init__(features)
        self.layers = [f"stage {layer}" for layer in features.layers]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, self.features.stages(images), strict=True))


class _TokenExtractor(_Extractor):
    """The features in the shape in which AnomalyDINO's extractor gives them: by layer, [B, h * w, C]."""

    def __init__(self, features: nn.Module, patch_size: int) -> None:
        super().__init__(features)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {LAYER: self.features(images).flatten(2).transpose(1, 2)}
