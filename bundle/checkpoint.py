"""Checkpoints: files that hold what was trained, and the settings that make the detector of it."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from torch import Tensor, nn

from bundle.errors import BundleError, shown
from bundle.files import whole_file
from bundle.identity import FACTS, check_numbers, checked_identity
from bundle.model import Settings, agreed_settings, known_settings
from bundle.networks.detector import decode_identity
from bundle.networks.weights import read_plain

STORED = torch.float16  # of the weights in a checkpoint: half the size, and far more digits than a prediction has

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        identity: settings of the model and facts of its weights, as plain JSON values, checked.
        state: tensors by name.
    """

    identity: dict[str, Any]
    state: dict[str, Any]


def save_atomically(content: Any, path: str | os.PathLike) -> None:
    """`torch.save`, at once or not at all; of several processes only the first writes."""
    if idist.get_rank() > 0:
        return
    buffer = io.BytesIO()  # torch hides why it cannot write to a disk
    torch.save(content, buffer)
    with whole_file(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def save_checkpoint(detector: nn.Module, path: str | os.PathLike) -> None:
    """Write the state of a trained and calibrated detector, the weights of its prediction in 16 bits."""
    state = detector.state_dict()
    narrow = [key for key in state if key.startswith(("density.linear.", "density.contexts."))]
    save_atomically(state | {key: state[key].to(STORED) for key in narrow}, path)
    logger.info(f"the model is '{path}'")


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint as data, which are checked: nothing in it is run.

    Raises:
        BundleError: if the file is missing or no checkpoint, or holds a setting that no model has, or a number that is
            none.
    """
    if not os.path.isfile(path):
        raise BundleError(f"no checkpoint at '{path}': train first, or give --checkpoint")
    try:
        state = read_plain(path)
        stored = state["identity"]
        identity = decode_identity(stored) if isinstance(stored, Tensor) else stored
        check_numbers(state)
        return Checkpoint(checked_identity(identity, with_others=True), state)
    except Exception as error:
        raise _no_checkpoint(path, error) from error


def trained_settings(path: str | os.PathLike, given: Mapping[str, Any] | None = None) -> Settings:
    """The settings that a model was trained with, from its checkpoint.

    Args:
        path: of the checkpoint.
        given: settings that the caller expects, or that the model leaves open.

    Raises:
        BundleError: if there is no such checkpoint, an entry is of another type, or ``given`` is not what the model was
            trained with.
    """
    return agreed_settings(read_checkpoint(path).identity, given)


def load_checkpoint(detector: Any, path: str | os.PathLike) -> None:
    """Load what was trained into a detector of the same settings.

    Args:
        detector: an :class:`AnomalyDetector`, or a network that tells its identity and loads a state as that does.
        path: of the checkpoint.

    Raises:
        BundleError: if the file is missing, no checkpoint, of another version, or of other settings or weights.
    """
    identity, state = read_checkpoint(path)
    unknown = identity.keys() - detector.describe().keys() - known_settings().keys() - FACTS.keys()
    if unknown:
        raise BundleError(
            f"'{path}' has {shown(', '.join(sorted(unknown)))} in its identity, which this version does not know: take "
            "the version that made it"
        )
    try:
        detector.load_state_dict(state)
    except BundleError:
        raise
    except Exception as error:
        raise _no_checkpoint(path, error) from error


def _no_checkpoint(path: str | os.PathLike, error: Exception) -> BundleError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2])
    return BundleError(f"'{path}' is no checkpoint of this bundle ({reason}): give the model.pt of a training")
