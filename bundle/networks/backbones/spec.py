"""What every kind of backbone says of itself, and how the names of a weights file become those of timm."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

State = dict[str, Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV3_PAGE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"


@dataclass(frozen=True)
class Layout:
    """How one publisher lays out a weights file.

    Attributes:
        publisher: 'meta', 'timm' or 'transformers'.
        marker: a tensor that only files of this layout have.
        convert: from the tensors of a file to tensors with timm's names.
    """

    publisher: str
    marker: str
    convert: Callable[[State], State]


@dataclass(frozen=True)
class Package:
    """An installable package that holds weights.

    Attributes:
        name: as pip knows it.
        locate: gives the file; raises ImportError if the package is not installed.
    """

    name: str
    locate: Callable[[], Path]


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(ABC):
    """What is fixed for a backbone. Each kind is a subclass in a module of its own, each backbone a row there.

    Attributes:
        timm_name: architecture and pretrained tag in timm.
        license: of the weights, in a word.
        page: where license and weights are.
        files: names of weights files without their suffix, as patterns; see :meth:`file_patterns`.
        repository: on the model hub, with a ``model.safetensors``; default: that of timm.
        package: that holds the weights, if there is one; then neither folder nor hub is searched.
        detail_layers: what is tapped at its own finer stride by default; kinds that have none know no such layer.
        strides: of every layer, in pixels; empty where all have that of the grid.
        mean: of each color channel that the input is normalized with, for images in [0, 1].
        std: the deviation to match.
        patch: stride of the output grid, in pixels.
        image_size: default side of an image, in pixels; a multiple of ``patch``.
        has_blocks: whether it is a ViT, of which the setting ``blocks`` speaks.
        keeps_bf16: whether bf16 changes the embeddings by about 1 % at most. A ViT-S/16 and a ConvNeXt with random
            weights change by half a percent, a pretrained ViT-S/14 by 0.8 to 1.1 %, EfficientNet-Lite0 by several
            (``docs/performance.md``).
    """

    timm_name: str
    license: str
    page: str
    files: tuple[str, ...] = ()
    repository: str = ""
    package: Package | None = None
    detail_layers: tuple[int, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    patch: int = 16
    image_size: int = 320
    keeps_bf16: bool = True

    strides: ClassVar[tuple[int, ...]] = ()
    has_blocks: ClassVar[bool] = False
    layouts: ClassVar[tuple[Layout, ...]] = ()
    timm_kwargs: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def depth(self, network: Any) -> int:
        """How many layers of the timm ``network`` can be tapped."""

    @abstractmethod
    def default_layers(self, network: Any) -> tuple[int, ...]:
        """Which layers of the timm ``network`` are tapped where nothing is said."""

    @abstractmethod
    def tapped(self, network: Any, layers: list[int], details: list[int], publisher: str, blocks: str) -> nn.Module:
        """A scriptable module that gives one map of ``layers`` of the timm ``network``.

        Args:
            network: with its weights loaded.
            layers: not negative, ascending.
            details: the same, of layers with a finer stride than the grid; empty where there are no ``strides``.
            publisher: of the weights file, see :class:`Layout`.
            blocks: how those of a ViT come together, see :data:`~bundle.networks.backbones.vit.BLOCKS`.

        Returns:
            From normalized images [B, 3, H, W] to embeddings [B, C, H // patch, W // patch], followed along the
            channels by the maps of ``details`` as they are, space to depth.
        """

    def describe(self, publisher: str) -> dict[str, Any]:
        """What else decides the embeddings, as plain JSON values; nothing for most kinds."""
        return {}

    def to_timm(self, state: State, expected: State) -> tuple[str, State]:
        """Publisher of a file, and its tensors by timm's names; of an unknown layout they keep their names.

        Args:
            state: the tensors of a file.
            expected: the state dict of the timm network.
        """
        state = _without_training(state)
        for layout in self.layouts:
            if layout.marker in state:
                return layout.publisher, layout.convert(state)
        return "timm", state

    def file_patterns(self) -> list[str]:
        """Patterns of paths in a folder of weights."""
        return [f"{stem}{ending}" for stem in self.files for ending in (".pth", ".safetensors", "/model.safetensors")]

    @property
    def hub_repository(self) -> str:
        """Where the model hub has the weights."""
        return self.repository or f"timm/{self.timm_name}"


def rename(state: State, rules: Iterable[tuple[str, str]]) -> State:
    """``state`` with every regular expression of ``rules`` replaced in its names, one after the other."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def dinov3_files(name: str, timm_name: str) -> tuple[str, ...]:
    """Names of the files of a DINOv3 network from Meta, timm and Hugging Face."""
    architecture = timm_name.partition("dinov3")[0]
    return f"{name}_pretrain*", f"{architecture}dinov3*", f"{name.replace('_', '-')}-pretrain*"


def _without_training(state: State) -> State:
    """The backbone alone, out of a teacher of Meta's training code or a model of Hugging Face."""
    inside = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return inside or {key.removeprefix("model."): value for key, value in state.items()}
