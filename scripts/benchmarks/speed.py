"""Speed, memory and training time of this bundle beside its bare backbone, the paper's loop and peers, in one run.

    python -m scripts.benchmarks.speed --out docs/performance

Every contender sees the same images (slices of the synthetic sample cohort), the same backbone and the same machine. In
each round all of them are timed one after the other, so that a ratio compares what ran within the same seconds: on a
shared machine that says more than the times themselves. Memory is that of a fresh process for each contender.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.transforms import Compose
from monai.utils import set_determinism
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from bundle.checkpoint import save_checkpoint
from bundle.compute import DTYPES, Compute
from bundle.data import EmbeddingDataset, EmbeddingStore
from bundle.errors import BundleError, check_choice
from bundle.inferers import SliceBatchInferer
from bundle.networks import AnomalyDetector, FeatureNetwork
from bundle.networks.backbones import BACKBONES
from bundle.samples import make_sample_cohort
from bundle.transforms import ExtractSlicesd
from scripts.benchmarks.common import (
    FIT_BATCH,
    PACKAGES,
    ROOT,
    cpu_entries,
    in_batches,
    installed,
    processor,
    say,
    write,
)
from scripts.benchmarks.contenders import (
    PAPER_MAP,
    TRAINING_BATCH,
    TrainingStep,
    backbone_flops,
    bare_features,
    bare_network,
    has_bf16,
    make_features,
    matrix_peak,
    paper_density,
    paper_detector,
    paper_embeddings,
    paper_map,
    synchronize,
)
from scripts.benchmarks.images import load_images, reading

PAPER = "paper loop fp32"
SLICES = 12  # of a subject of the sample cohort
MATRIX = 2048  # side of the square matrices whose product gives the peak
ALL_ELSE, UNDIVIDED = ("#8fb3d1", ""), ("#b9b9b9", "//")  # color and hatch of bars, told apart in gray, too
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders; plain JSON values, so that a fresh process gets it from a file."""

    backbone: str
    weights: str | None
    image_size: int
    device: str
    threads: int
    batch_sizes: list[int]
    rounds: int
    epochs: int
    paper_epochs: int
    emulated_bf16: bool
    contenders: list[str]
    train_files: list[str]
    test_files: list[str]


class Clock:
    """A context that adds up the seconds which are spent in it, until the device has done its work."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0
        self.started = 0.0

    def __enter__(self) -> None:
        synchronize(self.device)
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.started

    def attach(self, module: nn.Module) -> None:
        """Run whenever ``module`` does."""
        module.register_forward_pre_hook(lambda *_: self.__enter__())
        module.register_forward_hook(lambda *_: self.__exit__())


@dataclass
class Runner:
    """A contender that is ready to run.

    Attributes:
        run: what is timed, for a batch of what ``place`` gave.
        clock: runs while the backbone does; None where the two cannot be told apart.
        stored_bytes: of the model on disk or of the memory bank, None if there is none.
        place: what comes before the timed part, from the files of a batch.
    """

    run: Callable[[Any], Any]
    clock: Clock | None = None
    stored_bytes: int | None = None
    place: Callable[[list[str]], Any] = list


@dataclass(frozen=True)
class Contender:
    """What is compared.

    Attributes:
        name: unique.
        what: in a few words, for the report.
        build: makes it ready to run; reads what ``prepare`` wrote.
        precision: ``fp32`` or ``bf16``, of the bare backbone that it is compared with too.
        prepare: writes into the workspace what takes long to make or is not of the running contender's memory.
        modules: what is imported for it, whose memory is told apart.
    """

    name: str
    what: str
    build: Callable[[Setting, Path], Runner]
    precision: str = "fp32"
    prepare: Callable[[Setting, Path], None] | None = None
    modules: tuple[str, ...] = ()


def build_bare(setting: Setting, workspace: Path, precision: str) -> Runner:
    """The backbone alone; images are on the device already."""
    network = bare_network(setting.backbone, setting.weights, setting.device)
    clock = Clock(setting.device)

    @torch.inference_mode()
    def run(images: Tensor) -> None:
        with clock, autocast(setting, precision):
            bare_features(network, setting.backbone, images)

    return Runner(run, clock, place=partial(normalized_images, setting=setting))


class PaperFeatures:
    """From files to embeddings as the paper's loop gets them: PIL, RGB, bilinear resizing, normalization, backbone."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.network = bare_network(setting.backbone, setting.weights, setting.device)
        self.clock = Clock(setting.device)
        spec = BACKBONES[setting.backbone]
        self.read = v2.Compose(
            [
                v2.Resize([setting.image_size] * 2, v2.InterpolationMode.BILINEAR),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(spec.mean, spec.std),
            ]
        )

    @torch.no_grad()
    def __call__(self, files: Sequence[str]) -> Tensor:
        """The embeddings [B, C, h, w] of ``files``."""
        images = torch.stack([self.read(Image.open(file).convert("RGB")) for file in files]).to(self.setting.device)
        with self.clock:
            return paper_embeddings(self.network, self.setting.backbone, images)


