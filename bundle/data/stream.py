"""From cases to batches of slices: read ahead while the networks work, and filled across cases."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from monai.data import DataLoader
from monai.data import Dataset as MonaiDataset
from monai.utils import first
from torch import Tensor
from torch.utils.data import Dataset

from bundle.data.cases import check_unchanged
from bundle.errors import BundleError, check, check_choice, user_error
from bundle.transforms.slices import slice_spacing

READ_AHEAD = 2  # cases that wait, decoded

logger = logging.getLogger(__name__)


@dataclass
class CaseInProgress:
    """A case on its way through the networks, which its slices pass in one or several batches.

    Attributes:
        item: what the transform gave: a case, or a list of slices as cases.
        position: in the data set.
        count: of its slices.
        done: what the networks say of the slices that have passed them, in order.
    """

    item: Any
    position: int
    count: int
    done: list[Any] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all slices are done."""
        return len(self.done) == self.count


class Slice(NamedTuple):
    """One slice of a case."""

    image: Tensor
    """[1 or 3, H, W], as ``prepare`` left it."""
    case: CaseInProgress


class Unreadable(NamedTuple):
    """What stands for a case that cannot be read, since errors do not come whole out of a data loader's processes."""

    reason: str


class _Readable(Dataset):
    """The items of ``dataset``, with :class:`Unreadable` for those whose files are bad, or not what they were."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            item = self.dataset[index]
            check_unchanged(self.dataset.data[index])
            return item
        except Exception as error:
            cause = user_error(error)
            if cause is None:
                raise
            return Unreadable(str(cause))


class SliceBatches:
    """Iterates over batches of slices of a data set; a batch takes from as many cases as fill it.

    Gray and color slices go in batches of their own. Cases are decoded one or two ahead in a thread, or in
    ``num_workers`` processes, while the caller computes; at most these and the slices of one batch are in memory.

    Args:
        dataset: gives cases whose ``image`` is [C, rows, columns, slices], or lists of cases whose ``image`` is
            [C, rows, columns].
        prepare: brings slices [1, C, rows, columns] to one size, so that they fit into one batch.
        batch_size: slices in a batch; only the last ones are smaller.
        num_workers: processes that read cases; 0: a thread of this one.
        on_error: at a case that cannot be read, or has changed since it was checked, ``raise``, or ``skip``: warn of
            it, count it, and go on.

    Attributes:
        skipped: positions in the data set of what the last iteration has skipped.

    Raises:
        BundleError: if a number is out of range; in an iteration, at a case that cannot be read.
    """

    def __init__(
        self,
        dataset: MonaiDataset,
        prepare: Callable[[Tensor], Tensor],
        batch_size: int,
        num_workers: int = 0,
        on_error: str = "raise",
    ) -> None:
        check(batch_size >= 1, "batch_size", batch_size, "give at least 1")
        check(num_workers >= 0, "num_workers", num_workers, "give 0, or a number of processes")
        self.dataset = dataset
        self.prepare = prepare
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.skips = check_choice("on_error", on_error, ("raise", "skip")) == "skip"
        self.skipped: list[int] = []

    def __iter__(self) -> Iterator[list[Slice]]:
        self.skipped = []
        cases = DataLoader(_Readable(self.dataset), batch_size=1, collate_fn=first, num_workers=self.num_workers)
        waiting: dict[int, list[Slice]] = {}  # by number of channels
        for position, item in enumerate(read_ahead(cases, READ_AHEAD)):
            if isinstance(item, Unreadable):
                self._skip(position, item)
                continue
            images = slices_of(item)
            case = CaseInProgress(item, position, len(images))
            for image in images:
                batch = waiting.setdefault(len(image), [])
                batch.append(Slice(self.prepare(image[None])[0], case))
                if len(batch) == self.batch_size:
                    yield waiting.pop(len(image))
        yield from waiting.values()
        if self.skipped:
            logger.warning(f"skipped {len(self.skipped)} of {len(self.dataset)} images that cannot be read any more")

    def _skip(self, position: int, case: Unreadable) -> None:
        if not self.skips:
            raise BundleError(case.reason)
        logger.warning(f"skipped: {case.reason}")
        self.skipped.append(position)


def slices_of(item: Any) -> list[Tensor]:
    """The slices [C, rows, columns] of a case, or of a list of slices as cases."""
    if isinstance(item, list):
        return [part["image"].as_tensor() for part in item]
    return list(item["image"].as_tensor().unbind(-1))


def meta_of(item: Any) -> dict[str, Any]:
    """What is known of the image of a case, or of the first slice of a list of slices as cases."""
    image = item[0]["image"] if isinstance(item, list) else item["image"]
    return dict(image.meta)


def positions_of(item: Any) -> Tensor:
    """Where the slices that :func:`slices_of` gives lie, in mm along their normal, not a number where nobody knows."""
    if isinstance(item, list):
        image, indices = item[0]["image"], [part["image"].meta["slice_index"] for part in item]
    else:
        image, indices = item["image"], list(range(item["image"].shape[-1]))
    return torch.tensor(indices, dtype=torch.float32) * (slice_spacing(image) or torch.nan)


def read_ahead(source: Iterable[Any], count: int) -> Iterator[Any]:
    """The items of ``source`` in order, ``count`` of them read ahead by a thread; errors come out where they belong.

    MONAI's ThreadBuffer ends silently where its source raises.
    """
    end = object()
    items = iter(source)
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, items, end))
            yield item
