"""NRRD and MetaImage: the same volume as NIfTI, and headers that would lead a reader elsewhere."""

import gzip
import os
import re

import numpy as np
import pytest
import SimpleITK
from test_outputs import infer, left_in, saver_in

from bundle.data import find_images, find_splits
from bundle.data.cases import add_keys, check_unchanged, note_states
from bundle.errors import BundleError
from bundle.transforms import LoadCased
from bundle.transforms.loading import load_case, modality_of

SUFFIXES = ("nrrd", "mha", "mhd")
ANGLES = (0.2, -0.3, 0.1)


def volume(shape=(20, 18, 7), dtype=np.int16, seed=0):
    """An oblique volume of SimpleITK, [x, y, slices]."""
    image = SimpleITK.GetImageFromArray(np.random.default_rng(seed).integers(0, 99, shape[::-1]).astype(dtype))
    image.SetSpacing((0.7, 0.8, 3.5)[: len(shape)])
    image.SetOrigin((-12.5, 30, 4)[: len(shape)])
    if len(shape) == 3:
        image.SetDirection(SimpleITK.Euler3DTransform((0, 0, 0), *ANGLES).GetMatrix())
    return image


def saved(image, path, packed=True):
    SimpleITK.WriteImage(image, str(path), useCompression=packed)
    return path


def changed(path, old, new):
    """Another text in the header of a file."""
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))
    return path


def refusal(path, **options):
    with pytest.raises(BundleError) as error:
        load_case(path, **options)
    return str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_volume_has_the_same_voxels_at_the_same_places_in_all_formats(tmp_path, suffix, packed):
    image = volume()
    expected = load_case(saved(image, tmp_path / "a.nii.gz"))
    found = load_case(saved(image, tmp_path / f"a.{suffix}", packed))
    assert found.dtype == expected.dtype and found.shape == expected.shape == (1, 20, 18, 7)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    voxel = (3, 5, 6)
    left, posterior, superior = image.TransformIndexToPhysicalPoint(voxel)
    np.testing.assert_allclose((found.affine.numpy() @ [*voxel, 1])[:3], [-left, -posterior, superior], atol=1e-9)
    assert float(found[0, *voxel]) == image[voxel]
    assert found.meta["modality"] == expected.meta["modality"] == modality_of(str(tmp_path / f"a.{suffix}")) == ""
    assert found.meta["slice_axis"] == expected.meta["slice_axis"] == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64])
