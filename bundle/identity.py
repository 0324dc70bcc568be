"""What the file of a model says of it: data, checked where they are read, before anything follows from them.

Whoever reads a checkpoint or an exported file calls :func:`checked_identity` and :func:`check_numbers`. What they let
pass holds no expression, no reference and no component of a config, and no number that is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bundle.errors import BundleError, check_choice, shown
from bundle.knobs import SYNTAX, fits
from bundle.model import Settings, known_settings
from bundle.networks.backbones import BACKBONES
from bundle.networks.backbones.learned_vit import INTERPOLATIONS
from bundle.networks.backbones.vit import BLOCKS
from bundle.networks.context import CONTEXTS, check_kernel
from bundle.networks.density import check_density
from bundle.networks.detector import AnomalyDetector
from bundle.reading import Reading


def _one_of(*words: str) -> Any:
    return Annotated[str, Field(pattern=rf"\A({'|'.join(map(re.escape, words))})\z")]


_OF_COLORS = Field(min_length=3, max_length=3)
FACTS: dict[str, Any] = {
    "weights": Annotated[str, Field(pattern=r"\A(random:)?[0-9a-f]{64}\z")],
    "positions": _one_of(*(one.name for one in INTERPOLATIONS.values())),
    "mean": Annotated[list[float], _OF_COLORS],
    "std": Annotated[list[Annotated[float, Field(gt=0)]], _OF_COLORS],
    "likelihood": _one_of("joint", "composite", "none", "pseudo"),  # of version 0.5 and before
}
"""Entries of an identity that are no settings, with their types."""
CALIBRATION = ("threshold", "image_threshold", "false_positive_rate", "image_false_positive_rate")
MOST_CHANNELS = 2**16  # of embeddings, more than any backbone has


def checked_identity(identity: object, with_others: bool = False) -> dict[str, Any]:
    """``identity``, if it is one: settings of a model that its parts take, and facts of its weights.

    Args:
        identity: of a checkpoint or an exported file.
        with_others: let entries pass that are neither, as plain data: the network that loads them knows them or not.

    Raises:
        BundleError: for an expression, a reference or a component of a config at any depth, an entry of another type,
            a choice that there is not, a number out of range, or an unknown name.
    """
    if not isinstance(identity, Mapping):
        raise BundleError(f"its identity is {shown(identity)}, not settings by name")
    entries = dict(identity)
    for name, value in entries.items():
        _refuse_syntax(str(name), name)
        _refuse_syntax(str(name), value)
    known = known_settings()
    unknown = sorted(name for name in entries if name not in known and name not in FACTS)
    if unknown and not with_others:
        raise BundleError(
            f"it has {shown(', '.join(unknown))} in its identity, which this version does not know: take the version "
            "that made it"
        )
    if absent := [name for name in ("backbone", "weights") if name not in entries]:
        raise BundleError(f"its identity names no {' and no '.join(absent)}")
    for name in entries.keys() & FACTS.keys():
        if not fits(entries[name], FACTS[name]):
            raise BundleError(f"{name} in its identity is {shown(entries[name])}, which no model has")
    _check_parts(Settings({name: value for name, value in entries.items() if name in known}))
    return entries


def check_numbers(tensors: Mapping[str, Any]) -> None:
    """Refuse weights, scores, thresholds and rates of a model that are no numbers.

    A model that is not calibrated has infinite thresholds, and for these no rates. Other thresholds may be infinite.

    Args:
        tensors: by name, those of a state dict; other values are passed over.

    Raises:
        BundleError: for NaN, infinity in what is no threshold, or a rate that is none.
    """
    for name, tensor in tensors.items():
        if name in CALIBRATION or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        known = ~torch.isnan(tensor) if name.endswith("_threshold") else torch.isfinite(tensor)
        if not known.all():
            raise BundleError(f"its '{name}' is not finite")
    for rate, threshold in (("false_positive_rate", "threshold"), ("image_false_positive_rate", "image_threshold")):
        if threshold in tensors:
            limit, share = float(tensors[threshold]), float(tensors.get(rate, math.nan))
            open_ended = limit == math.inf and math.isnan(share)
            if not open_ended and not (math.isfinite(limit) and (rate not in tensors or 0 < share < 1)):
                raise BundleError(f"its {threshold} is {limit} for a {rate} of {share}")


def _refuse_syntax(name: str, value: object) -> None:
    """Refuse what a config would evaluate, look up or make, at any depth of ``value``."""
    if isinstance(value, str) and value.startswith(SYNTAX):
        raise BundleError(f"{shown(name)} in its identity is {shown(value)}: expressions are not evaluated")
    if isinstance(value, Mapping):
        for key in value:
            if str(key).startswith("_"):
                raise BundleError(f"{shown(name)} in its identity has {shown(key)}: components are not made")
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for part in value:
            _refuse_syntax(name, part)


def _check_parts(settings: Settings) -> None:
    """The parts' own checks of choices and ranges, as far as they need no weights, at no size that matters."""
    spec = BACKBONES[check_choice("backbone", settings["backbone"], BACKBONES)]
    check_choice("blocks", settings["blocks"], BLOCKS)
    Reading(**settings.of(Reading))
    channels = settings["feature_components"] or MOST_CHANNELS
    arguments = {name: settings[name] for name in signature(check_density).parameters if name in settings}
    check_density(channels, **arguments)
    context = CONTEXTS[settings["mode"]]
    own = settings.of(context)
    if "hidden_channels" in own:
        check_kernel(own["hidden_channels"], own["kernel_size"])
        own["hidden_channels"] = 1
    context(1, 1, **own)
    features: Any = SimpleNamespace(
        num_channels=MOST_CHANNELS,
        detail_channels=0,
        detail_factor=1,
        patch_size=spec.patch,
        image_size=spec.image_size,
        describe=dict,
    )
    fit = {"kind": settings["covariance"], "rank": settings["rank"], "shrinkage": settings["shrinkage"]}
    density: Any = SimpleNamespace(in_channels=channels, fit=fit, describe=dict)
    with torch.device("meta"):
        AnomalyDetector(features, density, **settings.of(AnomalyDetector))
