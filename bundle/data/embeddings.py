"""Patch embeddings of healthy slices: the data that the density network learns from."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import Dataset as MonaiDataset
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from bundle.compute import Compute
from bundle.data.cases import Case, add_keys, number_patients, place_of
from bundle.data.stream import SliceBatches, meta_of, positions_of
from bundle.dicom.words import facts_of
from bundle.distributed import gather, shard
from bundle.errors import BundleError
from bundle.networks.detector import AnomalyDetector
from bundle.networks.neighbors import PlacedSlices
from bundle.store import EmbeddingStore

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
        on_error: at a case that cannot be read, or has changed since its content was looked at, ``raise``, or ``skip``:
            warn of it, count it, and go on without it.

    Attributes:
        data: the cases that are there.
        keys: of each of them in the store, by its content.

    Raises:
        BundleError: at a case that cannot be read.
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
        on_error: str = "raise",
    ) -> None:
        self.transform = transform
        self.store = store
        add_keys(data)
        found = [case for case in data if "key" in case]
        self._report_vanished([case for case in data if "key" not in case], on_error)
        store.use([case["key"] for case in found])
        absent = {case["key"]: case for case in found if case["key"] not in store}
        missing = gather(list(absent.items()))[0]  # one view of the store, before any process adds to it
        lost: set[str] = set()
        if missing:
            place = compute.place(detector)
            lost = set(chain(*gather(self._embed(shard(missing), place, compute, batch_size, num_workers, on_error))))
        idist.barrier()
        store.refresh()
        self.data = [case for case in found if case["key"] not in lost]
        keys = self.keys = [case["key"] for case in self.data]
        store.use(keys)
        new, kept = len(missing) - len(lost), len(found) - len(missing)
        logger.info(f"embedded {new} images, {kept} were there; {store.describe()}")
        self._places = [(key, index) for key in keys for index in range(store.count(key))]

    @staticmethod
    def _report_vanished(cases: Sequence[Case], on_error: str) -> None:
        for case in cases:
            message = f"no file at '{place_of(case)}': check the path"
            if on_error == "raise":
                raise BundleError(message)
            logger.warning(f"skipped: {message}")

    def _embed(
        self,
        missing: Sequence[tuple[str, Case]],
        detector: AnomalyDetector,
        compute: Compute,
        batch_size: int,
        num_workers: int,
        on_error: str,
    ) -> list[str]:
        """Fill the store; returns the keys of what could not be read."""
        cases = MonaiDataset([case for _, case in missing], self.transform)
        device = compute.device
        batches = SliceBatches(
            cases, lambda image: detector.resize(image.to(device)), batch_size, num_workers, on_error
        )
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
        return [missing[position][0] for position in batches.skipped]

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
