"""What training needs beyond MONAI's engines: noisy input, fits before and after, and a state that survives Ctrl-C.

``trainer.run()`` alone gives a calibrated detector: whatever comes before and after its epochs are handlers.
"""

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
from ignite.handlers import EMAHandler
from monai.optimizers import WarmupCosineSchedule
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bundle.checkpoint import STORED, save_atomically, save_checkpoint
from bundle.compute import Compute
from bundle.data.embeddings import EmbeddingDataset
from bundle.distributed import check_synchronized
from bundle.errors import BundleError, check, check_choice
from bundle.learned import Learned
from bundle.networks.detector import AnomalyDetector
from bundle.networks.scores import check_rate, rate_interval
from bundle.networks.weights import read_plain, weights_id
from bundle.report import Report
from bundle.tracking import Tracker

SCHEDULES = ("cosine", "constant")
STATE_FORMAT = 4  # of the file of an interrupted training

logger = logging.getLogger(__name__)


class NoisyFeatures:
    """Turns a batch of maps into (input, target) of the density network: `prepare_batch` of the trainer.

    Both are standardized embeddings; in some batches the input gets Gaussian noise, in proportion to the deviation of
    each sample's channel over the map (arXiv 2603.02974, training details). Patches of the input may be dropped, too.

    Args:
        detector: standardizes.
        probability: share of the batches with noise, in [0, 1].
        scale: deviation of the noise over the deviation of the channel.
        dropout: share of the patches whose input is zero, in [0, 1); for standardized embeddings that is the mean of
            healthy patches.

    Raises:
        BundleError: if a share is out of range.
    """

    def __init__(
        self, detector: AnomalyDetector, probability: float = 0.2, scale: float = 0.03, dropout: float = 0.0
    ) -> None:
        if not 0 <= probability <= 1:
            raise BundleError(f"noise_probability must be in [0, 1], got {probability}: the paper uses 0.2")
        if not 0 <= dropout < 1:
            raise BundleError(f"context_dropout must be in [0, 1), got {dropout}: try 0.1, or 0 for none")
        self.detector = detector
        self.probability = probability
        self.scale = scale
        self.dropout = dropout

    def __call__(
        self, batch: Tensor, device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Input and target, both [B, C, h, w], from what :meth:`AnomalyDetector.embed` gives."""
        target = self.detector.standardized(batch.to(device, non_blocking=non_blocking))
        features = target
        # processes that train together draw the same numbers: all add noise or none does, each its own
        if float(torch.rand(())) < self.probability:
            noise = torch.randn(target.shape, generator=self._own(device), device=device)
            features = target + self.scale * target.std(dim=(2, 3), keepdim=True) * noise
        if self.dropout > 0:
            kept = torch.rand(target[:, :1].shape, generator=self._own(device), device=device) >= self.dropout
            features = features * kept
        return features, target

    @staticmethod
    def _own(device: torch.device) -> torch.Generator:
        """A random generator of this process."""
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())) + idist.get_rank())


class HealthyMaps:
    """Turns a batch of maps into (input of the density network, the maps): `prepare_batch` of the validation.

    Args:
        detector: standardizes.
    """

    def __init__(self, detector: AnomalyDetector) -> None:
        self.detector = detector

    def __call__(
        self, batch: Tensor, device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Standardized embeddings [B, C, h, w], and the maps that :meth:`AnomalyDetector.embed` gave."""
        maps = batch.to(device, non_blocking=non_blocking)
        return self.detector.standardized(maps), maps


def checked_rate(learning_rate: float) -> float:
    """``learning_rate``, if it is positive.

    Raises:
        BundleError: if it is not.
    """
    check(learning_rate > 0, "learning_rate", learning_rate, "give a positive number such as 0.003")
    return learning_rate


def learning_rate_schedule(optimizer: torch.optim.Optimizer, name: str, steps: int) -> LRScheduler:
    """The learning rate over ``steps`` iterations: ``constant``, or ``cosine`` to zero after a tenth of warm-up.

    Raises:
        BundleError: for an unknown name.
    """
    check_choice("schedule", name, SCHEDULES)
    if name == "constant":
        return LambdaLR(optimizer, lambda _: 1.0)
    return WarmupCosineSchedule(optimizer, warmup_steps=max(1, steps // 10), t_total=steps, warmup_multiplier=0.1)


class MovingAverage(EMAHandler):
    """Ignite's exponential moving average of a model, over the last tenth of the training while that is shorter.

    Args:
        model: what is averaged.
        momentum: share of the newest weights, in (0, 1]; 1: no average.

    Raises:
        BundleError: if the momentum is out of range.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        if not 0 < momentum <= 1:
            raise BundleError(f"ema_momentum must be in (0, 1], got {momentum}: try 0.01, or 1 for no average")
        super().__init__(model, momentum=0.5)
        self.momentum = momentum  # 1, too, which Ignite refuses
        self.begin = 0  # iteration

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        setattr(engine.state, name, max(self.momentum, 9 / (9 + engine.state.iteration - self.begin)))
        super()._update_ema_model(engine, name)

    def restart(self, iteration: int) -> None:
        """Forget the average: it starts again from what the model is now, after ``iteration`` iterations."""
        self.begin = iteration
        self.ema_model.load_state_dict(self.model.state_dict())


class FitBeforeTraining:
    """Fits in closed form what training starts from: a handler of the trainer, to be placed first.

    Where the trainer runs again, as in federated learning, a site has its own standardization and linear prediction
    again, whatever weights came from elsewhere.

    Args:
        detector: whose density is trained.
        training, validation: healthy embeddings.
        ema: the moving average, which starts from the fitted density.
        patches: about how many patches fits look at.
    """

    def __init__(
        self,
        detector: AnomalyDetector,
        training: EmbeddingDataset,
        validation: EmbeddingDataset,
        ema: MovingAverage,
        patches: int = 262144,
    ) -> None:
        self.detector = detector
        self.training = training
        self.validation = validation
        self.ema = ema
        self.patches = patches

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, self.fit)

    def fit(self, engine: Engine) -> None:
        """Fit the detector."""
        self.detector.set_standardization(*self.training.channel_moments())
        self.detector.fit_before_training(self.training.batches(self.patches), self.validation.batches(self.patches))
        self.ema.restart(engine.state.iteration)


class Calibration:
    """Fits covariance and scores, sets thresholds and writes the checkpoint: a handler, placed after the state.

    Each patient counts once for the threshold of images, by the largest score of all slices, be they one volume or many
    pictures. Patients are what is exchangeable; slices of one patient are alike, and a threshold from all of them would
    promise more than their number of patients can. The largest score is a careful choice for pictures, which are scored
    one by one in use: *no* picture of a healthy patient exceeds the threshold with a probability of 1 - rate at least,
    so a single one exceeds it no more often than the rate. In return pictures need no other rule than volumes, and one
    score a patient makes promise and interval hold, however many pictures a patient has, but for the scales, which are
    fitted to the same images.

    Args:
        detector: whose density was trained.
        training: healthy embeddings that scores are fitted to.
        validation: healthy embeddings that thresholds come from.
        compute: precision that inference will run in.
        path: of the checkpoint.
        tracker: its run keeps the checkpoint.
        report: of the run, which tells what the thresholds promise; None: none is made.
        patches: about how many patches fits look at.
        false_positive_rate: of healthy patches, in (0, 1), see :meth:`AnomalyDetector.calibrate`.
        image_false_positive_rate: of healthy patients, in (0, 1).
        unlike_rate: of healthy cases that may be called unlike the training data, in (0, 1).
        log_model: keep the model in the run in the form that MLflow loads and serves, too.
        register_model: the name under which that becomes a version in the registry of the server; None: it does not.

    Raises:
        BundleError: if a rate is out of range, or the name is none, or nothing would be registered.
    """

    def __init__(
        self,
        detector: AnomalyDetector,
        training: EmbeddingDataset,
        validation: EmbeddingDataset,
        compute: Compute,
        path: str | os.PathLike,
        tracker: Tracker,
        report: Report | None = None,
        patches: int = 262144,
        false_positive_rate: float = 0.01,
        image_false_positive_rate: float = 0.05,
        unlike_rate: float = 0.01,
        log_model: bool = True,
        register_model: str | None = None,
    ) -> None:
        if register_model is not None:
            named = register_model.strip() and not {"/", ":"} & {*register_model}
            check(bool(named), "register_model", register_model, "give a name without / and :")
            is_told = log_model and (tracker.uri is not None or idist.get_rank() > 0)
            check(is_told, "register_model", register_model, "this needs --log_model true and a --tracking_uri")
        self.detector = detector
        self.training = training
        self.validation = validation
        self.compute = compute
        self.path = path
        self.tracker = tracker
        self.report = report
        self.patches = patches
        self.rates = (
            check_rate("false_positive_rate", false_positive_rate),
            check_rate("image_false_positive_rate", image_false_positive_rate),
        )
        self.unlike_rate = check_rate("unlike_rate", unlike_rate)
        self.log_model = log_model
        self.register_model = register_model

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.COMPLETED, self.calibrate)

    def calibrate(self) -> None:
        """Finish the detector, and write it."""
        self.compute.run(self.detector.fit_after_training, self.training.batches(self.patches))
        validation = self.validation
        self.compute.run(
            self.detector.calibrate,
            validation.batches(),
            validation.patients,
            *self.rates,
            validation.volumes,
            self.unlike_rate,
        )
        logger.info(self.promise())
        patients = len(set(validation.patients))
        self.detector.case_likeness.remember(Learned(self.training.words(), patients, bool(validation.volumes)))
        logger.info(self.detector.case_likeness.promise())
        nats = self.compute.run(self.detector.healthy_log_likelihood, self.validation.batches())
        logger.info(f"the healthy validation images have a log-likelihood of {nats:.2f} nats per foreground patch")
        save_checkpoint(self.detector, self.path)
        likelihood = f"log-likelihood of healthy validation images: {nats:.2f} nats per foreground patch"
        if self.report is not None:
            for note in (self.promise(), self.detector.case_likeness.promise(), likelihood):
                self.report.add_note(note)
        self.tracker.describe(f"- {self.promise()}\n- {likelihood}")
        if self.log_model:
            self.tracker.model(self.path, self.register_model)
        self.tracker.log({"healthy_log_likelihood": nats}, {"checkpoint": [self.path]})

    def promise(self) -> str:
        """What the threshold of images holds with as many validation patients as there are, in one line."""
        images, patients = len(self.validation.data), len(set(self.validation.patients))
        who = f"{images} healthy validation images"
        if patients < images:
            who += f" of {patients} patients, each of whom counts once,"
        wanted = self.rates[1]
        low, high = rate_interval(patients, wanted)
        return (
            f"image threshold {float(self.detector.image_threshold):.3g}: wanted false positive rate {wanted:g}; with "
            f"{who} the true rate lies between {low:.2g} and {high:.2g} (90 %)"
        )


class TrainingState:
    """Keeps the best density and lets an interrupted training go on, bit for bit as if it had not been interrupted.

    A handler of the trainer, to be placed after the validation. Each epoch is seeded by its own number, and after each
    one density, its moving average, optimizer, schedule, the best average so far and its healthy validation loss are
    written to ``path``, at once or not at all. A state that was written under other ``settings`` is not used. Training
    ends with the first validation by which the healthy validation loss has not fallen for ``patience`` epochs.

    Args:
        path: the file.
        detector: whose density is trained.
        optimizer: of the density.
        scheduler: of the optimizer, a step an iteration.
        ema: the moving average of the density, which is validated and kept.
        validator: its only metric is the healthy validation loss.
        max_epochs, val_interval: of the trainer, in epochs.
        patience: in epochs; 0: train to the last one.
        settings: plain JSON values; what must be equal for a state to be used.
        seed: of the training.
        restart: begin anew, and remove the file of an interrupted training.
        report: of the run, which tells of the epochs before an interruption, too; None: none is made.

    Raises:
        BundleError: if no epoch would be validated, or the patience is negative.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        detector: AnomalyDetector,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        ema: MovingAverage,
        validator: Engine,
        settings: dict[str, Any],
        max_epochs: int = 12,
        val_interval: int = 1,
        patience: int = 6,
        seed: int = 0,
        restart: bool = False,
        report: Report | None = None,
    ) -> None:
        if max_epochs < 1:
            raise BundleError(f"max_epochs is {max_epochs}: give at least 1, try 12")
        if not 1 <= val_interval <= max_epochs:
            raise BundleError(
                f"val_interval is {val_interval}: give 1 to max_epochs, which is {max_epochs}, since the best epoch is "
                "kept by healthy validation"
            )
        if patience < 0:
            raise BundleError(f"patience is {patience}: give a number of epochs, or 0 to train to the last one")
        self.path = Path(path)
        self.detector = detector
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.ema = ema
        self.validator = validator
        self.patience = patience
        self.written_under = json.dumps([STATE_FORMAT, max_epochs, val_interval, settings], sort_keys=True, default=str)
        self.fingerprint = ""
        self.seed = seed
        self.restart = restart
        self.report = report
        self.best_loss, self.best_epoch, self.validated_epoch = math.inf, 0, 0
        self.best_density: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, lambda e: check_synchronized(e.network))
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: set_determinism(self.seed + e.state.epoch))
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.scheduler.step())
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.take_best)

    def _is_over(self) -> bool:
        return 0 < self.patience <= self.validated_epoch - self.best_epoch

    def take_best(self) -> None:
        """Give the detector the density of the lowest healthy validation loss, rounded as checkpoints store it."""
        rounded = {key: value.to(STORED).to(value.dtype) for key, value in self.best_density.items()}
        self.detector.density.load_state_dict(rounded)

    def discard(self) -> None:
        """Remove the file: the training is done, and the same command starts a new one."""
        if idist.get_rank() == 0:
            self.path.unlink(missing_ok=True)

    def resume(self, engine: Engine) -> None:
        """Go on from the file, if it is there and fits.

        Where the trainer runs again, nothing is resumed: the best epoch is sought anew, and the schedule starts again.

        Raises:
            BundleError: if the file is damaged, or of something else.
        """
        if engine.state.epoch > 0:
            self.best_loss, self.best_epoch = math.inf, engine.state.epoch
            self.validator.state.metrics.clear()
            self.scheduler.last_epoch = -1  # its word for steps
            self.scheduler.step()
            return
        # weights that came from elsewhere are no beginning of this training
        begin = weights_id(self.detector.density.contexts)
        self.fingerprint = hashlib.sha256(f"{self.written_under} {begin}".encode()).hexdigest()
        if self.restart:
            self.discard()
            return
        if not self.path.is_file():
            return
        try:
            state = read_plain(self.path)
            if state["fingerprint"] != self.fingerprint:
                logger.warning(f"'{self.path}' belongs to a training with other settings or data: starting over")
                return
            epoch = int(state["epoch"])
            self.detector.density.load_state_dict(state["density"])
            self.ema.ema_model.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best_density, self.best_loss, self.best_epoch, self.validated_epoch = (
                state[key] for key in ("best_density", "best_loss", "best_epoch", "validated_epoch")
            )
            if self.report is not None:
                for number, values in state.get("epochs", {}).items():
                    self.report.add_epoch(int(number), values)
        except Exception as error:  # whatever may be in the file
            raise BundleError(
                f"'{self.path}' is damaged, or no state of an interrupted training ({type(error).__name__}): give "
                "--restart true to begin the training anew"
            ) from error
        progress: Any = engine.state
        progress.epoch = progress.max_epochs if self._is_over() else min(epoch, progress.max_epochs)
        progress.iteration = progress.epoch * progress.epoch_length
        self.scheduler.last_epoch = progress.iteration  # its word for steps; the rate follows from it alone
        logger.info(f"resuming after epoch {progress.epoch} from '{self.path}'")

    def save(self, engine: Engine) -> None:
        """Note the best density, write the state, and end a training that does not get better."""
        average = {key: value.detach().clone() for key, value in self.ema.ema_model.state_dict().items()}
        self.validated_epoch = max(self.validated_epoch, self.validator.state.epoch)
        for loss in map(float, self.validator.state.metrics.values()):
            if not math.isfinite(loss):
                raise BundleError(
                    f"the healthy validation loss is {loss} in epoch {engine.state.epoch}: lower learning_rate"
                )
            if loss < self.best_loss:
                self.best_loss, self.best_density, self.best_epoch = loss, average, engine.state.epoch
        save_atomically(
            {
                "fingerprint": self.fingerprint,
                "epoch": engine.state.epoch,
                "density": self.detector.density.state_dict(),
                "average": average,
                "optimizer": self.optimizer.state_dict(),
                "best_density": self.best_density,
                "best_loss": self.best_loss,
                "best_epoch": self.best_epoch,
                "validated_epoch": self.validated_epoch,
                "epochs": self.report.epochs if self.report is not None else {},
            },
            self.path,
        )
        if self._is_over():
            logger.info(f"no better healthy validation loss since epoch {self.best_epoch}: training ends")
            engine.terminate()
