"""NRRD and MetaImage files, those of 3D Slicer and ITK-SNAP: headers are checked here, MONAI's ITKReader reads them.

ITK's own readers of headers are not made for files of strangers: numbers run on into other lines, arrays outgrow their
place, a header can name any file of the machine. So a header is read here first, by a grammar that leaves nothing
open: each field once, in its line, with as many numbers as it must have. ITK is imported when the first file is read.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.data.image_reader import ITKReader
from monai.data.utils import to_affine_nd

from bundle.errors import BundleError, shown
from bundle.files import LOCAL, data_of
from bundle.limits import check_claim, check_regular, check_size

HEADER = 2**20  # bytes of the longest header; 3D Slicer writes a few lines for each segment
LINE = 400  # characters of a line of a MetaImage; ITK's reader takes 500
_STEP = 2**20  # bytes
_SIZES = (
    ("MET_CHAR MET_UCHAR", 1),
    ("MET_SHORT MET_USHORT", 2),
    ("MET_INT MET_UINT MET_FLOAT", 4),
    ("MET_LONG_LONG MET_ULONG_LONG MET_DOUBLE", 8),
    ("signedchar int8 int8_t uchar unsignedchar uint8 uint8_t", 1),
    ("short shortint signedshort signedshortint int16 int16_t", 2),
    ("ushort unsignedshort unsignedshortint uint16 uint16_t", 2),
    ("int signedint int32 int32_t uint unsignedint uint32 uint32_t float", 4),
    ("longlong longlongint signedlonglong signedlonglongint int64 int64_t", 8),
    ("ulonglong unsignedlonglong unsignedlonglongint uint64 uint64_t double", 8),
)
_BYTES = {name: size for names, size in _SIZES for name in names.split()}  # of a value, by type without blanks

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_META_LINE = re.compile(r"(\w[\w |.-]*?)[ \t]*=[ \t]*([^\s=:].*?)[ \t]*\r?", re.ASCII)
# how often the fields of a MetaImage that hold numbers hold one, by the rank of the image
_META_COUNTS: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("DimSize", "Offset", "Position", "Origin", "CenterOfRotation"), lambda rank: rank),
    **dict.fromkeys(("ElementSpacing", "ElementSize"), lambda rank: rank),
    **dict.fromkeys(("TransformMatrix", "Orientation", "Rotation"), lambda rank: rank**2),
    **dict.fromkeys(("NDims", "ID", "ParentID", "HeaderSize", "CompressedDataSize"), lambda rank: 1),
    **dict.fromkeys(("ElementNumberOfChannels", "ElementMin", "ElementMax", "CompressionLevel"), lambda rank: 1),
    **dict.fromkeys(("ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset"), lambda rank: 1),
    "Color": lambda rank: 4,
}
_META_SWITCHES = ("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData")
_META_LEAST = {"ElementNumberOfChannels": 1, "HeaderSize": 0, "CompressedDataSize": 0}
_META_DIRECTIONS = ("TransformMatrix", "Orientation", "Rotation")
_NRRD_MAGIC = re.compile(r"NRRD000[1-5]\r?")
_NRRD_LINE = re.compile(r"([a-z][a-z ]*): *([^\s:].*?)[ \t]*\r?", re.IGNORECASE | re.ASCII)
_NRRD_REMARK = re.compile(r"#.*|[^:=]+:=.*", re.DOTALL)  # a comment, or a key and its value
_NRRD_ELSEWHERE = ("datafile", "lineskip", "byteskip")  # what would lead to other bytes than those behind the header


class _Header(NamedTuple):
    """What a header claims.

    Attributes:
        sides: of the array in the file.
        channels: values in each of its places.
        type: of a value.
        data: the file that holds them.
        start: where in it they begin.
        deflated: how :mod:`zlib` calls their packing; None: they are not packed.
        packed: bytes that they take then; 0: all that follow.
        placed: whether it tells an orientation.
    """

    sides: list[int]
    channels: int
    type: str
    data: Path
    start: int
    deflated: int | None
    packed: int
    placed: bool


class ItkImage(NamedTuple):
    """What a file holds.

    Attributes:
        values: [x, y, slices, volumes] float32.
        affine: [4, 4], from voxel indices to mm in RAS.
        placed: whether the header tells an orientation.
        axes: of the image, 2 or 3.
    """

    values: np.ndarray
    affine: np.ndarray
    placed: bool
    axes: int


def read_itk(path: str, max_voxels: int) -> ItkImage:
    """The image in a NRRD or MetaImage file; vectors, colors and a fourth axis are volumes.

    Args:
        path: of the file, or of the header beside its data.
        max_voxels: largest number of voxels; those of each volume count.

    Raises:
        BundleError: if the header leaves something open, claims more than the file holds, or names data elsewhere.
    """
    is_nrrd = path.lower().endswith(".nrrd")
    header = (_nrrd_header if is_nrrd else _meta_header)(path)
    check_size(path, header.sides, max_voxels, header.channels)
    _check_data(path, header)
    import itk

    itk.Object.SetGlobalWarningDisplay(False)
    file = (itk.NrrdImageIO if is_nrrd else itk.MetaImageIO).New()
    file.SetFileName(path)
    file.ReadImageInformation()
    sides = [file.GetDimensions(axis) for axis in range(file.GetNumberOfDimensions())]
    volumes = file.GetNumberOfComponents()
    if math.prod(sides) * volumes != math.prod(header.sides) * header.channels:
        raise _unclear(path, "its size")
    if len(sides) + (volumes > 1) > 4:
        raise BundleError(f"'{path}' has {volumes} values in each voxel of 4 axes: give a 2D image or a 3D volume")
    reader: Any = ITKReader(pixel_type=itk.VariableLengthVector[itk.F] if volumes > 1 else itk.F, imageio=file)
    values, told = reader.get_data(reader.read(path))
    values = values.reshape(*(*sides, 1)[:3], -1)
    affine = to_affine_nd(3, np.asarray(told["affine"], dtype=np.float64))
    return ItkImage(values, affine, header.placed, min(len(sides), 3))


def _meta_header(path: str) -> _Header:
    fields: dict[str, str] = {}
    start = 0
    for line in _lines(path):
        start += len(os.fsencode(line)) + 1
        found = _META_LINE.fullmatch(line)
        if not found or found[1] in fields or len(line) > LINE:
            raise _unclear(path, line)
        fields[found[1]] = found[2]
        if found[1] == "NDims" and found[2] not in ("2", "3", "4"):
            raise BundleError(f"'{path}' has {found[2]} axes: give a 2D image or a 3D volume")
        count = _META_COUNTS.get(found[1], lambda rank: 0)(int(fields.get("NDims", 0)))
        if found[1] in _META_COUNTS and not _are_numbers(found[2], count):
            raise _unclear(path, line)
        if found[1] in _META_SWITCHES and found[2] not in ("True", "False"):
            raise _unclear(path, line)
        if found[1] in _META_LEAST and int(found[2]) < _META_LEAST[found[1]]:
            raise _unclear(path, line)
        if found[1] == "ElementDataFile":
            break
    _check_told(path, fields, ("NDims", "DimSize", "ElementType", "ElementDataFile"))
    if fields.get("BinaryData", "True") != "True":
        raise BundleError(f"'{path}' has its voxels as text: save it as binary")
    name, beside = fields["ElementDataFile"], data_of(path)
    if name != LOCAL and (beside is None or beside.name != name or beside.is_symlink()):
        raise BundleError(
            f"'{path}' has its voxels in '{name}': they must be in one file beside it, no link; save it as .mha"
        )
    return _Header(
        [int(side) for side in fields["DimSize"].split()],
        int(fields.get("ElementNumberOfChannels", 1)),
        fields["ElementType"],
        beside or Path(path),
        int(fields.get("HeaderSize", 0)) if name != LOCAL else start,
        zlib.MAX_WBITS + 32 if fields.get("CompressedData", "False") == "True" else None,
        int(fields.get("CompressedDataSize", 0)),
        any(field in fields for field in _META_DIRECTIONS),
    )


def _nrrd_header(path: str) -> _Header:
    fields: dict[str, str] = {}
    lines = _lines(path)
    magic = next(lines)
    if not _NRRD_MAGIC.fullmatch(magic):
        raise BundleError(f"'{path}' is no NRRD file: replace the file, or skip such files with --on_error skip")
    start = len(magic) + 1
    for line in lines:
        start += len(os.fsencode(line)) + 1
        if line in ("", "\r"):
            break
        if _NRRD_REMARK.fullmatch(line):
            continue
        found = _NRRD_LINE.fullmatch(line)
        name = found[1].replace(" ", "").lower() if found else ""
        if name in _NRRD_ELSEWHERE:
            raise BundleError(f"'{path}' has its voxels elsewhere ({name}): save it as one file")
        if not found or name in fields:
            raise _unclear(path, line)
        fields[name] = found[2]
    _check_told(path, fields, ("type", "dimension", "sizes", "encoding"))
    sides = [int(side) for side in fields["sizes"].split()]
    if fields["dimension"] != str(len(sides)) or len(sides) not in (2, 3, 4):
        raise BundleError(f"'{path}' has {fields['dimension']} axes: give a 2D image or a 3D volume")
    packings = {"raw": None, "gzip": zlib.MAX_WBITS + 16, "gz": zlib.MAX_WBITS + 16}
    if fields["encoding"] not in packings:
        raise BundleError(f"'{path}' has its voxels in encoding {shown(fields['encoding'])}: save it as raw or gzip")
    deflated, placed = packings[fields["encoding"]], "spacedirections" in fields
    return _Header(sides, 1, fields["type"].replace(" ", ""), Path(path), start, deflated, 0, placed)


def _lines(path: str) -> Iterator[str]:
    """The lines of a header, as far as it is text; ends without one where the header ends.

    Raises:
        BundleError: if there is no end of the header in the first MiB.
    """
    with open(path, "rb") as stream:
        left = HEADER
        while (line := stream.readline(left)).endswith(b"\n"):
            left -= len(line)
            text = os.fsdecode(line[:-1])
            if any(ord(letter) < 32 and letter != "\t" for letter in text.removesuffix("\r")):
                raise _unclear(path, text)
            yield text
    raise BundleError(f"'{path}' has no end of its header: replace the file, or skip such files with --on_error skip")


def _check_told(path: str, fields: Container[str], needed: Sequence[str]) -> None:
    for field in needed:
        if field not in fields:
            raise BundleError(
                f"'{path}' does not say its {field}: replace the file, or skip such files with --on_error skip"
            )


def _are_numbers(text: str, count: int) -> bool:
    return len(text.split()) == count and all(map(_NUMBER.fullmatch, text.split()))


def _check_data(path: str, header: _Header) -> None:
    """Compare what a header claims with what is there, to the last byte.

    Raises:
        BundleError: if there is less, or no file, or of packed data more.
    """
    if header.type not in _BYTES:
        raise BundleError(f"'{path}' has voxels of type {shown(header.type)}: give whole numbers, float or double")
    check_regular(header.data)
    claimed = math.prod(header.sides) * header.channels * _BYTES[header.type]
    there = max(0, os.path.getsize(header.data) - header.start)
    if header.deflated is None:
        check_claim(path, claimed, there, packed=False)
        return
    check_claim(path, claimed, there)
    if header.packed > there or _inflated(header, claimed) != claimed:
        raise BundleError(
            f"'{path}' has other voxels than its header says, it may be truncated: replace the file, or skip such "
            "files with --on_error skip"
        )


def _inflated(header: _Header, most: int) -> int:
    """How many bytes the data unpack to, in steps, as far as ``most``; 0 if they have no end."""
    assert header.deflated is not None
    inflater, inflated, left = zlib.decompressobj(header.deflated), 0, header.packed or math.inf
    with open(header.data, "rb") as stream:
        stream.seek(header.start)
        try:
            while not inflater.eof and inflated <= most:
                packed = inflater.unconsumed_tail or stream.read(int(min(left, _STEP)))
                left -= 0 if inflater.unconsumed_tail else len(packed)
                if not packed:
                    return 0
                inflated += len(inflater.decompress(packed, _STEP))
        except zlib.error:
            return 0
    return inflated


def _unclear(path: str, line: str) -> BundleError:
    return BundleError(
        f"'{path}' has a header that is damaged or unclear at {shown(line)}: save it anew, or skip such files with "
        "--on_error skip"
    )
