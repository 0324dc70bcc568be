"""The page of a report: one HTML file that loads nothing, made by Jinja2, with charts by Vega."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import metadata, resources
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps

from bundle.errors import BundleError
from bundle.figures import COLORMAP, OUTLINE
from bundle.metrics import METRIC_NAMES
from bundle.report.pictures import Ranked

PACKAGES = ("torch", "monai", "timm", "numpy", "pydicom", "nibabel", "itk-core")
TITLES = {"training": "Training", "evaluating": "Evaluation", "inferring": "Inference"}


def page_of(record: dict[str, Any], shown: Sequence[Ranked], volumes: Sequence[Ranked], limit: float) -> str:
    """The page.

    Args:
        record: what it tells, as plain JSON values.
        shown: cases with a picture of their worst slice, the most important ones first.
        volumes: cases with all of their slices, the same; they come after.
        limit: bytes that the page may have; pictures that would exceed it are left out.

    Raises:
        BundleError: if there is no room for the page without pictures.
    """
    bare = _rendered(record, {ranked.name: {} for ranked in shown})  # what leads to pictures takes room, too
    room = limit - len(bare.encode())
    if room < 0:
        raise BundleError(
            f"the report takes {len(bare.encode()) / 1e6:.1f} MB without a picture, but report_limit_mb is "
            f"{limit / 1e6:g}: give more, or 0 for no report"
        )
    pictures: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for ranked in (*shown, *volumes):
        size = len(_json(ranked.pictures)) + len(_json(ranked.name)) + 8
        more = size - sizes.get(ranked.name, 0)
        if more <= room:
            room -= more
            pictures[ranked.name], sizes[ranked.name] = ranked.pictures, size
    return _rendered(record, pictures)


def package_versions() -> dict[str, str]:
    """The versions of the packages that a map depends on."""
    return {name: metadata.version(name) for name in PACKAGES}


def _rendered(record: dict[str, Any], pictures: dict[str, Any]) -> str:
    files = {name: _read(name) for name in ("page.css", "page.js", "charts.js")}
    template = _environment().from_string(_read("page.html.jinja"))
    specs = {path.name.removesuffix(".json"): json.loads(path.read_text("utf-8")) for path in _folder("charts")}
    return template.render(
        record=record,
        title=TITLES[record["command"]],
        metrics=[
            (name, record["metrics"][name], _interval(record, name)) for name in METRIC_NAMES if record["metrics"]
        ],
        folders=_folders(record),
        has_slices=any(case["slices"] > 1 for case in record["cases"]),
        pictured=pictures.keys(),
        css=Markup(files["page.css"]),
        scripts=[Markup(files["charts.js"]), Markup(files["page.js"])],
        hashes=" ".join(f"'sha256-{_hash(files[name])}'" for name in ("charts.js", "page.js")),
        blocks={
            "record": Markup(_json(record)),
            "pictures": Markup(_json(pictures)),
            "look": Markup(_json(_look(specs))),
        },
    )


def _look(specs: dict[str, Any]) -> dict[str, Any]:
    """What the page draws with: the charts, and the colors of maps and masks."""
    colors = (255 * colormaps[COLORMAP](range(256))[:, :3]).round().astype(int).tolist()
    return {"charts": specs, "colors": colors, "outline": OUTLINE}


def _folders(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of each folder, such as the series of a study, where any has several; the highest score first."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in record["cases"]:
        groups[str(PurePosixPath(case["name"]).parent)].append(case)
    if len(groups) < 2 or len(groups) == len(record["cases"]):
        return []
    limit = record["rates"]["image_threshold"]
    found = [
        {
            "name": name,
            "cases": len(cases),
            "score": max(case["score"] for case in cases),
            "above": sum(limit is not None and case["score"] > limit for case in cases),
            "unlike": sum(case["like"] is False for case in cases),
        }
        for name, cases in groups.items()
    ]
    return sorted(found, key=lambda folder: -folder["score"])


def _interval(record: dict[str, Any], metric: str) -> dict[str, float] | None:
    """That of a metric, by its name in :data:`~bundle.metrics.METRIC_NAMES`; None where there is none."""
    of_cases = metric.startswith("image_")
    curves = record["of_cases" if of_cases else "of_pixels"]
    return curves["metrics"].get(metric.removeprefix("image_" if of_cases else "pixel_")) if curves else None


@cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent, "href": _href, "words": _words}
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "not defined"
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 10**digits else f"{value:.{digits}g}"


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.3g}\u00a0%"


def _href(path: str) -> str:
    return "./" + quote(path)


def _words(name: str) -> str:
    """A name of a metric, as people write it."""
    known = {"auroc": "AUROC", "ap": "AP", "aupro": "AUPRO", "fpr": "FPR", "tpr": "TPR", "dice": "Dice"}
    words = [known.get(word, word) for word in name.split("_")]
    return " ".join([*words, "%"] if words[-2:-1] == ["95"] else words).replace("95 TPR %", "95 % TPR")


@cache
def _read(name: str) -> str:
    return (_here() / name).read_text("utf-8")


def _folder(name: str) -> list[Any]:
    return sorted((path for path in (_here() / name).iterdir() if path.name.endswith(".json")), key=lambda p: p.name)


def _here() -> Any:
    return resources.files(__package__)


def _json(value: Any) -> str:
    """JSON that is safe within a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
