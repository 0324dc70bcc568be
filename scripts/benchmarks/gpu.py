"""What this bundle costs on a graphics card, beside the paper's loop and memory banks, by itself in eight minutes.

    python -m scripts.benchmarks.gpu --out docs/performance

It needs a card, torch, timm and safetensors, no data and no weights: those of the networks are RANDOM, images are
smooth noise, and the vectors of a bank are random, too. Speed and memory depend on none of these values. Images and
maps stay on the card. The cells of a plan are measured in the order of their importance. Each is written at once, and
one that fails loses no other. What the time does not suffice for is named.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bundle.compute import DTYPES, Compute
from bundle.errors import BundleError, one_line
from bundle.networks import AnomalyDetector, FeatureNetwork, SpatialARDensity
from bundle.networks.backbones import BACKBONES
from bundle.store import EmbeddingStore
from scripts.benchmarks.common import installed, processor, say, write
from scripts.benchmarks.contenders import (
    TRAINING_BATCH,
    Bank,
    CosineBank,
    FixedRope,
    PatchCoreBank,
    TrainingStep,
    backbone_flops,
    bare_features,
    bare_network,
    make_features,
    matrix_peak,
    paper_density,
    paper_detector,
    paper_embeddings,
    paper_map,
    synchronize,
)
from scripts.benchmarks.words import digits

STARTED = time.monotonic()
SPARE = 20.0  # seconds that no cell may use: imports before, and the end
PAPER_MS, PAPER_BYTES = 20.0, 0.2e9  # an image, and memory, as published
WARM_UP = 3  # runs
LEAST_RUNS = 5
MOST_RUNS = 200
FITTED_IMAGES = 8
PACKAGES = ("torch", "timm", "safetensors", "torch_tensorrt")


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        models: backbones.
        image_size: side, in pixels.
        batches: images at once.
        bank_images: healthy images whose patches a bank is made of.
        cached: slices in the feature cache that training reads.
        training_batch: of them.
        seconds: for which a cell is timed, after it was warmed up.
        matrix: side of the matrices whose product gives the peak.
        timm_kwargs: changes of the architecture.
    """

    models: tuple[str, ...] = ("dinov3_vits16", "dinov3_vitl16")
    image_size: int = 448
    batches: tuple[int, ...] = (1, 16, 64)
    bank_images: int = 1000
    cached: int = 256
    training_batch: int = TRAINING_BATCH
    seconds: float = 1.5
    matrix: int = 8192
    timm_kwargs: dict[str, Any] = field(default_factory=dict)


TINY = Scale(
    models=("dinov3_vits16",),
    image_size=32,
    batches=(2,),
    bank_images=10,
    cached=4,
    training_batch=2,
    seconds=0.01,
    matrix=64,
    timm_kwargs={"depth": 1, "embed_dim": 64, "num_heads": 2},
)


class OutOfTimeError(Exception):
    """The time of the whole run is over."""


