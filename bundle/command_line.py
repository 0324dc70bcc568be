"""How the bundle meets a person who types ``python -m monai.bundle run ...``: misspelt knobs and errors in one line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from inspect import signature
from types import TracebackType
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle.scripts import run

from bundle.errors import BundleError, did_you_mean, user_error


def start(arguments: Sequence[str] | None = None) -> None:
    """Check the command line and show errors of the user's making as one line; the first step of every config.

    Does nothing where MONAI's bundle is used from Python, as MONAI Label does.

    Args:
        arguments: the command line, default: that of this process.
    """
    arguments = sys.argv if arguments is None else arguments
    if len(arguments) < 2 or not arguments[0].endswith(("monai/bundle/__main__.py", "monai\\bundle\\__main__.py")):
        return
    sys.excepthook = show_error
    given = _overrides(arguments[2:])
    files = given.pop("config_file", None)
    if isinstance(files, str) and files.startswith("["):
        files = ast.literal_eval(files)
    if files:
        check_knobs(given, ConfigParser.load_config_files(files))


def check_knobs(given: dict[str, Any], config: dict[str, Any]) -> None:
    """Compare overrides with the config that they override.

    Args:
        given: names and values from the command line.
        config: the content of the config files, before macros are resolved.

    Raises:
        BundleError: for a name that the config does not have, or text where it has a number.
    """
    knobs = [key for key, value in config.items() if not isinstance(value, dict) and not _is_steps(value)]
    for name, value in given.items():
        top = name.replace("#", "::").split("::")[0]
        if top in signature(run).parameters or top == "_meta_":
            continue
        if top not in config:
            raise BundleError(f"knob --{name} is unknown: {did_you_mean(top, knobs)}")
        default = _included(config[top])
        if isinstance(default, (int, float)) and not isinstance(default, bool) and isinstance(value, str):
            if not value.startswith(("$", "@", "%")):
                raise BundleError(f"--{name} must be a number, got '{value}': the default is {default}")


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line if the error, or one that it stems from, is a :class:`BundleError`; the whole trace otherwise."""
    cause = user_error(error)
    if cause is not None:
        # a data loader's worker wraps the message into the worker's trace, whose last line it is
        line = str(cause).strip().splitlines()[-1]
        print(f"error: {line.removeprefix('bundle.errors.BundleError: ')}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted: run the same command again; a training goes on after its last whole epoch", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Names and values of ``--name value`` and ``--name=value``, read as Fire reads them."""
    given = {}
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals and index + 1 < len(arguments):
            value = arguments[index + 1]
        given[name.replace("-", "_")] = DefaultParseValue(value) if name != "config_file" else value
    return given


def _is_steps(value: Any) -> bool:
    """Whether the item is a list of things to do, not of numbers."""
    return isinstance(value, list) and any(isinstance(item, (str, dict)) for item in value)


def _included(value: Any) -> Any:
    """The value behind a macro like ``%configs/inference.json::seed``."""
    if isinstance(value, str) and value.startswith("%"):
        path, key = ConfigParser.split_path_id(value[1:])
        return ConfigParser(ConfigParser.load_config_file(path)).get(key) if path else None
    return value
