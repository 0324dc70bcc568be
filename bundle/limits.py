"""What one image may cost: what a file claims is compared with what it can hold before memory is given to it."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from typing import Any

from bundle.errors import BundleError, check

MAX_VOXELS = 10**9  # 786 million are a CT of 512 x 512 x 3000
MAX_SIDE = 65535  # pixels; what JPEG and DICOM can say of a side
RATIO = 1032  # bytes that deflate makes of one, at most; other codecs come near it in pictures that show something
GRANTED = 2**26  # bytes that any file may claim, for codecs that keep a blank picture in a few bytes
MAX_SCANS = 100  # of a JPEG, each of which passes over all pixels; encoders write ten, and libtiff reads no more
MAX_PARTS = 4 * MAX_SIDE  # of a TIFF, each of which takes time, however small: a strip for each row of four bands
INFLATED = 2**28  # bytes that a deflated DICOM file may hold, header and pixels

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_limit(max_voxels: int) -> None:
    """Refuse a limit that no image can keep.

    Raises:
        BundleError: if it is less than 1.
    """
    check(max_voxels >= 1, "max_voxels", max_voxels, "give the largest number of voxels of an image")


def check_regular(file: str | os.PathLike) -> None:
    """Refuse what is no file with an end; nothing is opened, for opening a pipe may wait for ever.

    Raises:
        BundleError: if there is nothing, or a pipe, a socket, a device or a folder, behind links, too.
    """
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        raise BundleError(f"no file at '{file}': check the path") from error
    if not stat.S_ISREG(mode):
        raise BundleError(f"'{file}' is {_KINDS.get(stat.S_IFMT(mode), 'no file')}: give a regular file, or remove it")


def check_size(place: Any, sides: Sequence[int], max_voxels: int, channels: int = 1) -> None:
    """Refuse an image that is too large.

    Args:
        place: what a person finds it by.
        sides: of the image, in pixels or voxels, as its header says.
        max_voxels: largest product of them; each channel counts.
        channels: values of a pixel.

    Raises:
        BundleError: if there are more voxels, a side is longer than 65535, or none at all.
    """
    said = "x".join(map(str, sides))
    if min(sides, default=0) < 1:
        raise BundleError(
            f"'{place}' has {said or 'no'} voxels: replace the file, or skip such files with --on_error skip"
        )
    if max(sides) > MAX_SIDE:
        raise BundleError(f"'{place}' has {said} voxels: no side may have more than {MAX_SIDE}, cut it into images")
    if math.prod(sides) * channels > max_voxels:
        of = f" of {channels} channels" if channels > 1 else ""
        raise BundleError(
            f"'{place}' has {said} voxels{of}, more than max_voxels ({max_voxels}): give a smaller image, or raise "
            "--max_voxels"
        )


def check_claim(place: Any, claimed: int, size: int, packed: bool = True) -> None:
    """Refuse a file that claims more than it can hold.

    Args:
        place: what a person finds it by.
        claimed: bytes that its header asks for.
        size: of the file, in bytes.
        packed: whether it is compressed.

    Raises:
        BundleError: if it claims more than ``size``; packed, more than both 64 MiB and 1032 times ``size``.
    """
    if claimed > (max(GRANTED, RATIO * size) if packed else size):
        raise BundleError(
            f"'{place}' claims {claimed} bytes of pixels, which its {size} bytes cannot hold: replace the file, or "
            "skip such files with --on_error skip"
        )


def check_count(place: Any, count: int, parts: str, most: int) -> None:
    """Refuse a file in so many parts that decoding them takes longer than its pixels are worth.

    Args:
        place: what a person finds it by.
        count: of the parts.
        parts: in words, in the plural.
        most: of them.

    Raises:
        BundleError: if there are more.
    """
    if count > most:
        raise BundleError(
            f"'{place}' has {count} {parts}, more than {most}: save it anew, or skip such files with --on_error skip"
        )
