"""What a config of another hand would run: read it before you run it.

python -m scripts.checks.foreign_config FILE...

A config of a MONAI bundle is a program: texts that begin with ``$`` are Python, ``_target_`` names what is called, and
``%`` takes items of other files. So is ``logging.conf``, which MONAI takes from beside a config: ``args`` is Python
there, and ``class`` names what is called. This lists every expression, every component that is not known to be
harmless, and whatever is taken from a file which is not among those given. Nothing of the files is run or imported. The
exit code is 1 if there is anything to read, and 0 if there is nothing.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bundle.errors import BundleError, one_line

CONFIGS = Path(__file__).parents[2] / "configs"
# packages whose classes compute and nothing else; MONAI's transforms and losses look up names and download programs
HARMLESS = ("monai.inferers", "torch.nn", "torch.optim", "torch.optim.lr_scheduler")
# components of this bundle's own configs that run what their arguments name
POWERFUL = ("site.addsitedir", "bundle.exports.load_exported")
_CLASS = re.compile(r"[A-Z]\w*")  # modules and functions have small letters
_TARGET = "_target_"
_FACTORY = "()"  # what is called in the place of a class, where the configuration of logging is a dictionary
_CONFIGS = (".json", ".yaml", ".yml")
_LOGGING = "logging.conf"  # which MONAI reads if it lies beside a config
_LOGGING_FILE = "logging_file"  # names another one
# what Python evaluates or calls in such a file, and the texts there that only show lines in a terminal
_CALLED = {"class": ("StreamHandler", "NullHandler", "Formatter")}
_EVALUATED = {"args": ("()", "(sys.stderr,)", "(sys.stdout,)"), "kwargs": ("{}",), "defaults": ("{}",)}


class Found(NamedTuple):
    """Something that a person should read."""

    file: Path
    item: str
    kind: str
    text: str

    def __str__(self) -> str:
        return one_line(f"{self.file}: {self.item}: {self.kind}: {self.text}")


def examine(files: Sequence[Path]) -> list[Found]:
    """Everything in ``files`` that would run, or that comes from elsewhere, in order.

    Raises:
        BundleError: if one is missing, or is no config of any kind.
    """
    given = {file.resolve(): file for file in files}
    for file in files:
        if file.suffix in _CONFIGS and (beside := file.with_name(_LOGGING)).is_file():
            given.setdefault(beside.resolve(), beside)
    return [found for file in given.values() for found in _in_file(file, {*given})]


def read_plainly(file: Path) -> Any:
    """The content of a JSON or YAML file, as plain data.

    Raises:
        BundleError: if it is missing, or neither.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _no_config(file, error) from error


def _no_config(file: Path, error: Exception) -> BundleError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return BundleError(f"'{file}' is no config ({reason}): give a .json or .yaml file, or a .conf file of logging")


def _in_file(file: Path, given: set[Path]) -> Iterator[Found]:
    return _in_item(file, "", read_plainly(file), given) if file.suffix in _CONFIGS else _in_logging(file)


def _in_logging(file: Path) -> Iterator[Found]:
    """What runs when ``logging.config.fileConfig`` reads the file; interpolated texts are told as they stand there."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, configparser.Error) as error:
        raise _no_config(file, error) from error
    for name, section in parser.items():
        for key, text in section.items():
            plain = text.replace(" ", "").removeprefix("logging.")
            for kind, harmless in (("component", _CALLED), ("expression", _EVALUATED)):
                if key in harmless and plain not in harmless[key]:
                    yield Found(file, f"{name}::{key}", kind, text)


@cache
def harmless_targets() -> frozenset[str]:
    """The components of this bundle's own configs that do nothing else, whatever their arguments are."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in CONFIGS.glob("*.json")]
    return frozenset(target for content in contents for target in _targets(content)) - {*POWERFUL}


def is_harmless(target: object) -> bool:
    """Whether what ``_target_`` names is one of this bundle's components, or a class of a package that computes.

    A package alone is no reason to trust: ``monai.bundle.scripts.os.system`` is of MONAI, too, and
    ``monai.transforms.LoadImage`` calls whatever its ``reader`` names.
    """
    if not isinstance(target, str):
        return False
    package, _, name = target.rpartition(".")
    return target in harmless_targets() or (package in HARMLESS and _CLASS.fullmatch(name) is not None)


def _targets(item: Any) -> Iterator[str]:
    if isinstance(item, dict):
        if isinstance(item.get(_TARGET), str):
            yield item[_TARGET]
        item = list(item.values())
    if isinstance(item, list):
        for part in item:
            yield from _targets(part)


def _in_item(file: Path, name: str, item: Any, given: set[Path]) -> Iterator[Found]:
    if isinstance(item, dict):
        if _TARGET in item and not is_harmless(item[_TARGET]):
            yield Found(file, name or ".", "component", str(item[_TARGET]))
        if _FACTORY in item:
            yield Found(file, name or ".", "component", str(item[_FACTORY]))
        for key, value in item.items():
            yield from _in_item(file, f"{name}::{key}" if name else str(key), value, given)
    elif isinstance(item, list):
        for index, value in enumerate(item):
            yield from _in_item(file, f"{name}::{index}" if name else str(index), value, given)
    elif isinstance(item, str) and item.startswith("$"):
        yield Found(file, name, "expression", item)
    elif isinstance(item, str) and item.startswith("%"):
        other = item[1:].partition("::")[0]
        if Path(other).suffix in _CONFIGS and Path(other).resolve() not in given | _own():
            yield Found(file, name, "item of another file", item)
    elif isinstance(item, str) and name.rpartition("::")[2] == _LOGGING_FILE:
        if Path(item).resolve() not in given | _own():
            yield Found(file, name, "another file of logging", item)


@cache
def _own() -> frozenset[Path]:
    return frozenset(file for file in CONFIGS.resolve().iterdir() if file.suffix == ".json" or file.name == _LOGGING)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.checks.foreign_config", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a config, or a file of logging")
    try:
        found = examine(parser.parse_args(arguments).files)
    except BundleError as error:
        parser.exit(2, f"error: {error}\n")
    for one in found:
        print(one)
    print(
        f"{len(found)} to read before you run {'it' if len(found) == 1 else 'them'}" if found else "nothing would run"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
