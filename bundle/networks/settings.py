"""Parts of a model remember the arguments that they were made with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any


def remembers_settings(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor keep its keyword-only arguments in ``settings``, by name, as plain JSON values."""
    signature = inspect.signature(init)
    names = [one.name for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY]

    @wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        own = {name: _plain(bound.arguments[name]) for name in names}
        self.__dict__["settings"] = self.__dict__.get("settings", {}) | own  # those of a subclass come first
        init(self, *args, **kwargs)

    return remembering


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
