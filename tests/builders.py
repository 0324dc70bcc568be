"""A detector that is quick to build."""

from bundle.networks import AnomalyDetector, SpatialARDensity

SCORES = ("score_scale", "residual_pooling", "per_position", "image_score", "standardize", "preprocessing")


def small_detector(features, image_size=64, **settings):
    """A detector of few channels; ``settings`` of density or scores, else the defaults of the bundle."""
    scores = {key: settings.pop(key) for key in SCORES if key in settings}
    density = SpatialARDensity(features.num_channels, **{"hidden_channels": 8, **settings})
    return AnomalyDetector(features, density, image_size, **scores)