def test_numbers_of_all_types_are_read(tmp_path, suffix, dtype):
    image = volume(dtype=dtype)
    found = load_case(saved(image, tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(found[0], SimpleITK.GetArrayFromImage(image).T.astype(np.float32))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flat_image_is_one_slice(tmp_path, suffix):
    image = volume((20, 18))
    found = load_case(saved(image, tmp_path / f"a.{suffix}"))
    assert found.shape == (1, 20, 18, 1)
    np.testing.assert_array_equal(found[0, ..., 0], SimpleITK.GetArrayFromImage(image).T)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["vectors", "4D"])
def test_of_several_volumes_one_is_chosen(tmp_path, suffix, kind):
    volumes = [volume(seed=seed) for seed in range(3)]
    image = SimpleITK.Compose(*volumes) if kind == "vectors" else SimpleITK.JoinSeries(volumes)
    file = saved(image, tmp_path / f"a.{suffix}")
    assert "choose one of its 3 volumes with --channel" in refusal(file)
    assert "has 3 volumes, but channel is 3: give 0 to 2" in refusal(file, channel=3)
    for channel, one in enumerate(volumes):
        np.testing.assert_array_equal(load_case(file, channel)[0], SimpleITK.GetArrayFromImage(one).T)


@pytest.mark.parametrize("space", ["right-anterior-superior", "left-anterior-superior", "left-posterior-superior"])
def test_the_space_of_a_nrrd_file_is_heeded(tmp_path, space):
    file = changed(saved(volume(), tmp_path / "a.nrrd"), b"left-posterior-superior", space.encode())
    given = SimpleITK.ReadImage(str(file)).TransformIndexToPhysicalPoint((3, 5, 6))
    np.testing.assert_allclose(
        (load_case(file).affine.numpy() @ [3, 5, 6, 1])[:3], np.array(given) * [-1, -1, 1], atol=1e-5
    )


def test_a_mask_may_have_another_format_than_its_image(tmp_path):
    mask = volume(dtype=np.uint8) > 50
    case = {"image": saved(volume(), tmp_path / "a.nii.gz"), "mask": saved(mask, tmp_path / "m.nrrd")}
    loaded = LoadCased(("image", "mask"))(case)
    np.testing.assert_array_equal(loaded["mask"] > 0, loaded["image"] > 50)


def test_folders_of_them_are_data_sets(tmp_path):
    for name in ("train/good/a.nrrd", "train/good/b.mhd", "test/good/c.mha", "test/Ungood/img/d.nrrd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        saved(volume(), tmp_path / name)
    (tmp_path / "test/Ungood/label").mkdir()
    saved(volume(dtype=np.uint8) > 50, tmp_path / "test/Ungood/label/d.mhd")
    splits = find_splits(tmp_path)
    assert [len(splits[split]) for split in ("training", "validation", "test")] == [1, 1, 2]
    assert splits["test"][1]["mask"].endswith("d.mhd")
    assert len(find_images(tmp_path)) == 4


def test_data_beside_a_header_count_for_cache_and_changes(tmp_path):
    file = saved(volume(), tmp_path / "a.mhd", packed=False)
    cases = [{"image": str(file), "name": "a"}]
    add_keys(cases)
    before = cases[0]["key"]
    (tmp_path / "a.raw").write_bytes(
        saved(volume(seed=1), tmp_path / "b.mhd", packed=False).with_suffix(".raw").read_bytes()
    )
    os.utime(tmp_path / "a.raw", (1, 1))
    with pytest.raises(BundleError, match="has changed since it was checked"):
        check_unchanged(cases[0])
    again = [{"image": str(file), "name": "a"}]
    add_keys(again)
    assert again[0]["key"] != before
    note_states(again)
    check_unchanged(again[0])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lost", [1, 700])
def test_a_truncated_file_is_one_line(tmp_path, suffix, packed, lost):
    file = saved(volume(), tmp_path / f"a.{suffix}", packed)
    data = file.with_suffix(".zraw" if packed else ".raw") if suffix == "mhd" else file
    data.write_bytes(data.read_bytes()[:-lost])
    assert re.search("truncated|cannot hold", refusal(file))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nan_and_folded_space_are_refused(tmp_path, suffix):
    image = volume(dtype=np.float32)
    image[3, 3, 3] = float("nan")
    assert "holds NaN" in refusal(saved(image, tmp_path / f"a.{suffix}"))


@pytest.fixture
def secret(tmp_path):
    """A file of somebody else, as large as the voxels."""
    place = tmp_path / "elsewhere" / "secret.raw"
    place.parent.mkdir()
    place.write_bytes(bytes(20 * 18 * 7 * 2))
    (tmp_path / "here").mkdir()
    return place


@pytest.mark.parametrize(
    "named", ["../elsewhere/secret.raw", "{}", "LIST\n{}", "LIST 2\n{}", "%s 1 1 1", "a:b", ".", "a\0b"]
)
def test_a_header_leads_to_no_file_elsewhere(secret, named):
    file = saved(volume(), secret.parent.parent / "here" / "a.mhd", packed=False)
    assert SimpleITK.ReadImage(str(changed(file, b"a.raw", str(secret).encode()))).GetSize() == (
        20,
        18,
        7,
    )  # ITK reads it
    changed(file, str(secret).encode(), named.format(secret).encode())
    assert re.search("must be in one file beside it|no file at|is a folder|damaged or unclear", refusal(file))


def test_a_file_that_is_called_as_what_follows_a_header_is_not_read(secret):
    file = saved(volume(), secret.parent.parent / "here" / "a.mhd", packed=False)
    file.with_suffix(".raw").rename(file.with_name("local"))
    assert "must be in one file beside it" in refusal(changed(file, b"a.raw", b"local"))


def test_a_header_leads_through_no_link(secret):
    file = saved(volume(), secret.parent.parent / "here" / "a.mhd", packed=False)
    file.with_suffix(".raw").unlink()
    file.with_suffix(".raw").symlink_to(secret)
    assert "must be in one file beside it, no link" in refusal(file)


@pytest.mark.parametrize("field", ["data file: {}", "datafile: {}", "Data File: {}", "line skip: 1", "byte skip: -1"])
def test_a_nrrd_header_leads_nowhere_else(secret, field):
    file = saved(volume(), secret.parent.parent / "here" / "a.nrrd", packed=False)
    changed(file, b"endian:", field.format(secret).encode() + b"\nendian:")
    assert "has its voxels elsewhere" in refusal(file)


def test_a_nrrd_header_beside_its_data_is_refused_in_one_line(tmp_path):
    assert "save it as one .nrrd file" in refusal(saved(volume(), tmp_path / "a.nhdr"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"NDims = 3", b"NDims = 1000000000"),
        (b"NDims = 3", b"NDims = 3\nNDims = 3"),
        (b"Offset = -12.5 30 4", b"Offset = -12.5 30"),
        (b"Offset = -12.5 30 4", b"Offset = 0x1 nan inf"),
        (b"Offset = -12.5 30 4", b"Comment = \nOffset = 0 0 0"),
        (b"Offset = -12.5 30 4", b"Comment = " + b"x" * 2000),
        (b"ObjectType = Image", b"ObjectType : Image"),
        (b"DimSize = 20 18 7", b"DimSize = 20 18 7\nElementDataFile = /etc/passwd"),
        (b"DimSize = 20 18 7", b"DimSize = -20 -18 7"),
        (b"DimSize = 20 18 7", b"DimSize = 60000 60000 60000"),
        (b"DimSize = 20 18 7", b"DimSize = 600 600 600"),
        (b"ElementType = MET_SHORT", b"ElementType = MET_SHORT_ARRAY"),
        (b"ElementType = MET_SHORT", b"ElementType = MET_SHORT\nElementNumberOfChannels = 999999"),
        (b"BinaryData = True", b"BinaryData = False"),
        (b"CompressedData = False", b"CompressedData = true"),
        (b"CompressedData = False", b"CompressedData = True\nCompressedDataSize = -5"),
        (b"ElementType = MET_SHORT", b"ElementType = MET_SHORT\nElementNumberOfChannels = -1"),
        (b"CompressedData = False", b"CompressedData = True\nCompressedDataSize = 99999999999"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = local\nElementDataFile = LOCAL"),
        (b"ElementSpacing = ", b"ElementSpacing = 0 0 0\nElementSize = "),
    ],
)
def test_a_meta_image_that_its_reader_may_misread_is_refused(tmp_path, old, new):
    file = changed(saved(volume(), tmp_path / "a.mha", packed=False), old, new)
    assert len(refusal(file).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"dimension: 3", b"dimension: 4"),
        (b"dimension: 3", b"dimension: 17"),
        (b"sizes: 20 18 7", b"sizes: 20 18 -7"),
        (b"sizes: 20 18 7", b"sizes: 20 18 7\nsizes: 20 18 7"),
        (b"sizes: 20 18 7", b"sizes: 600 600 600"),
        (b"type: short", b"type: block\nblock size: 9"),
        (b"encoding: raw", b"encoding: hex"),
        (b"encoding: raw", b"encoding: gzip"),
        (b"endian: little", b"endian little"),
        (b"endian: little", b"endian: little\x00"),
        (b"NRRD0004", b"NRRD0009"),
    ],
)
def test_a_nrrd_file_that_its_reader_may_misread_is_refused(tmp_path, old, new):
    file = changed(saved(volume(), tmp_path / "a.nrrd", packed=False), old, new)
    assert len(refusal(file).splitlines()) == 1


