"""Handlers of Ignite engines that MONAI does not have."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from tqdm import tqdm


def itself(handler: Any) -> Any:
    """``handler``: in a list of handlers MONAI's checks want an object, not a reference to one with an id."""
    return handler


class Progress:
    """A progress bar over the epochs of a trainer, with its metrics and the time left.

    Args:
        description: what goes on.
    """

    def __init__(self, description: str) -> None:
        self.description = description

    def attach(self, engine: Engine) -> None:
        """Register with the engine, in the first process only."""
        if idist.get_rank() == 0:
            bar = ProgressBar(persist=True, desc=self.description)
            bar.attach(engine, "all", event_name=Events.EPOCH_COMPLETED, closing_event_name=Events.COMPLETED)


class CaseProgress:
    """A progress bar over the cases of an evaluator, of which a batch of slices completes none, one or many.

    Args:
        description: what goes on.
        total: number of cases of this process.
    """

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total

    def attach(self, engine: Engine) -> None:
        """Register with the engine, in the first process only."""
        if idist.get_rank() > 0:
            return
        state: Any = engine.state
        bar = tqdm(total=self.total, desc=self.description, unit="case", delay=0.1)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: bar.update(len(state.batch)))
        engine.add_event_handler(Events.COMPLETED, bar.close)
