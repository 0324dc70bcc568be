"""Feature network, density network and the detector that joins them."""

from bundle.networks.density import SpatialARDensity, load_paper_checkpoint
from bundle.networks.detector import AnomalyDetector, Detection
from bundle.networks.features import FeatureNetwork

__all__ = ["AnomalyDetector", "Detection", "FeatureNetwork", "SpatialARDensity", "load_paper_checkpoint"]
