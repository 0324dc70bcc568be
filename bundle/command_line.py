"""How the bundle meets a person who types ``python -m monai.bundle run ...``: typed knobs, and errors in one line.

MONAI takes what Fire makes of a command line, in which ``false`` is a text and so true. The first step of every config
calls :func:`start`, which reads the command line once more, by the types of the knobs, and corrects the config.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from bundle.errors import BundleError, did_you_mean, log_single_lines, shown, user_error
from bundle.knobs import SYNTAX, Knob, is_used, knob_of, reached, read_text, typed
from bundle.model import known_settings

MODEL = "model"  # the item of a config that holds the settings of the model
COMMAND = "monai/bundle/__main__.py"
_FLAG = re.compile(r"--?[A-Za-z_]")  # Fire takes one dash, too; -1 is a number
logger = logging.getLogger(__name__)
_read_lines: list[Sequence[str]] = []  # the command line of this process, once it is read


def start(arguments: Sequence[str] | None = None) -> None:
    """Give the running config typed knobs, and show errors of the user's making, and all that is logged, as one line.

    Where MONAI's bundle is used from Python, as MONAI Label does, values have types already.

    Args:
        arguments: the command line, default: that of this process.

    Raises:
        BundleError: for a word that is no knob, or a knob that is unknown, or of another type.
    """
    log_single_lines()
    arguments = sys.argv if arguments is None else arguments
    parser = _running_parser()
    if parser is not None and _is_run(arguments):
        sys.excepthook = show_error
        _log_above_bars()
        given = given_texts(arguments[2:], words=1)
        _read_lines.append(arguments)
        command = given.get("run_id", arguments[2] if len(arguments) > 2 else "run")
        _check_command(command, parser)
        if files := given.pop("config_file", None):
            config = read_config(files)
            knobs = read_knobs(given, config)
            _warn_of_idle(knobs, config, "run" if _FLAG.match(command) else command)
            for name, value in knobs.items():
                if not (isinstance(value, str) and value.startswith(SYNTAX)):  # else it is as MONAI has it
                    parser[name] = value
    if parser is not None:
        nest_settings(parser)


def _log_above_bars() -> None:
    """What is logged from now on moves bars of progress down, where it would continue the line of one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.stdout):
            handler.setStream(DummyTqdmFile(handler.stream))


