"""What a model was learned from, and why a case is unlike it, in words.

The application on MONAI Deploy takes this module along, where no network of this bundle is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bundle.dicom.words import facts_of
from bundle.errors import BundleError
from bundle.results import Unlike

LARGEST_SUMMARY = 2**16  # bytes
# what headers and names tell of a case, and how it is called
LABELS = {
    "modality": "modality",
    "sequence": "sequence",
    "contrast": "contrast",
    "kernel": "kernel",
    "plane": "slices",
    "scheme": "intensities read as",
}


class Learned(NamedTuple):
    """What a model was learned from, in words of a fixed vocabulary and numbers: nothing of a patient.

    Attributes:
        cases: how many of the healthy training cases have each word, by the kinds in :data:`LABELS`.
        patients: of healthy validation, on whose number the promises of thresholds rest.
        of_volumes: whether the validation cases are volumes.
    """

    cases: dict[str, dict[str, int]]
    patients: int
    of_volumes: bool

    def unseen(self, kind: str, words: Sequence[str]) -> list[str]:
        """Those of ``words`` that no training case had; none where training cases tell no words of this ``kind``."""
        seen = self.cases.get(kind, {})
        return [word for word in words if word not in seen] if seen else []

    def reasons(self, unlikeness: float, threshold: float, meta: Mapping[str, Any]) -> tuple[Unlike, ...]:
        """Why a case is unlike the training data, in words; none if it is like them.

        A word of ``meta`` that no training case had is a reason, where training cases tell of such words at all.

        Args:
            unlikeness: of the case.
            threshold: of the unlikeness; what exceeds it is a reason.
            meta: of its image, see :func:`~bundle.dicom.words.facts_of`.
        """
        found = []
        facts = facts_of(meta)
        for kind, label in LABELS.items():
            if other := self.unseen(kind, facts.get(kind, ())):
                learned = ", ".join(sorted(self.cases[kind]))
                found.append(Unlike(kind, f"{label} {', '.join(other)}, learned from {learned}"))
        if unlikeness > threshold:
            words = f"its looks differ from healthy training images by {unlikeness:.1f}, threshold {threshold:.1f}"
            found.append(Unlike("appearance", words))
        return tuple(found)


def read_summary(stored: Tensor) -> Learned:
    """The summary in a checkpoint or an exported file, checked as data.

    Raises:
        BundleError: if it is none.
    """
    if stored.numel() == 0:
        return Learned({}, 0, False)
    try:
        if stored.dtype != torch.uint8 or stored.numel() > LARGEST_SUMMARY:
            raise ValueError("not bytes, or too many")
        found = Learned(**json.loads(bytes(stored.tolist())))
        counts = [(name, count) for kind in LABELS for name, count in found.cases.get(kind, {}).items()]
        plain = all(name.isascii() and name.replace("_", "").isalnum() and len(name) <= 32 for name, _ in counts)
        whole = all(type(count) is int and count > 0 for _, count in counts) and type(found.patients) is int
        if not (plain and whole and found.cases.keys() <= LABELS.keys() and type(found.of_volumes) is bool):
            raise ValueError("an unknown entry")
        return found
    except (ValueError, TypeError, AttributeError) as error:
        raise BundleError(
            f"the summary of the training data is damaged ({error}): take the model.pt of a training"
        ) from error
