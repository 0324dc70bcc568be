"""Handlers of Ignite engines that MONAI does not have."""

from __future__ import annotations

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar


class Progress:
    """A progress bar with metrics and the time left: over epochs for a trainer, over inputs for an evaluator.

    Args:
        description: what goes on.
        epochs: count epochs, not inputs.
    """

    def __init__(self, description: str, epochs: bool = False) -> None:
        self.description = description
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        """Register with the engine, in the first process only."""
        if idist.get_rank() > 0:
            return
        bar = ProgressBar(persist=True, desc=self.description)
        if self.epochs:
            bar.attach(engine, "all", event_name=Events.EPOCH_COMPLETED, closing_event_name=Events.COMPLETED)
        else:
            bar.attach(engine)
