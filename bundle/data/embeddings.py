"""Patch embeddings of healthy slices: the data that the density network learns from."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import Dataset as MonaiDataset
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from bundle.compute import Compute
from bundle.data.cases import Case, add_keys, number_patients
from bundle.data.store import EmbeddingStore
from bundle.data.stream import SliceBatches, meta_of, positions_of
from bundle.dicom.words import facts_of
from bundle.distributed import gather, shard
from bundle.errors import BundleError
from bundle.files import content_key
from bundle.networks.detector import AnomalyDetector
from bundle.networks.neighbors import PlacedSlices

logger = logging.getLogger(__name__)


class EmbeddingDataset(Dataset[Tensor]):
    """The patch embeddings of every slice of ``data``, as the frozen backbone gives them.

    The backbone never changes, so each slice goes through it once: in the first run that needs it, not in every epoch.
    Afterwards training streams from ``store`` on disk; memory does not grow with the set. Processes that work together
    embed a share each.

    Args:
        data: healthy cases.
        transform: reads a case and gives one slice or a list of slices, each with ``image`` [C, H, W] in [0, 1].
        detector: embeds the slices.
        compute: where the detector runs, and how precisely.
        store: keeps the embeddings; its recipe must say what ``transform``, ``detector`` and ``compute`` do.
        batch_size: slices that go through the backbone together.
        num_workers: processes that read cases.

    Attributes:
        keys: of every case in the store, by its content.
    """

    def __init__(
        self,
        data: list[Case],
        transform: Callable[[Case], Any],
        detector: AnomalyDetector,
        compute: Compute,
        store: EmbeddingStore,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        self.data = data
        self.transform = transform
        self.store = store
        add_keys(data)
        keys = self.keys = [case.get("key") or content_key(case["image"]) for case in data]  # which names a lost file
        store.use(keys)
        absent = {key: case for key, case in zip(keys, data, strict=True) if key not in store}
        missing = gather(list(absent.items()))[0]  # one view of the store, before any process adds to it
        if missing:
            self._embed(shard(missing), compute.place(detector), compute, batch_size, num_workers)
        idist.barrier()
        store.refresh()
        store.use(keys)
        new, kept = len(missing), len(data) - len(missing)
        logger.info(f"embedded {new} images, {kept} were there; {store.describe()}")
        self._places = [(key, index) for key in keys for index in range(store.count(key))]

    def _embed(
        self,
        missing: Sequence[tuple[str, Case]],
        detector: AnomalyDetector,
        compute: Compute,
        batch_size: int,
        num_workers: int,
    ) -> None:
        cases = MonaiDataset([case for _, case in missing], self.transform)
        batches = SliceBatches(cases, lambda image: detector.resize(image.to(compute.device)), batch_size, num_workers)
        with tqdm(
            total=len(missing), desc="embedding healthy images", unit="image", disable=idist.get_rank() > 0
        ) as bar:
            for batch in batches:
                with torch.inference_mode(), compute.autocast():
                    embeddings = detector.embed(torch.stack([image for image, _ in batch])).float().cpu()
                for (_, case), values in zip(batch, embeddings, strict=True):
                    case.done.append(values)
                    if case.complete:
                        key, _ = missing[case.position]
                        facts = facts_of(meta_of(case.item))
                        self.store.add(key, torch.stack(case.done), positions_of(case.item), facts)
                        bar.update()
        self.store.flush()

    @property
    def volumes(self) -> list[PlacedSlices]:
        """The cases of which it is known where their slices lie, of two or more slices each."""
        found, first = [], 0
        for key in self.keys:
            positions = self.store.positions(key)
            if len(positions) > 1 and math.isfinite(positions[0]):
                found.append(PlacedSlices(list(range(first, first + len(positions))), positions))
            first += len(positions)
        return found

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        """The embeddings [C, h, w] of slice ``index``."""
        return self.store.read(*self._places[index])

    @cached_property
    def patients(self) -> list[int]:
        """The patient of every slice, as a number from 0, see :func:`~bundle.data.cases.number_patients`."""
        numbers = number_patients(self.data)
        return [number for number, key in zip(numbers, self.keys, strict=True) for _ in range(self.store.count(key))]

    def words(self) -> dict[str, dict[str, int]]:
        """How many cases have each word that headers and names tell, by kind, see :mod:`bundle.dicom.words`."""
        found: dict[str, Counter[str]] = {}
        for key in self.keys:
            for kind, words in self.store.facts(key).items():
                found.setdefault(kind, Counter()).update(words)
        return {kind: dict(counts) for kind, counts in found.items()}

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [C] of every channel over all patches."""
        # double: a difference of large sums must not cancel
        sums = torch.zeros(3, self[0].shape[0], dtype=torch.float64)
        for index in shard(range(len(self))):
            values = self[index].double().flatten(1)
            sums += torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)])
        count, total, square = torch.as_tensor(idist.all_reduce(sums))
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp_min(0).sqrt().float()

    def batches(self, patches: int | None = None, batch_size: int = 8) -> EmbeddingBatches:
        """The embeddings in order, as batches of [B, C, h, w] that can be iterated again and again.

        Args:
            patches: of about as many patches, at equal distances in the set, so that a fit takes bounded time; None:
                all.
            batch_size: images in a batch.

        Raises:
            BundleError: if there is no embedding.
        """
        if not len(self):
            raise BundleError("no healthy image to learn from or to calibrate on: fill train/good and valid/good")
        each = self[0].shape[-2] * self[0].shape[-1]
        count = len(self) if patches is None else min(len(self), max(1, patches // each))
        return EmbeddingBatches(self, [index * len(self) // count for index in range(count)], batch_size)


class EmbeddingBatches(Iterable[Tensor]):
    """Embeddings of the slices ``indices`` of ``dataset``, read anew in batches with every iteration."""

    def __init__(self, dataset: EmbeddingDataset, indices: list[int], batch_size: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.indices), self.batch_size):
            yield torch.stack([self.dataset[index] for index in self.indices[start : start + self.batch_size]])
