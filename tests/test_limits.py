"""What a file claims costs nothing: sizes, bombs, pipes and decoders that loop."""

import gzip
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian

from bundle.data import find_images, find_splits, keep_readable, read_splits
from bundle.dicom import decoding, series
from bundle.dicom.series import read_volume
from bundle.errors import BundleError
from bundle.transforms import LoadCased
from bundle.transforms.loading import load_case

SPARE = 150_000  # kB that an attack may add to the memory of this process


@pytest.fixture(autouse=True)
def _cheap():
    """Whatever a test does takes little memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_peak()
    yield
    assert memory_peak() < before + SPARE


def memory_peak():
    """In kB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture(autouse=True)
def _in_time():
    """A test that hangs is ended."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


def nifti_header(shape, dtype=np.int16, **entries):
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), 1)
    for name, value in {"magic": b"n+1", "vox_offset": 352, **entries}.items():
        header[name] = value
    return header.binaryblock + bytes(4)


def bomb(path, start, megabytes):
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(start)
        for _ in range(megabytes):
            stream.write(bytes(2**20))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, content):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def rle(path, side, frames=1):
    image = dcmread(get_testdata_file("MR_small_RLE.dcm"))
    image.Rows = image.Columns = side
    image.NumberOfFrames = frames
    image.PixelData = encapsulate([struct.pack("<16L", 2, 64, 64, *[0] * 13) + bytes(64)] * frames)
    image.save_as(path)


def looping(path):
    """A JPEG 2000 image with a box of length 0, at which pydicom looks for ever."""
    image = dcmread(get_testdata_file("MR_small_jp2klossless.dcm"))
    [frame] = generate_frames(image.PixelData, number_of_frames=1)
    image.PixelData = encapsulate([b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0ftyp" + frame])
    image.save_as(path)
    return path


def test_a_few_bytes_that_claim_many_voxels_are_refused_by_the_limit(tmp_path):
    file = tmp_path / "a.nii.gz"
    file.write_bytes(gzip.compress(nifti_header((1200, 1200, 1200))))
    assert file.stat().st_size < 100
    with pytest.raises(BundleError, match=r"a.nii.gz' has 1200x1200x1200 voxels, more than max_voxels \(1000000000\)"):
        load_case(file)


@pytest.mark.parametrize(("name", "pack"), [("a.nii", bytes), ("a.nii.gz", gzip.compress)])
def test_a_few_bytes_that_claim_voxels_within_the_limit_are_refused_by_their_size(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(nifti_header((900, 900, 900))))
    with pytest.raises(BundleError, match="claims 1458000352 bytes of pixels, which its .* bytes cannot hold"):
        load_case(tmp_path / name)


def test_sides_below_one_are_refused(tmp_path):
    start = bytearray(nifti_header((32, 32, 32)))
    start[44:46] = struct.pack("<h", -5)
    bomb(tmp_path / "a.nii.gz", bytes(start), megabytes=250)
    with pytest.raises(BundleError, match="has 32x-5x32 voxels|cannot read"):
        load_case(tmp_path / "a.nii.gz")


def test_of_a_stream_longer_than_its_header_says_only_that_much_is_read(tmp_path):
    bomb(tmp_path / "a.nii.gz", nifti_header((32, 32, 4)), megabytes=250)
    assert load_case(tmp_path / "a.nii.gz").shape == (1, 32, 32, 4)


def test_a_header_that_fills_memory_is_refused(tmp_path):
    start = bytearray(nifti_header((32, 32, 4), vox_offset=2**27))
    start[348:] = b"\1\0\0\0" + struct.pack("<ii", 2**27 - 352, 6)
    bomb(tmp_path / "a.nii.gz", bytes(start), megabytes=250)
    with pytest.raises(BundleError, match="has a header of 134217728 bytes"):
        load_case(tmp_path / "a.nii.gz")


@pytest.mark.parametrize(("sides", "message"), [((13000, 13000), "claims 507000000 bytes"), ((40000, 9000), "max_vox")])
def test_a_picture_that_claims_many_pixels_is_refused(tmp_path, sides, message):
    (tmp_path / "a.png").write_bytes(png(*sides, zlib.compress(bytes(1000))))
    with pytest.raises(BundleError, match=message):
        load_case(tmp_path / "a.png")


def test_a_picture_with_a_side_of_millions_is_refused(tmp_path):
    Image.new("L", (24, 4_000_000)).save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    with pytest.raises(BundleError, match="has 24x4000000 voxels: no side may have more than 65535"):
        load_case(tmp_path / "a.tif")


def test_the_limit_is_the_only_one_and_a_knob(tmp_path):
    Image.new("L", (100, 80)).save(tmp_path / "a.png")
    assert LoadCased("image", max_voxels=8000)({"image": str(tmp_path / "a.png")})["image"].shape == (1, 100, 80, 1)
    with pytest.raises(BundleError, match=r"has 100x80 voxels, more than max_voxels \(7999\): .*raise --max_voxels"):
        LoadCased("image", max_voxels=7999)({"image": str(tmp_path / "a.png")})
    with pytest.raises(BundleError, match="max_voxels is 0"):
        LoadCased("image", max_voxels=0)


def test_each_channel_counts(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    with pytest.raises(BundleError, match=r"100x80 voxels of 3 channels, more than max_voxels \(8000\)"):
        load_case(tmp_path / "a.png", max_voxels=8000)


def test_pillow_has_no_limit_of_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(png(14000, 14000, zlib.compress(bytes(1000))))
    with pytest.raises(BundleError, match="14000x14000 voxels of 3 channels, more than max_voxels"):
        load_case(tmp_path / "a.png", max_voxels=10**8)


def test_only_the_formats_of_pictures_are_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n")
    with pytest.raises(BundleError, match="cannot identify"):
        load_case(tmp_path / "a.png")


def progressive(path, scans):
    """A JPEG whose last refinement of a coefficient comes again and again."""
    Image.new("L", (1000, 1000), 9).save(path, progressive=True)
    content = path.read_bytes()
    last, end = content.rindex(b"\xff\xda"), len(content) - 2
    path.write_bytes(content[:end] + content[last:end] * (scans - content.count(b"\xff\xda")) + content[end:])
    return path


def test_a_jpeg_of_thousands_of_scans_is_refused_in_no_time(tmp_path):
    file = progressive(tmp_path / "a.jpg", 5000)
    start = time.process_time()
    with pytest.raises(BundleError, match=r"a.jpg' has 5000 scans, more than 100: save it anew"):
        load_case(file)
    assert time.process_time() - start < 1


def test_only_scans_before_the_end_of_a_jpeg_count(tmp_path):
    file = progressive(tmp_path / "a.jpg", 100)
    content = file.read_bytes()
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
    film = b"\xff\xda" * 1000  # behind the picture, as telephones put it
    file.write_bytes(content[:2] + thumbnail + content[2:] + film)
    assert load_case(file).shape == (1, 1000, 1000, 1)


def tiff(path, side, tile, compression, offsets, sizes, content=b""):
    """A gray TIFF in tiles."""
    tags = {256: [side], 257: [side], 258: [8], 259: [compression], 262: [1], 277: [1], 322: [tile], 323: [tile]}
    tags |= {324: offsets, 325: sizes}
    start, lists = b"II*\0" + struct.pack("<IH", 8, len(tags)), b""
    behind = len(start) + 12 * len(tags) + 4
    for tag, values in tags.items():
        value = values[0] if len(values) == 1 else behind + len(lists)
        start += struct.pack("<HHII", tag, 4, len(values), value)
        lists += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
    path.write_bytes(start + bytes(4) + lists + content)


def test_a_tiff_of_a_tile_for_each_pixel_is_refused(tmp_path):
    tiff(tmp_path / "a.tif", 600, 1, 1, [8] * 360_000, [1] * 360_000)
    with pytest.raises(BundleError, match="a.tif' has 360000 strips or tiles, more than 262140"):
        load_case(tmp_path / "a.tif")


def test_a_small_tiff_with_a_huge_tile_is_refused(tmp_path):
    content = zlib.compress(bytes(2**20))
    tiff(tmp_path / "a.tif", 16, 46000, 8, [134], [len(content)], content)
    with pytest.raises(BundleError, match="a.tif' has 46000x46000 voxels, more than max_voxels"):
        load_case(tmp_path / "a.tif")


def test_a_palette_counts_as_the_colors_that_it_becomes(tmp_path):
    Image.new("P", (6000, 6000)).save(tmp_path / "a.png")
    with pytest.raises(BundleError, match=r"a.png' claims 108000000 bytes of pixels, which its \d+ bytes cannot hold"):
        load_case(tmp_path / "a.png")


CUT_WHILE_READ = """
import os, sys
import numpy
from nibabel.openers import Opener
from PIL import ImageFile
from bundle.errors import BundleError
from bundle.transforms.loading import load_case

