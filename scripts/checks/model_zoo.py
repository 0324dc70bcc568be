"""The bundle as MONAI's model zoo keeps bundles: one zip, and the checks of the zoo's CI that need no network.

python -m scripts.checks.model_zoo [--model RESULTS/model.pt]

Writes ``dist/NAME_vVERSION.zip``, the same bytes for the same files. Then MONAI's download fetches it into a temporary
folder, and everything runs there, in processes that see that folder alone: a training on a tiny synthetic cohort, an
inference, and the checks of ``ci/verify_bundle.py`` of the zoo. The exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bundle import NAME, __version__
from bundle.errors import BundleError
from bundle.files import whole_file
from bundle.samples import make_sample_cohort

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "tests/data/metadata_schema.json"
PARTS = (
    *("bundle", "configs", "docs", "scripts", "LICENSE", "large_files.yml", "pyproject.toml", "Makefile"),
    *("*.md", "CITATION.cff"),
)
MODEL = "models/model.pt"
# the zoo keeps the model of a bundle there; a training goes on to write into its own output folder
CHECKPOINTS = {"inference": f"$@bundle_root + '/{MODEL}'", "train": "$@output_dir + '/model.pt'"}
NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md")
LARGEST = 25 * 2**20  # bytes of one file in the zoo's repository; what is larger is named in large_files.yml
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can tell
TIMEOUT = 600  # seconds for one check
QUICK = {"backbone": "efficientnet_lite0", "max_epochs": 1, "image_size": 128, "hidden_channels": 32, "device": "cpu"}
# by MONAI's own list; that of the zoo is empty for a bundle that names no supported_apps
PROPERTIES = """
import json, sys
from monai.bundle import create_workflow
name, kind, knobs = sys.argv[1:]
workflow = create_workflow(workflow_type=kind, config_file=f"configs/{name}.json", **json.loads(knobs))
missing = workflow.check_properties()
workflow.finalize()
sys.exit(f"configs/{name}.json lacks {missing}" if missing else 0)
"""


def pack(folder: Path, model: Path | None = None) -> Path:
    """Write the zip of the files that git knows.

    Args:
        folder: that it is written to.
        model: becomes ``models/model.pt`` in it; None: the bundle comes without a model.

    Returns:
        Its path, ``folder / "NAME_vVERSION.zip"``.

    Raises:
        BundleError: if this is no clone, or there is no such model.
    """
    contents = {name: (ROOT / name).read_bytes() for name in _known_to_git()}
    for config, checkpoint in CHECKPOINTS.items():
        name = f"configs/{config}.json"
        contents[name] = _with_checkpoint(contents[name].decode(), checkpoint).encode()
    if model is not None:
        if not model.is_file():
            raise BundleError(f"no model at '{model}': give --model the model.pt of a training")
        contents[MODEL] = model.read_bytes()
    path = folder / f"{NAME}_v{__version__}.zip"
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(contents.items()):
            entry = zipfile.ZipInfo(f"{NAME}/{name}", EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def _known_to_git() -> list[str]:
    """The files of the bundle, without what was left behind in their folders."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--", *PARTS]  # whoever owns the clone
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BundleError(f"'{ROOT}' is no clone that git can list ({error}): clone the repository") from error
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _with_checkpoint(config: str, checkpoint: str) -> str:
    """The text of a config in which this item alone is another."""
    old = json.loads(config)["checkpoint"]
    changed = config.replace(f'"checkpoint": {json.dumps(old)}', f'"checkpoint": {json.dumps(checkpoint)}', 1)
    if json.loads(changed) != json.loads(config) | {"checkpoint": checkpoint}:
        raise BundleError("the item checkpoint of a config is not on a line of its own: write it so")
    return changed


