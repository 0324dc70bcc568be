"""Numbers, protocols and backbones of the benchmark in words."""

from __future__ import annotations

from typing import Any

TITLES = {
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
}


def backbone_words(data_set: dict[str, Any]) -> str:
    """Backbones and weights, RANDOM where they are."""
    models = (cell["model"].partition(", ")[2] for cells in data_set["cells"].values() for cell in cells)
    return "; ".join(dict.fromkeys(models))


def commit_words(commit: str) -> str:
    """The short hash, and whether there were changes that are not in it."""
    hash_, plus, changes = commit.partition("+")
    return hash_[:12] + (f" with {changes}" if plus else "")


def counted(images: dict[str, int]) -> str:
    """The numbers of images of a set."""
    return f"{images['training']} / {images['validation']} / {images['test']} (training / validation / test)"


def protocol_words(protocol: dict[str, Any]) -> str:
    """Size and mask rule, which belong to every number."""
    size, via = protocol["evaluation_size"], protocol.get("mask_via")
    detour = "" if size is None or via is None else f" by {via}x{via}"
    return f"{'native size' if size is None else f'{size}x{size}'}, mask `{protocol['mask_rule']}`{detour}"


def with_deviation(value: list[float | None], scale: float = 1) -> str:
    """Mean ± deviation, two decimals where it is a percentage."""
    average, deviation = value
    if average is None:
        return "-"
    show = digits if scale == 1 else "{:.2f}".format
    return show(scale * average) + ("" if deviation is None else f" ± {show(scale * deviation)}")


def with_interval(value: list[float | None], interval: list[float] | None) -> str:
    """Percentage ± deviation, and its interval, which may be unknown."""
    limits = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return with_deviation(value, 100) + limits


def difference_words(difference: list[float] | None) -> str:
    """A difference [value, low, high] of shares in points, 'undecided' where the interval holds 0."""
    if difference is None:
        return "-"
    value, low, high = difference
    limits = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{limits} undecided" if low <= 0 <= high else limits


def digits(value: float | None) -> str:
    """``value`` in three digits or all that are before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def set_words(name: str, data_set: dict[str, Any]) -> str:
    """The title of a panel."""
    title = name if data_set["title"] == name else f"{name} ({data_set['title']})"
    return f"SYNTHETIC: {title}" if data_set["synthetic"] else title