@dataclass
class Bench:
    """Where it is measured, and what cells share: networks on the CPU, of which each cell takes a copy.

    Attributes:
        peaks: measured FLOP/s of matrix products, by precision.
    """

    device: str
    scale: Scale
    peaks: dict[str, float] = field(default_factory=dict)
    _made: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def on_card(self) -> bool:
        """Whether a card is measured."""
        return self.device.startswith("cuda")

    def _once(self, kind: str, model: str, make: Callable[[], Any]) -> Any:
        if (kind, model) not in self._made:
            self._made[kind, model] = make()
        return self._made[kind, model]

    def bare(self, model: str) -> nn.Module:
        """The network of timm, on the device."""
        make = partial(bare_network, model, "random", "cpu", self.scale.timm_kwargs)
        return copy.deepcopy(self._once("bare", model, make)).to(self.device)

    def paper_detector(self, model: str) -> AnomalyDetector:
        """This bundle with the paper's model, on the CPU: the last block, and its density of width 256."""
        features = self._once("paper", model, lambda: make_features(model, "random", self.scale.timm_kwargs))
        return paper_detector(copy.deepcopy(features), self.scale.image_size)

    def default_detector(self, model: str) -> AnomalyDetector:
        """This bundle as it is without any setting, on the CPU."""
        make = partial(FeatureNetwork, model, "random", timm_kwargs=self.scale.timm_kwargs)
        features = copy.deepcopy(self._once("default", model, make))
        return AnomalyDetector(features, SpatialARDensity(features.num_channels), image_size=self.scale.image_size)

    def fitted_detector(self, model: str) -> AnomalyDetector:
        """The same, fitted to images, so that its maps are z-scores; thresholds are not set."""

        def fit() -> AnomalyDetector:
            detector = self.default_detector(model).eval()
            with torch.no_grad():
                maps = detector.embed(self.images(FITTED_IMAGES))
            values = maps.transpose(0, 1).flatten(1)
            detector.set_standardization(values.mean(1), values.std(1))
            detector.fit_before_training([maps], [maps])
            detector.fit_after_training([maps])
            return detector

        return copy.deepcopy(self._once("fitted", model, fit))

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Smooth noise [count, 1, H, W] in [0, 1], on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 1, 8, 8, generator=generator)
        return F.interpolate(coarse, [self.scale.image_size] * 2, mode="bicubic").clamp(0, 1)

    def flops(self, model: str) -> int:
        """Of the backbone for one image, up to its last block."""

        def count() -> int:
            side = self.scale.image_size
            return backbone_flops(self.bare(model), model, torch.zeros(1, 3, side, side, device=self.device))

        return int(self._once("flops", model, count))

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.scale.image_size // BACKBONES[self.scale.models[0]].patch) ** 2


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: unique.
        what: in a few words, for the page.
        build: from bench, model and images [B, 1, H, W] on the device to what makes a map of them.
        precision: of the matrix peak that it is compared with; '' where the backbone does not run to its last block.
        reserve: seconds that must be left for it to start.
        exact: builds what must give the same map, for those that change how it is computed.
    """

    name: str
    what: str
    build: Callable[[Bench, str, Tensor], Callable[[], Tensor]]
    precision: str = "fp16"
    reserve: float = 15.0
    exact: Callable[[Bench, str, Tensor], Callable[[], Tensor]] | None = None


def normalized(model: str, images: Tensor) -> Tensor:
    """RGB images [B, 3, H, W] as the backbone of ``model`` sees them."""
    spec = BACKBONES[model]
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def build_bare(bench: Bench, model: str, images: Tensor, precision: str) -> Callable[[], Tensor]:
    """The backbone alone, of images that are normalized already."""
    dtype = DTYPES[precision]
    network, seen = bench.bare(model).to(dtype), normalized(model, images).to(dtype)
    return lambda: bare_features(network, model, seen)[-1]


def build_paper(bench: Bench, model: str, images: Tensor) -> Callable[[], Tensor]:
    """The paper's loop, from images on the device, normalized already, to maps of 240 x 240."""
    network, seen = bench.bare(model), normalized(model, images)
    density = paper_density(bench.paper_detector(model).density).to(bench.device)
    return lambda: paper_map(density, paper_embeddings(network, model, seen))


def build_ours(
    bench: Bench, model: str, images: Tensor, precision: str = "fp16", default: bool = False, compiler: str = ""
) -> Callable[[], Tensor]:
    """This bundle, from images on the device to maps of their size."""
    compute = Compute(bench.device, precision)
    detector = compute.place((bench.default_detector if default else bench.paper_detector)(model)).eval()
    if compiler:
        detector.features.backbone.compile(backend=compiler)

    def run() -> Tensor:
        with compute.autocast():
            return detector.detect(images).anomaly_map

    return run