def test_a_bomb_costs_nothing(tmp_path):
    start = saved(volume(), tmp_path / "a.nrrd", packed=False).read_bytes().split(b"\n\n")[0]
    start = start.replace(b"encoding: raw", b"encoding: gzip")
    (tmp_path / "a.nrrd").write_bytes(start + b"\n\n" + gzip.compress(bytes(2**26)))
    assert "has other voxels than its header says" in refusal(tmp_path / "a.nrrd")
    claims = start.replace(b"20 18 7", b"900 900 900") + b"\n\n" + gzip.compress(bytes(100))
    (tmp_path / "a.nrrd").write_bytes(claims)
    assert "claims 1458000000 bytes of pixels" in refusal(tmp_path / "a.nrrd")


def test_keys_and_comments_of_3d_slicer_are_passed_over(tmp_path):
    extra = b"Segment0_ID:=Segment_1\nSegment0_Name:=tumor: left\n# a comment: with a colon\nendian: little"
    file = changed(saved(volume(), tmp_path / "a.nrrd"), b"endian: little", extra)
    assert load_case(file).shape == (1, 20, 18, 7)
    image = volume()
    image.SetMetaData("0008|0060", "CT")
    assert load_case(saved(image, tmp_path / "b.mha")).shape == (1, 20, 18, 7)


