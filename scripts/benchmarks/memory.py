"""Peak memory and model size of this bundle and of PatchCore against the number of images and their size.

    python -m scripts.benchmarks.memory --out docs/performance

The bundle is measured by its real commands, each a process of its own, on slices of the synthetic sample cohort. This
process stays small: a child's peak starts from that of the process which started it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import (
    FIT_BATCH,
    MEGABYTE,
    ROOT,
    bundle_command,
    cost_of,
    in_batches,
    processor,
    say,
    write,
)

SLICES = 40  # of a subject of the sample cohort
VALIDATION = 20  # images
CORESET_LIMIT = 1000  # images; beyond, choosing PatchCore's coreset takes hours
SIZE_IMAGES = 16  # to learn from and to score, where the image size varies
BACKBONE = "efficientnet_lite0"


@dataclass
class Point:
    """One measurement: ``peak_mb`` resident at most, ``model_mb`` stored, at ``images`` of side ``image_size``."""

    series: str
    images: int
    image_size: int
    peak_mb: float
    model_mb: float | None = None


def peak_of(command: Sequence[str]) -> float:
    """Run ``command`` from the bundle's root; its peak resident memory in MB.

    Raises:
        RuntimeError: if it fails, with what it said last.
    """
    with tempfile.TemporaryFile() as log:
        cost = cost_of(command, log, {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "2"})
        if cost.status:
            log.seek(0)
            raise RuntimeError(f"{shlex.join(command)} failed: {log.read().decode()[-500:]}")
    return cost.peak_mb


def datalist(folder: Path, cohort: Path, training: int, test: int) -> Path:
    """A datalist of the first slices of the cohort.

    Raises:
        SystemExit: if it has too few.
    """
    healthy = sorted(cohort.glob("slices/train/good/*.png"))
    tested = sorted(cohort.glob("slices/test/*/img/*.png"))
    if len(healthy) < training + VALIDATION or len(tested) < test:
        sys.exit(f"error: '{cohort}' has {len(healthy)} healthy and {len(tested)} test slices: name a new folder")
    lists = {
        "training": [{"image": str(path)} for path in healthy[VALIDATION : VALIDATION + training]],
        "validation": [{"image": str(path)} for path in healthy[:VALIDATION]],
        "test": [_with_mask(path) for path in tested[:test]],
    }
    path = folder / f"datalist-{training}-{test}.json"
    path.write_text(json.dumps(lists), encoding="utf-8")
    return path


def _with_mask(image: Path) -> dict[str, Any]:
    if image.parts[-3] == "good":
        return {"image": str(image), "label": 0}
    return {"image": str(image), "label": str(image.parents[1] / "label" / image.name)}


def measure_bundle(folder: Path, cohort: Path, counts: Sequence[int], sizes: Sequence[int], side: int) -> list[Point]:
    """Training against the number of training images, evaluation against test images, inference against their size."""
    common = {"backbone": BACKBONE, "device": "cpu", "tracking_uri": "off", "hidden_channels": 64}
    points = []
    for count in counts:
        say(f"training on {count} images")
        output = folder / f"train-{count}"
        knobs = {**common, "image_size": side, "max_epochs": 1, "output_dir": output}
        data = datalist(folder, cohort, count, 0)
        peak = peak_of(bundle_command("training", "configs/train.json", dataset_dir=data, **knobs))
        stored = (output / "model.pt").stat().st_size / MEGABYTE
        points.append(Point("training", count, side, peak, stored))
    model = folder / f"train-{counts[0]}" / "model.pt"
    for count in counts:
        say(f"evaluating {count} images")
        knobs = {**common, "image_size": side, "checkpoint": model, "output_dir": folder / f"test-{count}"}
        data = datalist(folder, cohort, counts[0], count)
        files = "['configs/train.json','configs/evaluate.json']"
        points.append(
            Point("evaluation", count, side, peak_of(bundle_command("evaluating", files, dataset_dir=data, **knobs)))
        )
    for size in sizes:
        say(f"inference at {size} pixels")
        output = folder / f"size-{size}"
        knobs = {**common, "image_size": size, "output_dir": output}
        data = datalist(folder, cohort, SIZE_IMAGES, SIZE_IMAGES)
        run = bundle_command("training", "configs/train.json", dataset_dir=data, max_epochs=1, **knobs)
        peak_of(run)
        run = bundle_command("evaluating", "['configs/train.json','configs/evaluate.json']", dataset_dir=data, **knobs)
        points.append(Point("size", SIZE_IMAGES, size, peak_of(run), (output / "model.pt").stat().st_size / MEGABYTE))
    return points


def measure_peer(folder: Path, cohort: Path, counts: Sequence[int], sizes: Sequence[int], side: int) -> list[Point]:
    """PatchCore on the same images and features: fitting and scoring, each in a process of its own.

    Beyond :data:`CORESET_LIMIT` images it is fitted only up to the choice of its coreset.
    """

    def fit(data: Path, size: int, bank: Path) -> float:
        return peak_of([*command, "fit", "--datalist", str(data), "--side", str(size), "--bank", str(bank)])

    def score(data: Path, size: int, bank: Path) -> float:
        return peak_of([*command, "score", "--datalist", str(data), "--side", str(size), "--bank", str(bank)])

    command = [sys.executable, "-m", "scripts.benchmarks.memory", "--peer"]
    points = []
    for count in counts:
        say(f"PatchCore on {count} images")
        bank = folder / f"bank-{count}.pt"
        peak = fit(datalist(folder, cohort, count, 0), side, bank)
        if count <= CORESET_LIMIT:
            stored = bank.stat().st_size
        else:
            stored = json.loads(bank.with_suffix(".json").read_text())["bank_bytes"]
        points.append(Point("PatchCore fitting", count, side, peak, stored / MEGABYTE))
    for count in counts:
        say(f"PatchCore, scoring {count} images")
        peak = score(datalist(folder, cohort, counts[0], count), side, folder / f"bank-{counts[0]}.pt")
        points.append(Point("PatchCore scoring", count, side, peak))
    for size in sizes:
        say(f"PatchCore at {size} pixels")
        bank, data = folder / f"bank-size-{size}.pt", datalist(folder, cohort, SIZE_IMAGES, SIZE_IMAGES)
        fit(data, size, bank)
        points.append(
            Point("PatchCore size", SIZE_IMAGES, size, score(data, size, bank), bank.stat().st_size / MEGABYTE)
        )
    return points


def run_peer(action: str, data: Path, side: int, bank: Path) -> None:
    """``fit`` PatchCore in this process and write its memory ``bank``, or ``score`` test images with it."""
    import torch

    from bundle.networks import FeatureNetwork
    from scripts.benchmarks.images import load_images
    from scripts.benchmarks.peers import PatchCorePeer

    torch.manual_seed(0)
    lists = json.loads(data.read_text(encoding="utf-8"))
    files = [item["image"] for item in lists["training" if action == "fit" else "test"]]
    features = FeatureNetwork(BACKBONE)
    peer = PatchCorePeer(features)

    def batches() -> Any:
        for part in in_batches(files, FIT_BATCH):
            pixels = load_images(part, "cpu")[..., 0]
            resized = torch.nn.functional.interpolate(pixels, [side, side], mode="bilinear", antialias=True)
            yield features.normalize(resized)

    if action == "score":
        peer.memory_bank = torch.load(bank, weights_only=True)
        for batch in batches():
            peer.detect(batch)
    elif len(files) <= CORESET_LIMIT:
        peer.fit(batches())
        torch.save(peer.memory_bank.clone(), bank)
    else:
        size = round(peer.coreset_ratio * peer.keep(batches()))
        bank.with_suffix(".json").write_text(json.dumps({"bank_bytes": size}), encoding="utf-8")


def draw(results: dict[str, Any]) -> Any:
    """Four panels of what is in ``memory.json``: training images, test images, image size, model size."""
    from matplotlib.figure import Figure

    points = [Point(**one) for one in results["points"]]
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    series = {name: [point for point in points if point.series == name] for name in {p.series for p in points}}
    ours, theirs = "#30506e", "#b5651d"

    def line(panel: Any, name: str, horizontal: str, vertical: str, color: str, label: str) -> None:
        chosen = series.get(name, [])
        marker = "o-" if color == ours else "s--"  # told apart in gray, too
        panel.plot(
            [getattr(one, horizontal) for one in chosen],
            [getattr(one, vertical) for one in chosen],
            marker,
            color=color,
            label=label,
            clip_on=False,  # a point at 0 is shown whole
        )

    line(panels[0, 0], "training", "images", "peak_mb", ours, "this bundle, training")
    line(panels[0, 0], "PatchCore fitting", "images", "peak_mb", theirs, "PatchCore (anomalib), fitting")
    line(panels[0, 1], "evaluation", "images", "peak_mb", ours, "this bundle, evaluation")
    line(panels[0, 1], "PatchCore scoring", "images", "peak_mb", theirs, "PatchCore, scoring")
    line(panels[1, 0], "size", "image_size", "peak_mb", ours, "this bundle, evaluation")
    line(panels[1, 0], "PatchCore size", "image_size", "peak_mb", theirs, "PatchCore, scoring")
    line(panels[1, 1], "training", "images", "model_mb", ours, "this bundle, model.pt")
    line(panels[1, 1], "PatchCore fitting", "images", "model_mb", theirs, "PatchCore, memory bank")
    for panel, below, left in (
        (panels[0, 0], "training images", "peak resident memory, MB"),
        (panels[0, 1], "test images", "peak resident memory, MB"),
        (panels[1, 0], "image_size, pixels", "peak resident memory, MB"),
        (panels[1, 1], "training images", "stored model, MB"),
    ):
        panel.set(xlabel=below, ylabel=left)
        panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
        if "images" in below:
            panel.set_xscale("log")
    figure.suptitle(f"SYNTHETIC images, EfficientNet-Lite0; {results['machine']}", fontsize=9)
    return figure


def report(results: dict[str, Any]) -> str:
    """The Markdown page of what is in ``memory.json``."""
    points = [Point(**one) for one in results["points"]]
    side = next(point.image_size for point in points if point.series == "training")
    lines = [
        "# Memory",
        "",
        "Made by",
        "",
        "```sh",
        results["command"],
        "```",
        "",
        f"on {results['machine']}. Images are slices of the **synthetic** sample cohort; EfficientNet-Lite0 at "
        f"{side} x {side} where no other size is said. Peaks are those of whole processes, imports of torch and MONAI "
        "included; the "
        "bundle's are those of its real commands `training` and `evaluating`.",
        "",
        "![Peak memory and model size](memory.png)",
        "",
        "| what | images | image_size | peak memory, MB | stored model, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for point in points:
        stored = "-" if point.model_mb is None else f"{point.model_mb:.3g}"
        lines.append(f"| {point.series} | {point.images} | {point.image_size} | {point.peak_mb:.0f} | {stored} |")
    lines += [
        "",
        f"PatchCore keeps a tenth of all healthy patches. Beyond {CORESET_LIMIT} images the choice of these would take "
        "hours, so its peak is that of keeping all features until then, a lower bound, and its stored size a tenth of "
        "them. The bundle's features are on disk, in the feature cache; its pages that are mapped count as resident, "
        "though the system may take them back. PatchCore scores with the bank of the fewest training images, this "
        "bundle evaluates, metrics and figures included; where the size varies, both learn from "
        f"{SIZE_IMAGES} images and score {SIZE_IMAGES}.",
        "",
    ]
    return "\n".join(lines)


def make_cohort(folder: Path, count: int) -> None:
    """A sample cohort with ``count`` training and test slices, made by a process of its own."""
    subjects = -(-(count + VALIDATION) // SLICES)
    command = [sys.executable, "-m", "scripts.samples.cohort", "--out", str(folder), "--slices", str(SLICES)]
    # a few slices of diseased subjects are left out
    subprocess.run(
        [*command, "--train", str(subjects), "--valid", "0", "--test", str(2 * subjects)], cwd=ROOT, check=True
    )


def main() -> None:
    """Measure, or fit PatchCore in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="folder of memory.json, .md, .png")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000], help="numbers of images"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 448, 640], help="of images, in pixels")
    parser.add_argument("--side", type=int, default=96, help="image_size where the number of images varies")
    parser.add_argument("--cohort", type=Path, help="a sample cohort, made if it is missing; default: a temporary one")
    parser.add_argument("--peer", choices=["fit", "score"], help=argparse.SUPPRESS)
    parser.add_argument("--datalist", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        run_peer(given.peer, given.datalist, given.side, given.bank)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        cohort = (given.cohort or folder / "cohort").resolve()
        if not cohort.exists():
            say(f"making {max(given.counts)} slices each")
            make_cohort(cohort, max(given.counts))
        points = measure_bundle(folder, cohort, given.counts, given.sizes, given.side)
        points += measure_peer(folder, cohort, given.counts, given.sizes, given.side)
    command = f"python -m scripts.benchmarks.memory {shlex.join(sys.argv[1:])}".strip()
    machine = f"{processor()}, {os.cpu_count()} cores"
    results = {"command": command, "machine": machine, "points": [vars(point) for point in points]}
    write(given.out / "memory.json", results)
    (given.out / "memory.md").write_text(report(results), encoding="utf-8")
    draw(results).savefig(given.out / "memory.png", dpi=150)


if __name__ == "__main__":
    main()