def build_paper(setting: Setting, workspace: Path) -> Runner:
    """The loop of the authors' code, in other words."""
    embed = PaperFeatures(setting)
    density = paper_density(make_detector(setting).density).to(setting.device)
    path = workspace / "paper.pth"
    torch.save({"model_state_dict": density.state_dict()}, path)

    @torch.no_grad()
    def run(files: list[str]) -> np.ndarray:
        return paper_map(density, embed(files)).cpu().numpy()

    return Runner(run, embed.clock, path.stat().st_size)


def make_detector(setting: Setting) -> AnomalyDetector:
    """This bundle's detector with the paper's density; the same initial weights at every call."""
    return paper_detector(make_features(setting.backbone, setting.weights), setting.image_size)


def normalized_images(files: Sequence[str], setting: Setting) -> Tensor:
    """Images [B, 3, H, W] as the backbone sees them, resized as the detector does it."""
    images = load_images(files, setting.device)[..., 0]
    size = [setting.image_size] * 2
    resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    spec = BACKBONES[setting.backbone]
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (resized - mean) / std


def build_ours(setting: Setting, workspace: Path, precision: str) -> Runner:
    """This bundle in PyTorch."""
    compute = Compute(setting.device, precision)
    detector = compute.place(make_detector(setting))
    save_checkpoint(detector, workspace / "model.pt")
    clock = Clock(setting.device)
    clock.attach(detector.features.backbone)
    return Runner(file_to_map(setting, detector, compute), clock, (workspace / "model.pt").stat().st_size)


def prepare_export(setting: Setting, workspace: Path, kind: str) -> None:
    """Export the detector; both precisions of OpenVINO share a file."""
    from bundle.exports import export_onnx, export_openvino

    path = export_path(workspace, kind)
    if not path.exists():
        path.parent.mkdir()
        (export_onnx if kind == "onnx" else export_openvino)(make_detector(setting), path)


def export_path(workspace: Path, kind: str) -> Path:
    """In a folder of its own, for files that an export may leave beside it."""
    return workspace / kind / ("model.onnx" if kind == "onnx" else "model.xml")


def build_export(setting: Setting, workspace: Path, kind: str, precision: str) -> Runner:
    """This bundle in another runtime; its file holds the backbone."""
    from bundle.exports import load_exported

    path = export_path(workspace, kind)
    stored = sum(file.stat().st_size for file in path.parent.iterdir())
    detector = load_exported(path, setting.device, precision)
    return Runner(file_to_map(setting, detector, detector.compute), None, stored)


def file_to_map(setting: Setting, detector: Any, compute: Compute) -> Callable[[list[str]], np.ndarray]:
    """From the files of a batch to maps [B, 1, H, W, 1] of their size in memory, all in one forward pass."""
    inferer = SliceBatchInferer(max(setting.batch_sizes), compute=compute)

    def run(files: list[str]) -> np.ndarray:
        return inferer(load_images(files, setting.device), detector)["map"].cpu().numpy()

    return run


def make_peer(setting: Setting, name: str) -> tuple[Any, FeatureNetwork]:
    """The peer, on the feature network of this bundle."""
    from scripts.benchmarks.peers import NearestNeighborPeer, PatchCorePeer

    features = make_features(setting.backbone, setting.weights).to(setting.device)
    classes = {peer.name: peer for peer in (PatchCorePeer, NearestNeighborPeer)}
    return classes[name](features), features


def prepare_peer(setting: Setting, workspace: Path, name: str) -> None:
    """Fit the peer and keep its memory bank."""
    peer, _ = make_peer(setting, name)
    peer.fit(normalized_images(files, setting) for files in in_batches(setting.train_files, FIT_BATCH))
    torch.save(peer.memory_bank, workspace / f"{name}.pt")


def build_peer(setting: Setting, workspace: Path, name: str) -> Runner:
    """A peer with its memory bank; files are read and resized as for this bundle."""
    peer, features = make_peer(setting, name)
    peer.memory_bank = torch.load(workspace / f"{name}.pt", map_location=setting.device, weights_only=True)
    clock = Clock(setting.device)
    clock.attach(features)

    @torch.inference_mode()
    def run(files: list[str]) -> np.ndarray:
        return peer.detect(normalized_images(files, setting))[0].cpu().numpy()

    return Runner(run, clock, peer.stored_bytes)


