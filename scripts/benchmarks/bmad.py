"""This bundle, the paper's recipe and peers on the sets of BMAD, or on any data set in their layout, in one table.

    python -m scripts.benchmarks.bmad --data BMAD --out RESULTS

``configs/benchmark.json`` says what is compared: sets, protocols and methods, each of which is a list of config files
and knobs of the bundle; peers too, by ``scripts/benchmarks/peers.json``. A method may be ``like`` another one and hold
only what differs, and have knobs for backbones whose names begin with a word such as ``efficientnet``; with
``backbones`` it is for no others, and left out where it was not asked for. ``seeds`` of a
method is how many of those that are asked for it gets, all without it: for one with no chance in it, or a slow one. A
cell is a method on a set with a seed. Each runs the bundle's own commands in processes of their own
(:mod:`scripts.benchmarks.cells`), and is not run again while its knobs, the code, the weights and the data are the
same: an interrupted run goes on by the same command.

The page is of one half of the test images (``--part``, :func:`scripts.benchmarks.tables.part_of`), so that choices can
be made on the other. Numbers and differences to the reference have intervals (:mod:`scripts.benchmarks.bootstrap`).

Source of the sets: Bao et al., 'BMAD: Benchmarks for Medical Anomaly Detection', arXiv 2306.11876.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from bundle.command_line import read_config, read_knobs
from bundle.data.cases import SPLITS, Case, find_splits
from bundle.errors import BundleError, check_choice
from bundle.networks import FeatureNetwork
from bundle.networks.weights import find_weights
from bundle.provenance import data_fingerprint, data_words, git_commit, is_synthetic
from bundle.transforms.masks import apply_mask_rule
from scripts.benchmarks.bootstrap import DRAWS, compare
from scripts.benchmarks.cells import known_result, last_words, missing_protocols, tables_of
from scripts.benchmarks.common import ROOT, machine_words, read, say, write
from scripts.benchmarks.report import write_report
from scripts.benchmarks.tables import PARTS

DEPTH = 4  # folders below --data in which a set may lie; BMAD's archives unpack to Liver/Train/hist_DIY and the like
PATHS = ("folder", "command", "data")  # of a cell, on this machine: no part of a report


@dataclass(frozen=True)
class DataSet:
    """A data set in BMAD's layout.

    Attributes:
        name: that of BMAD's set, or of the folder.
        folder: holds ``train``, ``valid`` and ``test``.
        splits: see :func:`bundle.data.cases.find_splits`.
        counts: images that each split uses; anomalous validation images are not used.
        listed: images that are there, anomalous validation images too, as BMAD counts its sets.
        fingerprint: of images and masks.
    """

    name: str
    folder: Path
    splits: dict[str, list[Case]]
    counts: dict[str, int]
    listed: dict[str, int]
    fingerprint: str


def find_sets(roots: Sequence[Path], config: dict[str, Any], wanted: list[str] | None) -> dict[str, Path]:
    """The folder of every set: those in and below ``roots`` that have one of BMAD's names, or a root by its own name.

    Raises:
        BundleError: if a name is unknown, a wanted set or all sets are missing, or two folders claim to be one set.
    """
    for name in wanted or ():
        check_choice("set", name, config["sets"])
    found: dict[str, Path] = {}
    for root in roots:
        for folder in set_folders(root):
            own = set_name(folder, root, config) or (root.absolute().name if folder == root else None)
            if own in found:
                raise BundleError(f"'{found[own]}' and '{folder}' are both the set {own}: rename one, or move it away")
            if own is not None:
                found[own] = folder
    missing = [name for name in wanted or config["sets"] if name not in found]
    if missing and (wanted or not found):
        raise BundleError(
            f"no {' or '.join(missing)} in {words_of(roots)}: download {'it' if len(missing) == 1 else 'them'} from "
            f"{config['download']} and unpack to '{roots[0] / missing[0]}' and so on, or give --data a folder with "
            "train, valid and test"
        )
    if missing and not all(holds_splits(root) for root in roots):
        say(f"not in {words_of(roots)}, and left out: {', '.join(missing)} ({config['download']})")
    return {name: folder for name, folder in found.items() if not wanted or name in wanted}


def words_of(paths: Iterable[Path]) -> str:
    """The paths as a list in a sentence."""
    return " and ".join(f"'{path}'" for path in paths)


def set_folders(root: Path) -> Iterator[Path]:
    """Folders in BMAD's layout in and below ``root``; what lies in one of them is its own."""
    for directory, subfolders, _ in os.walk(root, followlinks=True):
        folder = Path(directory)
        if holds_splits(folder):
            yield folder
        if holds_splits(folder) or len(folder.relative_to(root).parts) >= DEPTH:
            subfolders.clear()
        subfolders.sort()


