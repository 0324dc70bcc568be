"""The configs inside ``model.ts``: preprocessing and postprocessing that resolve where this bundle is not installed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRange

from bundle.errors import BundleError
from bundle.reading import SCHEMES
from bundle.transforms import OrientSlicesd, ScaleForegroundPercentiles
from bundle.transforms.intensity import scaler_of, scheme_of

READ_BY_DEPLOY = ("preprocessing", "inferer", "postprocessing")
OWN_PACKAGES = ("bundle", "scripts")


def axcodes(plane: str) -> dict[str, str]:
    """The axes that the network sees (rows, columns, slices), by the direction that a series is stacked along."""
    oriented = OrientSlicesd("image", plane)
    image = MetaTensor(torch.zeros(1, 2, 2, 2), meta={"slice_axis": 2})
    return {direction: oriented._target(image, f"??{direction}") for direction in "LRPAIS"}


def scheme_for(scheme: str, modality: str) -> str:
    """By which scheme images of ``modality`` are read, where that of the model is ``scheme``; see also the next one."""
    return scheme_of(modality) if scheme in ("auto", "8bit") else scheme


def scheme_of_8_bits(scheme: str) -> str | None:
    """By which scheme images of 8 bits are read, where ``scheme`` has a way of its own for them."""
    return scheme if scheme == "8bit" else None


def windows() -> dict[str, list[float] | None]:
    """The intensities that become 0 and 1 under each scheme; None: percentiles decide."""
    scalers = {scheme: scaler_of(scheme) for scheme in SCHEMES if scheme != "auto"}
    return {
        scheme: [scaler.a_min, scaler.a_max] if isinstance(scaler, ScaleIntensityRange) else None
        for scheme, scaler in scalers.items()
    }


def foreground_percentiles() -> list[float]:
    """The percentiles of the foreground that become 0 and 1 where no window decides."""
    scaler = ScaleForegroundPercentiles()
    return [scaler.lower, scaler.upper]


def embedded_configs(configs: list[Path], metadata: Path, items: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The content of ``inference.json`` and ``metadata.json`` for ``model.ts``.

    Of the merged configs there remains what MONAI Deploy reads, and what that refers to. Expressions that name this
    bundle's packages are evaluated now, and their values, plain JSON, take their place.

    Args:
        configs: config files; later ones overlay earlier ones.
        metadata: ``metadata.json``.
        items: values in place of items in the files: the path of the ``checkpoint``, ...

    Raises:
        BundleError: if something would not resolve without this bundle.
    """
    parser = ConfigParser(
        ConfigParser.load_config_files(list(map(str, configs))) | items,
        globals={name: import_module(name) for name in OWN_PACKAGES},
    )
    parser.resolve_macro_and_relative_ids()
    config: Any = parser.config
    inference: dict[str, Any] = {}
    needed = list(READ_BY_DEPLOY)
    while needed:
        name = needed.pop(0)
        if name in inference:
            continue
        own = isinstance(config[name], str) and _names_own_package(config[name])
        inference[name] = parser.get_parsed_content(name) if own else config[name]
        references = ReferenceResolver.find_refs_in_config(inference[name], id=name)
        needed += [reference.split("::")[0] for reference in references]
    if _names_own_package(json.dumps(inference)):
        raise BundleError(f"'{configs[-1]}' refers to this bundle, which is not there where model.ts runs: inline it")
    about = ConfigParser.load_config_file(str(metadata))
    about["network_data_format"] |= config["network_data_format"]
    return {"inference": inference, "metadata": about}


def _names_own_package(text: str) -> bool:
    return any(f"{name}." in text for name in OWN_PACKAGES)