def given_settings(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model that a config and its user give; what every config makes its ``settings`` from.

    MONAI's commands other than ``run`` do not call :func:`start`: what they give at the top level is found here.

    Args:
        nested: the item ``model`` of the config.

    Raises:
        BundleError: for a command line with a word too many, which MONAI takes for another ``initialize``.
    """
    if _is_run(sys.argv) and not _read_lines:
        sys.excepthook = show_error
        given_texts(sys.argv[2:], words=1)
    parser = _running_parser()
    top: Any = {} if parser is None else parser.config
    return {**nested, **{name: top[name] for name in known_settings() if name in top}}


def _is_run(arguments: Sequence[str]) -> bool:
    """Whether the command line is one of ``python -m monai.bundle run``."""
    return len(arguments) > 1 and Path(arguments[0]).as_posix().endswith(COMMAND) and arguments[1] == "run"


def set_knobs(parser: ConfigParser, given: Mapping[str, Any]) -> None:
    """Give a config knobs, as a command line does.

    Args:
        parser: of a config; afterwards its macros are resolved.
        given: see :func:`read_knobs`.

    Raises:
        BundleError: for a name that the config does not have, or a value of another type.
    """
    parser.resolve_macro_and_relative_ids()
    for name, value in read_knobs(given, parser.get()).items():
        parser[name] = value
    nest_settings(parser)


def read_knobs(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of knobs as their types have them.

    Args:
        given: by name, or by the id of a nested item; texts are read, other values checked.
        config: the content of the config files that they override, with macros resolved.

    Raises:
        BundleError: for a name that the config does not have, or a value of another type.
    """
    values = {}
    for name, value in given.items():
        name = name.replace("#", "::")
        if name.split("::")[0] in signature(run).parameters or name.startswith(ConfigParser.meta_key):
            continue
        knob = find_knob(name, config)
        if isinstance(value, dict) and "_target_" in value:
            values[name] = value  # another component, which only a file can give
            continue
        values[name] = read_text(name, value, knob) if isinstance(value, str) else typed(name, value, knob)
    return values


def find_knob(name: str, config: Mapping[str, Any]) -> Knob:
    """What is known of the knob ``name`` of ``config``.

    Raises:
        BundleError: if there is none, with the closest name, or nothing takes it.
    """
    top, _, inner = name.partition("::")
    settings = known_settings() if MODEL in config else {}
    setting = inner if top == MODEL else name
    if setting in settings and name not in config:
        return settings[setting]._replace(default=config[MODEL].get(setting, settings[setting].default))
    if top in config and not (top == MODEL and inner):
        if not inner and not _is_steps(config[top]) and not isinstance(config[top], dict) and not is_used(config, top):
            raise BundleError(f"knob --{name} has no use in this command: leave it out")
        return knob_of(config, name)
    knobs = [key for key, value in config.items() if not isinstance(value, dict) and not _is_steps(value)]
    raise BundleError(f"knob --{name} is unknown: {did_you_mean(setting, {*knobs, *settings})}")


def nest_settings(parser: ConfigParser) -> None:
    """Move settings of the model that were given at the top level to where the config has them."""
    config: Any = parser.config
    for name in list(known_settings()) if MODEL in config else ():
        if name in config:
            config[MODEL][name] = config.pop(name)
    parser.ref_resolver.reset()


def given_texts(arguments: Sequence[str], words: int = 0) -> dict[str, Any]:
    """Values by name: those of ``--args_file``, then ``--name value`` and ``--name=value`` as texts.

    Args:
        arguments: of a command line.
        words: how many of them need no name, such as the command to run.

    Raises:
        BundleError: for more words, a name that is given twice, or a file of arguments that cannot be read.
    """
    given: dict[str, Any] = {}
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not _FLAG.match(word):
            words -= 1
            if words < 0:
                raise BundleError(f"'{word}' belongs to no knob: write --NAME VALUE, and quote a list that has blanks")
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            value = left.pop(0) if left and not _FLAG.match(left[0]) else "true"
        name = name.replace("-", "_").replace("#", "::").removeprefix(f"{MODEL}::")
        if name in given:
            raise BundleError(f"--{name} is given twice: give it once")
        given[name] = value
    if file := given.pop("args_file", None):
        given = _loaded([file], "args_file") | given
    return given


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line if the error, or one that it stems from, is a :class:`BundleError`; the whole trace otherwise.

    What the system refuses is one line as well: a full disk, a file where a folder should be, missing rights.
    """
    for bar in list(getattr(tqdm, "_instances", ())):  # of progress, which the error would continue the line of
        bar.close()
    cause = user_error(error)
    if cause is not None:
        print(f"error: {cause}", file=sys.stderr)
    elif refusal := _refusal(error):
        print(f"error: {refusal}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted: run the same command again; a training goes on after its last whole epoch", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _refusal(error: BaseException) -> str | None:
    """Which file the system refuses to read or write, and why, if that is what ``error`` stems from."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.filename and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return None
    return f"cannot use '{cause.filename}' ({cause.strerror}): check the path, the rights and the disk"


def read_config(files: Any) -> dict[str, Any]:
    """The content of config files, with macros resolved.

    Args:
        files: a path, a list of them, or the text of a list as Fire takes it.

    Raises:
        BundleError: if they are no configs.
    """
    parser = ConfigParser(_loaded(DefaultParseValue(files) if isinstance(files, str) else files, "config_file"))
    try:
        parser.resolve_macro_and_relative_ids()
    except Exception as error:  # macros may name whatever files and items they like
        raise _unreadable(files, "config_file", error) from error
    return dict(parser.get())


def _loaded(files: Any, knob: str) -> dict[str, Any]:
    """The content of the files that ``knob`` names, with macros as they stand."""
    try:
        return dict(ConfigParser.load_config_files(files))
    except Exception as error:  # of the parsers of JSON and YAML, and of MONAI where a file holds no items
        raise _unreadable(files, knob, error) from error


def _unreadable(files: Any, knob: str, error: Exception) -> BundleError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BundleError(f"cannot read --{knob} {shown(files)} ({reason}): give a JSON or YAML file with items by name")


def _check_command(name: str, parser: ConfigParser) -> None:
    """Refuse a command that the config does not have."""
    if not _FLAG.match(name) and name not in parser:
        commands = [key for key, value in parser.get().items() if isinstance(value, list) and key.endswith("ing")]
        raise BundleError(f"this config has no command '{name}': {did_you_mean(name, commands)}")


def _warn_of_idle(knobs: Iterable[str], config: Mapping[str, Any], command: str) -> None:
    """Name the knobs that no step of the command looks at, such as those of training in an evaluation."""
    used = reached(config, (command, "initialize", "finalize"))
    idle = [name for name in knobs if name in config and name not in used and "::" not in name]
    if idle:
        logger.warning(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no part in {command}: nothing changes")


def _running_parser() -> ConfigParser | None:
    """The parser of the config that calls us: MONAI hands it to nobody, but it is on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigParser):
            return caller
        frame = frame.f_back
    return None


def _is_steps(value: Any) -> bool:
    """Whether the item is a list of things to do, not of numbers."""
    return isinstance(value, list) and any(isinstance(item, (str, dict)) for item in value)