def holds_splits(folder: Path) -> bool:
    """Whether the folder has what BMAD calls train and test."""
    return folder.is_dir() and {"train", "test"} <= {sub.name.lower() for sub in folder.iterdir() if sub.is_dir()}


def set_name(folder: Path, root: Path, config: dict[str, Any]) -> str | None:
    """BMAD's set that ``folder``, or the closest folder around it up to ``root``, is named after, in any case."""
    names = {spelling.lower(): name for name, one in config["sets"].items() for spelling in one["folders"]}
    parts = folder.absolute().relative_to(root.absolute().parent).parts
    return next((names[part.lower()] for part in reversed(parts) if part.lower() in names), None)


def read_set(name: str, folder: Path) -> DataSet:
    """Find the images of a set.

    Raises:
        BundleError: if there is nothing to learn from or to test on.
    """
    splits = find_splits(folder)
    if not splits["test"]:
        raise BundleError(f"'{folder}' has no test images: put them into test/good and test/Ungood")
    counts = {split: len(splits[split]) for split in SPLITS}
    listed = {**counts, "validation": len(find_splits(folder, needed=("validation",))["validation"])}
    return DataSet(name, folder, splits, counts, listed, data_fingerprint(chain.from_iterable(splits.values())))


def make_recipe(config: dict[str, Any], method: str, data_set: DataSet, seed: int, given: dict[str, Any]) -> Any:
    """What decides the result of a cell, apart from the protocol.

    Later knobs win: those of the set for the method's preset, of the method, of the method for a family of backbones
    (``dinov3``, ``efficientnet``), and those ``given`` for all methods.

    Raises:
        BundleError: for an unknown knob, with the closest name, or if there are no weights.
    """
    whole = config["methods"][method]
    preset = config["sets"].get(data_set.name, {}).get("knobs", {}).get(whole.get("preset", "ours"), {})
    asked = {**preset, **whole.get("knobs", {}), **given}
    backbone = find_backbone(asked.get("backbone", "auto"), asked.get("weights"))
    family = family_of(whole, backbone)
    configs = [*whole.get("configs", []), *family.get("configs", [])]
    knobs = {**preset, **whole.get("knobs", {}), **family.get("knobs", {}), **given, "backbone": backbone}
    knobs = read_knobs(knobs, read_config([str(ROOT / name) for name in ("configs/train.json", *configs)]))
    features = describe_features(backbone, *(knobs.get(key) for key in ("weights", "weights_sha256")))
    return {
        "set": data_set.name,
        "method": method,
        "seed": seed,
        "configs": configs,
        "knobs": knobs,
        "features": features,
        "data": data_set.fingerprint,
        "code": code_fingerprint(),
    }


