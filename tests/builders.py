"""A detector that is quick to build."""

import torch

from bundle.networks import AnomalyDetector, SpatialARDensity

PREPROCESSING = {"intensity": "auto", "slice_plane": "acquired", "slice_range": [0.0, 1.0], "min_foreground": 0.05}
OF_DETECTOR = (
    "tiles",
    "feature_pooling",
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
    "preprocessing",
)


def small_detector(features, image_size=64, **settings):
    """A detector of few channels; ``settings`` of density or detector, else the defaults of the bundle."""
    own = {key: settings.pop(key) for key in OF_DETECTOR if key in settings}
    channels = own.get("feature_components") or features.num_channels
    settings = {"hidden_channels": 8, "linear_components": min(32, channels), **settings}
    return AnomalyDetector(
        features, SpatialARDensity(channels, **settings), own.pop("preprocessing", None), image_size=image_size, **own
    )


def random_maps(features, images=4, side=4, generator=None):
    """What a detector of ``features`` keeps of bright images: [images, C + details + 1, side, side]."""
    channels = features.num_channels + features.detail_channels * features.detail_factor**2
    maps = torch.randn(images, channels, side, side, generator=generator)
    return torch.cat([maps, torch.full((images, 1, side, side), 0.5)], dim=1)
