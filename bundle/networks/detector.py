"""The anomaly detector: an image goes in, an anomaly map of its size comes out, in one forward pass.

::

    image -> resize -> brightness of patches -> which are foreground
                    -> normalize (3 channels, backbone's mean and deviation) -> patch embeddings -> pool, and details
          -> standardize, reduce -> density: residual of the prediction -> patch score
                                    details: the same on a finer grid
          -> patch map, lowest outside the foreground -> anomaly map and image score
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, check, shown
from bundle.networks.backbones import BACKBONES
from bundle.networks.density import SpatialARDensity, squared_error
from bundle.networks.detail import Detailed, DetailScore
from bundle.networks.features import FeatureNetwork
from bundle.networks.foreground import Foreground, air_level, mean_brightness
from bundle.networks.gaussian import moments
from bundle.networks.likeness import CaseLikeness, SliceLikeness
from bundle.networks.neighbors import PlacedSlices, SlicePooling, Volume
from bundle.networks.scores import (
    LOWEST,
    Healthy,
    ImageScore,
    NormalScale,
    PatchScore,
    conformal_threshold,
    largest_of_each,
)
from bundle.networks.settings import remembers_settings

Mapped = TypeVar("Mapped")

LARGEST_SIDE = 2**14  # pixels
LARGEST_POOLING = 63  # patches
WEIGHT_FACTS = {"weights", "positions", "mean", "std"}  # entries of an identity that follow from the weights
# settings of the detector that embeddings do not depend on
AFTER_EMBEDDING = (
    "standardize",
    "feature_components",
    "score_scale",
    "residual_pooling",
    "per_position",
    "position_smoothing",
    "detail_weight",
    "foreground",
    "image_score",
    "slice_pooling",
)


class Detection(NamedTuple):
    """What the detector says of a batch of images."""

    anomaly_map: Tensor
    """[B, 1, H, W], the size of the images."""
    image_score: Tensor
    """[B]."""
    patch_map: Tensor
    """[B, h, w], one value per patch, or per cell of the details."""
    unlikeness: Tensor
    """[B], how far each image is from the training data, see :class:`~bundle.networks.likeness.SliceLikeness`."""


class Maps(NamedTuple):
    """What is computed of an image once, and kept while a density is trained."""

    embeddings: Tensor
    """[B, C, h, w], before standardization."""
    details: Tensor
    """[B, D * f * f, h, w], space to depth; no channels without details."""
    brightness: Tensor
    """[B, h, w], mean intensity of each patch, in [0, 1]."""


class Detector(Protocol):
    """What inference needs: an :class:`AnomalyDetector`, or a file that was exported from one."""

    threshold: Tensor
    image_threshold: Tensor
    false_positive_rate: Tensor
    image_false_positive_rate: Tensor
    slice_pooling: SlicePooling
    case_likeness: CaseLikeness

    def resize(self, image: Tensor) -> Tensor:
        """Bring ``image`` [B, C, H, W] to the size that the backbone sees."""

    def detect(self, image: Tensor, raw: bool = False) -> Detection:
        """Anomaly map, image score and patch map of ``image`` [B, C, H, W] in [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """The identity: settings of preprocessing, features, density and scores, and the hash of the weights."""


class AnomalyDetector(nn.Module):
    """A frozen feature network, a density of its patch embeddings, and scores that are calibrated on healthy images.

    A map is on the scale of a standard normal ('z'), but for ``squared_error``: healthy foreground patches of
    validation images exceed 2 in 2.3 % and, if there are thousands of them, 3 in 0.13 % of all cases. They are compared
    with those at the same position where ``per_position`` says so. Outside the foreground a map has its lowest value,
    -6. An image score is in deviations above the mean of healthy images. ``raw=True`` gives the squared error of the
    paper. Before :meth:`calibrate` thresholds are infinite, and the rates that they were wanted for not a number.

    What decides an output travels in the state dict: density, standardization, scores, thresholds and ``identity``
    (settings of preprocessing, features, density and scores, and the hash of the backbone's weights). The weights of
    the backbone do not. Loading the state of another identity is refused. Scriptable by ``torch.jit.script``, at every
    image size.

    Args:
        features: the frozen feature network.
        density: of ``num_channels`` of the features, or of ``feature_components`` channels.
        preprocessing: how images are read before they come here (plain JSON values), a part of the identity.
        image_size: side, or [height, width], that images are resized to, divisible by the patch size; None: that of the
            backbone.
        tiles: per side, that a resized image is cut into for the feature network: at twice the image size and 2 tiles
            a patch covers half the length, and a transformer no longer sequence. 1: whole.
        standardize: bring every channel of the embeddings to mean 0 and deviation 1 over healthy training patches, so
            that channels of much natural variance do not drown the others. The paper does not.
        feature_pooling: side, in patches, of the square that embeddings are averaged over, with zeros outside the map;
            3 as PatchCore does it, 1: each patch alone.
        feature_components: principal components that the standardized embeddings are reduced to; None: not reduced.
        score_scale, residual_pooling, per_position: see :class:`~bundle.networks.scores.PatchScore`. The pooling is in
            patches, of details in their cells.
        position_smoothing: deviation of the weights of near positions in the moments, in patches.
        detail_weight: of the z-scores of details beside those of embeddings, where the features have details.
        foreground: see :class:`~bundle.networks.foreground.Foreground`.
        image_score: see :class:`~bundle.networks.scores.ImageScore`.
        slice_pooling: deviation of the weights of near slices in the map of a volume, in mm, see
            :class:`~bundle.networks.neighbors.SlicePooling`; 0: each slice alone.

    Raises:
        BundleError: if ``image_size`` is not divisible by the patch size in every tile, the density is of other
            channels, or a setting of the scores is unknown.

    Attributes:
        embedding_recipe: what decides the embeddings: the part of the identity that the feature cache depends on.
    """

    feature_mean: Tensor
    feature_std: Tensor
    projection: Tensor
    threshold: Tensor
    image_threshold: Tensor
    false_positive_rate: Tensor
    image_false_positive_rate: Tensor
    identity: Tensor
    settings: dict[str, Any]

    @remembers_settings
    def __init__(
        self,
        features: FeatureNetwork,
        density: SpatialARDensity,
        preprocessing: dict[str, Any] | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        tiles: int = 1,
        feature_pooling: int = 1,
        standardize: bool = True,
        feature_components: int | None = None,
        score_scale: str = "log_radius",
        residual_pooling: float = 1.0,
        per_position: bool | Literal["auto"] = "auto",
        position_smoothing: float = 0.75,
        detail_weight: float = 0.5,
        foreground: float | Literal["auto", "all"] = "auto",
        image_score: str = "top_patches",
        slice_pooling: float = 6.0,
    ) -> None:
        super().__init__()
        channels = features.num_channels
        check(isinstance(tiles, int) and tiles >= 1, "tiles", tiles, "give their number per side, 1 for whole images")
        check(
            feature_components is None or 1 <= feature_components <= channels,
            "feature_components",
            feature_components,
            f"give 1 to {channels}, the embeddings' channels, or null",
        )
        odd = 1 <= feature_pooling <= LARGEST_POOLING and feature_pooling % 2 == 1
        check(odd, "feature_pooling", feature_pooling, "give an odd number of patches such as 3, 1 for none")
        reduced = feature_components or channels
        check(0 <= detail_weight <= 10, "detail_weight", detail_weight, "give 0 for none, 0.5, or another up to 10")
        self.image_size = _checked_size(
            features.image_size if image_size is None else image_size, features.patch_size * tiles
        )
        if density.in_channels != reduced:
            raise BundleError(
                f"the density has {density.in_channels} channels, but the embeddings {reduced}: give it that many"
            )
        self.features = features
        self.feature_pooling = nn.AvgPool2d(feature_pooling, stride=1, padding=feature_pooling // 2)
        self.density = density
        grid = [side // features.patch_size for side in self.image_size]
        remedy = "give 0 for none, or a number of patches such as 0.75, up to 16"
        check(0 <= position_smoothing <= 16, "position_smoothing", position_smoothing, remedy)
        score: dict[str, Any] = {
            "fit": density.fit,
            "scale": score_scale,
            "pooling": residual_pooling,
            "per_position": per_position,
            "smoothing": position_smoothing,
        }
        self.foreground = Foreground(grid, foreground)
        self.patch_score = PatchScore(reduced, grid, **score)
        self.detail_factor = features.detail_factor
        self.detail_score: DetailScore | None = None
        if features.detail_channels and detail_weight > 0:
            of_cells = score | {"smoothing": position_smoothing * self.detail_factor, "what": "details"}
            self.detail_score = DetailScore(features.detail_channels, self.detail_factor, reduced, grid, of_cells)
        self.detail_weight = detail_weight
        self.normal_scale = NormalScale()
        self.image_score = ImageScore(image_score)
        self.slice_pooling = SlicePooling(slice_pooling, image_score, score_scale)
        self.slice_likeness = SliceLikeness(reduced)
        self.case_likeness = CaseLikeness()
        self.lowest = LOWEST
        self.tiles = tiles
        self.standardizes = standardize
        self.reduces = feature_components is not None
        self.register_buffer("feature_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("feature_std", torch.ones(1, channels, 1, 1))
        self.register_buffer("projection", torch.eye(reduced, channels if self.reduces else reduced)[..., None, None])
        self.register_buffer("threshold", torch.full((), float("inf")))
        self.register_buffer("image_threshold", torch.full((), float("inf")))
        self.register_buffer("false_positive_rate", torch.full((), float("nan"), dtype=torch.float64))
        self.register_buffer("image_false_positive_rate", torch.full((), float("nan"), dtype=torch.float64))
        own = self.settings | {"image_size": self.image_size}
        self.embedding_recipe = {
            **(preprocessing or {}),
            **features.describe(),
            **{name: value for name, value in own.items() if name not in AFTER_EMBEDDING},
        }
        identity = {**self.embedding_recipe, **own, **density.describe()}
        self.register_buffer("identity", encode_identity(identity))

    @torch.jit.export
    def resize(self, image: Tensor) -> Tensor:
        """Resize ``image`` [B, 1 or 3, H, W] to ``image_size``."""
        if image.shape[-2] != self.image_size[0] or image.shape[-1] != self.image_size[1] or torch.jit.is_tracing():
            image = F.interpolate(image, self.image_size, mode="bilinear", align_corners=False, antialias=True)
        return image

    @torch.jit.export
    def embed(self, image: Tensor) -> Tensor:
        """What is kept of ``image`` [B, 1 or 3, H, W] in [0, 1]: :class:`Maps`, joined along the channels."""
        return self.embed_resized(self.resize(image))

    @torch.jit.export
    def embed_resized(self, image: Tensor) -> Tensor:
        """:meth:`embed` of an ``image`` [B, 1 or 3, H, W] that has ``image_size``."""
        features = self.embed_tiles(self.features.normalize(image))
        return torch.cat([features, mean_brightness(image, self.features.patch_size).to(features.dtype)], dim=1)

    @torch.jit.export
    def embed_tiles(self, image: Tensor) -> Tensor:
        """Patch embeddings, and details after them, of ``image`` [B, 3, H, W], normalized, tile by tile."""
        if self.tiles == 1:
            maps = self.features.packed(image)
        else:
            sides = [self.tiles, -1]
            tiles = image.unflatten(3, sides).unflatten(2, sides)  # [B, 3, tiles, H / tiles, tiles, W / tiles]
            maps = self.features.packed(tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
            maps = maps.unflatten(0, [-1, self.tiles, self.tiles]).permute(0, 3, 1, 4, 2, 5)
            maps = maps.flatten(2, 3).flatten(3, 4)
        channels = self.features.num_channels
        return torch.cat([self.feature_pooling(maps[:, :channels]), maps[:, channels:]], dim=1)

    @torch.jit.export
    def unpack(self, maps: Tensor) -> Maps:
        """The parts of what :meth:`embed` gave, ``maps`` [B, C + D * f * f + 1, h, w]."""
        channels = self.features.num_channels
        return Maps(maps[:, :channels], maps[:, channels:-1], maps[:, -1])

    @torch.jit.export
    def standardize(self, embeddings: Tensor) -> Tensor:
        """Bring ``embeddings`` [B, C, h, w] to the scale of healthy training patches, reduced if that is wanted."""
        standardized = (embeddings - self.feature_mean) / self.feature_std
        if self.reduces:  # in double, which no automatic cast to 16 bits touches
            projected = torch.matmul(self.projection.flatten(1).double(), standardized.double().flatten(2))
            grid = [standardized.shape[2], standardized.shape[3]]
            standardized = projected.to(standardized.dtype).unflatten(2, grid)
        return standardized

    @torch.jit.export
    def score_patches(self, maps: Tensor, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The patch map [B, h, w] of what :meth:`embed` gave, and which of its patches are foreground [B, h, w] bool.

        With details both have the grid of the details. ``raw`` errors have that of the patches, and are 0 in the air.
        """
        embeddings, details, brightness = self.unpack(maps)
        inside = self.foreground(brightness)
        embeddings = self.standardize(embeddings)
        prediction = self.density(embeddings)
        if raw:
            error = squared_error(prediction[:, : embeddings.shape[1]], embeddings)
            return torch.where(inside, error, torch.zeros_like(error)), inside
        z = self.patch_score(self.density.residual_of(prediction, embeddings))
        if self.detail_score is not None:
            inside = self.inside_cells(inside)
            of_details = self.detail_score(details, prediction[:, : embeddings.shape[1]])
            z = self.detail_weight * of_details + self.to_cells(z)
        if self.patch_score.takes_logarithm:  # squared errors stay in proportion to those of the paper
            z = self.normal_scale(z)
        if not self.foreground.takes_all:
            z = z.clamp_min(self.lowest)
        return torch.where(inside, z, torch.full_like(z, self.lowest)), inside

    @torch.jit.export
    def unlikeness(self, maps: Tensor, patch_map: Tensor, inside: Tensor) -> Tensor:
        """How far images are from the training data, [B], of what :meth:`embed` and :meth:`score_patches` gave."""
        embeddings, _, brightness = self.unpack(maps)
        median = self.image_score.statistics(patch_map, inside)[1][:, 0]
        return self.slice_likeness(self.standardize(embeddings), brightness, self.foreground(brightness), median)

    @torch.jit.export
    def to_cells(self, patches: Tensor) -> Tensor:
        """``patches`` [B, h, w] on the grid of the details."""
        size = [patches.shape[1] * self.detail_factor, patches.shape[2] * self.detail_factor]
        return F.interpolate(patches.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)

    @torch.jit.export
    def inside_cells(self, inside: Tensor) -> Tensor:
        """``inside`` [B, h, w] bool on the grid of the details: a cell is what its patch is."""
        height, width = inside.shape[1], inside.shape[2]
        cells = inside[:, :, None, :, None].expand(-1, -1, self.detail_factor, -1, self.detail_factor)
        return cells.reshape(-1, height * self.detail_factor, width * self.detail_factor)

    @torch.jit.export
    def detect(self, image: Tensor, raw: bool = False) -> Detection:
        """Anomaly map, image score and patch map of ``image``.

        Args:
            image: [B, 1 or 3, H, W] in [0, 1], any H and W.
            raw: squared errors, and the mean of the top 1 % of them, instead of calibrated scores; nothing is compared.
        """
        maps = self.embed(image)
        patch_map, inside = self.score_patches(maps, raw)
        anomaly_map = F.interpolate(
            patch_map.unsqueeze(1), [image.shape[-2], image.shape[-1]], mode="bilinear", align_corners=False
        )
        score = self.image_score.statistics(patch_map, inside)[0] if raw else self.image_score(patch_map, inside)
        unlikeness = torch.zeros_like(score) if raw else self.unlikeness(maps, patch_map, inside)
        return Detection(anomaly_map, score, patch_map, unlikeness)

    def forward(self, image: Tensor, raw: bool = False) -> Tensor:
        """The anomaly map [B, 1, H, W] of ``image`` [B, 1 or 3, H, W] in [0, 1]."""
        return self.detect(image, raw).anomaly_map

    @torch.no_grad()
    def set_standardization(self, mean: Tensor, deviation: Tensor) -> None:
        """Take ``mean`` and ``deviation`` of every channel that :meth:`embed` gives over healthy training patches."""
        channels = self.features.num_channels
        if self.detail_score is not None:
            self.detail_score.set_standardization(mean[channels:-1], deviation[channels:-1])
        if not self.standardizes:
            return
        mean, deviation = mean[:channels], deviation[:channels]
        # a channel that hardly varies on healthy images must not be blown up
        floor = 1e-3 * deviation.mean().clamp_min(1e-12)
        self.feature_mean.copy_(mean.view_as(self.feature_mean))
        self.feature_std.copy_(deviation.clamp_min(floor).view_as(self.feature_std))

    def fit_before_training(self, training: Iterable[Tensor], validation: Iterable[Tensor]) -> None:
        """Fit what training starts from: reduction, linear prediction, and the covariances that weigh its errors.

        Args:
            training, validation: what :meth:`embed` gives of healthy images, in batches, iterated more than once.

        Raises:
            BundleError: if no validation image has any foreground.
        """
        self._check_foreground(validation)
        if self.reduces:
            deviation = self.feature_std.flatten().double().cpu()
            embeddings = _Mapped(lambda maps: self.unpack(maps).embeddings, training)
            covariance = moments(embeddings)[1] / torch.outer(deviation, deviation)
            leading = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : len(self.projection)]
            self.projection.copy_(leading.T[..., None, None])
        standardized = _Mapped(self.standardized, training)
        self.density.fit_linear(standardized, _Mapped(self.standardized, validation))
        self.density.fit_covariance(standardized)
        self.patch_score.fit_covariance(_Mapped(self._residual, training))

    @torch.no_grad()
    def fit_after_training(self, training: Iterable[Tensor]) -> None:
        """Fit the covariance of what the trained density leaves, and the scores, to healthy training images.

        Args:
            training: what :meth:`embed` gives of them, in batches, iterated more than once.
        """
        self.density.fit_covariance(_Mapped(self.standardized, training))
        self.patch_score.fit(_Mapped(self._residual, training))
        if self.detail_score is not None:
            self.detail_score.fit(_Mapped(self._detailed, training))
        self.slice_likeness.fit(self._statistics(training))
        self.normal_scale.reset()
        if self.image_score.adjusts:
            patch_maps, inside = self._scores(training)
            self.normal_scale.fit(patch_maps[inside])
            self.image_score.fit(*self._scores(training))

    @torch.no_grad()
    def calibrate(
        self,
        validation: Iterable[Tensor],
        cases: Sequence[int] | None = None,
        false_positive_rate: float = 0.01,
        image_false_positive_rate: float = 0.05,
        volumes: Sequence[PlacedSlices] = (),
        unlike_rate: float = 0.01,
    ) -> None:
        """Set scales and thresholds from healthy validation images, which no score was fitted to.

        Args:
            validation: what :meth:`embed` gives of them, in batches, iterated more than once.
            cases: to which case each slice belongs, as numbers from 0; a volume's score is that of its worst slice.
                None: each is a case of its own.
            false_positive_rate: the largest share of healthy foreground patches above ``threshold``, in (0, 1).
            image_false_positive_rate: the same of healthy cases above ``image_threshold``.
            volumes: which slices are scored together, as in use; all others are scored alone.
            unlike_rate: the share of healthy cases that may be called unlike the training data, in (0, 1).

        Raises:
            BundleError: if a rate is not in (0, 1), or no validation image has any foreground.
        """
        self._check_foreground(validation)
        self.patch_score.calibrate(_Mapped(self._residual, validation))
        if self.detail_score is not None:
            self.detail_score.calibrate(_Mapped(self._detailed, validation))
        self.normal_scale.reset()
        patch_maps, inside = self._scores(validation)
        self.normal_scale.fit(patch_maps[inside])
        patch_maps, inside = self._scores(validation)
        image_scores = self.image_score.calibrate(patch_maps, inside)
        medians = self.image_score.statistics(patch_maps, inside)[1][:, 0]
        distances = self.slice_likeness.distance(self._statistics(validation)).cpu()
        unlikeness = self.slice_likeness.calibrate(distances, medians.cpu())
        self.slice_pooling.length.zero_()  # nothing is pooled
        if volumes and self.slice_pooling.width:
            self._pool_healthy(patch_maps, image_scores, volumes)
        self.threshold.fill_(conformal_threshold(patch_maps[inside], false_positive_rate, "patches"))
        self.case_likeness.keep_patches(patch_maps[inside])
        case_scores = image_scores if cases is None else largest_of_each(image_scores, cases)
        self.image_threshold.fill_(conformal_threshold(case_scores, image_false_positive_rate, "images"))
        self.false_positive_rate.fill_(false_positive_rate)
        self.image_false_positive_rate.fill_(image_false_positive_rate)
        patients = range(len(image_scores)) if cases is None else cases
        self.case_likeness.calibrate(unlikeness, image_scores, patients, [one.slices for one in volumes], unlike_rate)

    def _pool_healthy(self, patch_maps: Tensor, image_scores: Tensor, volumes: Sequence[PlacedSlices]) -> None:
        """Calibrate the pooling, and put what it gives in the place of what the slices of ``volumes`` have alone."""
        healthy = [Volume(patch_maps[one.slices], torch.tensor(one.positions)) for one in volumes]
        pooled = self.slice_pooling.calibrate(healthy, self.image_score)
        for one, (maps, scores) in zip(volumes, pooled, strict=True):
            patch_maps[one.slices], image_scores[one.slices] = maps, scores

    def negative_log_likelihood(self, prediction: Tensor, maps: Tensor) -> Tensor:
        """Of what is shown: the mean of foreground patches, whose pooled residuals are Gaussian, in nats per patch.

        Comparable between images, and between settings on equal features and pooling. Where variances are learned,
        they are those of single residuals, so that it is a likelihood about. 0 without any foreground.

        Args:
            prediction: of the density, see :meth:`SpatialARDensity.forward`.
            maps: what :meth:`embed` gave.
        """
        residual = self.density.residual_of(prediction, self.standardized(maps))
        nats = self.patch_score.negative_log_likelihood(residual) + self.density.log_scale(prediction)
        inside = self.foreground(self.unpack(maps).brightness)
        return nats[inside].sum() / inside.sum().clamp_min(1)

    def count_foreground(self, maps: Tensor) -> int:
        """How many foreground patches there are in what :meth:`embed` gave."""
        return int(self.foreground(self.unpack(maps).brightness).sum())

    @torch.no_grad()
    def healthy_log_likelihood(self, healthy: Iterable[Tensor]) -> float:
        """The mean log-likelihood of the foreground patches of ``healthy`` images, see above, in nats per patch."""
        total, count = 0.0, 0
        for maps in healthy:
            maps = maps.to(self.threshold.device)
            patches = self.count_foreground(maps)
            total += patches * float(self.negative_log_likelihood(self.density(self.standardized(maps)), maps))
            count += patches
        return -total / count

    def _check_foreground(self, validation: Iterable[Tensor]) -> None:
        if not any(self.count_foreground(maps.to(self.threshold.device)) for maps in validation):
            raise BundleError("no healthy validation image has any foreground: give foreground all, or other images")

    def standardized(self, maps: Tensor) -> Tensor:
        """The standardized embeddings in what :meth:`embed` gave, [B, C, h, w], where the detector is."""
        return self.standardize(self.unpack(maps.to(self.feature_mean.device)).embeddings)

    def _residual(self, maps: Tensor) -> Healthy:
        maps = maps.to(self.feature_mean.device)
        return Healthy(self.density.residual(self.standardized(maps)), self.foreground(self.unpack(maps).brightness))

    def _detailed(self, maps: Tensor) -> Detailed:
        maps = maps.to(self.feature_mean.device)
        embeddings = self.standardized(maps)
        prediction = self.density(embeddings)[:, : embeddings.shape[1]]
        _, details, brightness = self.unpack(maps)
        return Detailed(details, prediction, self.inside_cells(self.foreground(brightness)))

    def _statistics(self, batches: Iterable[Tensor]) -> Tensor:
        """What the likeness looks at, [images, statistics]."""
        found = []
        for maps in batches:
            embeddings, _, brightness = self.unpack(maps.to(self.feature_mean.device))
            inside = self.foreground(brightness)
            found.append(self.slice_likeness.statistics(self.standardize(embeddings), brightness, inside))
        return torch.cat(found)

    def _scores(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Patch maps of all images, and which patches are foreground, [images, h, w] each."""
        scored = (self.score_patches(maps.to(self.feature_mean.device)) for maps in batches)
        patch_maps, inside = zip(*((scores.cpu(), found.cpu()) for scores, found in scored), strict=True)
        return torch.cat(patch_maps), torch.cat(inside)

    def describe(self) -> dict[str, Any]:
        """The identity: what a checkpoint must agree with, as plain JSON values."""
        return decode_identity(self.identity)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "identity")
        if stored is not None:
            refuse_other(decode_identity(stored), self.describe())
            # that of an earlier version may have entries that this one does not need, and lack others
            state_dict[prefix + "identity"] = self.identity
            # earlier maps were not brought to a normal scale, and slices were not pooled
            later = {
                "normal_scale": NormalScale(),
                "slice_pooling": SlicePooling(),
                "slice_likeness": SliceLikeness(self.density.in_channels),
                "case_likeness": CaseLikeness(),  # which compares nothing
            }
            for name, part in later.items():
                for key, value in part.state_dict(prefix=f"{prefix}{name}.").items():
                    state_dict.setdefault(key, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Mapped(Iterable[Mapped]):
    """``function`` of each of ``batches``, anew with every iteration: nothing is kept."""

    def __init__(self, function: Callable[[Tensor], Mapped], batches: Iterable[Tensor]) -> None:
        self.function = function
        self.batches = batches

    def __iter__(self) -> Iterator[Mapped]:
        return map(self.function, self.batches)


def _checked_size(image_size: int | Sequence[int], patch: int) -> list[int]:
    size = list(image_size) if isinstance(image_size, Sequence) else [image_size, image_size]
    if len(size) != 2 or any(side < patch or side % patch or side > LARGEST_SIDE for side in size):
        near = [min(max(patch, round(side / patch) * patch), LARGEST_SIDE // patch * patch) for side in size[:2]]
        raise BundleError(
            f"image_size {shown(image_size)} must be one or two multiples of the patch size {patch}: try "
            f"{near or [20 * patch] * 2}, at most {LARGEST_SIDE}"
        )
    return [int(side) for side in size]


def encode_identity(identity: dict[str, Any]) -> Tensor:
    """JSON as bytes in a tensor, which every checkpoint format and TorchScript can hold."""
    return torch.tensor(list(json.dumps(identity, sort_keys=True).encode()), dtype=torch.uint8)


def decode_identity(stored: Tensor) -> dict[str, Any]:
    """What :func:`encode_identity` was given."""
    return dict(json.loads(bytes(stored.tolist()).decode()))


def completed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """``identity``, with what was meant before it had such an entry, where that is not today's default."""
    spec = BACKBONES.get(str(identity.get("backbone")))
    blocks = {"blocks": "normed"} if spec is not None and spec.has_blocks else {}
    return {"foreground": "all", "detail_layers": [], "slice_pooling": 0.0, **blocks} | dict(identity)


def air_of(detector: Detector) -> float:
    """The intensity up to which the ``detector`` takes a patch for air; below 0 where nothing is air."""
    return air_level(completed(detector.describe())["foreground"])


def refuse_other(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a model that is not what is ``wanted``, as far as both tell.

    Raises:
        BundleError: with all differences in one line.
    """
    stored = completed(stored)
    different = [name for name in sorted(stored.keys() & wanted.keys()) if not same(stored[name], wanted[name])]
    if different:
        differences = "; ".join(f"{name} {shown(stored[name])}, not {shown(wanted[name])}" for name in different)
        of_weights = WEIGHT_FACTS.issuperset(different)
        remedy = "give --weights those of the training" if of_weights else "leave these out, or take another model"
        raise BundleError(f"the model was trained with {differences}: {remedy}")


def same(stored: Any, wanted: Any) -> bool:
    """Whether two entries mean the same: one number stands for a list of equal ones."""
    return stored == wanted or (isinstance(stored, list) and stored != [] and all(one == wanted for one in stored))
