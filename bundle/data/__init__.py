"""Cases of a data set, their embeddings, and the synthetic sample cohort."""

from bundle.data.cases import find_images, find_splits, read_splits, readable
from bundle.data.cohort import make_sample_cohort
from bundle.data.embeddings import EmbeddingDataset
from bundle.data.store import EmbeddingStore
from bundle.data.stream import SliceBatches

__all__ = [
    "EmbeddingDataset",
    "EmbeddingStore",
    "SliceBatches",
    "find_images",
    "find_splits",
    "make_sample_cohort",
    "read_splits",
    "readable",
]
