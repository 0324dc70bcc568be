"""What training needs beyond MONAI's engines: the noisy input of the paper, and a state that survives Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.utils import set_determinism
from torch import Tensor, nn

from bundle.distributed import check_synchronized
from bundle.errors import BundleError
from bundle.networks.detector import AnomalyDetector

logger = logging.getLogger(__name__)


class NoisyFeatures:
    """Turns a batch of embeddings into (input, target) of the density network: `prepare_batch` of the trainer.

    Both are standardized; in some batches the input gets Gaussian noise, in proportion to the deviation of each
    sample's channel over the map (arXiv 2603.02974, training details).

    Args:
        detector: standardizes.
        probability: share of the batches with noise, in [0, 1]; 0 for validation.
        scale: deviation of the noise over the deviation of the channel.
    """

    def __init__(self, detector: AnomalyDetector, probability: float = 0.2, scale: float = 0.03) -> None:
        if not 0 <= probability <= 1:
            raise BundleError(f"noise_probability must be in [0, 1], got {probability}: the paper uses 0.2")
        self.detector = detector
        self.probability = probability
        self.scale = scale

    def __call__(
        self, batch: Tensor, device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Input and target, both [B, C, h, w], from embeddings of that shape."""
        target = self.detector.standardize(batch.to(device, non_blocking=non_blocking))
        # processes that train together draw the same numbers: all add noise or none does, each its own
        if float(torch.rand(())) >= self.probability:
            return target, target
        own = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())) + idist.get_rank())
        noise = torch.randn(target.shape, generator=own, device=device)
        return target + self.scale * target.std(dim=(2, 3), keepdim=True) * noise, target


class TrainingState:
    """Keeps the best density and lets an interrupted training go on, bit for bit as if it had not been interrupted.

    A handler of the trainer, to be placed after the validation. Each epoch is seeded by its own number, and after each
    one density, optimizer, the best density so far and its healthy validation loss are written to ``path``, at once or
    not at all. A state that was written under other ``settings`` is not used.

    Args:
        path: the file.
        detector: whose density is trained.
        optimizer: of the density.
        validator: its only metric is the healthy validation loss.
        settings: plain JSON values; what must be equal for a state to be used.
        seed: of the training.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        detector: AnomalyDetector,
        optimizer: torch.optim.Optimizer,
        validator: Engine,
        settings: dict[str, Any],
        seed: int = 0,
    ) -> None:
        self.path = Path(path)
        self.detector = detector
        self.optimizer = optimizer
        self.validator = validator
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.seed = seed
        self.best_loss = math.inf
        self.best_density: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, lambda e: check_synchronized(e.network))
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: set_determinism(self.seed + e.state.epoch))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.take_best)

    def take_best(self) -> None:
        """Give the detector the density of the lowest healthy validation loss."""
        self.detector.density.load_state_dict(self.best_density)

    def discard(self) -> None:
        """Remove the file: the training is done, and the same command starts a new one."""
        if idist.get_rank() == 0:
            self.path.unlink(missing_ok=True)

    def resume(self, engine: Engine) -> None:
        """Go on from the file, if it is there and fits."""
        if not self.path.is_file():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            logger.warning(f"'{self.path}' belongs to a training with other settings or data: starting over")
            return
        self.detector.density.load_state_dict(state["density"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_density, self.best_loss = state["best_density"], state["best_loss"]
        progress: Any = engine.state
        progress.epoch = min(state["epoch"], progress.max_epochs)
        progress.iteration = progress.epoch * progress.epoch_length
        logger.info(f"resuming after epoch {progress.epoch} from '{self.path}'")

    def save(self, engine: Engine) -> None:
        """Note the best density and write the state."""
        density = {key: value.detach().clone() for key, value in self.detector.density.state_dict().items()}
        for loss in map(float, self.validator.state.metrics.values()):
            if not math.isfinite(loss):
                raise BundleError(
                    f"the healthy validation loss is {loss} in epoch {engine.state.epoch}: lower learning_rate"
                )
            if loss < self.best_loss:
                self.best_loss, self.best_density = loss, density
        save_atomically(
            {
                "fingerprint": self.fingerprint,
                "epoch": engine.state.epoch,
                "density": density,
                "optimizer": self.optimizer.state_dict(),
                "best_density": self.best_density,
                "best_loss": self.best_loss,
            },
            self.path,
        )


def save_atomically(content: Any, path: str | os.PathLike) -> None:
    """`torch.save` to a temporary name, then move: a crash leaves the old file or none, never half of one.

    Of several processes only the first writes.
    """
    if idist.get_rank() > 0:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, target)


def save_checkpoint(detector: AnomalyDetector, path: str | os.PathLike) -> None:
    """Write the state of a trained and calibrated detector."""
    save_atomically(detector.state_dict(), path)
    logger.info(f"the model is '{path}'")


def load_checkpoint(detector: nn.Module, path: str | os.PathLike) -> None:
    """Load a trained detector.

    Raises:
        BundleError: if the file is missing, is no checkpoint, or was trained with another backbone, preprocessing or
            density.
    """
    if not os.path.isfile(path):
        raise BundleError(f"no checkpoint at '{path}': train first, or give --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        detector.load_state_dict(state)
    except BundleError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"'{path}' is no checkpoint of this bundle ({reason}): give the model.pt of a training"
        ) from error
