"""Errors that a user can act on: what is wrong, the value, and the remedy, in one line."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable

MAX_SHOWN = 200  # characters of a value in a message
_BAR = "| "


class BundleError(ValueError):
    """Bad input or a bad setting.

    The message is one line that names the file or setting, the value found and the remedy; the command line
    shows this line and nothing else (see :mod:`bundle.command_line`). Whatever is in the name of a file, it stays one.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class OneLine(logging.Filter):
    """Lets every record pass, as one line: a file name can forge none. A trace keeps its lines, each behind a bar."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape what is not printable in what ``record`` says."""
        try:
            message = record.getMessage()
        except Exception:  # a library's values do not fit its message: what it does goes on all the same
            message = f"{record.msg} {record.args}"
        record.msg, record.args = one_line(message.rstrip()), None
        if record.exc_info:
            record.exc_text = _barred(record.exc_text or logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            record.stack_info = _barred(record.stack_info)
        return True


ONE_LINE = OneLine()


def log_single_lines() -> None:
    """Escape all that this process logs from now on by the handlers that it has, of whichever library."""
    loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    for handler in (handler for one in loggers for handler in getattr(one, "handlers", ())):
        handler.addFilter(ONE_LINE)


def _barred(trace: str) -> str:
    """``trace`` with a bar before each line, so that none in the text of an error passes for a record."""
    return "\n".join(line if line.startswith(_BAR) else _BAR + one_line(line) for line in trace.split("\n"))


def one_line(text: str) -> str:
    """``text`` with escapes in the place of line breaks, control characters and others that cannot be printed."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """A hint for a misspelled ``value``: the closest of ``options``, and all of them.

    >>> did_you_mean("casual", ["causal", "standard"])
    "did you mean 'causal'? (choose from causal, standard)"
    """
    names = sorted(map(str, options))
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    listing = f"choose from {', '.join(names)}"
    return f"did you mean '{close[0]}'? ({listing})" if close else listing


def shown(value: object) -> str:
    """``value`` as a config has it, in one line that is not too long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def check_choice(what: str, value: str, options: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``options``.

    Raises:
        BundleError: if it is not, with the closest spelling.
    """
    options = list(options)
    if value not in options:
        raise BundleError(f"{what} {shown(value)} is unknown: {did_you_mean(value, options)}")
    return value


def check(holds: bool, name: str, value: object, remedy: str) -> None:
    """Refuse the ``value`` of the setting ``name`` unless what it must be ``holds``.

    Raises:
        BundleError: with the ``remedy``.
    """
    if not holds:
        raise BundleError(f"{name} is {shown(value)}: {remedy}")


def user_error(error: BaseException) -> BundleError | None:
    """The :class:`BundleError` that ``error`` is or stems from: MONAI wraps what its transforms and configs raise."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, BundleError):
        cause = cause.__cause__ or cause.__context__
    return cause
