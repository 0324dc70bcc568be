"""Intensities to [0, 1]: MR by percentiles of the foreground, CT by named Hounsfield windows, 8-bit by 255."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, ScaleIntensityRange, Transform
from monai.transforms.utils_pytorch_numpy_unification import percentile

from bundle.errors import BundleError, check_choice
from bundle.reading import HOUNSFIELD_WINDOWS, SCHEMES

EIGHT_BITS = float(np.iinfo(np.uint8).max)

logger = logging.getLogger(__name__)


def scheme_of(modality: str) -> str:
    """The scheme that ``auto`` means for a modality, as :class:`~bundle.transforms.LoadCased` tells it."""
    return {"8bit": "8bit", "CT": "ct_soft_tissue"}.get(modality, "mr")


class ScaleForegroundPercentiles(Transform):
    """Clip at two percentiles of the foreground and scale to [0, 1], for MR and other images without fixed units.

    The foreground is what differs from ``background``. Percentiles are taken over the whole volume, so that its slices
    stay comparable; the background itself becomes 0. An image without foreground becomes all 0.

    Args:
        lower, upper: percentiles in [0, 100], lower < upper.
        background: the value of voxels outside the subject.

    Raises:
        BundleError: if the percentiles are not in order.
    """

    def __init__(self, lower: float = 0.5, upper: float = 99.5, background: float = 0.0) -> None:
        if not 0 <= lower < upper <= 100:
            raise BundleError(
                f"percentiles must satisfy 0 <= lower < upper <= 100, got {lower} and {upper}: try 0.5 and 99.5"
            )
        self.lower = lower
        self.upper = upper
        self.background = background

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Scale ``img`` of any shape."""
        foreground = img != self.background
        if not foreground.any():
            return img * 0
        low, high = (float(percentile(img[foreground], q)) for q in (self.lower, self.upper))
        if low == high:
            return foreground * (img * 0 + 1)
        return ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(img) * foreground


class ScaleHounsfieldWindow(ScaleIntensityRange):
    """Clip CT to a named window of Hounsfield units and scale to [0, 1].

    Args:
        window: a name in :data:`~bundle.reading.HOUNSFIELD_WINDOWS`.

    Raises:
        BundleError: for an unknown window, with the closest name.
    """

    def __init__(self, window: str = "ct_soft_tissue") -> None:
        low, high = HOUNSFIELD_WINDOWS[check_choice("CT window", window, HOUNSFIELD_WINDOWS)]
        super().__init__(low, high, 0.0, 1.0, clip=True)


class ScaleIntensityByModalityd(MapTransform):
    """Bring ``keys`` to [0, 1] by one scheme, and say in ``meta["intensity_scheme"]`` by which.

    An image whose modality is unknown is read by ``scheme``. One that tells another modality is too, with a warning,
    the first of its kind. Two schemes stand for a kind of pixels, and give nonsense for others: a picture of 8 bits
    holds no Hounsfield units, and what does not fit into 8 bits is not divided by 255. Such an image is read as
    ``auto`` does, with a warning.

    Args:
        keys: images as :class:`~bundle.transforms.LoadCased` gives them.
        scheme: ``mr`` (percentiles 0.5 and 99.5 of the nonzero voxels), ``8bit`` (divide by 255), a window of
            :data:`~bundle.reading.HOUNSFIELD_WINDOWS`, or ``auto``: ``8bit`` for 8-bit images, ``ct_soft_tissue`` for
            DICOM of modality CT, else ``mr``.

    Raises:
        BundleError: for an unknown scheme, with the closest name.
    """

    def __init__(self, keys: KeysCollection, scheme: str = "auto", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scheme = check_choice("intensity", scheme, SCHEMES)
        self._told: set[str] = set()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale each key of ``data``."""
        scaled = dict(data)
        for key in self.key_iterator(scaled):
            scheme = self.scheme_for(scaled[key])
            scaled[key] = scaler_of(scheme)(scaled[key])
            if isinstance(scaled[key], MetaTensor):
                scaled[key].meta["intensity_scheme"] = scheme
        return scaled

    def scheme_for(self, image: NdarrayOrTensor) -> str:
        """The scheme by which ``image`` is read, none of which is ``auto``."""
        meta = getattr(image, "meta", {})
        modality = str(meta.get("modality", ""))
        own = scheme_of(modality)
        if self.scheme in ("auto", own):
            return own
        fits = modality == "" or (own == "ct_soft_tissue" and self.scheme in HOUNSFIELD_WINDOWS)
        scheme = self.scheme
        if self.scheme == "8bit":
            fits = has_8_bits(image)
            scheme = "8bit" if fits else own
        elif own == "8bit" and self.scheme in HOUNSFIELD_WINDOWS:
            scheme = "8bit"
        if not fits and modality not in self._told:
            self._told.add(modality)
            kind = {"": "no 8-bit image", "8bit": "an 8-bit picture"}.get(modality, f"of modality {modality}")
            logger.warning(
                f"'{meta.get('filename_or_obj', 'an image')}' is {kind}, but the model reads intensities as "
                f"{self.scheme}: it is read as {scheme}, and its map may mean nothing; more images of the kind are not "
                "named"
            )
        return scheme


def scaler_of(scheme: str) -> Transform:
    """The transform to [0, 1] of a scheme other than ``auto``."""
    if scheme == "mr":
        return ScaleForegroundPercentiles()
    if scheme == "8bit":
        return ScaleIntensityRange(0.0, EIGHT_BITS, 0.0, 1.0, clip=True)
    return ScaleHounsfieldWindow(scheme)


def has_8_bits(image: NdarrayOrTensor) -> bool:
    """Whether the values are those of an 8-bit image, whatever the file stores them as: whole, and from 0 to 255."""
    low, high = float(image.min()), float(image.max())
    return low >= 0 and 1 < high <= EIGHT_BITS and not bool((image - image.round()).any())
