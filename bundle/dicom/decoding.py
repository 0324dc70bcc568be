"""Compressed pixels of DICOM files, decoded in a process of its own that a damaged file cannot keep, fill or crash.

Decoders of JPEG, JPEG-LS, JPEG 2000 and RLE are large programs in C++ that may loop, ask for any memory or end their
process. Each call has seconds and memory by the size that the image claims. A process serves one call after the other,
and is started anew only after it died; calls of several threads have processes of their own.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

SECONDS = 5.0  # for any image, and
VALUES_PER_SECOND = 1e6  # of pixels, a tenth of what decoders do
MEMORY = 2**30  # bytes of addresses for any image, of which the program and its libraries take a fifth, and
COPIES = 8  # of its pixels
LONGEST_REASON = 300  # characters

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve()"


def is_compressed(dataset: Dataset) -> bool:
    """Whether the pixels are kept in fragments of some codec."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    return syntax is not None and UID(syntax).is_encapsulated and "PixelData" in dataset


def remedy(syntax: UID) -> str:
    """What a person can do about pixels of transfer syntax ``syntax`` that are not decoded here."""
    tools = ((JPEGTransferSyntaxes, "dcmdjpeg"), (JPEGLSTransferSyntaxes, "dcmdjpls"), ([RLELossless], "dcmdrle"))
    tool = next((name for syntaxes, name in tools if syntax in syntaxes), None)
    return f"decompress it by dcmtk's '{tool} IN OUT'" if tool else "export it uncompressed"


def decompress(dataset: Dataset, claimed: int) -> None:
    """Replace the pixels of a compressed image by plain ones, colors by RGB; elements are replaced, not changed.

    Args:
        dataset: of a file whose pixels are compressed.
        claimed: bytes of its pixels, as the header says.

    Raises:
        TimeoutError: if decoding takes too long.
        RuntimeError: if it fails, whatever the reason.
    """
    from pydicom.pixels.utils import as_pixel_options  # of pydicom 3, which not every environment has

    options = as_pixel_options(dataset, pixel_keyword="PixelData")
    offsets = [table.hex() for table in options.pop("extended_offsets", ())]
    request = {
        "seconds": SECONDS + claimed / VALUES_PER_SECOND,
        "memory": MEMORY + COPIES * claimed,
        "syntax": str(dataset.file_meta.TransferSyntaxUID),
        "options": options,
        "offsets": offsets,
    }
    try:
        decoder = _idle.pop()
    except IndexError:
        decoder = _Decoder()
    found, pixels = decoder.decode(request, dataset["PixelData"].value)
    _idle.append(decoder)
    if "error" in found:
        raise RuntimeError(found["error"])
    wide = dataset.BitsAllocated > 8
    dataset.file_meta = copy.deepcopy(dataset.file_meta)
    dataset.file_meta["TransferSyntaxUID"] = DataElement("TransferSyntaxUID", "UI", ExplicitVRLittleEndian)
    dataset["PixelData"] = DataElement("PixelData", "OW" if wide else "OB", pixels + b"\0" * (len(pixels) % 2))
    for keyword, kind in (("PhotometricInterpretation", "CS"), ("PlanarConfiguration", "US")):
        if keyword in found:
            dataset[keyword] = DataElement(keyword, kind, found[keyword])


class _Decoder:
    """A process that decodes, and how to ask it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(module=__name__), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=2**20,  # few turns for an image
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # threads take addresses
        )

    def decode(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """What the process answers to a ``request`` for compressed ``data``.

        Raises:
            TimeoutError: if it was stopped after its seconds.
            RuntimeError: if it ended.
        """
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request | {"length": len(data)}).encode() + b"\n")
            self.process.stdin.write(data)
            self.process.stdin.flush()
            head = self.process.stdout.readline()
            if head.endswith(b"\n"):
                found = json.loads(head)
                pixels = self.process.stdout.read(found.pop("length"))
                return found, pixels
        self.close()
        if self.process.returncode == -signal.SIGALRM:
            raise TimeoutError(f"its decoder does not end within {request['seconds']:.0f} s")
        raise RuntimeError(f"its decoder ended by {_ending(self.process.returncode)}")

    def close(self) -> None:
        """End the process, which waits for nothing."""
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> None:
    """Decode what comes by standard input, until it ends."""
    import resource  # POSIX alone has it; the asking process does without

    from pydicom.pixels import get_decoder

    get_decoder(JPEGExtended12Bit).add_plugin("imagecodecs", (f"{__package__}.jpeg12", "decode_frame"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print what they like
    while True:
        head = requests.readline()
        if not head.endswith(b"\n"):
            return
        request = json.loads(head)
        data = requests.read(request["length"])
        options = request["options"]
        if request["offsets"]:
            options["extended_offsets"] = tuple(map(bytes.fromhex, request["offsets"]))
        # nobody handles the alarm, so that the kernel ends what loops
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], resource.RLIM_INFINITY))
        found, frames = _decoded(request["syntax"], options, data)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(found | {"length": sum(map(len, frames))}).encode() + b"\n")
        for frame in frames:
            answers.write(frame)
        answers.flush()


def _decoded(syntax: str, options: dict[str, Any], data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What has changed of the header, or the error, and the frames."""
    from pydicom.pixels import get_decoder

    found: dict[str, Any] = {}
    frames = []
    try:
        decoder, indices = get_decoder(UID(syntax)), range(int(options["number_of_frames"]))
        for array, about in decoder.iter_array(data, indices=indices, as_rgb=True, **options):
            frames.append(array.tobytes())
            found["PhotometricInterpretation"] = str(about["photometric_interpretation"])
            if int(about["samples_per_pixel"]) > 1:
                found["PlanarConfiguration"] = int(about["planar_configuration"])
    except Exception as error:
        return {"error": _reason(error)}, []
    return found, frames


def _reason(error: Exception) -> str:
    """The text of ``error`` in one line; where plugins failed, what each of them says."""
    first, *plugins = (str(error).strip() or type(error).__name__).splitlines()
    return ("; ".join(line.strip() for line in plugins) or first)[:LONGEST_REASON]


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _close_idle() -> None:
    while _idle:
        _idle.pop().close()


_idle: list[_Decoder] = []
os.register_at_fork(after_in_child=_idle.clear)  # a process of another process is not ours to ask
atexit.register(_close_idle)
