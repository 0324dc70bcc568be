"""The feature cache: patch embeddings on disk, found by the content of the image and the recipe that made them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bundle import __version__
from bundle.errors import BundleError, check_choice
from bundle.files import partial_prefix, whole_file, write_json, writing

STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 2**24  # what waits in memory and what an interruption loses at most; a file that opens fast
GIGABYTE = 10**9
POSITIONS = "/mm"  # what the positions of an entry are called, after its key
FACTS = "/facts"  # and what is known of its image

logger = logging.getLogger(__name__)


class EmbeddingStore:
    """Patch embeddings [slices, C, h, w] of images, and where their slices lie, in shards below a folder per recipe.

    An entry is found by the hash of the image's file and by the hash of the recipe: all that decides the embeddings
    but the image. Another recipe is another folder, so a stale entry is never read. Shards appear whole or not at all:
    what an interrupted run has written is there for the next one. Reads go through the page cache and hold no memory.

    Processes that work together share one store on one file system; each writes shards of its own.

    Args:
        directory: of all recipes; ``off`` or None: a temporary folder in ``temporary`` that vanishes with the process.
        temporary: see ``directory``.
        recipe: backbone, hash of its weights, preprocessing, ... as plain JSON values.
        limit_gb: what all recipes together may take, in 10**9 bytes. Shards that this run does not use make room, those
            first that were not used for longest.
        stored: ``fp16``, ``bf16`` or ``fp32``, the precision on disk.

    Raises:
        BundleError: for a limit that is not positive, or an unknown precision.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None,
        temporary: str | os.PathLike,
        recipe: dict[str, Any],
        limit_gb: float = 20.0,
        stored: str = "fp16",
    ) -> None:
        if limit_gb <= 0:
            raise BundleError(f"cache_limit_gb must be above 0, got {limit_gb}: --cache_dir off keeps nothing")
        self.stored = STORED[check_choice("cache_precision", stored, STORED)]
        self.limit = int(limit_gb * GIGABYTE)
        self.recipe = {**recipe, "stored": stored, "positions": "mm", "facts": "words", "bundle": __version__}
        self._temporary: tempfile.TemporaryDirectory | None = None
        self.kept = directory not in (None, "off")
        self._directory = Path(str(directory)) if self.kept else Path(temporary)
        self._opened = False
        self._shard_of: dict[str, Path] = {}
        self._count: dict[str, int] = {}
        self._used: set[Path] = set()
        self._waiting: dict[str, Tensor] = {}

    @property
    def folder(self) -> Path:
        """Where the entries of this recipe are."""
        return self._directory / _digest(json.dumps(self.recipe, sort_keys=True).encode())[:16]

    def __contains__(self, key: str) -> bool:
        if not self.kept and not self._opened:
            return False  # and no temporary folder, before anything is to be kept
        self._open()
        return key in self._shard_of

    def count(self, key: str) -> int:
        """The number of slices of entry ``key``."""
        self._open()
        return self._count[key]

    def read(self, key: str, index: int) -> Tensor:
        """The embeddings [C, h, w] of slice ``index`` of entry ``key``, in float32.

        Raises:
            BundleError: if the shard has vanished or is damaged.
        """
        with self._opened_shard(key) as file:
            embeddings: Tensor = file.get_slice(key)[index]
            return embeddings.float()

    def positions(self, key: str) -> list[float]:
        """Where the slices of entry ``key`` lie, in mm along their normal; not a number where nobody knows.

        Raises:
            BundleError: if the shard has vanished or is damaged.
        """
        self._open()
        with self._opened_shard(key) as file:
            positions: list[float] = file.get_tensor(key + POSITIONS).tolist()
            return positions

    def facts(self, key: str) -> dict[str, list[str]]:
        """What is known of the image of entry ``key``, see :func:`~bundle.dicom.words.facts_of`.

        Raises:
            BundleError: if the shard has vanished or is damaged.
        """
        self._open()
        with self._opened_shard(key) as file:
            return dict(json.loads(bytes(file.get_tensor(key + FACTS).tolist())))

    @contextmanager
    def _opened_shard(self, key: str) -> Iterator[Any]:
        shard = self._shard_of[key]
        try:
            with safe_open(shard, "pt") as file:  # opened anew: pages of an open map would count as our memory
                yield file
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"cannot read '{shard}' of the feature cache ({error}): delete it and run again"
            ) from error

    def use(self, keys: list[str]) -> None:
        """Say that entries are needed: they are not removed in this run, and count as used now."""
        self._open()
        for shard in {self._shard_of[key] for key in keys if key in self._shard_of} - self._used:
            os.utime(shard)
            self._used.add(shard)

    def add(
        self,
        key: str,
        embeddings: Tensor,
        positions: Tensor | None = None,
        facts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Add an entry; it can be read after the next :meth:`flush`.

        Args:
            key: of the entry.
            embeddings: [slices, C, h, w].
            positions: [slices], see :meth:`positions`; None: nobody knows.
            facts: see :meth:`facts`; None: nothing is known.

        Raises:
            BundleError: if a value does not fit into the precision on disk, or the limit is reached.
        """
        values = embeddings.to("cpu", self.stored).contiguous()
        if not torch.isfinite(values).all():
            raise BundleError(
                f"embeddings up to {float(embeddings.abs().max()):.3g} do not fit into the feature cache's "
                f"{str(self.stored).removeprefix('torch.')}: give --cache_precision fp32"
            )
        nowhere = torch.full((len(values),), torch.nan)
        known = torch.tensor(list(json.dumps(facts or {}).encode()), dtype=torch.uint8)
        where = nowhere if positions is None else positions.float()
        self._waiting |= {key: values, key + POSITIONS: where, key + FACTS: known}
        if sum(value.nbytes for value in self._waiting.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard."""
        if not self._waiting:
            return
        self._open()
        self._make_folder()
        self._make_room(sum(value.nbytes for value in self._waiting.values()))
        shard = self.folder / f"{_digest(''.join(sorted(self._waiting)).encode())[:32]}.safetensors"
        with whole_file(shard) as partial:
            partial.write_bytes(save(self._waiting))  # safetensors hides why it cannot write to a disk
        self._used.add(shard)
        self._waiting = {}
        self._index(shard)

    def refresh(self) -> None:
        """Find what other processes have written."""
        self._open()
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self._shard_of.values():
                self._index(shard)

    def total_bytes(self) -> int:
        """What all recipes take on disk."""
        return sum(size for _, _, size in self._every_shard())

    def describe(self) -> str:
        """What the cache takes, in words."""
        taken = self.total_bytes() / GIGABYTE
        return f"feature cache '{self._directory}': {taken:.3g} GB of at most {self.limit / GIGABYTE:g} GB"

    def _open(self) -> None:
        """Read the index, with the first use; nothing is written yet, but a temporary folder."""
        if self._opened:
            return
        self._opened = True
        if not self.kept:
            import ignite.distributed as idist  # here, so that a kept cache needs torch and safetensors alone

            if idist.get_rank() == 0:
                with writing(self._directory):
                    self._directory.mkdir(parents=True, exist_ok=True)
                    self._temporary = tempfile.TemporaryDirectory(dir=self._directory, prefix=partial_prefix())
            name = self._temporary.name if self._temporary else ""
            self._directory = Path(str(idist.broadcast(name, src=0)) if idist.get_world_size() > 1 else name)
        self.refresh()

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "recipe.json"
        if not note.exists():
            write_json(note, self.recipe, indent=1, sort_keys=True)

    def _index(self, shard: Path) -> None:
        try:
            with safe_open(shard, "pt") as file:
                for key in (name for name in file.keys() if not name.endswith((POSITIONS, FACTS))):
                    self._shard_of[key] = shard
                    self._count[key] = file.get_slice(key).get_shape()[0]
        except (OSError, SafetensorError) as error:
            logger.warning(f"'{shard}' of the feature cache cannot be read ({error}): it is made anew")

    def _every_shard(self) -> list[tuple[float, Path, int]]:
        """Time of the last use, path and size of the shards of all recipes, the least recently used first."""
        found = []
        for shard in self._directory.glob("*/*.safetensors"):
            try:
                status = shard.stat()
            except FileNotFoundError:  # another run made room
                continue
            found.append((status.st_mtime, shard, status.st_size))
        return sorted(found)

    def _make_room(self, size: int) -> None:
        shards = self._every_shard()
        taken = sum(size for _, _, size in shards)
        for _, shard, freed in shards:
            if taken + size <= self.limit:
                break
            if shard not in self._used:
                shard.unlink(missing_ok=True)
                taken -= freed
                for key in [key for key, at in self._shard_of.items() if at == shard]:
                    del self._shard_of[key], self._count[key]
        if taken + size > self.limit:
            raise BundleError(
                f"the embeddings of this run need more than cache_limit_gb {self.limit / GIGABYTE:g} in "
                f"'{self._directory}': raise it, or lower image_size or the number of layers"
            )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
