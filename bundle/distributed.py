"""Several processes on one task: started by torchrun, joined here, each with its share of the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from torch import nn

from bundle.errors import BundleError, check

Item = TypeVar("Item")


def join() -> None:
    """Join the processes that torchrun has started, NCCL between GPUs and gloo between CPUs; alone, do nothing."""
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
        idist.initialize("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """End what :func:`join` began, if it did."""
    idist.finalize()


def local_device() -> torch.device:
    """The GPU of this process, by its number on this machine, or the CPU."""
    return torch.device("cuda", idist.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def shard(items: Sequence[Item]) -> Sequence[Item]:
    """The share of ``items`` of this process; shares differ by one item at most, and all of them are all items."""
    return items[idist.get_rank() :: idist.get_world_size()]


def gather(value: Item) -> list[Item]:
    """What every process holds, in their order; any plain object."""
    gathered: Any = idist.all_gather([value])  # type: ignore[arg-type]
    return [item for share in gathered for item in share] if idist.get_world_size() > 1 else [value]


def per_process(batch_size: int) -> int:
    """The share of each process in a batch, so that the number of processes does not change what is learned.

    Raises:
        BundleError: if it cannot be divided evenly.
    """
    check(batch_size >= 1, "batch_size", batch_size, "give at least 1")
    processes = idist.get_world_size()
    if batch_size % processes:
        near = max(1, round(batch_size / processes)) * processes
        raise BundleError(f"batch_size {batch_size} cannot be shared by {processes} processes: try {near}")
    return batch_size // processes


def check_synchronized(network: Any) -> None:
    """Refuse to train replicas that do not learn from each other.

    Raises:
        BundleError: if there are several processes, and the network is not distributed over them.
    """
    if idist.get_world_size() > 1 and not isinstance(network, nn.parallel.DistributedDataParallel):
        raise BundleError(
            f"{idist.get_world_size()} processes train networks of their own: append configs/multi_gpu_train.json to "
            "--config_file"
        )
