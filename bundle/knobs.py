"""Typed values of knobs: one reading of what a command line, a file of arguments or a checkpoint gives.

The type of a knob is the annotation of the argument that takes it, else that of its default. JSON's spellings
(``true``, ``null``, ``[1, 2]``) and Python's are read alike; anything else is refused with the type and an example.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pydoc import locate
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from bundle.errors import BundleError, shown

SYNTAX = ("$", "@", "%")  # how MONAI's expressions, references and macros begin
OWN_PACKAGES = ("bundle.", "scripts.")
_REFERENCE = re.compile(r"@(\w+(?:::\w+)*)")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class Knob(NamedTuple):
    """What is known of a knob.

    Attributes:
        kind: its type, as annotations are written.
        default: its value if nothing is given.
    """

    kind: Any
    default: Any = None


def typed(name: str, value: Any, knob: Knob) -> Any:
    """``value`` as the type of ``knob`` has it; sequences become lists.

    Raises:
        BundleError: if it is of another type, with an example.
    """
    try:
        found = TypeAdapter(knob.kind, config=_STRICT).validate_python(value)
    except (ValidationError, SchemaError) as error:
        raise BundleError(
            f"--{name} must be {words(knob.kind)}, got {shown(value)}: for example --{name} {shown(_example(knob))}"
        ) from error
    return list(found) if isinstance(found, tuple) else found


def read_text(name: str, text: str, knob: Knob) -> Any:
    """What a person means by ``text``; MONAI's own syntax stays as it is.

    Raises:
        BundleError: if it cannot be read as the type of ``knob``.
    """
    if text.startswith(SYNTAX):
        return text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and fits(text[1:-1], knob.kind):
        return text[1:-1]
    word = text.strip().lower()
    if word in _WORDS:  # never a text
        return typed(name, _WORDS[word], knob)
    return typed(name, next((value for value in _readings(text, knob) if fits(value, knob.kind)), text), knob)


def settings_of(part: Callable[..., Any]) -> dict[str, Knob]:
    """The arguments of a class or function that have a default, with their annotations."""
    hints = _hints(part)
    return {
        parameter.name: Knob(hints.get(parameter.name, Any), parameter.default)
        for parameter in inspect.signature(part).parameters.values()
        if parameter.default is not parameter.empty
    }


def knob_of(config: Mapping[str, Any], name: str) -> Knob:
    """The knob that item ``name`` of a config is; nested items are named ``outer::inner``.

    Args:
        config: the content of config files, with macros resolved.
        name: of an item.
    """
    default = _item(config, name)
    if isinstance(default, str) and default.startswith("@") and default[1:] in config:
        return knob_of(config, default[1:])
    kind = next((kind for kind in _consumers(config, name) if kind is not Any), None)
    if kind is not None:
        return Knob(kind if default is not None else kind | None, default)
    if isinstance(default, dict) or default is None:
        return Knob(Any, None)
    if isinstance(default, str) and default.startswith(SYNTAX):
        return Knob(str, None)
    if isinstance(default, list):
        return Knob(list[type(default[0])] if default else list, default)  # type: ignore[misc]
    return Knob(type(default), default)


def is_used(config: Mapping[str, Any], name: str) -> bool:
    """Whether a part of ``config`` refers to the item ``name``."""
    return re.search(rf"@{re.escape(name)}\b", json.dumps(config, default=str)) is not None


def reached(config: Mapping[str, Any], items: Iterable[str]) -> set[str]:
    """The ids of ``items``, and of all that they refer to, directly or by others."""
    found: set[str] = set()
    left = list(items)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _REFERENCE.findall(json.dumps(_item(config, name), default=str))
    return found


def words(kind: Any) -> str:
    """A type in words."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        os.PathLike: "text",
        types.NoneType: "null",
    }
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, typing.get_args(kind))))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        inner = words(typing.get_args(kind)[0]).removeprefix("a ")
        return f"a list of {f'{inner}s' if inner.endswith('number') else inner}"
    return names.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _readings(text: str, knob: Knob) -> Iterator[Any]:
    """What ``text`` may mean, the likeliest first."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if not isinstance(value, str):  # 0.05 of a knob that takes a word or a number is the number
        yield value
    if fits(text, knob.kind) and knob.kind is not Any and not text.lstrip().startswith("["):
        yield text
    from fire.parser import DefaultParseValue  # of a command line alone: a checkpoint needs no reader of text

    yield DefaultParseValue(text)


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the type ``kind``, as annotations are written."""
    try:
        TypeAdapter(kind, config=_STRICT).validate_python(value)
    except (ValidationError, SchemaError):
        return False
    return True


def _example(knob: Knob) -> Any:
    """A value of the right type."""
    if knob.default is not None and not (isinstance(knob.default, str) and knob.default.startswith(SYNTAX)):
        return knob.default
    for example in (True, 0.5, 8, [1, 2], "text"):
        if fits(example, knob.kind):
            return example
    return None


def _item(config: Any, name: str) -> Any:
    for key in name.split("::"):
        try:
            config = config[int(key) if isinstance(config, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return config


def _consumers(config: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The annotations of the arguments that take ``name``, that of the component that it lies in first."""
    outer, _, inner = name.rpartition("::")
    if outer and isinstance(component := _item(config, outer), dict):
        yield from _annotation(component, inner)
    yield from _referring(config, f"@{name}")


def _referring(config: Any, reference: str) -> Iterator[Any]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if value == reference:
                yield from _annotation(config, key)
            yield from _referring(value, reference)
    elif isinstance(config, list):
        for value in config:
            yield from _referring(value, reference)


def _annotation(component: Mapping[str, Any], argument: str) -> Iterator[Any]:
    """The annotation of an argument of a component that is of this project."""
    target = component.get("_target_")
    if isinstance(target, str) and target.startswith(OWN_PACKAGES):
        part: Any = locate(target)
        if part is None:
            raise BundleError(f"_target_ '{target}' of the config does not exist: correct its name")
        if argument in (hints := _hints(part)):
            yield hints[argument]


def _hints(part: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(inspect.getattr_static(part, "__init__") if isinstance(part, type) else part)