def _bare(precision: str) -> Contender:
    what = "the timm network alone, `forward_intermediates` up to the deepest tapped layer; input on the device already"
    what += "; autocast" if precision == "bf16" else ""
    return Contender(f"bare backbone {precision}", what, partial(build_bare, precision=precision), precision)


def _ours(precision: str) -> Contender:
    what = "this bundle's transforms, inferer and detector; map of the size of the image"
    return Contender(f"this bundle {precision}", what, partial(build_ours, precision=precision), precision)


def _export(name: str, kind: str, module: str, precision: str) -> Contender:
    return Contender(
        f"this bundle {name}",
        f"the same with the detector exported to {module}; the stored model holds the backbone",
        partial(build_export, kind=kind, precision=precision),
        precision,
        partial(prepare_export, kind=kind),
        (module,),
    )


def _peer(name: str, what: str) -> Contender:
    what += ", by anomalib on this bundle's features and transforms; map at the size that the backbone sees"
    build, prepare = partial(build_peer, name=name), partial(prepare_peer, name=name)
    return Contender(name, what, build, prepare=prepare, modules=("anomalib.models",))


CONTENDERS = (
    _bare("fp32"),
    _bare("bf16"),
    Contender(
        PAPER,
        f"the authors' loop in other words: PIL, torchvision, timm, masked convolutions with all taps; "
        f"map of {PAPER_MAP} x {PAPER_MAP}",
        build_paper,
    ),
    _ours("fp32"),
    _ours("bf16"),
    _export("ONNX", "onnx", "onnxruntime", "fp32"),
    _export("OpenVINO fp32", "openvino", "openvino", "fp32"),
    _export("OpenVINO bf16", "openvino", "openvino", "bf16"),
    _peer("PatchCore", "a coreset of a tenth of the healthy patches, 9 neighbors"),
    _peer("nearest neighbor", "AnomalyDINO's scoring with all healthy patches, no masking"),
)


def why_not(contender: Contender, setting: Setting) -> str | None:
    """Why ``contender`` does not run here, if that is known beforehand."""
    if contender.precision == "bf16" and not has_bf16(setting.device) and not setting.emulated_bf16:
        return "no bf16 hardware (--emulated_bf16 runs it nevertheless)"
    if contender.prepare and contender.name.startswith("this bundle") and not setting.device.startswith("cpu"):
        return f"exports are timed on the CPU, and this run is on {setting.device}"
    return None


