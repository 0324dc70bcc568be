"""Thousands of damaged files: only errors in one line come out, in seconds, with little memory.

    python -m pytest tests/test_fuzz.py -s   # prints the cases of each format, the slowest and the memory

One process reads all cases of a format. Seeds are fixed, so that a case that fails fails again.
"""

import gzip
import io
import json
import re
import signal
import tempfile
import time
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from builders import small_detector
from highdicom.legacy import LegacyConvertedEnhancedMRImage
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import JPEGLSLossless, RLELossless, generate_uid

from bundle.checkpoint import load_checkpoint, save_checkpoint, trained_settings
from bundle.command_line import given_texts, read_config, read_knobs
from bundle.data import find_splits
from bundle.dicom import decoding
from bundle.dicom.mr import SeriesIdentity, mr_series
from bundle.errors import BundleError
from bundle.transforms.loading import load_case

pytestmark = pytest.mark.slow

SECONDS = 10  # for a case
MEMORY = 2**18  # kB that the cases of a format may add to this process, and that a decoder may take
HEADER = 400  # bytes at the start, which decide most
"""Where half of the damage goes."""

mutations = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "flip", "cut", "double", "zeros", "number", "swap"]),
        st.booleans(),
        st.integers(0, 2**20),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content, changes):
    """``content`` after a list of changes: bytes set, bits flipped, parts cut, doubled, emptied or exchanged."""
    data = bytearray(content)
    for kind, at_start, place, value in changes:
        if not data:
            break
        at = place % min(len(data), HEADER if at_start else len(data))
        size = 1 + value[0]
        if kind == "set":
            data[at : at + len(value)] = value
        elif kind == "flip":
            data[at] ^= 1 << value[0] % 8
        elif kind == "cut":
            del data[at : at + size if value[-1] % 2 else len(data)]
        elif kind == "double":
            data[at:at] = data[at : at + size]
        elif kind == "zeros":
            data[at : at + size] = bytes(size)
        elif kind == "number":  # as sizes and offsets are written, at both ends of their range
            numbers = (b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
            data[at : at + len(numbers[value[0] % 5])] = numbers[value[0] % 5]
        else:
            other = (place // 7) % len(data)
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    return bytes(data)


def memory_peak(process):
    """In kB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


def with_right_sums(data):
    """A PNG whose checksums fit again, so that more than the checksum is tried."""
    found, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = min(at + 8 + int.from_bytes(data[at : at + 4], "big"), len(data))
        found += [data[at:end], zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")]
        at = end + 4
    return b"".join(found)


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def nifti():
    values = np.random.default_rng(0).integers(0, 999, (20, 18, 5)).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([1.0, 1, 4, 1])).to_bytes()


def by_itk(suffix, packed):
    image = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 999, (5, 18, 20)).astype(np.int16))
    image.SetMetaData("Comment", "noise")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"a{suffix}")
        SimpleITK.WriteImage(image, str(file), useCompression=packed)
        return file.read_bytes()


def dicom(name, syntax=None):
    image = dcmread(get_testdata_file(name))
    if syntax is not None:
        image.compress(syntax, generate_instance_uid=False)
    stream = io.BytesIO()
    image.save_as(stream)
    return stream.getvalue()


def enhanced():
    slices = mr_series(
        np.random.default_rng(0).integers(0, 999, (20, 18, 3)).astype(np.uint16),
        np.diag([1.0, 1, 4, 1]),
        SeriesIdentity("p", "P", *(generate_uid() for _ in range(3)), series_number=1),
    )
    stream = io.BytesIO()
    LegacyConvertedEnhancedMRImage(slices, generate_uid(), 9, generate_uid(), 1).save_as(stream)
    return stream.getvalue()


GRAY = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 40), dtype=np.uint8))
COLOR = GRAY.convert("RGB")
SEEDS = {  # of each format: the suffix, how many cases, and files; gzip is damaged inside and outside
    "png": (".png", 1200, lambda: [saved(GRAY, format="PNG"), saved(COLOR.quantize(), format="PNG")]),
    "jpeg": (".jpg", 1000, lambda: [saved(GRAY, format="JPEG"), saved(COLOR, format="JPEG", progressive=True)]),
    "bmp": (".bmp", 600, lambda: [saved(GRAY, format="BMP"), saved(COLOR, format="BMP")]),
    "tiff": (
        ".tif",
        1200,
        lambda: [saved(COLOR, format="TIFF", compression=way) for way in (None, "tiff_lzw", "tiff_adobe_deflate")],
    ),
    "nifti": (".nii", 1200, lambda: [nifti()]),
    "gzip": (".nii.gz", 800, lambda: [gzip.compress(nifti())]),
    "nrrd": (".nrrd", 1200, lambda: [by_itk(".nrrd", packed) for packed in (False, True)]),
    "metaimage": (".mha", 1200, lambda: [by_itk(".mha", packed) for packed in (False, True)]),
    "dicom": (".dcm", 1200, lambda: [dicom("CT_small.dcm"), dicom("MR_small_bigendian.dcm"), dicom("image_dfl.dcm")]),
    "dicom frames": (".dcm", 300, lambda: [enhanced()]),
    "dicom rle": (".dcm", 300, lambda: [dicom("CT_small.dcm", RLELossless)]),
    "dicom jpeg ls": (".dcm", 300, lambda: [dicom("CT_small.dcm", JPEGLSLossless)]),
    "dicom jpeg": (".dcm", 300, lambda: [dicom("SC_rgb_jpeg_dcmtk.dcm"), dicom("SC_rgb_jpeg_gdcm.dcm")]),
    "dicom jpeg 2000": (".dcm", 300, lambda: [dicom("MR_small_jp2klossless.dcm"), dicom("693_J2KI.dcm")]),
}
"""A case of a compressed format that ends its decoder costs a second."""

totals: Counter[str] = Counter()


def fuzz(name, count, seeds, read):
    """Read ``count`` damaged versions of ``seeds``.

    Raises:
        AssertionError: if a case takes too long, or memory.
        Exception: whatever comes out of ``read`` beside :class:`BundleError`.
    """
    outcomes: Counter[str] = Counter()
    slowest = 0.0

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=SECONDS),
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(seeds), mutations)
    def case(seed, changes):
        nonlocal slowest
        start = time.monotonic()
        signal.alarm(10 * SECONDS)  # what hangs ends the whole
        try:
            read(mutated(seed, changes))
            outcomes["read"] += 1
        except BundleError as error:
            assert len(str(error).splitlines()) == 1
            outcomes["refused"] += 1
        finally:
            signal.alarm(0)
            slowest = max(slowest, time.monotonic() - start)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_peak("self")
    case()
    added = memory_peak("self") - before
    decoders = max([memory_peak(decoder.process.pid) for decoder in decoding._idle], default=0)
    totals[name] = outcomes.total()
    print(
        f"\n{name}: {outcomes.total()} cases, {outcomes['read']} read, {outcomes['refused']} refused, slowest "
        f"{slowest:.1f} s, {added / 2**20:.2f} GB more, decoders {decoders / 2**20:.2f} GB"
    )
    assert max(added, decoders) < MEMORY
    assert outcomes.total() >= count


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_images_are_refused_in_one_line(tmp_path, monkeypatch, name):
    suffix, count, seeds = SEEDS[name]
    monkeypatch.setattr(decoding, "SECONDS", 2.0)
    file = tmp_path / f"a{suffix}"

    def read(content):
        file.write_bytes(with_right_sums(content) if name == "png" else content)
        load_case(file)

    read(seeds()[0])  # libraries load what they need
    fuzz(name, count, seeds(), read)


def test_damaged_volumes_inside_of_gzip_are_refused_in_one_line(tmp_path):
    file = tmp_path / "a.nii.gz"

    def read(content):
        file.write_bytes(gzip.compress(content, compresslevel=1))
        load_case(file)

    fuzz("nifti in gzip", 600, [nifti()], read)


def test_damaged_datalists_are_refused_in_one_line(tmp_path):
    lists = {
        "training": [{"image": "a.png", "patient": "1"}, {"image": "b.nii.gz", "patient": 2}, "c.png"],
        "validation": [{"image": ["a.dcm", "b.dcm"]}],
        "test": [{"image": "d.png", "label": 1, "mask": "m.png"}, {"image": "e.png", "label": "m.png"}],
    }
    file = tmp_path / "data.json"

    def read(content):
        file.write_bytes(content)
        find_splits(file)

    fuzz("datalist", 600, [json.dumps(lists).encode(), json.dumps(lists, indent=1).encode()], read)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, features):
    detector = small_detector(features)
    file = tmp_path / "model.pt"
    save_checkpoint(detector, file)

    def read(content):
        file.write_bytes(content)
        trained_settings(file)
        load_checkpoint(detector, file)

    fuzz("checkpoint", 300, [file.read_bytes()], read)


def test_damaged_files_of_arguments_are_refused_in_one_line(tmp_path):
    config = read_config(["configs/train.json"])
    seed = json.dumps({"batch_size": 4, "mode": "causal", "dilations": [1, 2], "rank": 8, "shrinkage": None}).encode()
    file = tmp_path / "knobs.json"

    def read(content):
        file.write_bytes(content)
        read_knobs(given_texts(["--args_file", str(file)]), config)

    fuzz("arguments", 300, [seed], read)


def test_damaged_configs_are_refused_in_one_line(tmp_path):
    file = tmp_path / "overlay.json"

    def read(content):
        file.write_bytes(content)
        read_config([str(file)])

    fuzz("config", 300, [Path("configs/paper.json").read_bytes(), Path("configs/export.json").read_bytes()], read)


def test_there_were_ten_thousand_cases():
    if len(totals) < len(SEEDS) + 5:
        pytest.skip("not all formats ran")
    assert totals.total() >= 10_000
