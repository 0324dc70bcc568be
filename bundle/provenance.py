"""Where a result comes from: data, weights, code. These words travel with every output."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from bundle import NAME, __version__
from bundle.files import files_of

NO_COMMIT = "unknown"
_HEAD_BYTES = 2**20


class Described(Protocol):
    """A detector, as far as its words go."""

    def describe(self) -> dict[str, Any]:
        """Backbone, hash of its weights, preprocessing and density."""
        ...


def data_fingerprint(cases: Iterable[dict[str, Any]]) -> str:
    """A sha256 over names, sizes and the first MiB of all images and masks: equal for equal data in any folder."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(case["name"].encode())
        for part in chain.from_iterable(files_of(case[key]) for key in ("image", "mask") if key in case):
            try:
                digest.update(str(part.stat().st_size).encode())
                with part.open("rb") as stream:
                    digest.update(stream.read(_HEAD_BYTES))
            except OSError:  # gone: whoever needs its pixels says so
                digest.update(b"missing")
    return digest.hexdigest()


def git_commit(folder: str | os.PathLike) -> str:
    """The commit of the checkout whose root is ``folder``, ``+changes`` if it has any, or :data:`NO_COMMIT`."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")) != Path(folder).resolve():
            return NO_COMMIT  # installed below the checkout of something else
        commit, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return NO_COMMIT
    return f"{commit}+changes" if changes else commit


def is_synthetic(path: str | os.PathLike) -> bool:
    """Whether the data are of the sample cohort."""
    folder = Path(path).resolve()
    return any((parent / "cohort.json").is_file() for parent in (folder, *folder.parents))


class DataSet:
    """What a command works on.

    Args:
        splits: the cases of each split.
        directory: that they were found in, or the file that lists them.
    """

    def __init__(self, splits: Mapping[str, Sequence[dict[str, Any]]], directory: str | os.PathLike) -> None:
        self.splits = splits
        self.directory = directory

    @property
    def name(self) -> str:
        """That of the folder or file."""
        return Path(self.directory).resolve().name or str(self.directory)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of cases of each split that has any."""
        return {name: len(cases) for name, cases in self.splits.items() if cases}

    @property
    def counts(self) -> str:
        """The same in words."""
        return ", ".join(f"{count} {name}" for name, count in self.sizes.items())

    @property
    def words(self) -> str:
        """See :func:`data_words`."""
        return data_words(self.directory)

    @cached_property
    def fingerprint(self) -> str:
        """See :func:`data_fingerprint`."""
        return data_fingerprint(chain.from_iterable(self.splits.values()))


def run_tags(detector: Described, data: DataSet, bundle_root: str | os.PathLike) -> dict[str, str]:
    """The tags of an MLflow run: backbone, hash of its weights, fingerprint of the data, commit of the code."""
    identity = detector.describe()
    return {
        "backbone": identity["backbone"],
        "weights": identity["weights"],
        "data": data.words,
        "data_fingerprint": data.fingerprint,
        "git_commit": git_commit(bundle_root),
        "version": __version__,
    }


def data_words(dataset_dir: str | os.PathLike) -> str:
    """The data set in words, with SYNTHETIC where it is."""
    return f"{'SYNTHETIC sample cohort ' if is_synthetic(dataset_dir) else ''}{dataset_dir}"


def model_words(identity: dict[str, Any]) -> str:
    """Bundle, version, backbone and weights in a few words, RANDOM where the weights are."""
    weights = str(identity["weights"])
    kind = "RANDOM WEIGHTS" if weights.startswith("random") else f"weights {weights[:12]}"
    return f"{NAME} {__version__}, {identity['backbone']}, {kind}"
