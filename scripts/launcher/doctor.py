"""``dinov3_spatial_ar doctor``: what is installed, which weights are here, and whether a picture comes out as a map."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "dinov3_spatial_ar"
GIB = 2**30
NEEDED_DISK = 2 * GIB  # the sample cohort, its feature cache and a model, with room
NEEDED_MEMORY = 2 * GIB  # of a training on the sample cohort
_SIDE = 320  # of the trial picture


class Finding(NamedTuple):
    """One line of what was found.

    Attributes:
        topic: a word.
        says: what, and if it is not well, the remedy.
        is_well: whether commands can work.
    """

    topic: str
    says: str
    is_well: bool = True


def doctor(root: Path) -> int:
    """Look at this machine, and print a line for each finding. Nothing is fetched, and nothing is left behind.

    Args:
        root: of the bundle.

    Returns:
        The exit status: 0 if everything that is needed works.
    """
    sys.path.insert(0, str(root))
    findings = []
    for finding in _findings(root):
        print(f"{'  ' if finding.is_well else '! '}{finding.topic:<9} {finding.says}", flush=True)
        findings.append(finding)
    bad = sum(not finding.is_well for finding in findings)
    print(
        "all that is needed works"
        if not bad
        else f"{bad} of {len(findings)} findings need a remedy: see the lines with !"
    )
    return int(bool(bad))


def _findings(root: Path) -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield _disk()
    yield _memory()
    try:
        yield _device()
        found = []
        for finding, backbone in _weights():
            yield finding
            found += [backbone] if backbone else []
        if found:
            yield _trial(root, found[0])
    except ImportError as error:
        yield Finding("trial", f"not made: {error}", False)


def _packages() -> Iterator[Finding]:
    """Each requirement against what is installed, and which extras are whole."""
    from packaging.requirements import Requirement

    try:
        version, needed = metadata.version(PACKAGE), [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        yield Finding("packages", f"{PACKAGE} is not installed: pip install -e .", False)
        return
    own = [one for one in needed if one.marker is None]
    lacking = [text for one in own if (text := _lack(one))]
    remedy = f"pip install --upgrade {PACKAGE}"
    yield (
        Finding("packages", f"{PACKAGE} {version}; {len(lacking)} do not fit ({'; '.join(lacking)}): {remedy}", False)
        if lacking
        else Finding("packages", f"{PACKAGE} {version} and {len(own)} packages in the versions that it was tested with")
    )
    for extra in sorted(metadata.metadata(PACKAGE).get_all("Provides-Extra") or []):
        parts = [one for one in needed if one.marker and one.marker.evaluate({"extra": extra}) and one.name != PACKAGE]
        lacking = [text for one in parts if (text := _lack(one))]
        whole = "whole" if not lacking else f'lacks {len(lacking)} packages: pip install "{PACKAGE}[{extra}]"'
        yield Finding("extra", f"{extra}: {whole}")


def _lack(one: Any) -> str:
    """Why a requirement is not met; empty if it is."""
    try:
        there = metadata.version(one.name)
    except metadata.PackageNotFoundError:
        return f"{one.name} is missing"
    return "" if one.specifier.contains(there, prereleases=True) else f"{one.name} {there}, needs {one.specifier}"


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    says = f"{free / GIB:.1f} GiB free in '{Path.cwd()}'"
    return Finding("disk", says if free > NEEDED_DISK else f"{says}: free some, a training needs 2", free > NEEDED_DISK)


def _memory() -> Finding:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    says = f"{whole / GIB:.1f} GiB"
    return Finding("memory", says if whole > NEEDED_MEMORY else f"{says}, a training needs 2", whole > NEEDED_MEMORY)


def _device() -> Finding:
    import torch

    from bundle.compute import fastest_precision
    from bundle.distributed import local_device

    device = local_device()
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name = f"{about.name}, {about.total_memory / GIB:.0f} GiB"
    else:
        name = f"{torch.get_num_threads()} threads"
    return Finding("device", f"{device} ({name}); --precision auto is {fastest_precision(device)}")


def _weights() -> Iterator[tuple[Finding, str]]:
    """For each backbone that ``auto`` tries: where its weights are; and its name if they are here."""
    from bundle.errors import BundleError
    from bundle.networks.backbones import BACKBONES
    from bundle.networks.weights import AUTO, FOLDER_VARIABLES, weights_at_hand

    for name in AUTO:
        try:
            source = weights_at_hand(name)
        except BundleError as error:
            yield Finding("weights", f"{name}: {error}", False), ""
            continue
        if source is not None:
            yield Finding("weights", f"{name}: {source.origin}"), name
        else:
            page = BACKBONES[name].page
            yield (
                Finding("weights", f"{name}: not here; {FOLDER_VARIABLES[0]} or --weights may say where, see {page}"),
                "",
            )


def _trial(root: Path, backbone: str) -> Finding:
    """From a picture to its map, as ``inferring`` does it, by a model that has learned nothing."""
    import numpy as np
    from monai.bundle import ConfigParser
    from PIL import Image

    from bundle.checkpoint import save_checkpoint
    from bundle.model import make_detector

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        pixels = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "noise.png")
        config = ConfigParser.load_config_file(root / "configs" / "inference.json")
        knobs = {"bundle_root": str(root), "dataset_dir": str(folder / "noise.png"), "tracking_uri": "off"}
        places = {"checkpoint": str(folder / "model.pt"), "output_dir": str(folder / "out")}
        try:
            save_checkpoint(make_detector({"backbone": backbone}), folder / "model.pt")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                ConfigParser(config | knobs | places).get_parsed_content("evaluator").run()
            found = np.asarray(Image.open(folder / "out" / "noise_map.tiff"))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return Finding("trial", f"a picture gives no map ({reason})", False)
    well = found.shape == pixels.shape and bool(np.isfinite(found).all())
    return Finding("trial", f"a picture gave its map in {time.monotonic() - start:.1f} s ({backbone})", well)
