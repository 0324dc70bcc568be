"""What a model is: settings that decide its output, each an argument of one of the parts that it is made of.

A training chooses them, its checkpoint holds them, and whoever uses the checkpoint follows them. A new one is an
argument of a part and a line in ``configs/train.json``. Its default is what a checkpoint means that does not have it,
unless :func:`~bundle.networks.detector.completed` says otherwise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from bundle.errors import BundleError, check_choice, did_you_mean, shown
from bundle.knobs import SYNTAX, Knob, settings_of, typed
from bundle.networks.context import CONTEXTS
from bundle.networks.density import SpatialARDensity
from bundle.networks.detector import AnomalyDetector, completed, refuse_other, same
from bundle.networks.features import FeatureNetwork
from bundle.reading import Reading

PARTS: tuple[Callable[..., Any], ...] = (Reading, FeatureNetwork, SpatialARDensity, *CONTEXTS.values(), AnomalyDetector)
# arguments that say where things are, or hand one part to another
NO_SETTINGS = ("weights", "weights_sha256", "timm_kwargs", "preprocessing")
OPEN = ("channel",)  # what a model may leave to its user
# values that stand for a choice of training
TO_BE_CHOSEN = {"backbone": "auto", "layers": None, "detail_layers": None, "image_size": None, "intensity": "auto"}

logger = logging.getLogger(__name__)


class Settings(Mapping[str, Any]):
    """The settings of a model, all of them, checked.

    Args:
        values: by name; what is absent has its default.

    Raises:
        BundleError: for an unknown name, or a value of another type. Choices and ranges are checked by the parts.

    Attributes:
        given: those that are in ``values``.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        known = known_settings()
        self.given: dict[str, Any] = {}
        for name, value in (values or {}).items():
            if name not in known:
                raise BundleError(f"a model has no setting '{name}': {did_you_mean(name, known)}")
            self.given[name] = typed(name, value, known[name])
            if any(str(part).startswith(SYNTAX) for part in (value if isinstance(value, (list, tuple)) else [value])):
                raise BundleError(f"the setting {name} is {shown(value)}: give a value, expressions are not evaluated")
        self._values = {name: knob.default for name, knob in known.items()} | self.given

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def of(self, part: Callable[..., Any]) -> dict[str, Any]:
        """Those that are arguments of ``part``."""
        return {name: self[name] for name in settings_of(part) if name in self}


@cache
def known_settings() -> dict[str, Knob]:
    """All settings, with their types and defaults; parts that share one agree on both."""
    known: dict[str, Knob] = {}
    for part in PARTS:
        for name, knob in settings_of(part).items():
            plain = list(knob.default) if isinstance(knob.default, tuple) else knob.default
            knob = knob._replace(default=plain)
            if name not in NO_SETTINGS and known.setdefault(name, knob) != knob:
                raise TypeError(f"{part} has another type or default of {name} than another part: {knob}")
    return known


def settings_in(identity: Mapping[str, Any]) -> Settings:
    """The settings in the identity of a checkpoint or an exported file, whose other entries are facts of its weights.

    Raises:
        BundleError: for a value of another type.
    """
    return Settings({name: value for name, value in identity.items() if name in known_settings()})


def agreed_settings(identity: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Settings:
    """The settings in an ``identity``, with which those that are ``given`` must agree.

    Args:
        identity: of a checkpoint or an exported file.
        given: settings that the caller expects, or that the model leaves open.

    Raises:
        BundleError: for a value of another type, or settings that the model does not have; all in one line.
    """
    identity = completed(identity)
    wishes = {name: value for name, value in Settings(given).given.items() if value != TO_BE_CHOSEN.get(name, ...)}
    refuse_other(identity, wishes)
    known = known_settings()
    absent = [name for name in wishes if name not in identity and name not in OPEN]
    if unused := [name for name in absent if not same(known[name].default, wishes[name])]:
        raise BundleError(f"{', '.join(unused)} has no part in this model: leave it out")
    return Settings(wishes | settings_in(identity).given)


def make_detector(
    settings: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
    weights_sha256: str | None = None,
) -> AnomalyDetector:
    """The untrained detector of ``settings``.

    Args:
        settings: by name; what is absent has its default.
        weights, weights_sha256: of the backbone, see :class:`~bundle.networks.FeatureNetwork`.

    Raises:
        BundleError: for settings that are unknown or do not fit, or if there are no weights.
    """
    chosen = Settings(settings)
    reading = Reading(**chosen.of(Reading))
    context = CONTEXTS[check_choice("density mode", chosen["mode"], CONTEXTS)]
    features = FeatureNetwork(weights=weights, weights_sha256=weights_sha256, **chosen.of(FeatureNetwork))
    channels = chosen["feature_components"] or features.num_channels
    density = SpatialARDensity(channels, **chosen.of(SpatialARDensity), **chosen.of(context))
    detector = AnomalyDetector(features, density, reading.describe(), **chosen.of(AnomalyDetector))
    for name in chosen.given.keys() - detector.describe().keys():
        if not same(known_settings()[name].default, chosen[name]):
            logger.warning(
                f"{name} {shown(chosen[name])} has no part in a model of mode '{chosen['mode']}': it is not used"
            )
    return detector
