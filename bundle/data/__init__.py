"""Cases of a data set, and their embeddings."""

from bundle.data.cases import find_images, find_splits, keep_readable, read_splits
from bundle.data.embeddings import EmbeddingDataset
from bundle.data.schemes import SplitFinder, settings_for
from bundle.data.stream import SliceBatches
from bundle.store import EmbeddingStore

__all__ = [
    "EmbeddingDataset",
    "EmbeddingStore",
    "SliceBatches",
    "SplitFinder",
    "find_images",
    "find_splits",
    "keep_readable",
    "read_splits",
    "settings_for",
]
