"""Pictures of cases for a page: small, and with the map in numbers, so that the page can move its threshold."""

from __future__ import annotations

import base64
import io
from bisect import insort
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from bundle.figures import Placement, body, picture, resized, zoom_to
from bundle.results import CaseResult, heat

SIDE = 256  # pixels: the longer side of an image
MAP_SIDE = 128  # pixels: the same of a map, whose patches are far larger
MOST_SLICES = 64  # of a volume
QUALITY = 75  # of WebP, of images alone

Pictures = dict[str, Any]
"""Plain JSON values, see :func:`pictures_of`."""


class Ranked(NamedTuple):
    """A case among others of its group."""

    score: float
    name: str
    pictures: Pictures


class Extremes:
    """Pictures of the cases with the highest and the lowest scores of each group; of others none are kept.

    Args:
        most: how many at either end of each group.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.groups: dict[str, list[Ranked]] = {}

    def add(self, group: str, score: float, name: str, make: Callable[[], Pictures]) -> None:
        """Add a case; ``make`` is called only if its pictures are kept for now."""
        ranked = self.groups.setdefault(group, [])
        if len(ranked) == 2 * self.most and ranked[self.most - 1].score <= score <= ranked[self.most].score:
            return
        insort(ranked, Ranked(score, name, make()), key=lambda one: one[:2])
        if len(ranked) > 2 * self.most:
            del ranked[self.most]

    def join(self, other: Extremes, rank: int) -> None:
        """Add what the process ``rank`` has kept."""
        for group, ranked in other.groups.items():
            for score, name, pictures in ranked:
                self.add(group, score, name, partial(dict, pictures))

    def in_turn(self) -> Iterator[Ranked]:
        """All that are kept, the most telling ones first: the highest and the lowest of each group in turn."""
        ends = [list(ranked) for ranked in self.groups.values()]
        from_above = True
        while any(ends):
            for ranked in ends:
                if ranked:
                    yield ranked.pop(-1 if from_above else 0)
            from_above = not from_above


def pictures_of(
    result: CaseResult,
    image: Tensor,
    truth: np.ndarray | None,
    air: float,
    place: Placement | None,
    slices: int = 1,
) -> Pictures:
    """The worst slice of a case, or up to ``slices`` evenly spread ones with it among them.

    Args:
        result: of the case.
        image: [C, rows, columns, slices] in [0, 1].
        truth: [rows, columns, slices], above 0 in lesions; None where nobody knows.
        air: see :func:`bundle.figures.body`.
        place: of the slices in the patient; None if they have none.

    Returns:
        ``frames``, with ``slice``, and ``image``, ``map`` and ``truth`` as data URIs (``truth`` is empty where there is
        none); ``start``, the position of the worst slice among them; ``edges`` and ``millimeters``, the letters of
        directions and the width, empty and 0 where they are unknown.
    """
    worst, count = result.worst_position, image.shape[-1]
    spread = {int((step + 0.5) * count / slices) for step in range(slices)} if slices > 1 else set()
    positions = sorted(spread | {worst}) if slices < count else list(range(count))
    return {
        "start": positions.index(worst),
        "edges": place.edges if place else "",
        "millimeters": round(image.shape[2] * place.spacing[1], 3) if place else 0,
        "frames": [_frame(result, image, truth, air, place, position) for position in positions],
    }


def _frame(
    result: CaseResult, image: Tensor, truth: np.ndarray | None, air: float, place: Placement | None, position: int
) -> dict[str, Any]:
    shown = picture(image, position)
    scale = result.threshold if 0 < result.threshold < np.inf else 1.0
    share = heat(result.anomaly_map[0, ..., position], scale) * body(shown, air)
    lesion = None if truth is None else truth[..., position] > 0
    large, small = (zoom_to(shown, place, side) for side in (SIDE, MAP_SIDE))
    return {
        "slice": result.slices[position].index if result.on_file else position,
        "image": _encoded(resized(shown, place, large), "webp", quality=QUALITY, method=4),
        "map": _encoded(resized(share, place, small), "png", optimize=True),
        "truth": _encoded(resized(lesion, place, small) > 0, "png") if lesion is not None and lesion.any() else "",
    }


def _encoded(values: np.ndarray, kind: str, **options: Any) -> str:
    """``values`` in [0, 1], or bool, as a data URI."""
    if values.dtype == bool:
        image = Image.fromarray(values)
    else:
        image = Image.fromarray((255 * np.clip(values, 0, 1)).round().astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
