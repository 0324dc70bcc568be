"""Seconds from a cold ``inferring`` command to its first result, and how many of them are imports.

    python -m scripts.benchmarks.start --out docs/performance

Every process is fresh; the files that Python reads are in the memory of the system already.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from bundle.checkpoint import save_checkpoint
from bundle.model import make_detector
from scripts.benchmarks.common import ROOT, cpu_entries, processor, write

BACKBONE = "efficientnet_lite0"
IMPORTS = ("torch", "monai.bundle")  # timed as processes of their own
PARTS = (
    "torch",
    "ignite",
    "mlflow",
    "torchvision",
    "matplotlib.pyplot",
    "scipy.signal",
    "pandas",
    "sympy",
    "highdicom",
)
POLL = 0.01  # seconds


def make_inputs(folder: Path) -> None:
    """A checkpoint with random density, and one picture of noise: what they hold does not change the time."""
    save_checkpoint(make_detector({"backbone": BACKBONE}), folder / "model.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (240, 240), dtype=np.uint8)
    (folder / "images").mkdir()
    Image.fromarray(pixels).save(folder / "images" / "noise.png")


def first_result(folder: Path, *knobs: str) -> tuple[float, float]:
    """Seconds until the first result of ``inferring`` lies in its place, and until the command has ended.

    Raises:
        RuntimeError: if it ends without a result.
    """
    output = folder / "maps"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json"]
    command += [f"--backbone={BACKBONE}", f"--checkpoint={folder / 'model.pt'}", f"--dataset_dir={folder / 'images'}"]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, f"--output_dir={output}", "--device=cpu", *knobs], cwd=ROOT, stdout=log, stderr=log
        )
        while not (output / "noise_overlay.png").exists():
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(log.read().decode()[-500:])
            time.sleep(POLL)
        first = time.perf_counter() - started
        process.wait()
    return first, time.perf_counter() - started


def import_seconds(module: str) -> float:
    """Seconds of a process that imports ``module`` and nothing else."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
    return time.perf_counter() - started


def import_parts() -> dict[str, float]:
    """Seconds of each of :data:`PARTS` with what it imports first, within the import of MONAI; they overlap."""
    command = [sys.executable, "-X", "importtime", "-c", "import monai.bundle"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = dict.fromkeys(PARTS, 0.0)
    for microseconds, name in re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)", said):
        if name in found:
            found[name] = max(found[name], int(microseconds) / 1e6)
    return found


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of everything in each round."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        make_inputs(folder)
        first_result(folder)  # brings the files into memory
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for module in IMPORTS:
                seconds.setdefault(f"import {module}, end of the process", []).append(import_seconds(module))
            first, end = first_result(folder)
            seconds.setdefault("inferring, first result", []).append(first)
            seconds.setdefault("inferring, end", []).append(end)
            _, end = first_result(folder, "--tracking_uri=off")
            seconds.setdefault("inferring without MLflow, end", []).append(end)
            for part, value in import_parts().items():
                seconds.setdefault(f"of import monai.bundle: {part}", []).append(value)
    return seconds


def report(seconds: dict[str, list[float]], command: str) -> str:
    """The Markdown page."""
    rounds = len(next(iter(seconds.values())))
    lines = [
        "# Start-up",
        "",
        "Made by",
        "",
        "```sh",
        command,
        "```",
        "",
        f"on {processor()}, {os.cpu_count()} cores; medians of {rounds} fresh processes, one picture, "
        "EfficientNet-Lite0 at 320 x 320. The parts of MONAI's import overlap, and measuring them slows them.",
        "",
        "| what | seconds |",
        "| --- | ---: |",
    ]
    lines += [f"| {name} | {median(values):.1f} |" for name, values in seconds.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write ``start.json`` and ``start.md``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="folder of start.json and start.md")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each kind")
    given = parser.parse_args()
    seconds = measure(given.rounds)
    command = f"python -m scripts.benchmarks.start {' '.join(sys.argv[1:])}".strip()
    found = {"command": command, "processor": cpu_entries().get("model name"), "seconds": seconds}
    write(given.out / "start.json", found)
    (given.out / "start.md").write_text(report(seconds, command), encoding="utf-8")
    print((given.out / "start.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
