"""Exports of a trained detector, and inference with such a file instead of a checkpoint and a backbone.

Each file holds the whole way from an image in [0, 1] to its anomaly map, resize and normalization included, the
threshold, and the identity that a checkpoint has. ONNX (.onnx) and OpenVINO (.xml with its .bin) are graphs of
operations on tensors. TorchScript (.ts) is a program, which may read and write any file: it needs consent.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.data.torchscript_utils import save_net_with_metadata
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.compute import Compute
from bundle.errors import BundleError, check_choice
from bundle.files import check_hash, whole_files, write_csv, writing
from bundle.identity import CALIBRATION, check_numbers, checked_identity
from bundle.model import agreed_settings
from bundle.networks.backbones import BACKBONES
from bundle.networks.detector import AnomalyDetector, Detection
from bundle.networks.features import CPU_PIXELS
from bundle.networks.likeness import CaseLikeness
from bundle.networks.neighbors import SlicePooling
from bundle.provenance import model_words

logger = logging.getLogger(__name__)

INPUT = "image"
OUTPUTS = Detection._fields
COLUMNS = (
    "format",
    "file",
    "megabytes",
    "milliseconds_per_image",
    "times_as_fast",
    "max_difference",
    "image_size",
    "batch_size",
    "threads",
    "model",
)
_OPSET = 18
_PROTOBUF_LIMIT = 2**31 - 2**24  # bytes of one ONNX file, less 16 MiB for its graph
_OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_POOLING = "slice_pooling"
_LIKENESS = "case_likeness"
_STATES = (_POOLING, _LIKENESS)  # parts that come after the graph
_PASSPORT = "passport.json"  # what a TorchScript archive says of itself, beside its program
_LONGEST_PASSPORT = 2**20  # bytes
_SECTION = "framework"  # of rt_info, where OpenVINO keeps the metadata of an ONNX file


class ExportGraph(nn.Module):
    """:meth:`AnomalyDetector.detect` in operations that every runtime has, right at every batch, height and width.

    The same results within rounding; what differs is how: the resize is two matrix products, channels are picked by
    index (a broadcast of 1 to 3 would fix their number), and batches are not split.
    """

    def __init__(self, detector: AnomalyDetector) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).float().cpu().eval()
        self.detector.features.cpu_pixels = 0  # batches are not split

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :class:`Detection` has of ``image`` [B, 1 or 3, H, W], in its order."""
        # index 2 does not exist in an image of two channels: the runtime refuses it
        channels = torch.arange(3, device=image.device) * torch.sym_min(image.shape[1] - 1, 1)
        resized = resize_by_matrices(image, self.detector.image_size)[:, channels]
        maps = self.detector.embed_resized(resized)
        patch_map, inside = self.detector.score_patches(maps)
        anomaly_map = F.interpolate(
            patch_map.unsqueeze(1), [image.shape[-2], image.shape[-1]], mode="bilinear", align_corners=False
        )
        unlikeness = self.detector.unlikeness(maps, patch_map, inside)
        return anomaly_map, self.detector.image_score(patch_map, inside), patch_map, unlikeness


def resize_by_matrices(image: Tensor, size: Sequence[int]) -> Tensor:
    """``F.interpolate(image, size, mode="bilinear", antialias=True)`` of ``image`` [B, C, H, W], in matrix products.

    TensorRT has no antialiased resize, and runtimes that have one do not all agree; these agree to rounding.
    """
    rows = _resize_matrix(image.shape[-2], size[0], image)
    columns = _resize_matrix(image.shape[-1], size[1], image)
    return rows @ image @ columns.T


