"""What headers and names tell of how an image was made, in words of a fixed vocabulary: free text may hold names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

# kind -> word -> how it is spelled in series descriptions, protocol names and file names, between separators
VOCABULARY = {
    "sequence": {
        "flair": r"flair|(dark|tirm)_?fluid",
        "t1": r"t1w?|t1(ce|c|gd)|mp2?rage|bravo|fspgr",
        "t2": r"t2w?",
        "t2star": r"t2(star|s)w?|gre",
        "pd": r"pdw?",
        "dwi": r"dwi|dti|diff(usion)?|trace[wb]?",
        "adc": r"adc",
        "swi": r"swi|swan|venobold",
        "stir": r"stir|tirm",
        "angiography": r"mra|tof|angio(graphy)?|cta",
        "perfusion": r"perf(usion)?|dsc|dce|asl",
        "bold": r"bold|fmri",
    },
    "contrast": {"agent": r"t1(ce|c|gd)|gd|gado\w*|ce|contrast|kontrast|post|enhanced|cta"},
    "kernel": {
        "soft": r"soft|standard|smooth|[bhijqu][rf]?[1-4]\d[fsd]?",
        "sharp": r"bone|lung|sharp|edge|[bhijqu][rf]?[5-9]\d[fsd]?",
    },
}
_SEPARATORS = re.compile(r"[^a-z0-9]+")
_TEXTS = {"sequence": ("SeriesDescription", "ProtocolName"), "kernel": ("ConvolutionKernel",)}

Facts = dict[str, list[str]]
"""Words by kind; a kind of which nothing is known has none."""


def words_in(texts: Iterable[str], kind: str) -> list[str]:
    """The words of a ``kind`` in :data:`VOCABULARY` that ``texts`` hold, in order; FLAIR is not also T2."""
    parts = [part for text in texts for part in _SEPARATORS.split(text.lower()) if part]
    parts += [f"{one}_{other}" for one, other in pairwise(parts)]
    found = {word for word, spelled in VOCABULARY[kind].items() if any(re.fullmatch(spelled, part) for part in parts)}
    return sorted(found - {"t1", "t2", "stir"} if "flair" in found else found)


def header_words(header: Dataset) -> Facts:
    """What a DICOM ``header`` tells; of a contrast agent, that it names none, too."""
    texts = {kind: [str(header.get(keyword) or "") for keyword in keywords] for kind, keywords in _TEXTS.items()}
    found = {kind: words_in(values, kind) for kind, values in texts.items()}
    agent = bool(str(header.get("ContrastBolusAgent") or "").strip()) or words_in(texts["sequence"], "contrast")
    return found | {"contrast": ["agent" if agent else "none"]}


def facts_of(meta: Mapping[str, Any]) -> Facts:
    """What is known of an image by its ``meta``, see :class:`~bundle.transforms.LoadCased`.

    A picture of 8 bits tells neither modality nor how its intensities came about.
    """
    known = {"modality": str(meta.get("modality") or ""), "scheme": str(meta.get("intensity_scheme") or "")}
    plain = {
        kind: [word] if word != "8bit" and re.fullmatch(r"\w{1,32}", word, re.ASCII) else []
        for kind, word in known.items()
    }
    return plain | {kind: list(words) for kind, words in meta.get("words", {}).items()}


def name_words(name: str) -> Facts:
    """What the ``name`` of a file tells, such as ``sub-01_ce-gd_T1w.nii.gz``."""
    return {kind: words_in([name], kind) for kind in ("sequence", "contrast")}