def build_tensorrt(bench: Bench, model: str, images: Tensor) -> Callable[[], Tensor]:
    """This bundle with its backbone compiled by TensorRT."""
    try:
        import torch_tensorrt  # noqa: F401 (its import makes the backend known)
    except ImportError as error:
        raise BundleError("torch_tensorrt is not installed") from error
    return build_ours(bench, model, images, compiler="tensorrt")


def build_graph(bench: Bench, model: str, images: Tensor) -> Callable[[], Tensor]:
    """This bundle in one CUDA graph: the copy of the images to where it reads them, and its replay."""
    if not bench.on_card:
        raise BundleError("CUDA graphs need a card")
    compute = Compute(bench.device, "fp16")
    detector = compute.place(bench.paper_detector(model))
    fix_positions(detector)
    seen = images.clone()

    def run() -> Tensor:
        with compute.autocast():
            return detector.detect(seen).anomaly_map

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> Tensor:
        seen.copy_(images)
        graph.replay()
        return found

    return replay


def fix_positions(detector: AnomalyDetector) -> None:
    """Let the rotary positions of ``detector`` be those of its image size: no pass computes them on the CPU."""
    backbone: Any = detector.features.backbone
    grid = [side // detector.features.patch_size for side in detector.image_size]
    backbone.rope = FixedRope(backbone.rope, grid)


def build_peer(bench: Bench, model: str, images: Tensor, kind: type[Bank], ratio: float) -> Callable[[], Tensor]:
    """A memory bank on the features of this bundle in fp16, from images on the device to maps of their size."""
    compute = Compute(bench.device, "fp16")
    features = compute.place(bench.paper_detector(model)).features
    count = max(1, int(ratio * bench.scale.bank_images * bench.patches))
    bank = torch.empty(count, features.num_channels, dtype=compute.dtype, device=bench.device).normal_()
    for part in bank.split(2**14):
        part.copy_(F.normalize(part, dim=1))
    search = kind(bank)

    def run() -> Tensor:
        with compute.autocast():
            patch_map, _ = search(features(features.normalize(images)))
        return F.interpolate(patch_map[:, None], images.shape[2:], mode="bilinear", align_corners=False)

    return run


FAST = (
    Contender(
        "this bundle fp16", "the paper's model computed by this bundle, `--precision auto` on a card", build_ours
    ),
    Contender(
        "paper loop fp32",
        "the authors' loop in other words: timm, masked convolutions with all taps; map of 240 x 240",
        build_paper,
        "fp32",
    ),
    Contender("this bundle fp32", "the same as in fp16", partial(build_ours, precision="fp32"), "fp32"),
    Contender(
        "this bundle's default fp16",
        "this bundle without any setting: blocks in the middle of the ViT, its own density and scores",
        partial(build_ours, default=True),
        "",
    ),
    Contender(
        "PatchCore 1 %", "a bank of a hundredth of the patches", partial(build_peer, kind=PatchCoreBank, ratio=0.01)
    ),
    Contender("PatchCore 10 %", "a bank of a tenth of the patches", partial(build_peer, kind=PatchCoreBank, ratio=0.1)),
    Contender(
        "AnomalyDINO's nearest neighbor", "a bank of all patches", partial(build_peer, kind=CosineBank, ratio=1.0)
    ),
    Contender("this bundle bf16", "the same as in fp16", partial(build_ours, precision="bf16"), "bf16"),
    Contender("bare backbone fp16", "the timm network alone, all of it in fp16", partial(build_bare, precision="fp16")),
    Contender("bare backbone fp32", "the timm network alone", partial(build_bare, precision="fp32"), "fp32"),
)
# what may take long, or leave a card in a state in which nothing else runs, comes last
BOLD = (
    Contender("this bundle CUDA graph", "the detector in one CUDA graph, fp16", build_graph, exact=build_ours),
    Contender(
        "this bundle compiled",
        "`--compile true`: the backbone by `torch.compile`, fp16",
        partial(build_ours, compiler="inductor"),
        reserve=75.0,
        exact=build_ours,
    ),
    Contender(
        "this bundle TensorRT",
        "the backbone by `torch.compile` with the backend `tensorrt`, fp16",
        build_tensorrt,
        reserve=90.0,
        exact=build_ours,
    ),
)


@dataclass(frozen=True)
class Cell:
    """A measurement of the plan.

    Attributes:
        kind: ``peak``, ``parity``, ``speed``, ``training`` or ``processes``.
        name: of what is measured.
        measure: gives its numbers.
        reserve: seconds that must be left for it to start.
    """

    kind: str
    name: str
    measure: Callable[[Bench], dict[str, Any]]
    model: str = ""
    batch: int = 0
    reserve: float = 15.0

    def about(self) -> dict[str, Any]:
        """What it is, as it goes into the results."""
        return {"kind": self.kind, "name": self.name, "model": self.model, "batch": self.batch}

    def words(self) -> str:
        """The same in words."""
        return ", ".join(
            filter(None, [self.kind, self.name, self.model, f"{self.batch} at once" if self.batch else ""])
        )


def make_plan(scale: Scale) -> list[Cell]:
    """All cells, in the order of their importance."""

    def parity(model: str) -> list[Cell]:
        return [Cell("parity", name, partial(measure_parity, model=model, precision=name), model) for name in DTYPES]

    def speed(contenders: Sequence[Contender], model: str) -> list[Cell]:
        return [
            Cell(
                "speed",
                one.name,
                partial(measure_speed, contender=one, model=model, batch=batch),
                model,
                batch,
                one.reserve,
            )
            for one in contenders
            for batch in scale.batches
        ]

    def training(model: str) -> list[Cell]:
        names = {"paper's density": False, "this bundle's default density": True}
        return [
            Cell("training", name, partial(measure_training, model=model, default=default), model, scale.training_batch)
            for name, default in names.items()
        ]

    first, *others = scale.models
    plan = [Cell("peak", name, partial(measure_peak, precision=name)) for name in DTYPES]
    plan += [*parity(first), *speed(FAST, first), *training(first)]
    for model in others:
        plan += [*parity(model), *speed(FAST, model), *training(model)]
    plan.append(Cell("processes", "one process", partial(measure_processes, model=first), first, scale.training_batch))
    for one in BOLD:
        for model in scale.models:
            plan += speed([one], model)
    return plan


def measure_peak(bench: Bench, precision: str) -> dict[str, Any]:
    """The matrix peak."""
    bench.peaks[precision] = matrix_peak(bench.device, DTYPES[precision], bench.scale.matrix)
    return {"flop_per_s": bench.peaks[precision], "side": bench.scale.matrix}


def measure_parity(bench: Bench, model: str, precision: str) -> dict[str, Any]:
    """How far embeddings and z-scores on the device are from those of the CPU in fp32, as relative norms."""
    images = bench.images(2, seed=1)
    detector = bench.fitted_detector(model)
    on_cpu = partial(embedded_and_scored, bench.fitted_detector(model), images, Compute("cpu", "fp32"))
    exact = bench._once("exact", model, on_cpu)
    found = embedded_and_scored(detector, images, Compute(bench.device, precision))
    names = ("embeddings", "map")
    return {name: relative(one, other) for name, one, other in zip(names, found, exact, strict=True)}


@torch.inference_mode()
def embedded_and_scored(detector: AnomalyDetector, images: Tensor, compute: Compute) -> tuple[Tensor, Tensor]:
    """Embeddings and patch maps of ``images``, on the CPU."""
    detector = compute.place(detector)
    with compute.autocast():
        maps = detector.embed(images.to(compute.device))
        scored, _ = detector.score_patches(maps)
    return detector.unpack(maps).embeddings.float().cpu(), scored.float().cpu()


def relative(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of ``exact``."""
    return float((found - exact).norm() / exact.norm())


@torch.inference_mode()
def measure_speed(bench: Bench, contender: Contender, model: str, batch: int) -> dict[str, Any]:
    """Milliseconds an image, memory, and share of the matrix peak."""
    images = bench.images(batch).to(bench.device)
    run = contender.build(bench, model, images)
    milliseconds = [one / batch for one in time_runs(run, bench)]
    low, middle, high = quantiles(milliseconds, n=4)
    numbers = {
        "ms": middle,
        "quartiles_ms": [low, high],
        "runs": len(milliseconds),
        "peak_bytes": torch.cuda.max_memory_allocated(bench.device) if bench.on_card else None,
    }
    if contender.exact is not None:
        found = run().float().clone()
        exact = contender.exact(bench, model, images)().float()
        numbers["difference"] = relative(found, exact)
    if contender.precision in bench.peaks:
        numbers["share_of_peak"] = bench.flops(model) / (middle / 1e3) / bench.peaks[contender.precision]
    return numbers


def time_runs(run: Callable[[], Any], bench: Bench) -> list[float]:
    """Milliseconds of each run, which waits for the one before: by events of the card, else by the clock."""
    for _ in range(WARM_UP):
        run()
    synchronize(bench.device)
    spent: list[float] = []
    until = time.monotonic() + bench.scale.seconds
    while len(spent) < LEAST_RUNS or (time.monotonic() < until and len(spent) < MOST_RUNS):
        spent.append(time_on_card(run) if bench.on_card else time_by_clock(run))
    return spent


def time_on_card(run: Callable[[], Any]) -> float:
    """Milliseconds between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_by_clock(run: Callable[[], Any]) -> float:
    """Milliseconds of the clock."""
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def measure_training(bench: Bench, model: str, default: bool) -> dict[str, Any]:
    """Slices a second of training on embeddings that are read from a feature cache on disk."""
    scale = bench.scale
    compute = Compute(bench.device, "auto")
    detector = compute.place((bench.default_detector if default else bench.paper_detector)(model))
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        store = EmbeddingStore(folder, folder, {"model": model})
        with torch.inference_mode(), compute.autocast():
            for start in range(0, scale.cached, 16):
                maps = detector.embed(bench.images(min(16, scale.cached - start)).to(bench.device)).float().cpu()
                for number, one in enumerate(maps, start):
                    store.add(str(number), one[None])
        store.flush()
        step = TrainingStep(detector.density, compute.training_autocast)
        generator = torch.Generator().manual_seed(0)
        reading, losses = 0.0, []

        def learn() -> None:
            nonlocal reading
            started = time.perf_counter()
            numbers = torch.randint(scale.cached, (scale.training_batch,), generator=generator)
            maps = torch.stack([store.read(str(int(number)), 0) for number in numbers])
            reading += time.perf_counter() - started
            losses.append(step(detector.standardized(maps)))

        learn()
        reading, started, steps = 0.0, time.perf_counter(), 0
        while steps < LEAST_RUNS or time.perf_counter() < started + scale.seconds:
            learn()
            steps += 1
        seconds = time.perf_counter() - started
    return {
        "slices_per_s": steps * scale.training_batch / seconds,
        "reading_share": reading / seconds,
        "steps": steps,
        "peak_bytes": torch.cuda.max_memory_allocated(bench.device) if bench.on_card else None,
        "losses": [losses[0], losses[-1]],
    }


def measure_processes(bench: Bench, model: str) -> dict[str, Any]:
    """Milliseconds of a training step alone, and in a group of one process: what NCCL (gloo on a CPU) adds."""
    backend = "nccl" if bench.on_card else "gloo"
    compute = Compute(bench.device, "auto")
    density = bench.paper_detector(model).density.to(bench.device)
    side = bench.scale.image_size // BACKBONES[model].patch
    features = torch.randn(bench.scale.training_batch, density.in_channels, side, side, device=bench.device)
    alone = TrainingStep(copy.deepcopy(density), compute.training_autocast)
    numbers: dict[str, Any] = {
        "backend": backend,
        "alone_ms": quantiles(time_runs(lambda: alone(features), bench), n=4)[1],
    }
    # a store within the process: nothing listens on a port
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        total = torch.ones(1, device=bench.device)
        torch.distributed.all_reduce(total)
        replica = DistributedDataParallel(density, device_ids=[bench.device] if bench.on_card else None)
        joined = TrainingStep(replica, compute.training_autocast)
        numbers |= {"sum": float(total), "ms": quantiles(time_runs(lambda: joined(features), bench), n=4)[1]}
    finally:
        torch.distributed.destroy_process_group()
    return numbers


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise an error in what runs longer.

    Raises:
        OutOfTimeError: in the middle of it.
    """

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"stopped after {seconds:.0f} s, when the time was over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(cell: Cell, bench: Bench, seconds: float) -> dict[str, Any]:
    """The numbers of ``cell``, or ``unavailable`` or ``failed`` with the reason in a line."""
    try:
        release(bench)
        with time_limit(seconds):
            return cell.measure(bench)
    except BundleError as error:
        return {"unavailable": str(error)}
    except Exception as error:  # whatever it is, the other cells go on
        reason = next(filter(str.strip, str(error).splitlines()), "no message")
        return {"failed": one_line(f"{type(error).__name__}: {reason.strip()}")}


def release(bench: Bench) -> None:
    """Forget what the last cell had on the card, and its peak."""
    gc.collect()
    torch.compiler.reset()
    if bench.on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)


def run_plan(
    plan: Sequence[Cell],
    bench: Bench,
    left: Callable[[], float],
    results: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Measure the cells of ``plan`` one after the other; all that is known is saved after each.

    Args:
        plan: in the order of importance.
        bench: where.
        left: seconds that are left; a cell for which they do not suffice is not begun, but those after it may be.
        results: ``cells`` and ``not_reached`` are added.
        save: gets the results.
    """
    results |= {"cells": [], "not_reached": []}
    for cell in plan:
        if left() < cell.reserve:
            results["not_reached"].append(cell.words())
            continue
        say(f"{left():.0f} s left: {cell.words()}")
        started = time.monotonic()
        numbers = outcome(cell, bench, left())
        results["cells"].append({**cell.about(), **numbers, "took_s": time.monotonic() - started})
        results["flops"] = {model: flops for (kind, model), flops in bench._made.items() if kind == "flops"}
        save(results)
    save(results)


def about(bench: Bench, minutes: float) -> dict[str, Any]:
    """Where the numbers come from."""
    card = torch.cuda.get_device_properties(bench.device) if bench.on_card else None
    return {
        "command": f"python -m scripts.benchmarks.gpu {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "weights": "random",
        "machine": {
            "card": card.name if card else None,
            "card_bytes": card.total_memory if card else None,
            "capability": f"{card.major}.{card.minor}" if card else None,
            "cuda": torch.version.cuda if card else None,
            "processor": processor(),
            "cores": os.cpu_count(),
        },
        "tf32": {
            "matrix products": torch.backends.cuda.matmul.allow_tf32,
            "convolutions": torch.backends.cudnn.allow_tf32,
        },
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        "scale": asdict(bench.scale),
    }


def report(results: dict[str, Any]) -> str:
    """The Markdown page."""
    machine, scale, cells = results["machine"], results["scale"], results["cells"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        "# On a graphics card",
        "",
        "```sh",
        "python -m scripts.benchmarks.gpu --out docs/performance",
        "```",
        "",
    ]
    if not cells:
        lines += ["**Not measured: no graphics card was at hand.** What the command measures on one:", ""]
        lines += [f"- {words}" for words in results["not_reached"]]
        return "\n".join([*lines, "", *legend(scale)]) + "\n"
    card = (
        f"{machine['card']} ({megabytes(machine['card_bytes'])} MB, compute capability {machine['capability']}, CUDA "
        f"{machine['cuda']})"
        if machine["card"]
        else "**No graphics card: this only shows that everything runs**"
    )
    tf32 = " and ".join(name for name, on in results["tf32"].items() if on) or "nothing"
    lines += [
        f"`{results['command']}` on {results['date']}. {card}; {machine['processor']}, {machine['cores']} cores. "
        f"{versions}. In fp32, TF32 is used for {tf32}.",
        "",
        "The weights of all networks are **random**, images are smooth noise, and the vectors of a bank are random, "
        "too: speed and memory do not depend on them, and nothing here is about accuracy.",
    ]
    for model in scale["models"]:
        for batch in scale["batches"]:
            lines += speed_table(results, model, batch)
    lines += other_tables(cells)
    if results["not_reached"]:
        lines += ["", f"Not reached in {results['minutes']:g} minutes:", ""]
        lines += [f"- {words}" for words in results["not_reached"]]
    return "\n".join([*lines, "", *legend(scale)]) + "\n"


def speed_table(results: dict[str, Any], model: str, batch: int) -> list[str]:
    """The rows of one backbone and number of images at once."""
    rows = [one for one in results["cells"] if (one["kind"], one["model"], one["batch"]) == ("speed", model, batch)]
    if not rows:
        return []
    size = results["scale"]["image_size"]
    flops = results["flops"].get(model)
    paper = next((row["ms"] for row in rows if row["name"].startswith("paper loop") and "ms" in row), None)
    lines = [
        "",
        f"## {model} at {size} x {size}, {batch} at once",
        "",
        f"The backbone takes {flops / 1e9:.1f} GFLOP an image." if flops else "",
        "",
        "| | ms an image (quartiles) | times paper's loop | times 20 ms | of matrix peak | peak MB | times 0.2 GB "
        "| difference |",
        "| --- " + "| ---: " * 7 + "|",
    ]
    for row in rows:
        if "ms" in row:
            low, high = row["quartiles_ms"]
            lines.append(
                f"| {row['name']} | {digits(row['ms'])} ({digits(low)} to {digits(high)}) "
                f"| {ratio(row['ms'], paper)} | {ratio(row['ms'], PAPER_MS)} | {share(row.get('share_of_peak'))} "
                f"| {megabytes(row['peak_bytes'])} | {ratio(row['peak_bytes'], PAPER_BYTES)} "
                f"| {share(row.get('difference'))} |"
            )
        else:
            lines.append(f"| {row['name']} | {trouble(row)} {'| ' * 7}|")
    return lines


def other_tables(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Peaks, parity, training and processes."""

    def rows(kind: str) -> list[dict[str, Any]]:
        return [one for one in cells if one["kind"] == kind]

    def cut(row: dict[str, Any], texts: Sequence[str]) -> str:
        return f"| {row['model']} | {row['name']} | {' | '.join(texts)} |"

    lines = ["", "## Parity with the CPU", "", "Relative norm of the difference from the CPU in fp32:", ""]
    lines += ["| backbone | on the card | embeddings | z-scores |", "| --- | --- | ---: | ---: |"]
    for row in rows("parity"):
        lines.append(cut(row, [share(row["embeddings"]), share(row["map"])] if "map" in row else [trouble(row), ""]))
    lines += ["", "## Training from the feature cache", ""]
    lines += ["| backbone | | slices a second | of it reading | peak MB |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows("training"):
        if "slices_per_s" in row:
            numbers = digits(row["slices_per_s"]), share(row["reading_share"]), megabytes(row["peak_bytes"])
            lines.append(cut(row, numbers))
        else:
            lines.append(cut(row, [trouble(row), "", ""]))
    lines += ["", "## Processes", ""]
    for row in rows("processes"):
        times = "a training step of {batch} slices takes {alone_ms:.3g} ms alone, {ms:.3g} ms in a group ({backend})"
        lines.append(f"- {row['name']}: {times.format(**row) if 'ms' in row else trouble(row)}")
    lines += ["", "## Matrix peak", ""]
    for row in rows("peak"):
        found = f"{row['flop_per_s'] / 1e12:.1f} TFLOP/s" if "flop_per_s" in row else trouble(row)
        lines.append(f"- {row['name']}: {found}")
    return lines


def legend(scale: dict[str, Any]) -> list[str]:
    """What was compared, and how."""
    return [
        "## What is compared",
        "",
        *(f"- {one.name}: {one.what}." for one in (*FAST, *BOLD)),
        "",
        "Images are on the card, maps stay there. Every run waits for the one before. Times are those between two "
        f"events of the card: median and quartiles of {LEAST_RUNS} to {MOST_RUNS} runs, after {WARM_UP} to warm up. "
        "'peak MB': what torch had allocated at most, with weights, bank and images. 'of matrix peak': floating-point "
        "operations of the backbone per second of the whole, over those of a product of square matrices of side "
        f"{scale['matrix']} in the same precision. 'difference': of the map from that of 'this bundle fp16', as a "
        f"relative norm. The paper says {PAPER_MS:g} ms an image and {PAPER_BYTES / 1e9:g} GB of its own card, for a "
        "ViT-S/16.",
        "",
        f"A bank is made of {scale['bank_images']} healthy images; its time and memory grow in proportion to them. The "
        "search is in plain torch and fp16, by one matrix product for each part of the bank, without the Gaussian by "
        "which anomalib smooths maps: that favors the peers. To choose a coreset is not timed.",
        "",
        f"Training reads {scale['cached']} slices from the feature cache on disk again and again, in batches of "
        f"{scale['training_batch']}, in the precision that training takes by `--precision auto`.",
    ]


def trouble(row: dict[str, Any]) -> str:
    """Why a cell has no numbers."""
    return f"not available: {row['unavailable']}" if "unavailable" in row else f"failed: {row['failed']}"


def ratio(value: float | None, base: float | None) -> str:
    """``value`` in parts of ``base``."""
    return "-" if value is None or base is None else digits(value / base)


def share(value: float | None) -> str:
    """``value`` as a percentage."""
    return "-" if value is None else f"{100 * value:.3g} %"


def megabytes(value: float | None) -> str:
    """``value`` bytes in MB."""
    return "-" if value is None else digits(value / 1e6)


def save(results: dict[str, Any], folder: Path) -> None:
    """``gpu.json`` and ``gpu.md``, of all that is known."""
    write(folder / "gpu.json", results)
    (folder / "gpu.md").write_text(report(results), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="")
    add("--out", type=Path, default=Path("docs/performance"), help="folder of gpu.json and gpu.md")
    add("--minutes", type=float, default=8.0, help="that it may take in all; 0 writes down the plan")
    add("--device", default="cuda:0", help="default: cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images: to see that everything runs")
    given = parser.parse_args(arguments)
    try:
        if given.device.startswith("cuda") and not torch.cuda.is_available():
            raise BundleError("there is no graphics card here: --device cpu --tiny shows that everything runs")
        bench = Bench(given.device, TINY if given.tiny else Scale())
        if bench.on_card:
            torch.cuda.set_device(bench.device)
        end = STARTED + 60 * given.minutes - SPARE
        given.out.mkdir(parents=True, exist_ok=True)
        plan, results = make_plan(bench.scale), about(bench, given.minutes)
        run_plan(plan, bench, lambda: end - time.monotonic(), results, partial(save, folder=given.out))
    except BundleError as error:
        sys.exit(f"error: {error}")
    print((given.out / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
