"""Which series of a study are examined: what is no image is passed over, and a rule chooses among the rest.

The commands and the application on MONAI Deploy choose by this module, from the header of the first file of a series.
"""

from __future__ import annotations

import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword

from bundle.dicom.series import NoImageError, Series, read_headers
from bundle.dicom.words import facts_of, header_words
from bundle.errors import BundleError, shown

LEARNED = "learned"
PLANES_ACROSS = ("sagittal", "coronal", "axial")  # across x, y and z
MODALITY, DESCRIPTION, ORIENTATION = "Modality", "SeriesDescription", "ImageOrientationPatient"
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "!=": operator.ne,
}
# what LEARNED asks of the model, by attribute: the kind of words, see bundle.learned
_KINDS = {MODALITY: "modality", DESCRIPTION: "sequence"}

logger = logging.getLogger(__name__)

Unseen = Callable[[str, Sequence[str]], list[str]]
"""Of a kind of words and of words, those that no training case had."""


class SeriesRule:
    """What the header of a series must say for it to be examined.

    A condition names an attribute of DICOM by its keyword. What it asks for is one of these:

    - a text: a regular expression that is found in the value, or in one of several values, whatever the case of
      letters; with ``!`` before it, one that is found in none;
    - for ``ImageOrientationPatient``, ``axial``, ``coronal`` or ``sagittal``: the plane that the slices are closest to;
    - for ``Modality`` and ``SeriesDescription``, ``learned``: no modality, or sequence, that the model has not learned
      from, if it knows what it has learned from, and the header tells;
    - a number; ``[5, "<="]`` with ``>``, ``>=``, ``<``, ``<=`` or ``!=``; or ``[3, 5]``: from 3 to 5;
    - a list of texts: each of them.

    An attribute that is missing fulfills no condition but those with ``!`` and ``learned``.

    Args:
        conditions: by keyword.
        unseen: of the model, for ``learned``; None: it has learned from everything.

    Raises:
        BundleError: for a condition that has no meaning.
    """

    def __init__(self, conditions: Mapping[str, Any], unseen: Unseen | None = None) -> None:
        self.conditions = {keyword: _read(keyword, wanted) for keyword, wanted in conditions.items()}
        self.unseen = unseen or (lambda kind, words: [])

    def misfit(self, header: Dataset) -> str | None:
        """Why a series is not examined, in words that hold no value of its ``header`` as it stands; None: it is."""
        for keyword, parts in self.conditions.items():
            for part in parts:
                reason = self._learned(keyword, header) if part == LEARNED else _misfit(keyword, part, header)
                if reason:
                    return reason
        return None

    def _learned(self, keyword: str, header: Dataset) -> str | None:
        kind = _KINDS[keyword]
        facts = facts_of({"modality": _texts(MODALITY, header)[0], "words": header_words(header)})
        other = self.unseen(kind, facts[kind])
        return f"{kind} {', '.join(other)}, which the model has not learned from" if other else None


def series_rule(
    modality: str | None = None,
    description: str | None = None,
    orientation: str | None = None,
    unseen: Unseen | None = None,
) -> SeriesRule:
    """The rule that a command line gives, see :class:`SeriesRule`.

    Args:
        modality: such as ``MR``, or ``learned``; None: any.
        description: a regular expression, or ``learned``; None: any.
        orientation: ``axial``, ``coronal`` or ``sagittal``; None: any.
        unseen: of the model.

    Raises:
        BundleError: for a condition that has no meaning.
    """
    wanted = {MODALITY: modality, DESCRIPTION: description, ORIENTATION: orientation}
    return SeriesRule({keyword: text for keyword, text in wanted.items() if text is not None}, unseen)


class Choice(NamedTuple):
    """What becomes of the groups of files in a folder.

    Attributes:
        series: to be read. One whose header is damaged is among them: reading it tells.
        no_images: sound objects that are no images to examine, counted by what they are.
        misfits: series that the rule excludes, counted by the reason.
    """

    series: list[Series]
    no_images: Counter[str]
    misfits: Counter[str]

    @property
    def passes_over(self) -> bool:
        """Whether there is something that is not read."""
        return bool(self.no_images or self.misfits)

    def __str__(self) -> str:
        """What is passed over, such as ``1 series (not axial: 1) and 3 files (localizer: 2, Basic Text SR: 1)``."""
        counted = [(self.misfits, "series"), (self.no_images, "files")]
        return " and ".join(f"{counts.total()} {what} ({_listed(counts)})" for counts, what in counted if counts)


