"""``python -m monai.bundle`` with the bundle and the configs of this package, from any folder.

    python -m dinov3_spatial_ar run inferring --config_file inference.json --dataset_dir IMAGES --checkpoint model.pt

A config is named as in the folder ``configs``, alone or in a list; a file of that name in the working folder comes
first. Paths start from the working folder, and so do the default folders of data and results.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "configs").is_dir() else HERE.parents[1]  # installed, or in a clone
FILE_KNOBS = ("config_file", "meta_file", "logging_file")
READ_AT_ONCE = ("config_file", "args_file")  # before the bundle could tell what is wrong
# what lies below the bundle's root in a clone has no place in an installed package
DEFAULTS = {
    "inference.json": {"dataset_dir": "sample_cohort/slices", "output_dir": "output"},
    "train.json": {"cohort_dir": "sample_cohort"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, default: that of this process, as ``python -m monai.bundle`` does."""
    with tempfile.TemporaryDirectory(prefix="dinov3_spatial_ar-") as folder:
        configs = copy_configs(ROOT / "configs", Path(folder))
        sys.path.insert(0, str(ROOT))
        sys.argv[1:] = with_configs(sys.argv[1:] if arguments is None else arguments, configs)
        if missing := missing_files(sys.argv[1:]):
            sys.exit("\n".join(f"error: no file at '{file}': check --{name}" for name, file in missing))
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def copy_configs(source: Path, folder: Path) -> Path:
    """Copy the configs to ``folder / "configs"``, where macros such as ``%configs/inference.json::seed`` find them.

    MONAI looks for the file of a macro from the working folder, which has none of these.
    """
    target = folder / "configs"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for file in target.glob("*.json"):
        text = file.read_text(encoding="utf-8").replace('"%configs/', f'"%{target.as_posix()}/')
        content: dict[str, Any] = json.loads(text) | DEFAULTS.get(file.name, {})
        file.write_text(json.dumps(content), encoding="utf-8")
    return target


def with_configs(arguments: Sequence[str], configs: Path) -> list[str]:
    """The command line with the names of ``configs`` as paths, and with the root of this package."""
    words: list[str] = []
    knob = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.lstrip("-").replace("-", "_") in FILE_KNOBS and name.startswith("--"):
            knob = name
            words.append(f"{name}={located(value, configs)}" if equals else name)
        else:
            words.append(located(argument, configs) if knob and words[-1] == knob else argument)
    given = any(word.partition("=")[0] in ("--bundle_root", "--bundle-root") for word in words)
    return words if given or not knob else [*words, f"--bundle_root={ROOT}"]


def missing_files(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The knobs that name files of configs or arguments which are not there, with these files."""
    missing = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        knob = name.lstrip("-").replace("-", "_")
        if knob in READ_AT_ONCE and name.startswith("--"):
            files = value if equals else following
            listed = DefaultParseValue(files) if files.startswith("[") else [files]
            missing += [(knob, str(file)) for file in listed if not Path(str(file)).is_file()]
    return missing


def located(files: str, configs: Path) -> str:
    """The path of a file, or the list of paths of a list of files, as Fire reads them."""
    if files.startswith("["):
        return str([located(str(file), configs) for file in DefaultParseValue(files)])
    shipped = configs / files.removeprefix("configs/")
    return str(shipped) if not Path(files).exists() and shipped.is_file() else files
