"""JPEG of 12 bits (JPEG Extended, Process 2 and 4), which pydicom's own plugins refuse: a plugin on imagecodecs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from pydicom.uid import JPEGExtended12Bit

if TYPE_CHECKING:  # of pydicom 3, which not every environment has
    from pydicom.pixels.decoders.base import DecodeRunner

DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("imagecodecs",)}  # by this name pydicom asks for it


def is_available(uid: str) -> bool:
    """Whether images of transfer syntax ``uid`` can be decoded here."""
    return uid in DECODER_DEPENDENCIES and find_spec("imagecodecs") is not None


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """The pixels of one gray frame.

    Raises:
        ValueError: if it has another size or number of colors than the header says.
    """
    from imagecodecs import jpeg8_decode

    frame = jpeg8_decode(source)
    if frame.shape != (runner.rows, runner.columns):
        raise ValueError(f"the JPEG has {'x'.join(map(str, frame.shape))} values, the header says otherwise")
    return frame.astype(np.dtype(f"<u{runner.bits_allocated // 8}")).tobytes()
