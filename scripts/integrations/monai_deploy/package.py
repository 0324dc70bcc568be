"""An application on MONAI Deploy from a checkpoint: a folder that runs where this bundle is not installed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.checkpoint import load_checkpoint, trained_settings
from bundle.errors import BundleError
from bundle.exports import export_torchscript
from bundle.files import file_sha256, whole_files
from bundle.model import make_detector
from scripts.integrations.monai_deploy.recipe import embedded_configs
from scripts.integrations.monai_deploy.study import StudyDetector

ROOT = Path(__file__).parents[3]
APPLICATION = Path(__file__).with_name("application")
CONFIGS = ROOT / "configs"
# of this bundle, what reads and writes DICOM, paints overlays and names what is unlike the training data; networks and
# transforms are in model.ts
MODULES = (
    "__init__.py",
    "errors.py",
    "figures.py",
    "learned.py",
    "limits.py",
    "results.py",
    "dicom/__init__.py",
    "dicom/decoding.py",
    "dicom/jpeg12.py",
    "dicom/selection.py",
    "dicom/series.py",
    "dicom/words.py",
    "dicom/objects.py",
)


def make_application(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, weights: str | None = None, batch_size: int = 8
) -> Path:
    """Write ``application/`` and ``model.ts`` to ``output_dir``, in place of what an earlier call left there.

    The settings of the model are those of the checkpoint: data, checked where they are read. The application knows the
    hash of ``model.ts``, which is a program, and runs no other.

    Args:
        checkpoint: ``model.pt`` of a training.
        output_dir: is made if it is missing.
        weights: of the backbone, as the knob of that name.
        batch_size: slices in one forward pass.

    Returns:
        The folder of the application, ready for ``python APPLICATION -i STUDY -o RESULTS -m model.ts``.

    Raises:
        BundleError: if there is no such checkpoint, or the weights are others.
    """
    settings = trained_settings(checkpoint)
    detector = make_detector(settings, weights)
    load_checkpoint(detector, checkpoint)
    configs = embedded_configs(
        [CONFIGS / "inference.json", CONFIGS / "monai_deploy.json"],
        CONFIGS / "metadata.json",
        {"checkpoint": os.path.abspath(checkpoint), "device": "cpu"},
    )
    study = StudyDetector(detector, settings["slice_range"], settings["min_foreground"], batch_size)
    with whole_files(output_dir, stale=["application"]) as folder:
        write_model(study, folder / "model.ts", configs)
        copy_application(folder / "application")
        vouch(folder / "model.ts", folder / "application" / "model.sha256")
    return Path(output_dir) / "application"


def write_model(study: StudyDetector, path: Path, configs: dict[str, dict[str, Any]]) -> None:
    """Write ``model.ts``: ``study``, scripted, with ``configs`` under ``extra/``."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.json" for name in configs}
        for name, file in files.items():
            file.write_text(json.dumps(configs[name]))
        export_torchscript(study, path, [files["inference"]], files["metadata"])


def copy_application(target: Path) -> None:
    """Copy the application, and of this bundle the modules that it needs, to the new folder ``target``."""
    shutil.copytree(APPLICATION, target, ignore=shutil.ignore_patterns("__pycache__"))
    for module in MODULES:
        copied = target / "bundle" / module
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "bundle" / module, copied)


def vouch(model: Path, target: Path) -> None:
    """Write the hash of ``model``, the one program that the application runs, as ``sha256sum -c`` reads it."""
    target.write_text(f"{file_sha256(model)}  {model.name}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.integrations.monai_deploy", description=__doc__)
    parser.add_argument("--checkpoint", default="output/model.pt", help="of a training (default: %(default)s)")
    parser.add_argument("--output_dir", default="output/monai_deploy", help="is written there (default: %(default)s)")
    parser.add_argument("--weights", help="of the backbone, as for training; default: where inference finds them")
    parser.add_argument("--batch_size", type=int, default=8, help="slices in one forward pass (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        application = make_application(chosen.checkpoint, chosen.output_dir, chosen.weights, chosen.batch_size)
    except BundleError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"run it in an environment of {application / 'requirements.txt'}:")
    print(f"python {application} -i STUDY -o RESULTS -m {application.with_name('model.ts')}")
    return 0
