"""Patch embeddings of healthy slices, computed once: the data that the density network learns from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import Dataset as MonaiDataset
from monai.utils import ensure_tuple
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bundle.data.cases import Case
from bundle.networks.detector import AnomalyDetector


class EmbeddingDataset(Dataset[Tensor]):
    """The patch embeddings of every slice of ``data``, on disk, as the frozen backbone gives them.

    The backbone never changes in training, so each slice goes through it once. The embeddings lie in a temporary file
    in ``directory`` that vanishes with this object, and are read through the page cache: memory does not grow with the
    set.

    Args:
        data: healthy cases.
        transform: reads a case and gives one slice or a list of slices, each with ``image`` [C, H, W] in [0, 1].
        detector: embeds the slices.
        device: where the detector runs.
        directory: for the temporary file.
        batch_size: slices that go through the backbone together.
        num_workers: processes that read cases.
    """

    def __init__(
        self,
        data: list[Case],
        transform: Callable[[Case], Any],
        detector: AnomalyDetector,
        device: torch.device | str,
        directory: str | Path,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        self.data = data
        self.transform = transform
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory, prefix="embeddings-")
        cases = DataLoader(MonaiDataset(data, transform), batch_size=None, collate_fn=_slices, num_workers=num_workers)
        count = 0
        shape: tuple[int, ...] = ()
        detector = detector.to(device).eval()
        bar = tqdm(cases, desc="embedding healthy images", unit="image")
        for batch in _batches(bar, batch_size):
            # slices of different sizes become equal by `prepare`
            with torch.inference_mode():
                images = torch.cat([detector.prepare(image[None].to(device)) for image in batch])
                embeddings = detector.features(images).float().cpu()
            embeddings.numpy().tofile(self._file)
            count += len(embeddings)
            shape = tuple(embeddings.shape[1:])
        self._embeddings = np.memmap(self._file, dtype=np.float32, mode="r+", shape=(count, *shape))

    def __len__(self) -> int:
        return len(self._embeddings)

    def __getitem__(self, index: int) -> Tensor:
        """The embeddings [C, h, w] of slice ``index``."""
        return torch.from_numpy(self._embeddings[index])

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [C] of every channel over all patches, of all processes that train together."""
        sums = torch.zeros(
            3, self[0].shape[0], dtype=torch.float64
        )  # double: a difference of large sums must not cancel
        for batch in self.batches():
            values = batch.double().transpose(0, 1).flatten(1)
            sums += torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)])
        count, total, square = torch.as_tensor(idist.all_reduce(sums))
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp_min(0).sqrt().float()

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """All embeddings in order, as batches of [B, C, h, w]."""
        for start in range(0, len(self), batch_size):
            yield torch.from_numpy(self._embeddings[start : start + batch_size])


def _slices(case: Any) -> list[Tensor]:
    return [item["image"].as_tensor() for item in ensure_tuple(case)]


def _batches(cases: Any, batch_size: int) -> Iterator[list[Tensor]]:
    waiting: list[Tensor] = []
    for slices in cases:
        waiting += slices
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]
    if waiting:
        yield waiting