def _resize_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The [new, old] weights of a triangle filter as wide as the coarser of the two grids.

    Whole numbers as far as they go, in units of 1 / (2 * new) old pixels: 16-bit floats could not tell pixels apart.
    """
    centers = (2 * torch.arange(old, device=like.device) + 1) * new
    targets = (2 * torch.arange(new, device=like.device) + 1) * old
    reach: Any = 2 * torch.sym_max(old, new)
    weights: Tensor = (reach - (centers[None] - targets[:, None]).abs()).clamp(min=0).to(like.dtype) / reach
    return weights / weights.sum(dim=1, keepdim=True)


# writing, of which export_all leaves nothing half done


def export_torchscript(
    detector: nn.Module,
    path: str | os.PathLike,
    configs: Sequence[str | os.PathLike] = (),
    metadata: str | os.PathLike | None = None,
) -> None:
    """Write a scripted detector, the file that ``python -m monai.bundle ckpt_export`` writes, and a passport in it.

    Its ``forward`` gives the anomaly map; ``detect`` and the buffers of thresholds and ``identity`` are there, too. The
    passport has these as JSON, for whoever reads them before the program is loaded.

    Args:
        detector: trained; one that is no :class:`AnomalyDetector` gets no passport.
        path: of the file, .ts.
        configs: config files to embed under ``extra/``.
        metadata: ``metadata.json`` to embed.
    """
    embedded = {f"{Path(file).stem}.json": json.dumps(ConfigParser.load_config_file(file)).encode() for file in configs}
    if isinstance(detector, AnomalyDetector):
        embedded[_PASSPORT] = json.dumps(_passport(detector)).encode()
    values = ConfigParser.load_config_file(metadata) if metadata else None
    written = io.BytesIO()  # torch ends the process if it cannot write to a file of its own
    with _quiet():
        scripted = torch.jit.script(copy.deepcopy(detector).float().cpu().eval())
        save_net_with_metadata(scripted, written, False, False, values, embedded)
    # what torch writes into memory has a root of another name than the file, where MONAI Deploy finds no config
    with zipfile.ZipFile(written) as archive, zipfile.ZipFile(path, "w") as renamed:
        for entry in archive.infolist():
            name = entry.filename.split("/", 1)[1]
            renamed.writestr(zipfile.ZipInfo(f"{Path(path).stem}/{name}"), archive.read(entry))


def export_onnx(detector: AnomalyDetector, path: str | os.PathLike) -> None:
    """Write an ONNX file: input ``image`` [B, 1 or 3, H, W] in [0, 1], outputs as in :class:`Detection`.

    Raises:
        BundleError: if the packages are missing, or the weights exceed the 2 GB that one ONNX file can hold.
    """
    _optional("onnx")
    _optional("onnxscript")
    size = sum(weight.numel() * 4 for weight in [*detector.parameters(), *detector.buffers()])
    if size > _PROTOBUF_LIMIT:
        raise BundleError(f"{size / 1e9:.1f} GB of weights do not fit into an ONNX file: give --formats torchscript")
    graph = ExportGraph(detector)
    height, width = detector.image_size
    example = torch.rand(2, 3, height // 2 + 3, width // 2 + 5)  # unlike each other: equal sizes may be taken for one
    axes = {0: "batch", 1: "channels", 2: "height", 3: "width"}
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: axes},
            opset_version=_OPSET,
            verbose=False,
        )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # source lines and paths of this machine
        program.model.metadata_props.clear()
        program.model.metadata_props.update(_passport(detector))
        program.save(path, external_data=False)


def export_openvino(
    detector: AnomalyDetector, path: str | os.PathLike, onnx_file: str | os.PathLike | None = None
) -> None:
    """Write an OpenVINO model, ``path`` (.xml) and its .bin, from the ONNX graph; the weights keep 32 bits.

    Args:
        detector: trained.
        path: of the .xml.
        onnx_file: what :func:`export_onnx` wrote of the same detector, if it is at hand.

    Raises:
        BundleError: if the packages are missing, or the weights exceed the 2 GB that one ONNX file can hold.
    """
    openvino = _optional("openvino")
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        source = Path(onnx_file or Path(folder, "model.onnx"))
        if onnx_file is None:
            export_onnx(detector, source)
        model = openvino.Core().read_model(source)
        try:
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError:
            shutil.copyfile(source, Path(folder, "room"))  # as large: here the system tells of a full disk
            raise


def _passport(detector: AnomalyDetector) -> dict[str, str]:
    """What decides an output and is no part of the graph."""
    return {
        "identity": json.dumps(detector.describe(), sort_keys=True),
        **{name: repr(float(getattr(detector, name))) for name in CALIBRATION},
        **{part: _as_json(getattr(detector, part).state_dict()) for part in _STATES},
    }


def _as_json(state: Mapping[str, Tensor]) -> str:
    return json.dumps({name: value.tolist() for name, value in state.items()})


@contextmanager
def _whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path of the same name in a folder beside ``path``; what is written there appears at once or not at all.

    Raises:
        BundleError: if it cannot be written.
    """
    target = Path(path)
    with whole_files(target.parent) as folder, writing(target):  # which moves the .bin before the .xml
        try:
            yield folder / target.name
        except RuntimeError as error:  # of torch and OpenVINO
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BundleError(f"cannot write '{target}' ({reason}): leave the format out of --formats") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks that no user can act on."""
    noisy = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [one.level for one in noisy]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            for one in noisy:
                one.setLevel(logging.ERROR)
            yield
        finally:
            for one, level in zip(noisy, levels, strict=True):
                one.setLevel(level)


class NotInstalledError(BundleError):
    """A package that reads or writes a format is missing."""


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(f'the package {name} is not installed: pip install -e ".[export]"') from error


# reading


class Runner(NamedTuple):
    """An exported file that is open.

    Attributes:
        identity: as :meth:`AnomalyDetector.describe` gives it.
        calibration: thresholds of patches and of images, and the rates that they were wanted for.
        states: of :class:`~bundle.networks.neighbors.SlicePooling` and :class:`CaseLikeness`, by their names; empty in
            files from before them.
        run: gives the outputs of :class:`Detection`, in its order, of images [B, 1 or 3, H, W], once the device and the
            precision are known; the first three in files from before the fourth.
        is_program: whether the file can do more than compute.
    """

    identity: dict[str, Any]
    calibration: Sequence[Tensor]
    states: Mapping[str, Mapping[str, Tensor]]
    run: Callable[[Compute], Callable[[Tensor], Sequence[Tensor]]]
    is_program: bool = False


class ExportedDetector(nn.Module):
    """A detector in a file: what inference needs of :class:`AnomalyDetector`, without a backbone or its weights.

    On a CPU few images go through at once, as in :class:`FeatureNetwork`.

    Args:
        runner: the open file.
        compute: where it runs, and how precisely.
        given: see :func:`load_exported`.

    Attributes:
        compute: as given.
        settings: of the model, see :mod:`bundle.model`.
    """

    def __init__(self, runner: Runner, compute: Compute, given: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.threshold, self.image_threshold, self.false_positive_rate, self.image_false_positive_rate = (
            runner.calibration
        )
        self.settings = agreed_settings(runner.identity, given)
        self.image_size: list[int] = self.settings["image_size"]
        self.compute = compute
        self.slice_pooling = SlicePooling(
            *(self.settings[name] for name in ("slice_pooling", "image_score", "score_scale"))
        )
        self.case_likeness = CaseLikeness()
        for name, kept in runner.states.items():
            part = getattr(self, name)
            if kept:  # TorchScript keeps more than a checkpoint
                wanted = {key: value for key, value in part.state_dict().items() if key in kept}
                part.load_state_dict({key: kept[key].to(value.dtype) for key, value in wanted.items()})
        self.slice_pooling.to(compute.device)
        self._run = runner.run(compute)
        self._identity = runner.identity

    def resize(self, image: Tensor) -> Tensor:
        """Resize ``image`` [B, 1 or 3, H, W] to ``image_size``."""
        if list(image.shape[-2:]) == self.image_size:
            return image
        return F.interpolate(image, self.image_size, mode="bilinear", align_corners=False, antialias=True)

    def detect(self, image: Tensor, raw: bool = False) -> Detection:
        """Anomaly map, image score and patch map of ``image`` [B, 1 or 3, H, W] in [0, 1], on its device.

        Raises:
            BundleError: for ``raw``, or another number of channels.
        """
        if raw:
            raise BundleError("an exported detector has no raw scores: use the checkpoint (raw=True)")
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise BundleError(f"image of shape {list(image.shape)}: give [batch, 1 or 3 channels, height, width]")
        height, width = self.image_size
        parts = [image] if image.is_cuda else image.split(max(1, CPU_PIXELS // (height * width)))
        outputs = zip(*(self._run(part) for part in parts), strict=True)
        found = [torch.cat(output).to(image.device) for output in outputs]
        absent = len(OUTPUTS) - len(found)  # in a file of an earlier version, with which nothing is compared
        found += [torch.zeros_like(found[1])] * absent
        return Detection(*found)

    def forward(self, image: Tensor) -> Tensor:
        """The anomaly map [B, 1, H, W] of ``image`` [B, 1 or 3, H, W] in [0, 1]."""
        return self.detect(image).anomaly_map

    def describe(self) -> dict[str, Any]:
        """Backbone, hash of its weights, preprocessing and density."""
        return self._identity


def load_exported(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    given: Mapping[str, Any] | None = None,
    trust_program: bool = False,
    exported_sha256: str | None = None,
) -> ExportedDetector:
    """The detector in an exported file, by its suffix, with as many threads as torch has now.

    Args:
        path: .ts, .onnx or .xml.
        device, precision: see :class:`~bundle.compute.Compute`. TorchScript follows both; OpenVINO follows the
            precision, on a CPU; ONNX runs in 32 bits, on the GPU where onnxruntime has a provider for it.
        given: settings that the caller expects, or that the model leaves open.
        trust_program: run a TorchScript file of whatever hash. It can do whatever its maker wants.
        exported_sha256: hash (hex) that the file must have; a TorchScript file that has it is run.

    Raises:
        BundleError: if the file is missing, damaged, of another make, version, settings or hash, a program that nobody
            vouches for, or if the package that reads it is not installed.
    """
    file = Path(path)
    if file.suffix not in _READERS:
        raise BundleError(f"exported file '{file}' must end in {', '.join(_READERS)}")
    if not file.is_file():
        raise BundleError(f"no exported detector at '{file}': make it by the command exporting, or give --exported")
    check_hash(file, exported_sha256, "exported_sha256")
    try:
        runner = _READERS[file.suffix](file)
    except NotInstalledError:
        raise
    except Exception as error:
        raise _no_export(file, error) from error
    if runner.is_program and not trust_program and exported_sha256 is None:
        raise BundleError(
            f"'{file}' is a program (TorchScript), which can read and write any file of yours when it is loaded: give "
            "an ONNX or OpenVINO file, which cannot, or its hash by --exported_sha256; --trust_program true takes any"
        )
    try:
        spec = BACKBONES[runner.identity["backbone"]]
        return ExportedDetector(runner, Compute(device, precision, features=spec), given)
    except BundleError:
        raise
    except Exception as error:
        raise _no_export(file, error) from error


def _no_export(file: Path, error: Exception) -> BundleError:
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("Exception from", "Check "))]
    reason = lines[0] if lines else type(error).__name__
    return BundleError(f"'{file}' is no exported detector of this bundle ({reason}): make it by the command exporting")


def _read_torchscript(file: Path) -> Runner:
    """The passport in the archive; the program is loaded when it runs."""

    def runs(compute: Compute) -> Callable[[Tensor], Sequence[Tensor]]:
        with _quiet():
            module: Any = torch.jit.load(str(file), map_location="cpu")
        return module.to(compute.device).detect

    with zipfile.ZipFile(file) as archive:
        entry = next((one for one in archive.infolist() if one.filename.endswith(f"/extra/{_PASSPORT}")), None)
        if entry is None or entry.file_size > _LONGEST_PASSPORT:
            raise ValueError("it has no passport, which names its settings outside of its program")
        return _from_passport(json.loads(archive.read(entry)), runs)._replace(is_program=True)


def _read_onnx(file: Path) -> Runner:
    runtime = _optional("onnxruntime")

    def session_on(device: torch.device) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" in runtime.get_available_providers():
                providers.insert(0, "CUDAExecutionProvider")
            else:
                logger.warning("onnxruntime has no provider for CUDA and runs on the CPU: install onnxruntime-gpu")
        return runtime.InferenceSession(str(file), options, providers=providers)

    on_cpu = session_on(torch.device("cpu"))

    def runs(compute: Compute) -> Callable[[Tensor], list[Tensor]]:
        session = session_on(compute.device) if compute.device.type == "cuda" else on_cpu
        names = [output.name for output in session.get_outputs()]

        def run(image: Tensor) -> list[Tensor]:
            outputs = session.run(
                [name for name in OUTPUTS if name in names], {INPUT: image.detach().float().cpu().numpy()}
            )
            return [torch.from_numpy(output) for output in outputs]

        return run

    return _from_passport(on_cpu.get_modelmeta().custom_metadata_map, runs)


def _read_openvino(file: Path) -> Runner:
    openvino = _optional("openvino")
    model = openvino.Core().read_model(file)
    if not model.has_rt_info([_SECTION, "identity"]):
        raise ValueError("it has no identity")
    keys = [key for key in ("identity", *CALIBRATION, *_STATES) if model.has_rt_info([_SECTION, key])]
    passport = {key: model.get_rt_info([_SECTION, key]).astype(str) for key in keys}

    def runs(compute: Compute) -> Callable[[Tensor], list[Tensor]]:
        settings = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISIONS[compute.precision],
            # the hint alone leaves shortcuts open to layers
            "EXECUTION_MODE_HINT": "ACCURACY" if compute.precision == "fp32" else "PERFORMANCE",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        names = {name for output in compiled.outputs for name in output.names}

        def run(image: Tensor) -> list[Tensor]:
            outputs = compiled({INPUT: image.detach().float().cpu().contiguous().numpy()})
            return [torch.from_numpy(outputs[name].copy()) for name in OUTPUTS if name in names]

        return run

    return _from_passport(passport, runs)


def _from_passport(
    passport: Mapping[str, str], runs: Callable[[Compute], Callable[[Tensor], Sequence[Tensor]]]
) -> Runner:
    """The file that ``runs``, with what its ``passport`` says, which is checked.

    Raises:
        BundleError: for an identity that no model has, or numbers that are none.
    """
    if "identity" not in passport:
        raise ValueError("it has no identity")
    calibration = {name: torch.tensor(float(passport[name]), dtype=torch.float64) for name in CALIBRATION}
    kept = {part: json.loads(passport.get(part, "{}")) for part in _STATES}
    states = {part: {name: torch.tensor(value) for name, value in state.items()} for part, state in kept.items()}
    check_numbers(calibration | {f"{part}.{name}": value for part in states for name, value in states[part].items()})
    return Runner(checked_identity(json.loads(passport["identity"])), list(calibration.values()), states, runs)


_READERS = {".ts": _read_torchscript, ".onnx": _read_onnx, ".xml": _read_openvino}

# all of them at once

_SUFFIXES = {"torchscript": ".ts", "onnx": ".onnx", "openvino": ".xml"}


def export_all(
    detector: AnomalyDetector,
    folder: str | os.PathLike,
    formats: str | Sequence[str] = tuple(_SUFFIXES),
    batch_size: int = 8,
    configs: Sequence[str | os.PathLike] = (),
    metadata: str | os.PathLike | None = None,
    tolerance: float = 1e-3,
) -> list[dict[str, Any]]:
    """Write ``model.ts``, ``model.onnx``, ``model.xml`` and ``.bin`` into ``folder``, checked and timed.

    Each must give the results of ``detector`` at three sizes before it appears. ``exports.csv`` and a table tell the
    speed and size of each, beside PyTorch in 32 bits.

    Args:
        detector: trained, on a CPU.
        folder: of the files.
        formats: of ``torchscript``, ``onnx`` and ``openvino``.
        batch_size: images per pass when timed.
        configs, metadata: to be embedded in TorchScript.
        tolerance: largest difference of an output, in parts of its largest value.

    Returns:
        The rows of ``exports.csv``, see ``COLUMNS``.

    Raises:
        BundleError: for an unknown format, a missing package, or an export that differs, of which no file is left.
    """
    wanted = [formats] if isinstance(formats, str) else list(formats)
    for name in wanted:
        check_choice("format", name, _SUFFIXES)
    detector = detector.cpu().eval()
    image = torch.rand(batch_size, 1, *detector.image_size)
    row = {
        "image_size": "x".join(map(str, detector.image_size)),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "model": model_words(detector.describe()),
    }
    plain = milliseconds(detector.detect, image)
    rows: list[dict[str, Any]] = [row | {"format": "pytorch", "milliseconds_per_image": plain, "times_as_fast": 1.0}]
    onnx_file: Path | None = None
    for name in wanted:
        target = Path(folder) / f"model{_SUFFIXES[name]}"
        with _whole(target) as partial:
            if name == "torchscript":
                export_torchscript(detector, partial, configs, metadata)
            elif name == "onnx":
                export_onnx(detector, partial)
                onnx_file = target
            else:
                export_openvino(detector, partial, onnx_file)
            size = sum(file.stat().st_size for file in partial.parent.iterdir())
            exported = load_exported(partial, trust_program=True)
            difference = check_parity(detector, exported, name, tolerance)
            spent = milliseconds(exported.detect, image)
        found = {"format": name, "file": target.name, "megabytes": size / 1e6, "milliseconds_per_image": spent}
        rows.append(row | found | {"times_as_fast": plain / spent, "max_difference": difference})
    write_csv(Path(folder) / "exports.csv", rows, COLUMNS)
    print(table(rows))
    print(f"the files and exports.csv are in {Path(folder).resolve()}")
    return rows


@torch.inference_mode()
def check_parity(
    detector: AnomalyDetector, exported: ExportedDetector, name: str = "export", tolerance: float = 1e-3
) -> float:
    """The largest difference of an output at three sizes, in parts of the largest value of that output.

    Sizes: that of the backbone, a smaller and a larger one of other proportions; 1 to 3 images, gray and color.

    Raises:
        BundleError: if it is not below ``tolerance``.
    """
    height, width = detector.image_size
    shapes = [(1, 1, height, width), (3, 1, height // 2 + 1, width * 2 // 3), (2, 3, height * 2 + 3, width + 17)]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in shapes:
        image = torch.rand(shape, generator=generator)
        for output, ours, theirs in zip(OUTPUTS, detector.detect(image), exported.detect(image), strict=True):
            difference = float((ours - theirs).abs().max() / ours.abs().max()) if ours.shape == theirs.shape else 1.0
            if not difference < tolerance:
                raise BundleError(
                    f"{name} differs from the checkpoint by {difference:.2g} of the largest {output} at "
                    f"{shape[2]} x {shape[3]} pixels, more than {tolerance:g}: leave it out of --formats"
                )
            worst = max(worst, difference)
    return worst


@torch.inference_mode()
def milliseconds(detect: Callable[[Tensor], Any], image: Tensor, repeats: int = 9, budget: float = 20.0) -> float:
    """Median time per image of ``detect(image)`` after two passes of warm-up, in ``budget`` seconds or a little more.

    Args:
        detect: what is timed.
        image: [B, C, H, W].
        repeats: how often, at most.
        budget: seconds after which no other pass begins.
    """
    for _ in range(2):
        detect(image)
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) < repeats and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        detect(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / len(image)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``exports.csv`` for the reader."""
    first = rows[0]
    lines = [
        f"{first['image_size']} pixels, batches of {first['batch_size']}, {first['threads']} threads, 32 bits, CPU; "
        f"{first['model']}",
        f"{'format':12} {'file':11} {'MB':>8} {'ms/image':>9} {'speed':>6} {'difference':>11}",
    ]
    for row in rows:
        size = f"{row['megabytes']:.1f}" if "megabytes" in row else ""
        difference = f"{row['max_difference']:.1e}" if "max_difference" in row else ""
        lines.append(
            f"{row['format']:12} {row.get('file', ''):11} {size:>8} {row['milliseconds_per_image']:9.1f} "
            f"{row['times_as_fast']:5.2f}x {difference:>11}"
        )
    return "\n".join(lines)
