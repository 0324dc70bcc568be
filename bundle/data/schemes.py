"""By which scheme the intensities of a training become [0, 1]: found once, from headers, before the model is made."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bundle.data.cases import SPLITS, Case, find_splits
from bundle.distributed import gather, shard
from bundle.errors import BundleError
from bundle.manifest import Manifest
from bundle.model import Settings
from bundle.transforms.intensity import scheme_of
from bundle.transforms.loading import modality_of

logger = logging.getLogger(__name__)


class SplitFinder:
    """The cases of a data set, found when they are first asked for, and once.

    Args:
        dataset_dir, seed, needed, patient_pattern, healthy_images, follow_links, on_copies: see
            :func:`~bundle.data.find_splits`.
        output_dir: the folder of the results, in which no image may lie; None: nothing is written.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike,
        seed: int = 0,
        needed: Sequence[str] = SPLITS,
        patient_pattern: str | None = None,
        healthy_images: int | None = None,
        follow_links: bool = False,
        output_dir: str | os.PathLike | None = None,
        on_copies: str = "warn",
    ) -> None:
        self.dataset_dir = dataset_dir
        self.output_dir = output_dir
        self.on_copies = on_copies
        self.arguments = (seed, needed, patient_pattern, healthy_images, follow_links)

    @property
    def exists(self) -> bool:
        """Whether there is anything to look into."""
        return Path(self.dataset_dir).exists()

    @cached_property
    def splits(self) -> dict[str, list[Case]]:
        """The cases of each split; raises what :func:`~bundle.data.find_splits` does."""
        results = None if self.output_dir is None else Manifest(self.output_dir)
        return find_splits(self.dataset_dir, *self.arguments, results, self.on_copies)


def settings_for(values: Mapping[str, Any], finder: SplitFinder, cut_plane: str | None = None) -> Settings:
    """The settings of a model that is to be trained, whose ``intensity`` is the scheme of its training images.

    With ``auto``, each image is read by its own header. Where all training images agree, the model keeps their scheme,
    so that an image whose header tells nothing is read as the model has learned. Where they do not, ``auto`` stays,
    with a warning.

    Args:
        values: of settings, as given.
        finder: of the images. Where the data are missing, as for who wants to look at the network only, ``auto`` stays.
        cut_plane: None, since a model keeps the plane that it learned.

    Raises:
        BundleError: for settings or data that are wrong, and for a ``cut_plane``.
    """
    if cut_plane is not None:
        raise BundleError(f"cut_plane has no part in training: give --slice_plane {cut_plane}")
    settings = Settings(values)
    if settings["intensity"] != "auto" or not finder.exists:
        return settings
    modalities = modalities_of(finder.splits["training"])
    schemes = Counter(scheme_of(modality) for modality in modalities.elements())
    if len(schemes) > 1:
        counts = ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common())
        logger.warning(
            f"training images are of {len(schemes)} intensity schemes ({counts}): intensity stays auto, and the same "
            "image in a format that tells no modality is read in another way; give --intensity, or images of one kind"
        )
    if len(schemes) != 1:
        return settings
    scheme = next(iter(schemes))
    untold = "" if set(modalities) != {""} else "; no header tells a modality: for CT, give --intensity ct_soft_tissue"
    logger.info(f"intensity auto is {scheme} for all {schemes[scheme]} training images, and the model keeps it{untold}")
    return Settings({**settings.given, "intensity": scheme})


def modalities_of(cases: Sequence[Case]) -> Counter[str]:
    """How many images are of which modality, as far as they can be read; processes look at a share each."""
    mine = Counter(modality for case in shard(cases) if (modality := modality_of(case["image"])) is not None)
    return sum(gather(mine), Counter())
