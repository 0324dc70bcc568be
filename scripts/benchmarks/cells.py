"""The measurements of :mod:`scripts.benchmarks.bmad`, each in a process of its own.

    python -m scripts.benchmarks.cells train FOLDER
    python -m scripts.benchmarks.cells time FOLDER

``FOLDER/job.json`` says what to do, ``FOLDER/result.json`` what came out. The process of ``train`` stays small, since a
child's peak memory starts from that of the process which started it; so nothing heavy is imported here.
"""

from __future__ import annotations

import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.errors import BundleError
from scripts.benchmarks.common import EVALUATE, MEGABYTE, METRICS, bundle_command, cost_of, read, write


def train(folder: Path) -> None:
    """Fit and score a method by the bundle's own commands; what is in ``result.json`` already is not done again.

    The model is fitted and scored under the first protocol in one command, whose time and memory are reported. Under
    each further one the trained model is scored again.
    """
    job = read(folder / "job.json")
    result = known_result(folder, job["recipe"])
    for name in missing_protocols(result, job["protocols"]):
        settings, others = split_knobs(job["recipe"]["knobs"])
        tables = {"_target_": "scripts.benchmarks.tables.TabledMetric", "path": str(tables_of(folder, name))}
        overlay = {"+model": settings, **others, **job["protocols"][name], "+test::metric": tables}
        write(folder / f"{name}.json", overlay)
        fits = not result["protocols"]
        run = "training" if fits else "evaluating"
        overlays = [*job["recipe"]["configs"], str(folder / f"{name}.json"), *([] if fits else [EVALUATE])]
        command = bundle_command(
            run,
            str(["configs/train.json", *overlays]),
            dataset_dir=job["dataset_dir"],
            output_dir=folder / name,
            checkpoint=folder / "model.pt",
            cache_dir=job["cache_dir"],
            tracking_uri="off",
            seed=job["recipe"]["seed"],
        )
        seconds, peak = measured(command, folder / f"{name}.log")
        report = read(folder / name / "metrics.json")
        result["protocols"][name] = {
            "protocol": job["protocols"][name],
            **{metric: report[metric] for metric in METRICS},
        }
        if fits:
            result |= {"seconds": seconds, "peak_mb": peak, "command": shlex.join(command)}
            result["threads"] = os.environ.get("OMP_NUM_THREADS")
            result |= {key: report[key] for key in ("model", "data", "images")}
            result["stored_mb"] = (folder / "model.pt").stat().st_size / MEGABYTE
        write(folder / "result.json", result)


def tables_of(folder: Path, protocol: str) -> Path:
    """The file of a cell that says what each test image contributes, see :mod:`scripts.benchmarks.tables`."""
    return folder / protocol / "tables.npz"


def split_knobs(knobs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that are settings of the model, which its checkpoint holds once it is trained, and all others."""
    known = read(Path("configs/train.json"))["model"]
    return {name: knobs[name] for name in knobs if name in known}, {name: knobs[name] for name in knobs.keys() - known}


def known_result(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The result that was measured by ``recipe``, an empty one if there is none."""
    path = folder / "result.json"
    if path.is_file() and (folder / "model.pt").is_file():
        result = read(path)
        if result["recipe"] == recipe:
            return result
    return {"recipe": recipe, "protocols": {}}


def missing_protocols(result: dict[str, Any], protocols: dict[str, Any]) -> list[str]:
    """Names of the ``protocols`` that were not measured, or meant something else then."""
    known = {name: found["protocol"] for name, found in result["protocols"].items()}
    return [name for name, protocol in protocols.items() if known.get(name) != protocol]


def measured(command: Sequence[str], log: Path) -> tuple[float, float]:
    """Run ``command`` from the bundle's root: its seconds, and its peak resident memory in MB.

    Raises:
        BundleError: if it fails, with the error that it ended with.
    """
    with log.open("wb") as stream:
        cost = cost_of(command, stream)
    if cost.status:
        raise BundleError(f"{last_words(log)} (all of it is in '{log}')")
    return cost.seconds, cost.peak_mb


def last_words(log: Path) -> str:
    """The line of a log that says what went wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it ended without a word"])[-1]


def measure_times(folder: Path) -> None:
    """Time the trained models on the same images: from resized images in memory to maps, features included.

    Batch by batch all methods run one after the other in an order that is drawn anew, so that a ratio compares what ran
    within the same seconds, and none always follows the same one. The first round only warms up.
    """
    import torch

    job = read(folder / "job.json")
    recipe = job["recipe"]
    methods = {name: load_method(one, job["cases"], recipe["batch_size"]) for name, one in job["methods"].items()}
    names = list(methods)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for repeat in range(recipe["repeats"] + 1):
        spent = dict.fromkeys(names, 0.0)
        for number in range(len(methods[names[0]][1])):
            for name in order.sample(names, len(names)):
                detect, batches = methods[name]
                started = time.perf_counter()
                detect(batches[number])
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent[name] += time.perf_counter() - started
        for name in names if repeat else ():
            seconds[name].append(spent[name] / len(job["cases"]))
    write(
        folder / "result.json",
        {"recipe": recipe, "seconds": seconds, "images": len(job["cases"]), "threads": torch.get_num_threads()},
    )


def load_method(method: dict[str, Any], cases: list[dict[str, Any]], batch_size: int) -> tuple[Any, list[Any]]:
    """A function from a batch to its maps, and the batches, read and resized as the method's configs do it."""
    import torch
    from monai.bundle import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_files(["configs/train.json", *method["configs"], EVALUATE]))
    _, others = split_knobs(method["knobs"])
    for name, value in {**others, "checkpoint": method["checkpoint"], "batch_size": batch_size}.items():
        parser[name] = value
    parser["splits"] = {"training": [], "validation": [], "test": cases}
    parser.get_parsed_content("load_checkpoint")
    network, inferer = (parser.get_parsed_content(name) for name in ("network", "inferer"))
    network.eval()
    batches = [torch.stack([one.image for one in batch]) for batch in parser.get_parsed_content("test::dataloader")]
    return lambda batch: inferer.detect(batch, network).anomaly_map, batches


def main() -> None:
    """Do what ``job.json`` says."""
    action, folder = sys.argv[1:]
    try:
        {"train": train, "time": measure_times}[action](Path(folder))
    except BundleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