def suits(method: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether the method is for the backbone that the bundle takes by the knobs that are ``given``."""
    asked = {**method.get("knobs", {}), **given}
    backbone = find_backbone(asked.get("backbone", "auto"), asked.get("weights"))
    return backbone.startswith(tuple(method.get("backbones", [""])))


def family_of(method: dict[str, Any], backbone: str) -> dict[str, Any]:
    """Configs and knobs that the method has for backbones of this name alone."""
    return next((method[key] for key in method if backbone.startswith(key)), {})


@cache
def find_backbone(backbone: str, weights: str | None) -> str:
    """The backbone that the bundle takes, never 'auto'."""
    return find_weights(backbone, weights).backbone


@cache
def describe_features(backbone: str, weights: str | None, weights_sha256: str | None) -> dict[str, Any]:
    """The backbone and the hash of its weights."""
    features = FeatureNetwork(backbone, weights, weights_sha256)
    return {"backbone": features.backbone_name, "weights": features.weights_id}


@cache
def code_fingerprint() -> str:
    """A sha256 over all code and configs that a cell runs."""
    configs = (
        path for path in (ROOT / "configs").glob("*.json") if path.name not in ("benchmark.json", "metadata.json")
    )
    digest = hashlib.sha256()
    scripts = ROOT / "scripts/benchmarks"
    for path in sorted([*(ROOT / "bundle").rglob("*.py"), *configs, *scripts.glob("*peer*"), scripts / "tables.py"]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def run_cell(
    folder: Path, recipe: dict[str, Any], protocols: dict[str, Any], data_set: DataSet, cache_dir: Path
) -> Any:
    """The result of a cell; what is missing of it is measured.

    Raises:
        BundleError: if the bundle's command fails, with its error.
    """
    result = known_result(folder, recipe)
    if missing_protocols(result, protocols):
        say(f"{recipe['set']}, {recipe['method']}, seed {recipe['seed']}")
        job = {
            "recipe": recipe,
            "protocols": protocols,
            "dataset_dir": str(data_set.folder.resolve()),
            "cache_dir": str(cache_dir),
        }
        result = run_job("train", folder, job)
    return result


def run_times(folder: Path, cells: dict[str, Any], data_set: DataSet, given: argparse.Namespace) -> Any:
    """The seconds per image of each method, see :func:`scripts.benchmarks.cells.measure_times`.

    Raises:
        BundleError: if a model cannot be run.
    """
    recipe = {
        "cells": {name: cell["recipe"] for name, cell in cells.items()},
        "batch_size": given.batch_size,
        "repeats": given.repeats,
        "images": given.timed_images,
    }
    if (folder / "result.json").is_file():
        result = read(folder / "result.json")
        if result["recipe"] == recipe:
            return result
    say(f"{data_set.name}, milliseconds per image")
    methods = {
        name: {**{key: cell["recipe"][key] for key in ("configs", "knobs")}, "checkpoint": f"{cell['folder']}/model.pt"}
        for name, cell in cells.items()
    }
    cases = spread(data_set.splits["test"], given.timed_images)
    cases = [
        {**case, **{key: str(Path(case[key]).resolve()) for key in ("image", "mask") if key in case}} for case in cases
    ]
    return run_job("time", folder, {"recipe": recipe, "methods": methods, "cases": cases})


def run_job(action: str, folder: Path, job: dict[str, Any]) -> Any:
    """Let a process of its own do it, and read the result."""
    write(folder / "job.json", job)
    log = folder / "log.txt"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "scripts.benchmarks.cells", action, str(folder)]
        status = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, check=False).returncode
    if status:
        raise BundleError(last_words(log))
    return read(folder / "result.json")


def spread(items: list[Any], count: int) -> list[Any]:
    """``count`` of the items at equal distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def slug(name: str) -> str:
    """``name`` as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def benchmark(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing; everything that goes into the report.

    Raises:
        BundleError: for a wrong name or knob, or missing data. What fails in a cell is a line of ``failed`` instead.
    """
    config = load_config(given.config)
    methods = chosen("method", given.methods, config["methods"])
    protocols = chosen("protocol", given.protocols, config["protocols"])
    check_choice("part", given.part, PARTS)
    out = given.out.resolve()
    sets = [read_set(name, folder) for name, folder in find_sets(given.data, config, given.sets).items()]
    if given.methods is None:
        methods = {name: method for name, method in methods.items() if suits(method, given.knobs)}
    plan = [
        (data_set, make_recipe(config, name, data_set, seed, given.knobs))
        for data_set in sets
        for name, method in methods.items()
        for seed in given.seeds[: method.get("seeds")]
    ]

    def measure(data_set: DataSet, recipe: dict[str, Any]) -> dict[str, Any] | BundleError:
        folder = out / "cells" / slug(data_set.name) / slug(recipe["method"]) / f"seed-{recipe['seed']}"
        try:
            result = run_cell(folder, recipe, protocols, data_set, out / "feature_cache")
        except BundleError as error:
            say(f"failed: {error}")
            return error
        return {**result, "folder": str(folder)}

    failed: dict[str, str] = {}
    results: dict[str, Any] = {one.name: describe_set(one, config) for one in sets}
    with ThreadPoolExecutor(given.jobs) as pool:  # each thread waits for a process
        outcomes = list(pool.map(measure, *zip(*plan, strict=True)))
    for (data_set, recipe), outcome in zip(plan, outcomes, strict=True):
        if isinstance(outcome, BundleError):
            failed[f"{data_set.name}, {recipe['method']}, seed {recipe['seed']}"] = str(outcome)
        else:
            results[data_set.name]["cells"].setdefault(recipe["method"], []).append(outcome)
    for data_set in sets:
        known = results[data_set.name]["cells"]
        first = {name: cells[0] for name, cells in known.items()}
        folder = out / "cells" / slug(data_set.name) / "times"
        try:
            timed = first and given.repeats
            results[data_set.name]["times"] = run_times(folder, first, data_set, given) if timed else None
        except BundleError as error:
            failed[f"{data_set.name}, milliseconds per image"] = str(error)
        results[data_set.name]["compared"] = {
            protocol: compare_cells(known, protocol, config["reference"], given) for protocol in protocols
        }
    for cells in (cells for one in results.values() for cells in one["cells"].values()):
        cells[:] = [{key: value for key, value in cell.items() if key not in PATHS} for cell in cells]
    return {
        "command": f"python -m scripts.benchmarks.bmad {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(ROOT),
        "machine": machine_words(),
        "protocols": protocols,
        "reference": config["reference"],
        "part": given.part,
        "draws": given.draws,
        "patient_pattern": given.patient_pattern,
        "published": config["published"],
        "methods": {name: config["methods"][name] for name in methods},
        "sets": results,
        "failed": failed,
    }


def compare_cells(
    methods: dict[str, list[dict[str, Any]]], protocol: str, reference: str, given: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy with intervals of the measured cells of a set, see :func:`scripts.benchmarks.bootstrap.compare`."""
    tables = {name: [tables_of(Path(cell["folder"]), protocol) for cell in cells] for name, cells in methods.items()}
    return compare(tables, reference, given.part, given.draws, given.patient_pattern)


def describe_set(data_set: DataSet, config: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the data."""
    known = config["sets"].get(data_set.name, {})
    return {
        "title": known.get("title", data_set.name),
        "data": data_words(data_set.folder),
        "synthetic": is_synthetic(data_set.folder),
        "images": data_set.counts,
        "listed": data_set.listed,
        "expected": known.get("images"),
        "fingerprint": data_set.fingerprint,
        "cells": {},
        "times": None,
    }


def chosen(what: str, names: Iterable[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The ``options`` of these names, all of them if there are none."""
    return {name: options[check_choice(what, name, options)] for name in names or options}


def load_config(path: Path) -> dict[str, Any]:
    """Read ``configs/benchmark.json``, or the user's.

    Raises:
        BundleError: if it is no JSON, lacks something, or has a misspelled mask rule.
    """
    try:
        config = read(path)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"cannot read --config '{path}' ({error}): give a file like configs/benchmark.json"
        ) from error
    missing = {"download", "sets", "protocols", "reference", "methods", "published"} - set(config)
    if missing:
        raise BundleError(f"--config '{path}' lacks {', '.join(sorted(missing))}: see configs/benchmark.json")
    for protocol in config["protocols"].values():
        apply_mask_rule(0, protocol["mask_rule"])  # type: ignore[arg-type]
    return {**config, "methods": {name: inherit(config["methods"], name) for name in config["methods"]}}


def inherit(methods: dict[str, Any], name: str) -> dict[str, Any]:
    """The method with what it takes from the one that it is ``like``: all but the published row and the seeds.

    Raises:
        BundleError: if there is no such method.
    """
    own = methods[name]
    if "like" not in own:
        return own
    base = inherit(methods, check_choice("method", own["like"], methods))
    taken = {key: value for key, value in base.items() if key not in ("published", "seeds")}
    return {**taken, **own, "knobs": {**base.get("knobs", {}), **own.get("knobs", {})}}


def knobs_of(text: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"no JSON object ({error}): give '{{\"max_epochs\": 5}}'") from error


def pattern_of(text: str) -> str:
    """A regular expression from the command line."""
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression ({error}): give 'patient_([0-9]+)'") from error


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", nargs="+", type=Path, required=True, help="folders of BMAD's sets, or with train, valid and test")
    add("--out", type=Path, required=True, help="folder of the report and of the cells, which are kept")
    add("--sets", nargs="+", metavar="NAME", help="default: all that are there")
    add("--methods", nargs="+", metavar="NAME", help="default: all of the config")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    add("--protocols", nargs="+", default=["native", "paper240"], metavar="NAME", help="default: native paper240")
    add("--knobs", type=knobs_of, default={}, metavar="JSON", help="knobs of the bundle for all methods")
    add("--config", type=Path, default=ROOT / "configs/benchmark.json", help="sets, protocols and methods")
    add("--part", default=PARTS[0], metavar="NAME", help="of the test images: report (the default), development or all")
    add(
        "--patient_pattern",
        type=pattern_of,
        metavar="REGEX",
        help="its first group is the patient in the name of a test image; default: each image is another one",
    )
    add("--draws", type=int, default=DRAWS, metavar="N", help=f"of the bootstrap over test images; default: {DRAWS}")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells at once, not the timing; with OMP_NUM_THREADS set to fit",
    )
    add("--batch_size", type=int, default=8, metavar="N", help="images that are timed together; default: 8")
    add("--repeats", type=int, default=5, metavar="N", help="rounds of timing, 0 for none; default: 5")
    add("--timed_images", type=int, default=32, metavar="N", help="test images that are timed; default: 32")
    return parser


def main() -> None:
    """Run the benchmark and print its tables."""
    given = make_parser().parse_args()
    try:
        for name in ("draws", "jobs", "batch_size", "repeats", "timed_images"):
            least = 0 if name == "repeats" else 1
            if getattr(given, name) < least:
                raise BundleError(f"--{name} must be at least {least}, got {getattr(given, name)}")
        results = benchmark(given)
    except BundleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where this one was")
    print(write_report(results, given.out))
    if results["failed"]:
        sys.exit(f"error: {len(results['failed'])} measurements failed, see {given.out / 'benchmark.md'}")


if __name__ == "__main__":
    main()