def choose(groups: Iterable[Series], rule: SeriesRule | None = None) -> Choice:
    """Which of ``groups`` (:func:`bundle.dicom.series.group_series`) are examined; None: all that are images."""
    choice = Choice([], Counter(), Counter())
    for group in groups:
        try:
            header = read_headers(group.files[:1])[0]
        except NoImageError as error:
            logger.debug(f"passed over: {error}")
            choice.no_images[error.kind] += len(group.files)
            continue
        except BundleError:
            choice.series.append(group)
            continue
        if reason := rule and rule.misfit(header):
            logger.debug(f"passed over: series of '{group.files[0]}' ({reason})")
            choice.misfits[reason] += 1
        else:
            choice.series.append(group)
    return choice


def _read(keyword: str, wanted: Any) -> list[Any]:
    """The parts of a condition, each of which must hold: texts and numbers, and ``(number, comparison)``."""
    if tag_for_keyword(keyword) is None:
        raise BundleError(f"'{keyword}' is no attribute of DICOM: give a keyword, such as {DESCRIPTION}")
    if isinstance(wanted, list) and len(wanted) == 2 and _is_number(wanted[0]):
        if _is_number(wanted[1]):
            return [(wanted[0], ">="), (wanted[1], "<=")]
        if isinstance(wanted[1], str) and wanted[1] in _COMPARISONS:
            return [tuple(wanted)]
    if _is_number(wanted):
        return [wanted]
    parts = wanted if isinstance(wanted, list) else [wanted]
    if not parts or not all(map(_is_pattern, parts)):
        raise BundleError(
            f"the condition {shown(wanted)} of {keyword} has no meaning: give a regular expression, '!' and one, a "
            'number, [5, "<="], [3, 5], or a list of texts'
        )
    if LEARNED in parts and keyword not in _KINDS:
        raise BundleError(f"{keyword} cannot be '{LEARNED}': only {' and '.join(_KINDS)} can")
    if keyword == ORIENTATION and not (len(parts) == 1 and str(parts[0]).lower() in PLANES_ACROSS):
        raise BundleError(f"the orientation {shown(wanted)} is unknown: give {', '.join(PLANES_ACROSS)}")
    return parts


def _misfit(keyword: str, part: Any, header: Dataset) -> str | None:
    """Why ``header`` does not fulfill one part of a condition; None if it does."""
    if keyword == ORIENTATION:
        return None if _plane(header) == part.lower() else f"not {part.lower()}"
    if isinstance(part, str):
        excluded = part.startswith("!")
        pattern = part.removeprefix("!")
        found = any(_found(pattern, text) for text in _texts(keyword, header))
        return None if found != excluded else f"{keyword} {'with' if excluded else 'without'} '{pattern}'"
    number, comparison = part if isinstance(part, tuple) else (part, "==")
    try:
        fits = all(_COMPARISONS.get(comparison, operator.eq)(float(text), number) for text in _texts(keyword, header))
    except ValueError:
        fits = False
    return None if fits else f"{keyword} not {comparison} {number:g}"


def _texts(keyword: str, header: Dataset) -> list[str]:
    """The values of an attribute; one empty text if there is none."""
    value = header.get(keyword)
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [str(value).strip() for value in values if value is not None] or [""]


def _found(pattern: str, text: str) -> bool:
    return bool(pattern.casefold() == text.casefold() or re.search(pattern, text, re.IGNORECASE))


def _plane(header: Dataset) -> str | None:
    """The anatomical plane that slices are closest to; None if the header tells no orientation."""
    groups = [
        *header.get("SharedFunctionalGroupsSequence", ()),
        *list(header.get("PerFrameFunctionalGroupsSequence", ()))[:1],
    ]
    places = [header, *(item for group in groups for item in group.get("PlaneOrientationSequence", ()))]
    told = next((place.get(ORIENTATION) for place in places if place.get(ORIENTATION)), None)
    if told is None or len(told) != 6:
        return None
    cosines = np.array(told, dtype=float).reshape(2, 3)
    return PLANES_ACROSS[int(np.abs(np.cross(*cosines)).argmax())]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str) or not value.removeprefix("!"):
        return False
    try:
        re.compile(value.removeprefix("!"))
    except re.error:
        return False
    return True


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in counts.most_common())