def autocast(setting: Setting, precision: str) -> Any:
    """The context of ``precision``, without anything of this bundle."""
    return torch.autocast(torch.device(setting.device).type, torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass
class Times:
    """Seconds per image in each round, of the whole and of the backbone in it."""

    whole: list[float] = field(default_factory=list)
    backbone: list[float] = field(default_factory=list)


@dataclass
class Ready:
    """What could be built, and for the rest why not."""

    runners: dict[str, Runner] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    prepare_s: dict[str, float] = field(default_factory=dict)


def make_ready(setting: Setting, workspace: Path) -> Ready:
    """Build every chosen contender and try every batch size, so that what fails does so here and is reported."""
    ready = Ready()
    for contender in (one for one in CONTENDERS if one.name in setting.contenders):
        reason = why_not(contender, setting)
        if reason is None:
            say(f"preparing {contender.name}")
            try:
                started = time.perf_counter()
                if contender.prepare:
                    contender.prepare(setting, workspace)
                ready.prepare_s[contender.name] = time.perf_counter() - started
                runner = contender.build(setting, workspace)
                for batch_size in setting.batch_sizes:
                    runner.run(runner.place(setting.test_files[:batch_size]))
                ready.runners[contender.name] = runner
            except Exception as error:  # whatever it is, the others go on and the table says it
                reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if reason is not None:
            ready.unavailable[contender.name] = reason
            say(f"not available: {contender.name} ({reason})")
    return ready


def time_rounds(
    setting: Setting, runners: dict[str, Runner], batch_size: int
) -> tuple[dict[str, Times], dict[str, list[float]]]:
    """Times of every runner, and the matrix peak [FLOP/s] of every precision, in each round."""
    files = setting.test_files[: len(setting.test_files) // batch_size * batch_size]
    batches = list(in_batches(files, batch_size))
    names = list(runners)
    times = {name: Times() for name in names}
    precisions = {one.precision for one in CONTENDERS if one.name in runners}
    peaks: dict[str, list[float]] = {precision: [] for precision in sorted(precisions)}
    for name in names:
        runners[name].run(runners[name].place(batches[0]))
    for number in range(setting.rounds):
        say(f"batch size {batch_size}, round {number + 1} of {setting.rounds}")
        for precision, values in peaks.items():
            values.append(matrix_peak(setting.device, DTYPES[precision], MATRIX))
        start = number % len(names)  # another one begins in each round, so that no place in the order is favored
        for name in names[start:] + names[:start]:
            whole, backbone = time_once(runners[name], batches, setting.device)
            times[name].whole.append(whole / len(files))
            times[name].backbone.append(backbone / len(files))
    return times, peaks


def time_once(runner: Runner, batches: list[list[str]], device: str) -> tuple[float, float]:
    """Seconds for all ``batches``, and those of the backbone in them."""
    placed = [runner.place(files) for files in batches]
    before = runner.clock.seconds if runner.clock else 0.0
    synchronize(device)
    started = time.perf_counter()
    for batch in placed:
        runner.run(batch)
    synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, runner.clock.seconds - before if runner.clock else 0.0


def memory_of(contender: Contender, setting: Setting, workspace: Path, batch_size: int) -> dict[str, Any]:
    """Memory of a fresh process that only runs ``contender``, see :func:`work`, or ``error``."""
    command = [sys.executable, "-m", "scripts.benchmarks.speed", "--worker", contender.name]
    command += ["--workspace", str(workspace), "--batch_sizes", str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit status {done.returncode}: {lines[-1]}"}


def work(name: str, workspace: Path, batch_size: int) -> None:
    """Run one contender over two batches and print its memory as JSON.

    ``imports_bytes``: resident after all imports; ``peak_bytes``: resident at most; ``device_peak_bytes``: allocated
    at most on the GPU, 0 on a CPU.
    """
    setting = Setting(**json.loads((workspace / "setting.json").read_text(encoding="utf-8")))
    torch.set_num_threads(setting.threads)
    contender = next(one for one in CONTENDERS if one.name == name)
    for module in ("timm", *contender.modules):
        import_module(module)
    imports = resident_bytes("VmRSS")
    runner = contender.build(setting, workspace)
    for files in list(in_batches(setting.test_files, batch_size))[:2]:
        runner.run(runner.place(files))
    synchronize(setting.device)
    device_peak = torch.cuda.max_memory_allocated(setting.device) if setting.device.startswith("cuda") else 0
    found = {
        "imports_bytes": imports,
        "peak_bytes": resident_bytes("VmHWM"),
        "device_peak_bytes": device_peak,
    }
    print(json.dumps(found))


def resident_bytes(entry: str) -> int:
    """Resident memory of this process, now (``VmRSS``) or at most (``VmHWM``).

    On Linux not by ``getrusage``, whose ``ru_maxrss`` starts from that of the process which started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(entry))


@dataclass
class TrainingRun:
    """Seconds for features and for training steps, and the mean loss of every epoch that was run."""

    features_s: float
    steps_s: float
    losses: list[float]


def batch_orders(setting: Setting) -> list[list[list[int]]]:
    """The batches of image numbers of every epoch, the same for all who train."""
    generator = torch.Generator().manual_seed(0)
    count = len(setting.train_files)
    return [
        [part.tolist() for part in torch.randperm(count, generator=generator).split(TRAINING_BATCH)]
        for _ in range(setting.epochs)
    ]


def train_paper(setting: Setting, orders: list[list[list[int]]]) -> TrainingRun:
    """As the paper's loop trains: the features of every image are computed anew in every epoch."""
    embed = PaperFeatures(setting)
    step = TrainingStep(paper_density(make_detector(setting).density).to(setting.device))
    features_clock, steps_clock = Clock(setting.device), Clock(setting.device)
    losses = []
    for order in orders:
        total = 0.0
        for numbers in order:
            with features_clock:
                features = embed([setting.train_files[number] for number in numbers])
            with steps_clock:
                total += step(features) * len(numbers)
        losses.append(total / len(setting.train_files))
    return TrainingRun(features_clock.seconds, steps_clock.seconds, losses)


def train_ours(setting: Setting, orders: list[list[list[int]]], workspace: Path) -> TrainingRun:
    """As this bundle trains: the features of every image are computed once, and stream from the feature cache."""
    detector = make_detector(setting)
    cases = [{"image": file, "name": file} for file in setting.train_files]
    transform = Compose([*reading().transforms, ExtractSlicesd("image")])
    store = EmbeddingStore(workspace / "feature_cache", workspace, {"image_size": setting.image_size})
    features_clock, steps_clock = Clock(setting.device), Clock(setting.device)
    with features_clock:
        dataset = EmbeddingDataset(cases, transform, detector, Compute(setting.device, "fp32"), store, FIT_BATCH)
    step = TrainingStep(detector.density)
    losses = []
    for order in orders:
        total = 0.0
        with steps_clock:
            for numbers in order:
                maps = torch.stack([dataset[number] for number in numbers])
                total += step(detector.standardized(maps)) * len(numbers)
        losses.append(total / len(dataset))
    return TrainingRun(features_clock.seconds, steps_clock.seconds, losses)


def compare_training(setting: Setting, workspace: Path) -> dict[str, Any]:
    """Both trainings from the same weights over the same batches, the paper's for a few epochs only."""
    orders = batch_orders(setting)
    say(f"training as the paper's loop, {setting.paper_epochs} epochs")
    paper = train_paper(setting, orders[: setting.paper_epochs])
    say(f"training as this bundle, {setting.epochs} epochs")
    ours = train_ours(setting, orders, workspace)
    both = len(paper.losses)
    paper_s = (paper.features_s + paper.steps_s) / both * setting.epochs
    ours_s = ours.features_s + ours.steps_s
    return {
        "images": len(setting.train_files),
        "epochs": setting.epochs,
        "paper": {**asdict(paper), "epochs_run": both, "extrapolated_s": paper_s},
        "ours": {**asdict(ours), "total_s": ours_s},
        "speedup": paper_s / ours_s,
        "losses_after_epochs_both_ran": [paper.losses[-1], ours.losses[both - 1]],
        "relative_difference": ours.losses[both - 1] / paper.losses[-1] - 1,
    }


def summarize(
    setting: Setting, ready: Ready, times: dict[str, Times], peaks: dict[str, list[float]], flops: int, batch_size: int
) -> list[dict[str, Any]]:
    """A row of numbers for every contender that ran; ratios are medians over those within each round."""
    rows = []
    for contender in (one for one in CONTENDERS if one.name in times):
        own = times[contender.name]
        bare = times.get(f"bare backbone {contender.precision}")
        paper = times.get(PAPER)
        low, middle, high = np.percentile(own.whole, [25, 50, 75]).tolist()
        rows.append(
            {
                "contender": contender.name,
                "batch_size": batch_size,
                "seconds_per_image": own.whole,
                "backbone_seconds_per_image": own.backbone if ready.runners[contender.name].clock else None,
                "median_ms": 1e3 * middle,
                "quartiles_ms": [1e3 * low, 1e3 * high],
                "images_per_s": 1 / middle,
                "times_bare": median_ratio(own.whole, bare.whole) if bare else None,
                "times_paper": median_ratio(own.whole, paper.whole) if paper else None,
                "backbone_share": (
                    median_ratio(own.backbone, own.whole) if ready.runners[contender.name].clock else None
                ),
                "share_of_peak": median(
                    flops / seconds / peak for seconds, peak in zip(own.whole, peaks[contender.precision], strict=True)
                ),
                "stored_bytes": ready.runners[contender.name].stored_bytes,
            }
        )
    return rows


def median_ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return median(a / b for a, b in zip(upper, lower, strict=True))


def add_memory(rows: list[dict[str, Any]], setting: Setting, workspace: Path) -> None:
    """Measure the memory of every row's contender, and how much more it is than that of the bare backbone."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        contender = next(one for one in CONTENDERS if one.name == row["contender"])
        say(f"memory of {contender.name}, batch size {row['batch_size']}")
        row["memory"] = memory_of(contender, setting, workspace, row["batch_size"])
        found[contender.name, row["batch_size"]] = row["memory"]
        bare = found.get((f"bare backbone {contender.precision}", row["batch_size"]), {})
        if "peak_bytes" in row["memory"] and "peak_bytes" in bare:
            row["memory"]["over_bare_bytes"] = row["memory"]["peak_bytes"] - bare["peak_bytes"]


def about(setting: Setting, weights_origin: str) -> dict[str, Any]:
    """Where the numbers come from."""
    known = asdict(setting)
    known["train_images"], known["test_images"] = len(known.pop("train_files")), len(known.pop("test_files"))
    return {
        "command": f"python -m scripts.benchmarks.speed {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": "SYNTHETIC sample cohort",
        "weights": weights_origin,
        "machine": describe_machine(setting),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        "setting": known,
    }


def describe_machine(setting: Setting) -> dict[str, Any]:
    """Processor, cores, the instructions that matter, and the GPU if it is used."""
    flags = cpu_entries().get("flags", "").split()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": setting.threads,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "gpu": torch.cuda.get_device_name(setting.device) if setting.device.startswith("cuda") else None,
        "load_average": list(os.getloadavg()),
    }


def source_words(results: dict[str, Any]) -> str:
    """Images, weights and machine in a line."""
    machine, setting = results["machine"], results["setting"]
    weights = "RANDOM weights" if results["weights"] == "random" else f"weights: {results['weights']}"
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    size = setting["image_size"]
    return f"SYNTHETIC images, {setting['backbone']} at {size} x {size}, {weights}; {where}"


def report(results: dict[str, Any]) -> str:
    """The Markdown page."""
    machine, setting = results["machine"], results["setting"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    weights = (
        "The weights are **random**: the speed does not depend on their values, and nothing here is about accuracy."
        if results["weights"] == "random"
        else f"Weights: {results['weights']}."
    )
    lines = [
        "# Speed",
        "",
        "Made by",
        "",
        "```sh",
        results["command"],
        "```",
        "",
        f"on {results['date']}. Processor: {machine['processor']}, {machine['cores']} cores of which "
        f"{machine['threads']} were used; instructions: {', '.join(machine['instructions']) or 'unknown'}"
        f"{'; GPU: ' + machine['gpu'] if machine['gpu'] else ''}. {versions}.",
        "",
        f"Backbone {setting['backbone']} at {setting['image_size']} x {setting['image_size']}, "
        f"{results['backbone_flops'] / 1e9:.1f} GFLOP an image. The images are **synthetic**. {weights}",
        "",
        "![Milliseconds per image](speed.png)",
    ]
    for batch_size in setting["batch_sizes"]:
        lines += ["", f"## From file to map, {batch_size} at once", ""]
        lines += table([row for row in results["rows"] if row["batch_size"] == batch_size])
    if results["unavailable"]:
        lines += ["", "Not timed:", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["unavailable"].items()]
    lines += ["", *legend(results)]
    if results["training"]:
        lines += ["", *training_report(results["training"])]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of one batch size."""
    lines = [
        "| contender | ms an image (quartiles) | images/s | times bare | times paper | backbone | of peak "
        "| stored MB | memory MB | of it imports | more than bare |",
        "| --- " + "| ---: " * 10 + "|",
    ]
    for row in rows:
        low, high = row["quartiles_ms"]
        memory = row["memory"]
        cells = [
            row["contender"],
            f"{digits(row['median_ms'])} ({digits(low)} to {digits(high)})",
            digits(row["images_per_s"]),
            digits(row["times_bare"]),
            digits(row["times_paper"]),
            share(row["backbone_share"]),
            share(row["share_of_peak"]),
            megabytes(row["stored_bytes"]),
            memory["error"] if "error" in memory else megabytes(memory["peak_bytes"]),
            megabytes(memory.get("imports_bytes")),
            megabytes(memory.get("over_bare_bytes")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def legend(results: dict[str, Any]) -> list[str]:
    """What the contenders and the columns are."""
    setting = results["setting"]
    peaks = "; ".join(
        f"{precision} {median(value for one in results['matrix_peak'].values() for value in one[precision]) / 1e9:.0f}"
        for precision in next(iter(results["matrix_peak"].values()))
    )
    lines = [
        "## What was compared",
        "",
        *(f"- {one.name}: {one.what}." for one in CONTENDERS if one.name in setting["contenders"]),
        "",
        f"Medians of {setting['rounds']} rounds of {setting['test_images']} images; in a round all contenders run one "
        "after the other. 'times bare' (the backbone of the same precision) and 'times paper' are medians of the "
        "ratios within each round, below 1 is faster. All but the bare backbone run from image files to maps in "
        "memory; no result is written. 'backbone': share of the time that is spent in the backbone. 'of peak': "
        "floating-point operations of the backbone per second of the whole, over those of a product of "
        f"{MATRIX} x {MATRIX} matrices of the same precision, measured in the same round (median in GFLOP/s: {peaks}).",
        "",
        f"'stored': the checkpoint, the exported model with its backbone, or the memory bank of "
        f"{setting['train_images']} images. 'memory': the most that a fresh process which only runs this contender "
        "held resident, and what it held after its imports, most of which are those of this script.",
    ]
    prepared = {name: seconds for name, seconds in results["prepare_s"].items() if seconds >= 0.1}
    if prepared:
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in prepared.items())
        lines += ["", f"Before the first image, to export or to fill the memory bank: {spent}."]
    if any(row["memory"].get("device_peak_bytes") for row in results["rows"]):
        device = ", ".join(
            f"{row['contender']} ({row['batch_size']}) {megabytes(row['memory'].get('device_peak_bytes'))}"
            for row in results["rows"]
        )
        lines += ["", f"Allocated at most on the GPU, MB: {device}."]
    return lines


def training_report(training: dict[str, Any]) -> list[str]:
    """The section about training."""
    paper, ours = training["paper"], training["ours"]
    run, epochs = paper["epochs_run"], training["epochs"]
    losses = training["losses_after_epochs_both_ran"]
    return [
        "## Training",
        "",
        f"{training['images']} images, batches of up to {TRAINING_BATCH}, fp32, no noise, the same initial weights and "
        "order of batches.",
        "",
        f"| loop | features, s | steps, s | epochs run | {epochs} epochs, s | loss after epoch {run} | at the end |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| paper | {digits(paper['features_s'])} | {digits(paper['steps_s'])} | {run} "
        f"| {digits(paper['extrapolated_s'])} (extrapolated) | {losses[0]:.6g} | |",
        f"| this bundle | {digits(ours['features_s'])} | {digits(ours['steps_s'])} | {epochs} "
        f"| {digits(ours['total_s'])} | {losses[1]:.6g} | {ours['losses'][-1]:.6g} |",
        "",
        f"The paper's loop computes the features of every image in every epoch, the bundle once: "
        f"{training['speedup']:.1f} times as fast over {epochs} epochs, of which the paper's loop ran {run} and the "
        "rest is extrapolated linearly. "
        f"The losses after epoch {run} differ by {training['relative_difference']:+.2e} of the paper's.",
    ]


def digits(value: float | None) -> str:
    """``value`` in three digits or all that are before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(value: float | None) -> str:
    """``value`` as a percentage."""
    return "-" if value is None else f"{100 * value:.0f} %"


def megabytes(value: float | None) -> str:
    """``value`` bytes in MB."""
    return "-" if value is None else digits(value / 1e6)


def picture(results: dict[str, Any]) -> Figure:
    """Bars of milliseconds per image, one panel per batch size, the part of the backbone dark."""
    sizes = results["setting"]["batch_sizes"]
    names = list(dict.fromkeys(row["contender"] for row in results["rows"]))
    figure = Figure(figsize=(5.5 * len(sizes) + 1, 0.45 * len(names) + 2), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, batch_size in zip(panels, sizes, strict=True):
        rows = [row for row in results["rows"] if row["batch_size"] == batch_size]
        places = [names.index(row["contender"]) for row in rows]
        whole = np.array([row["median_ms"] for row in rows])
        known = np.array([row["backbone_share"] is not None for row in rows])
        part = np.array([(row["backbone_share"] or 0) for row in rows]) * whole
        errors = np.abs(np.array([row["quartiles_ms"] for row in rows]).T - whole)
        panel.barh(places, part, color="#30506e", label="backbone")
        colors, hatches = zip(*(ALL_ELSE if one else UNDIVIDED for one in known), strict=True)
        panel.barh(places, whole - part, left=part, color=colors, hatch=hatches)
        panel.errorbar(whole, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for place, value, high in zip(places, whole, whole + errors[1], strict=True):
            panel.annotate(digits(value), (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        panel.set_xlim(0, 1.15 * float((whole + errors[1]).max()))
        panel.set(xlabel="ms an image, median and quartiles", title=f"{batch_size} at once")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for (color, hatch), label in ((ALL_ELSE, "all else"), (UNDIVIDED, "backbone and all else")):
        panels[-1].barh([0], [0], color=color, hatch=hatch, label=label)
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(source_words(results), fontsize=9)
    return figure


def benchmark(setting: Setting, workspace: Path) -> dict[str, Any]:
    """Everything, as it goes into ``speed.json``."""
    set_determinism(seed=0)
    torch.set_num_threads(setting.threads)
    (workspace / "setting.json").write_text(json.dumps(asdict(setting)), encoding="utf-8")
    origin = make_features(setting.backbone, setting.weights).weights_origin
    network = bare_network(setting.backbone, setting.weights, setting.device)
    image = torch.zeros(1, 3, setting.image_size, setting.image_size, device=setting.device)
    flops = backbone_flops(network, setting.backbone, image)
    del network
    ready = make_ready(setting, workspace)
    if not ready.runners:
        raise BundleError(f"no contender runs here ({'; '.join(ready.unavailable.values())}): choose others")
    rows: list[dict[str, Any]] = []
    peaks: dict[int, dict[str, list[float]]] = {}
    for batch_size in setting.batch_sizes:
        times, peaks[batch_size] = time_rounds(setting, ready.runners, batch_size)
        rows += summarize(setting, ready, times, peaks[batch_size], flops, batch_size)
    ready.runners.clear()  # their memory is needed for what follows
    add_memory(rows, setting, workspace)
    return {
        **about(setting, origin),
        "backbone_flops": flops,
        "matrix_peak": peaks,
        "rows": rows,
        "unavailable": ready.unavailable,
        "prepare_s": ready.prepare_s,
        "training": compare_training(setting, workspace) if setting.epochs and setting.paper_epochs else None,
    }


def publish(results: dict[str, Any], folder: Path) -> None:
    """``speed.json``, ``speed.md`` and ``speed.png``."""
    write(folder / "speed.json", results)
    (folder / "speed.md").write_text(report(results), encoding="utf-8")
    picture(results).savefig(folder / "speed.png", dpi=150)


def cohort_files(folder: Path, train_images: int, test_images: int) -> tuple[list[str], list[str]]:
    """Healthy training slices and test slices of the sample cohort in ``folder``, which is made if it is missing.

    Raises:
        BundleError: if it holds too few.
    """
    if not folder.exists():
        train, test = (-(-images // SLICES) for images in (train_images, test_images))
        # a few slices of a diseased subject are left out, hence one more
        make_sample_cohort(folder, train_subjects=train, valid_subjects=0, test_subjects=test + 1)
    train_files = sorted(folder.glob("slices/train/good/*.png"))[:train_images]
    test_files = sorted(folder.glob("slices/test/*/img/*.png"))[:test_images]
    if len(train_files) < train_images or len(test_files) < test_images:
        raise BundleError(
            f"'{folder}' has {len(train_files)} training and {len(test_files)} test slices, but {train_images} and "
            f"{test_images} are wanted: name a folder that is not there yet, or lower --train_images"
        )
    return [str(path) for path in train_files], [str(path) for path in test_files]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="")
    add("--out", type=Path, default=Path("docs/performance"), help="folder of speed.json, speed.md and speed.png")
    add("--backbone", default="dinov3_vits16", help="a named backbone")
    add("--weights", help="as of the bundle; default: random for DINOv3, whose speed does not depend on them")
    add("--image_size", type=int, default=448, help="side that images are resized to")
    add("--batch_sizes", type=int, nargs="+", default=[1, 16], help="images at once")
    add("--rounds", type=int, default=5, help="how often every contender is timed")
    add("--images", type=int, help="images of a round; default: the largest batch size")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    add("--train_images", type=int, default=64, help="healthy images that peers store and the density learns from")
    add("--epochs", type=int, default=40, help="of the training; 0: no training")
    add("--paper_epochs", type=int, default=2, help="that the paper's loop runs, the rest is extrapolated")
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="where networks run")
    add("--contenders", nargs="+", default=[one.name for one in CONTENDERS], help="names as in the table; default: all")
    add("--cohort", type=Path, help="folder of a sample cohort, made if it is missing; default: a temporary one")
    parser.add_argument("--emulated_bf16", action="store_true", help="time bf16 on a processor that lacks it, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--workspace", type=Path, help=argparse.SUPPRESS)
    return parser


def make_setting(arguments: argparse.Namespace, workspace: Path) -> Setting:
    """Check the command line and make the images.

    Raises:
        BundleError: for a value that cannot be.
    """
    check_choice("backbone", arguments.backbone, BACKBONES)
    for name in arguments.contenders:
        check_choice("contender", name, [one.name for one in CONTENDERS])
    for name in ("rounds", "threads", "train_images"):
        if getattr(arguments, name) < 1:
            raise BundleError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    images = arguments.images or max(arguments.batch_sizes)
    if not 1 <= min(arguments.batch_sizes) <= max(arguments.batch_sizes) <= images:
        raise BundleError(f"--batch_sizes {arguments.batch_sizes} must be from 1 to the {images} --images of a round")
    weights = arguments.weights or ("random" if arguments.backbone.startswith("dinov3") else None)
    cohort = arguments.cohort or workspace / "cohort"
    train_files, test_files = cohort_files(cohort.resolve(), arguments.train_images, images)
    return Setting(
        arguments.backbone,
        weights,
        arguments.image_size,
        arguments.device,
        arguments.threads,
        arguments.batch_sizes,
        arguments.rounds,
        arguments.epochs,
        min(arguments.paper_epochs, arguments.epochs),
        arguments.emulated_bf16,
        arguments.contenders,
        train_files,
        test_files,
    )


def main() -> None:
    """Run the benchmark, or one contender of it in a process of its own."""
    arguments = make_parser().parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.workspace, arguments.batch_sizes[0])
        return
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            setting = make_setting(arguments, Path(folder))
            publish(benchmark(setting, Path(folder)), arguments.out)
    except BundleError as error:
        sys.exit(f"error: {error}")
    print((arguments.out / "speed.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
