"""Where the networks run, and how precisely."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from bundle.errors import BundleError, check_choice
from bundle.networks.detector import AnomalyDetector

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


class HasPrecision(Protocol):
    """A backbone, or what is known of one."""

    @property
    def keeps_bf16(self) -> bool:
        """Whether bf16 changes the embeddings by less than 1 %."""


class Compute:
    """Device and precision of inference; scores, maps and calibration stay in 32 bits in every precision.

    Args:
        device: as ``torch.device`` takes it.
        precision: ``fp32``, ``bf16`` or ``fp16`` for convolutions and matrix products; ``auto`` is what the device does
            fastest: bf16 on a CPU that has instructions for it (AVX-512 BF16 or AMX), fp16 on an NVIDIA GPU, else fp32.
        compile: let ``torch.compile`` fuse the backbone: minutes of compilation, for long runs.
        features: the backbone that will run; ``auto`` is not bf16 for one that loses too much by it.

    Attributes:
        precision: never ``auto``.
        dtype: of convolutions and matrix products.

    Raises:
        BundleError: for an unknown precision, with the closest name, or an unknown device.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        compile: bool = False,
        features: HasPrecision | None = None,
    ) -> None:
        check_choice("precision", precision, ["auto", *DTYPES])
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise BundleError(f"device '{device}' is unknown: give cpu, cuda:0, ...") from error
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise BundleError(f"device '{device}' is not there: this machine has {torch.cuda.device_count()} GPUs")
        lossy = features is not None and not features.keeps_bf16
        if precision == "auto":
            fastest = fastest_precision(self.device)
            self.precision = "fp32" if fastest == "bf16" and lossy else fastest
        else:
            self.precision = precision
            if precision == "bf16" and lossy:
                logger.warning("bf16 changes the maps of this backbone by several percent: fp32 or fp16 do not")
        self.dtype = DTYPES[self.precision]
        self.compile = compile

    def place(self, detector: AnomalyDetector) -> AnomalyDetector:
        """Bring ``detector`` to the device, with the frozen weights in this precision, to be run in :meth:`autocast`.

        Weights that are never trained are converted once, instead of in every pass.
        """
        if self.dtype != torch.float32:
            for module in detector.features.backbone.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(self.dtype)
        if self.compile:
            detector.features.backbone.compile()
        return detector.to(self.device)

    def autocast(self) -> Any:
        """The context in which networks run in this precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` gives of ``arguments``, with networks in this precision: fits meet what inference meets."""
        with self.autocast():
            return function(*arguments)

    def training_autocast(self) -> Any:
        """The context of training: bf16 where that is fast, since fp16 would need its loss scaled; else fp32."""
        fast = self.dtype == torch.bfloat16 or (self.dtype == torch.float16 and self._gpu_has_bf16())
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def _gpu_has_bf16(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fastest_precision(device: torch.device) -> str:
    """The precision that ``device`` multiplies matrices in fastest, by its instructions."""
    if device.type == "cuda":
        return "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"
