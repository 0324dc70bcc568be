"""Handlers of Ignite engines that MONAI does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class SliceProgress:
    """A progress bar over the slices of an evaluator that :func:`~bundle.inferers.detect_slices` updates.

    Args:
        description: what goes on.
        cases: of this process; each that was read knows its number of ``slices``.
    """

    def __init__(self, description: str, cases: Sequence[Mapping[str, Any]]) -> None:
        self.description = description
        self.total = sum(case.get("slices", 1) for case in cases)

    def attach(self, engine: Engine) -> None:
        """Register with the engine, in the first process only."""
        if idist.get_rank() > 0:
            return
        state: Any = engine.state
        bar = tqdm(total=self.total, desc=self.description, unit="slice", delay=0.1)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: bar.update(state.slices))
        engine.add_event_handler(Events.COMPLETED, bar.close)
