"""Peers of the detector on the same frozen features: memory banks and Gaussians, by the torch models of anomalib.

Sources: Roth et al., 'Towards Total Recall in Industrial Anomaly Detection' (PatchCore), arXiv 2106.08265; Damm et al.,
'AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2', arXiv 2405.14529; Defard et al., 'PaDiM: a
Patch Distribution Modeling Framework for Anomaly Detection and Localization', arXiv 2011.08785; all as anomalib 2.7
implements them (``anomalib/models/image/patchcore``, ``.../anomaly_dino``, ``.../padim``).
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

from bundle.compute import Compute
from bundle.errors import BundleError
from bundle.networks.backbones.stages import Stages
from bundle.networks.detector import AnomalyDetector

LAYER = "blocks.11"  # what AnomalyDINO calls its features; PatchCore takes any name


class Peer(ABC):
    """A method that stores what it needs of healthy features and scores by the distance to it.

    anomalib's model computes everything after the features: what is stored, the search, the scores and the map, which
    it brings to the size of the images and smooths by a Gaussian of 4 pixels. It runs where the images are.

    Attributes:
        name: for tables.
        stored_names: the buffers of anomalib's model that are all that :meth:`fit` leaves.
        kept_name: its list of features that waits to be turned into them.
        extractor_name: what anomalib calls the class that computes its features.
        model: anomalib's torch model.
    """

    name: str
    stored_names: tuple[str, ...] = ("memory_bank",)
    kept_name = "embedding_store"
    extractor_name = "TimmFeatureExtractor"

    def __init__(self, extractor: nn.Module, package: str, model_class: str, **arguments: Any) -> None:
        try:
            module = import_module(f"anomalib.models.image.{package}.torch_model")
        except ImportError as error:
            raise BundleError(
                f'the peers need the package anomalib ({error}): pip install -e ".[benchmark]"'
            ) from error
        self._extractor = extractor
        # the constructors make a timm network by its name, AnomalyDINO's with weights from the hub, and take no other
        with patch.object(module, self.extractor_name, return_value=extractor):
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
        return bytes_of(kept)

    @abstractmethod
    def _fill_bank(self) -> None:
        """Turn the features that were kept into what is stored."""

    @torch.no_grad()
    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, 1, H, W] and image score [B] of ``images`` [B, 3, H, W], normalized; distances, no units.

        Raises:
            BundleError: before :meth:`fit`.
        """
        stored = self.stored
        if not stored or not all(tensor.numel() for tensor in stored.values()):
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
        return bytes_of(self.stored.values())


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
        patch_size: stride of the features, in pixels; None: what ``features`` say themselves.
        search_bytes: anomalib holds three matrices of all patches of a batch times all stored features; a batch that
            would need more than this is scored in parts, at least one image each.
        masking: leave out the background as AnomalyDINO does: patches whose first principal component within their
            image is small. Its threshold is made for the last block of DINOv2.

    Raises:
        BundleError: if anomalib is not installed.
    """

    name = "nearest neighbor"

    def __init__(
        self, features: Any, patch_size: int | None = None, search_bytes: int = 2**31, masking: bool = False
    ) -> None:
        patch_size = patch_size or features.patch_size
        super().__init__(_TokenExtractor(features, patch_size), "anomaly_dino", "AnomalyDINOModel", masking=masking)
        self.patch_size = patch_size
        self.search_bytes = search_bytes

    def _fill_bank(self) -> None:
        self.model.fit()
        if not self.memory_bank.numel():
            raise BundleError("masking is true, but finds no foreground in these features: leave it out")

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


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all ``tensors``."""
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
        self.patch_size = detector.features.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """From normalized images [B, 3, H, W] to patch embeddings [B, C, h, w]."""
        with self.compute.autocast():
            maps = self.detector.embed_tiles(images).float()
        embeddings = maps[:, : self.detector.features.num_channels]
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
            maps = backbone.maps(images)
        tapped = zip(backbone.tapped, maps, strict=True)
        return [one.float() for stage, one in tapped if stage in self.layers]


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