def results(folder, name, suffix):
    """Map, mask and heat map by SimpleITK."""
    return [SimpleITK.ReadImage(str(folder / f"{name}_{kind}.{suffix}")) for kind in ("map", "mask", "heatmap")]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_results_in_the_format_of_the_input_are_those_in_nifti(tmp_path, suffix):
    image = volume((32, 24, 3))
    (tmp_path / "in").mkdir()
    saved(image, tmp_path / "in" / f"a.{suffix}")
    saved(volume((32, 24)), tmp_path / "in" / f"flat.{suffix}")
    infer(tmp_path / "in", tmp_path / "out")
    expected = results(tmp_path / "out", "a", "nii.gz")
    infer(tmp_path / "in", tmp_path / "out", output_format="input")
    beside = {f"{name}_{kind}.zraw" for name in ("a", "flat") for kind in ("map", "mask", "heatmap")}
    assert {name for name in left_in(tmp_path / "out") if "map" in name or "mask" in name} == {
        f"{name}_{kind}.{suffix}" for name in ("a", "flat") for kind in ("map", "mask", "heatmap")
    } | (beside if suffix == "mhd" else set())
    for found, same in zip(results(tmp_path / "out", "a", suffix), expected, strict=True):
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(found), SimpleITK.GetArrayFromImage(same))
        assert found.GetPixelID() == same.GetPixelID()
        for of in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(found, of)(), getattr(image, of)(), atol=1e-9)
            np.testing.assert_allclose(getattr(found, of)(), getattr(same, of)(), atol=1e-5)
    assert SimpleITK.GetArrayFromImage(expected[0]).std() > 0
    assert results(tmp_path / "out", "flat", suffix)[0].GetSize() == (32, 24)


@pytest.mark.slow
def test_workers_read_after_their_parent_has(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        saved(volume((32, 24, 3), seed=number), tmp_path / "in" / f"{number}.nrrd")
    infer(tmp_path / "in", tmp_path / "out", num_workers=2)
    assert len([name for name in left_in(tmp_path / "out") if name.endswith("_map.nii.gz")]) == 4


@pytest.mark.slow
def test_other_input_stays_nifti(tmp_path):
    (tmp_path / "in").mkdir()
    saved(volume((32, 24, 3)), tmp_path / "in" / "a.nii.gz")
    infer(tmp_path / "in", tmp_path / "out", output_format="input")
    assert {"a_map.nii.gz", "a_mask.nii.gz", "a_heatmap.nii.gz"} <= left_in(tmp_path / "out")


def test_an_unknown_format_of_results_is_refused(tmp_path, detector):
    with pytest.raises(BundleError, match="output_format 'nrd' is unknown"):
        saver_in(tmp_path, detector, output_format="nrd")