def check(archive: Path) -> Iterator[tuple[str, str | None, float]]:
    """Unpack the zip as MONAI does, and check what is in it.

    Args:
        archive: that :func:`pack` wrote.

    Yields:
        What was checked, what is wrong (None: nothing), and the seconds that it took.
    """
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-zoo-") as temporary:
        base = Path(temporary)
        root, results, maps = base / NAME, base / "results", base / "maps"
        cohort = make_sample_cohort(
            base / "cohort", train_subjects=4, valid_subjects=2, test_subjects=2, slices_per_subject=6
        )
        trains = {"dataset_dir": str(cohort / "slices"), "output_dir": str(results), **QUICK}
        infers = {"dataset_dir": str(cohort / "slices/test"), "output_dir": str(maps)}
        network = ("--net_id=network_def", "--meta_file=configs/metadata.json", "--config_file=configs/inference.json")

        def monai(command: str, *words: str, **knobs: object) -> str | None:
            given = [f"--{name}={value}" for name, value in knobs.items()]
            return _run("-m", "monai.bundle", *command.split(), *words, *given, folder=root if root.is_dir() else base)

        def has_properties(config: str, kind: str, knobs: Mapping[str, Any]) -> str | None:
            return _run("-c", PROPERTIES, config, kind, json.dumps(knobs), folder=root)

        checks: dict[str, Callable[[], str | None]] = {
            "monai.bundle download takes the zip": lambda: monai(
                "download", name=NAME, url=archive.resolve().as_uri(), bundle_dir=base
            ),
            "files: those needed, none too large": lambda: wrong_files(root),
            "version and changelog": lambda: wrong_version(_json(root / "configs/metadata.json")),
            "monai.bundle verify_metadata": lambda: monai(
                # by the schema that is beside the tests: MONAI would fetch the one that the metadata name
                "verify_metadata",
                meta_file="configs/metadata.json",
                filepath=shutil.copy(SCHEMA, base),
            ),
            "training, on a tiny cohort": lambda: monai("run training", config_file="configs/train.json", **trains),
            f"{MODEL}, of the zip or of this training": lambda: _give_model(root, results / "model.pt"),
            "monai.bundle verify_net_in_out": lambda: monai("verify_net_in_out", *network),
            "monai.bundle ckpt_export": lambda: monai(
                "ckpt_export", *network, filepath=base / "model.ts", ckpt_file=MODEL
            ),
            "properties of training": lambda: has_properties("train", "train", trains),
            "properties of inference": lambda: has_properties("inference", "infer", infers),
            "inference": lambda: (
                monai("run inferring", config_file="configs/inference.json", **infers)
                or (None if [*maps.rglob("*_map.tiff")] else "no map was written")
            ),
            "nothing was written into the bundle": lambda: left_behind(root, archive),
        }
        for what, look in checks.items():
            begin = time.monotonic()
            wrong = look()
            yield what, wrong, time.monotonic() - begin
            if wrong and not root.is_dir():
                return


def wrong_files(root: Path) -> str | None:
    """What the files of a bundle lack, or are too large for, by the zoo's rules; None: nothing."""
    files = _files(root)
    if missing := [name for name in NEEDED if name not in files]:
        return f"needed, and not there: {', '.join(missing)}"
    elsewhere = {entry["path"] for entry in yaml.safe_load(files["large_files.yml"].read_text())["large_files"]}
    if large := [name for name, file in files.items() if file.stat().st_size > LARGEST and name not in elsewhere]:
        return f"larger than {LARGEST // 2**20} MiB: {', '.join(large)}; name them in large_files.yml"
    if "Apache License" not in files["LICENSE"].read_text():
        return "LICENSE is not that of the zoo's code"
    return None


def left_behind(root: Path, archive: Path) -> str | None:
    """What lies in the folder of a bundle that is neither in the zip nor its model; None: nothing."""
    with zipfile.ZipFile(archive) as packed:
        known = {*packed.namelist(), f"{NAME}/{MODEL}"}
    left = [name for name in sorted(_files(root)) if f"{root.name}/{name}" not in known]
    return f"left behind: {', '.join(left)}" if left else None


def _files(root: Path) -> dict[str, Path]:
    return {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}


def wrong_version(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with version and changelog of ``metadata.json``; None: nothing."""
    version = metadata.get("version")
    if version != __version__:
        return f"the version is {version}, and that of the bundle {__version__}"
    return None if version in metadata.get("changelog", {}) else f"the changelog has no entry for {version}"


def _give_model(root: Path, trained: Path) -> str | None:
    """Where the zip has no model, the one of the training just done takes its place in the temporary folder."""
    if (root / MODEL).is_file():
        return None
    if not trained.is_file():
        return f"none in the zip, and none at '{trained}'"
    (root / MODEL).parent.mkdir(exist_ok=True)
    shutil.copy(trained, root / MODEL)
    return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _run(*words: str, folder: Path) -> str | None:
    """Run Python in ``folder``; the end of what it said if it failed, else None."""
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "MLFLOW_DISABLE_TELEMETRY": "1"}
    clean = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "PYTHONPATH")}
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=clean | variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        return None if done.returncode == 0 else (done.stderr or done.stdout)[-2000:] or f"status {done.returncode}"
    return f"no end after {TIMEOUT} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.checks.model_zoo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, metavar="FILE", help="becomes models/model.pt (default: none)")
    parser.add_argument("-o", "--output_dir", type=Path, default=Path("dist"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        archive = pack(given.output_dir, given.model)
    except BundleError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{archive} has {archive.stat().st_size / 2**20:.1f} MiB{'' if given.model else ' and no model'}", flush=True)
    failed = 0
    for what, wrong, seconds in check(archive):
        print(f"{'! ' if wrong else '  '}{what} ({seconds:.0f} s){f': {wrong}' if wrong else ''}", flush=True)
        failed += wrong is not None
    print(f"{failed} checks failed: see the lines with !" if failed else "all checks passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