file = sys.argv[1]
opened = Opener.__init__

def cut(function):
    def call(*arguments, **options):
        result = function(*arguments, **options)
        os.truncate(file, 1000)
        return result
    return call

class Stream:
    # of nibabel, which reads the header first
    def __init__(self, stream):
        self.stream = stream
    def __getattr__(self, name):
        return getattr(self.stream, name)
    def readinto(self, target):
        os.truncate(file, 1000)
        return self.stream.readinto(target)

def open_to_cut(self, *arguments, **options):
    opened(self, *arguments, **options)
    self.fobj = Stream(self.fobj)

numpy.memmap = cut(numpy.memmap)
Opener.__init__ = open_to_cut
ImageFile.ImageFile.load_prepare = cut(ImageFile.ImageFile.load_prepare)
try:
    load_case(file)
except BundleError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.nii", "a.bmp", "a.tif"])
def test_a_file_that_is_cut_while_it_is_read_ends_no_command(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 255, (1000, 1000), np.uint8)
    if name == "a.nii":
        nib.save(nib.Nifti1Image(pixels[..., None], np.eye(4)), tmp_path / name)
    else:
        Image.fromarray(pixels).save(tmp_path / name)
    words = [sys.executable, "-c", CUT_WHILE_READ, str(tmp_path / name)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.returncode
    assert re.fullmatch(rf"cannot read '.*{name}' \(.*\): replace the file, .*\n", done.stdout)


@pytest.mark.parametrize(("side", "frames"), [(60000, 1), (512, 16000)])
def test_a_compressed_dicom_file_that_claims_gigabytes_is_refused(tmp_path, side, frames):
    rle(tmp_path / "a.dcm", side, frames)
    with pytest.raises(BundleError, match=r"a.dcm' claims \d+ bytes of pixels, which its \d+ bytes cannot hold"):
        load_case(tmp_path / "a.dcm")


def test_a_plain_dicom_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    image = dcmread(get_testdata_file("CT_small.dcm"))
    image.Rows = image.Columns = 20000
    image.save_as(tmp_path / "a.dcm")
    with pytest.raises(BundleError, match="claims 800000000 bytes of pixels, which its 39206 bytes cannot hold"):
        load_case(tmp_path / "a.dcm")


def test_slices_of_a_series_are_counted_together():
    files = [get_testdata_file("CT_small.dcm")]
    assert read_volume(files, max_voxels=128 * 128).pixels.size == 128 * 128
    with pytest.raises(BundleError, match=r"has 128x128x1 voxels, more than max_voxels \(16383\)"):
        read_volume(files, max_voxels=128 * 128 - 1)


def test_a_deflated_dicom_file_is_inflated_in_steps(tmp_path, monkeypatch):
    plain = dcmread(get_testdata_file("CT_small.dcm"))
    plain.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    plain.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    plain.save_as(tmp_path / "small.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(load_case(tmp_path / "small.dcm"), load_case(tmp_path / "a.dcm"))
    monkeypatch.setattr(series, "INFLATED", 2**24)
    plain.PixelData = bytes(2**24)
    plain.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    with pytest.raises(BundleError, match="b.dcm' inflates to more than 16777216 bytes"):
        load_case(tmp_path / "b.dcm")


def test_a_decoder_that_loops_is_ended_and_the_next_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "SECONDS", 1.0)
    file = looping(tmp_path / "a.dcm")
    read_volume([get_testdata_file("MR_small_RLE.dcm")])  # starts the process
    start = time.monotonic()
    with pytest.raises(BundleError, match=r"a.dcm' \(its decoder does not end within 1 s\)"):
        load_case(file)
    assert time.monotonic() - start < 10
    assert read_volume([get_testdata_file("MR_small_RLE.dcm")]).pixels.shape == (1, 64, 64, 1)


def test_a_decoder_that_dies_is_named_by_its_signal(tmp_path):
    read_volume([get_testdata_file("MR_small_RLE.dcm")])
    os.kill(decoding._idle[-1].process.pid, signal.SIGSEGV)
    with pytest.raises(BundleError, match="its decoder ended by signal 11"):
        read_volume([get_testdata_file("MR_small_RLE.dcm")])
    assert read_volume([get_testdata_file("MR_small_RLE.dcm")]).pixels.shape == (1, 64, 64, 1)


def test_a_decoder_cannot_take_all_memory(monkeypatch):
    monkeypatch.setattr(decoding, "MEMORY", 2**20)
    with pytest.raises(BundleError, match="cannot read"):
        read_volume([get_testdata_file("MR_small_jp2klossless.dcm")])


def test_images_of_one_command_share_a_decoder():
    file = get_testdata_file("MR_small_RLE.dcm")
    read_volume([file])
    before = [decoder.process.pid for decoder in decoding._idle]
    read_volume([file])
    assert [decoder.process.pid for decoder in decoding._idle] == before


def test_a_forked_process_has_decoders_of_its_own():
    file = get_testdata_file("MR_small_RLE.dcm")
    read_volume([file])
    child = os.fork()
    if not child:
        os._exit(len(decoding._idle))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert decoding._idle


def test_decoding_changes_no_header():
    file = get_testdata_file("SC_rgb_jpeg_dcmtk.dcm")
    header, original = read_volume([file]).files.headers()[0], dcmread(file)
    assert header.PhotometricInterpretation == original.PhotometricInterpretation
    assert header.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID


@pytest.mark.slow
def test_decoders_end_with_the_command():
    code = (
        "from bundle.dicom import decoding; from bundle.dicom.series import read_volume;"
        f"read_volume(['{get_testdata_file('MR_small_RLE.dcm')}']); print(decoding._idle[0].process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.fixture
def odd(tmp_path):
    """A folder with pipes, a socket and devices, each behind a link, too, and one picture."""
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.dcm")
    os.mkfifo(folder / "pipe.nii.gz")
    os.mkfifo(folder / "pipe")
    (folder / "link.tif").symlink_to("pipe.png")
    (folder / "zero.nii").symlink_to("/dev/zero")
    (folder / "null.dcm").symlink_to("/dev/null")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # names of sockets are short
    listener.bind("socket.png")
    os.chdir(here)
    Image.new("L", (32, 32), 9).save(folder / "good.png")
    yield folder
    listener.close()


def test_what_is_no_regular_file_is_named_without_opening_it(odd):
    for name, kind in [
        ("pipe.png", "a pipe"),
        ("pipe.dcm", "a pipe"),
        ("link.tif", "a pipe"),
        ("zero.nii", "a device"),
        ("null.dcm", "a device"),
        ("socket.png", "a socket"),
    ]:
        with pytest.raises(BundleError, match=f"{name}' is {kind}: give a regular file, or remove it"):
            load_case(odd / name)


def test_a_folder_with_pipes_and_devices_is_read_around_them(odd, caplog):
    cases = find_images(odd, follow_links=True)
    assert [case["name"] for case in keep_readable(cases, LoadCased("image"), on_error="skip")] == ["good"]
    assert "skipped 7 of 8 images" in caplog.text


def test_a_training_names_a_pipe_among_its_images(odd):
    found = find_splits(odd, follow_links=True)
    with pytest.raises(BundleError, match="is a (pipe|socket|device)"):
        read_splits(found, LoadCased("image"), store=set())
