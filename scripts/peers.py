"""Peers of the detector on the same frozen features: memory banks, by the torch models of anomalib.

Sources: Roth et al., 'Towards Total Recall in Industrial Anomaly Detection' (PatchCore), arXiv 2106.08265; Damm et al.,
'AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2', arXiv 2405.14529; both as anomalib 2.7
implements them (``anomalib/models/image/patchcore``, ``anomalib/models/image/anomaly_dino``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bundle.errors import BundleError

LAYER = "blocks.11"  # what AnomalyDINO calls its features; PatchCore takes any name


class Peer(ABC):
    """A method that stores features of healthy images and scores by the distance to them.

    anomalib's model computes everything after the features: the bank, the search, the scores and the map, which it
    brings to the size of the images by nearest neighbors and a Gaussian of 4 pixels. It runs where the images are.

    Attributes:
        name: for tables.
        model: anomalib's torch model.
    """

    name: str

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
        self.model.embedding_store.clear()
        self.model.train()  # anomalib's sign for 'keep the features, do not score'
        self._extractor.eval()
        for batch in images:
            self.model.to(batch.device)(batch)
        if not self.model.embedding_store:
            raise BundleError(f"{self.name} has no healthy image to store: give at least one")
        return sum(kept.numel() * kept.element_size() for kept in self.model.embedding_store)

    @abstractmethod
    def _fill_bank(self) -> None:
        """Turn the features that were kept into the memory bank."""

    @torch.no_grad()
    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly map [B, 1, H, W] and image score [B] of ``images`` [B, 3, H, W], normalized; distances, no units.

        Raises:
            BundleError: before :meth:`fit`.
        """
        if self.memory_bank.numel() == 0:
            raise BundleError(f"{self.name} has an empty memory bank: call fit with healthy images first")
        found = self.model.eval()(images)
        return found.anomaly_map, found.pred_score.flatten()

    @property
    def memory_bank(self) -> Tensor:
        """The stored features [N, C]; set it to go on with those of an earlier :meth:`fit`."""
        return self.model.memory_bank

    @memory_bank.setter
    def memory_bank(self, bank: Tensor) -> None:
        self.model.memory_bank = bank
        self.model.to(bank.device)

    @property
    def stored_bytes(self) -> int:
        """Size of the memory bank."""
        return self.memory_bank.numel() * self.memory_bank.element_size()


class PatchCorePeer(Peer):
    """PatchCore: a coreset of healthy features, each averaged over 3x3 patches; Euclidean distance to the nearest.

    The image score is the largest patch distance, weighted by the neighborhood of the nearest stored feature. The
    coreset depends on the global random states of torch and numpy.

    Args:
        features: from normalized images [B, 3, H, W] to patch embeddings [B, C, h, w], as
            :class:`bundle.networks.FeatureNetwork`.
        coreset_ratio: share of the features that is stored, in (0, 1].
        num_neighbors: stored features that the weight of the image score looks at.

    Raises:
        BundleError: if anomalib is not installed.
    """

    name = "PatchCore"

    def __init__(self, features: nn.Module, coreset_ratio: float = 0.1, num_neighbors: int = 9) -> None:
        super().__init__(
            _Extractor(features), "patchcore", "PatchcoreModel", layers=[LAYER], num_neighbors=num_neighbors
        )
        self.coreset_ratio = coreset_ratio

    def _fill_bank(self) -> None:
        self.model.subsample_embedding(self.coreset_ratio)


class NearestNeighborPeer(Peer):
    """AnomalyDINO's scoring: every healthy feature is stored; cosine distance to the nearest.

    It is anomalib's ``AnomalyDINOModel`` itself, which asks its extractor for nothing but patch tokens, so that any
    features go in; without masking of the background and without coreset. The image score is the mean of the top 1 % of
    patches.

    Args:
        features: from normalized images [B, 3, H, W] to patch embeddings [B, C, H // patch_size, W // patch_size].
        patch_size: stride of the features, in pixels.
        search_bytes: anomalib holds three matrices of all patches of a batch times all stored features; a batch that
            would need more than this is scored in parts, at least one image each.

    Raises:
        BundleError: if anomalib is not installed.
    """

    name = "nearest neighbor"

    def __init__(self, features: nn.Module, patch_size: int = 16, search_bytes: int = 2**31) -> None:
        super().__init__(_TokenExtractor(features, patch_size), "anomaly_dino", "AnomalyDINOModel")
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


class _Extractor(nn.Module):
    """The features in the shape in which PatchCore's extractor gives them: by layer, [B, C, h, w]."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {LAYER: self.features(images)}


class _TokenExtractor(_Extractor):
    """The features in the shape in which AnomalyDINO's extractor gives them: by layer, [B, h * w, C]."""

    def __init__(self, features: nn.Module, patch_size: int) -> None:
        super().__init__(features)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {LAYER: self.features(images).flatten(2).transpose(1, 2)}
