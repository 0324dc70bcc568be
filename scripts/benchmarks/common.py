"""What the benchmarks share: the root, commands of the bundle and their cost, the machine in words. Loads no torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple

from bundle.files import write_json

ROOT = Path(__file__).parents[2]
EVALUATE = "configs/evaluate.json"
METRICS = ("pixel_auroc", "pixel_ap", "aupro", "image_auroc", "image_ap")
PACKAGES = ("torch", "monai", "timm", "anomalib", "onnxruntime", "openvino")
FIT_BATCH = 8  # images that go through a backbone together, where nothing else is said
MEGABYTE = 1e6


class Cost(NamedTuple):
    """What a process took."""

    status: int
    """0 if it succeeded."""
    seconds: float
    peak_mb: float
    """Resident at most, in 10**6 bytes."""


def cost_of(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str] | None = None) -> Cost:
    """Run ``command`` from the root; what it says goes to ``log``.

    The caller should be small: a child's peak starts from that of the process which started it.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(status, time.perf_counter() - started, peak / MEGABYTE)


def bundle_command(run: str, files: str, **knobs: Any) -> list[str]:
    """A command of the bundle."""
    words = [f"--{name}={value}" for name, value in knobs.items()]
    return [sys.executable, "-m", "monai.bundle", "run", run, "--config_file", files, *words]


def in_batches(items: Sequence[str], size: int) -> Iterator[list[str]]:
    """Whole and, at the end, partial batches."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def machine_words() -> str:
    """Processor, cores, threads and versions in a line."""
    threads = os.environ.get("OMP_NUM_THREADS", "as torch chooses")
    cores = f"{os.cpu_count()} cores, OMP_NUM_THREADS {threads}"
    versions = [f"{name} {installed(name)}" for name in PACKAGES[:4]]
    return ", ".join([processor(), cores, f"Python {platform.python_version()}", *versions])


def processor() -> str:
    """The processor's name."""
    return cpu_entries().get("model name") or platform.processor() or platform.machine()


def cpu_entries() -> dict[str, str]:
    """What Linux says of the first core; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def installed(package: str) -> str:
    """The version of ``package``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def say(message: str) -> None:
    """Tell what goes on, beside the output."""
    print(message, file=sys.stderr, flush=True)


def read(path: Path) -> Any:
    """What the JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    """Write JSON, at once or not at all."""
    write_json(path, content, indent=1)
