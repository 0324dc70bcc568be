"""Reading, intensities, orientation and slices: geometry and units survive, bad input is named."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Invertd
from PIL import Image
from pydicom.data import get_testdata_file
from safetensors.torch import load_file

from bundle.dicom.words import VOCABULARY
from bundle.errors import BundleError
from bundle.transforms import (
    HOUNSFIELD_WINDOWS,
    ExtractSlicesd,
    LoadCased,
    OrientSlicesd,
    ReadMaskd,
    ScaleForegroundPercentiles,
    ScaleHounsfieldWindow,
    ScaleIntensityByModalityd,
    ToEvaluationGridd,
)

GOLDEN = Path(__file__).parent / "data" / "golden"

AFFINES = {
    "RAS": np.diag([1.0, 2.0, 3.0, 1.0]),
    "LPS": np.diag([-1.0, -2.0, 3.0, 1.0]),
    "left-handed": np.diag([-1.0, 2.0, 3.0, 1.0]),
    "permuted": np.array([[0, 0, 3.0, 5], [1.5, 0, 0, -7], [0, 2.0, 0, 11], [0, 0, 0, 1]]),
    "oblique": np.array([[0.9, -0.3, 0.1, 4], [0.3, 0.9, -0.2, 5], [-0.03, 0.2, 2.0, 6], [0, 0, 0, 1]]),
}


def save_volume(path, affine=None, shape=(20, 24, 18), seed=0):
    values = np.random.default_rng(seed).random(shape, dtype=np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return values


def world(affine, index):
    return (
        torch.as_tensor(np.asarray(affine), dtype=torch.float64) @ torch.tensor([*map(float, index), 1.0]).double()
    )[:3]


def test_a_picture_keeps_its_rows_and_columns(tmp_path):
    pixels = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    case = Compose([LoadCased("image"), OrientSlicesd("image")])({"image": tmp_path / "a.png"})
    np.testing.assert_array_equal(case["image"].numpy()[0, ..., 0], pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_reads_every_picture_format(tmp_path, suffix, mode, channels):
    Image.new(mode, (30, 20), 200 if mode == "L" else (200, 200, 200)).save(tmp_path / f"a.{suffix}")
    image = LoadCased("image")({"image": tmp_path / f"a.{suffix}"})["image"]
    assert image.shape == (channels, 30, 20, 1)
    assert abs(float(image.mean()) - 200) < 2


def test_alpha_and_palettes_become_rgb(tmp_path):
    Image.new("RGBA", (20, 20), (10, 20, 30, 255)).save(tmp_path / "a.png")
    Image.new("P", (20, 20)).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert LoadCased("image")({"image": tmp_path / name})["image"].shape[0] == 3


@pytest.mark.parametrize("bits", [8, 16])
def test_auto_intensity_divides_8_bit_by_255_and_clips_others_at_percentiles(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 400).astype(np.uint8 if bits == 8 else np.uint16).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = Compose([LoadCased("image"), ScaleIntensityByModalityd("image")])({"image": tmp_path / "a.png"})["image"]
    assert (float(image.min()), float(image.max())) == (0, 1)
    if bits == 8:
        np.testing.assert_allclose(image.numpy()[0, ..., 0].T, values / 255, atol=1e-6)
    else:
        assert (image.numpy() == 1).mean() > 0.004  # clipped at 99.5 %


def test_reads_a_dicom_slice_with_its_spacing_and_ct_units():
    case = {"image": get_testdata_file("CT_small.dcm")}
    image = Compose([LoadCased("image"), OrientSlicesd("image")])(case)["image"]
    assert image.meta["modality"] == "CT"
    assert image.shape == (1, 128, 128, 1)
    assert image.min() < -500  # Hounsfield units: rescaled
    np.testing.assert_allclose(image.affine[:3, :3].norm(dim=0), [0.661468, 0.661468, 5.0], atol=1e-5)


def test_auto_intensity_windows_ct():
    case = {"image": get_testdata_file("CT_small.dcm")}
    raw = LoadCased("image")(case)["image"]
    scaled = Compose([LoadCased("image"), ScaleIntensityByModalityd("image")])(case)["image"]
    low, high = HOUNSFIELD_WINDOWS["ct_soft_tissue"]
    np.testing.assert_allclose(scaled.numpy(), ((raw.numpy() - low) / (high - low)).clip(0, 1), atol=1e-6)


def test_nothing_of_the_patient_is_kept_from_a_dicom_header():
    meta = LoadCased("image")({"image": get_testdata_file("CT_small.dcm")})["image"].meta
    known = {"filename_or_obj", "modality", "slice_axis", "axes", "oriented", "files", "instances", "words"}
    assert set(map(str, meta)) <= known | {"affine", "space"}
    assert all(set(words) <= set(VOCABULARY[kind]) for kind, words in meta["words"].items())


@pytest.mark.parametrize("name", AFFINES)
def test_orientation_moves_no_voxel_in_space(tmp_path, name):
    save_volume(tmp_path / "v.nii.gz", AFFINES[name])
    loaded = LoadCased("image")({"image": tmp_path / "v.nii.gz"})["image"]
    oriented = OrientSlicesd("image")({"image": loaded})["image"]
    peak = torch.nonzero(oriented.as_tensor() == oriented.max())[0, 1:]
    source = torch.nonzero(loaded.as_tensor() == loaded.max())[0, 1:]
    torch.testing.assert_close(world(oriented.affine, peak), world(AFFINES[name], source))


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", AFFINES)
def test_orientation_is_inverted_exactly(tmp_path, name, plane):
    values = save_volume(tmp_path / "v.nii.gz", AFFINES[name])
    preprocessing = Compose([LoadCased("image"), OrientSlicesd("image", plane)])
    case = preprocessing({"image": tmp_path / "v.nii.gz"})
    case["map"] = case["image"].clone()
    restored = Invertd("map", preprocessing, orig_keys="image")(case)["map"]
    np.testing.assert_array_equal(restored.numpy()[0], values)
    np.testing.assert_allclose(restored.affine, AFFINES[name], atol=1e-6)


def test_the_same_anatomy_looks_the_same_from_ras_and_lps_files(tmp_path):
    values = save_volume(tmp_path / "ras.nii.gz", np.diag([1.0, 1, 1, 1]))
    nib.save(nib.Nifti1Image(values[::-1, ::-1], np.diag([-1.0, -1, 1, 1])), tmp_path / "lps.nii.gz")
    read = Compose([LoadCased("image"), OrientSlicesd("image")])
    ras, lps = (read({"image": tmp_path / f"{name}.nii.gz"})["image"] for name in ("ras", "lps"))
    np.testing.assert_array_equal(ras.numpy(), lps.numpy())


def test_axial_slices_show_anterior_on_top_and_the_patients_right_on_the_left(tmp_path):
    values = np.zeros((20, 24, 18), np.float32)
    values[15, 20, 9] = 1  # RAS: right of the middle, anterior
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii.gz")
    image = Compose([LoadCased("image"), OrientSlicesd("image")])({"image": tmp_path / "v.nii.gz"})["image"]
    row, column, index = torch.nonzero(image[0] == 1)[0].tolist()
    assert (row < 12, column < 10, index) == (True, True, 9)


def test_a_slice_alone_looks_as_it_does_in_its_volume(tmp_path):
    values = save_volume(tmp_path / "v.nii.gz", np.eye(4))
    nib.save(nib.Nifti1Image(values[..., 7:8], np.eye(4)), tmp_path / "s.nii.gz")
    read = Compose([LoadCased("image"), OrientSlicesd("image")])
    volume, alone = (read({"image": tmp_path / f"{name}.nii.gz"})["image"] for name in "vs")
    np.testing.assert_array_equal(alone.numpy()[..., 0], volume.numpy()[..., 7])


def test_a_mask_at_another_place_is_refused(tmp_path):
    save_volume(tmp_path / "v.nii.gz", AFFINES["RAS"])
    save_volume(tmp_path / "m.nii.gz", np.eye(4))
    with pytest.raises(BundleError, match="lie at different places"):
        LoadCased(["image", "mask"])({"image": tmp_path / "v.nii.gz", "mask": tmp_path / "m.nii.gz"})


def test_any_color_of_a_mask_counts():
    mask = torch.zeros(3, 2, 2)
    mask[1, 0, 0] = 255
    assert ReadMaskd()({"image": torch.zeros(1, 2, 2), "mask": mask, "name": "a"})["mask"].sum() == 1


@pytest.mark.parametrize("name", AFFINES)
def test_each_slice_keeps_index_affine_and_spacing(tmp_path, name):
    save_volume(tmp_path / "v.nii.gz", AFFINES[name])
    case = Compose([LoadCased("image"), OrientSlicesd("image")])({"image": tmp_path / "v.nii.gz"})
    stack = case["image"]
    slices = ExtractSlicesd("image")(case)
    assert len(slices) == stack.shape[-1]
    for index in (0, 7):
        image = slices[index]["image"]
        assert image.meta["slice_index"] == index
        np.testing.assert_array_equal(image.numpy(), stack[..., index].numpy())
        torch.testing.assert_close(world(image.affine, (3, 4, 0)), world(stack.affine, (3, 4, index)))
        np.testing.assert_allclose(sorted(image.meta["spacing"]), sorted(np.linalg.norm(AFFINES[name][:3, :3], axis=0)))


def test_slices_are_filtered_by_range_and_foreground(tmp_path):
    values = np.ones((20, 20, 18), np.float32)
    values[..., :5] = 0
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii.gz")
    case = Compose([LoadCased("image"), OrientSlicesd("image")])({"image": tmp_path / "v.nii.gz", "name": "v"})
    indices = [s["image"].meta["slice_index"] for s in ExtractSlicesd("image", [0, 0.5], 0.5)(case)]
    assert indices == [5, 6, 7, 8]


def test_a_volume_without_foreground_is_named(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 18), np.float32), np.eye(4)), tmp_path / "v.nii.gz")
    with pytest.raises(BundleError, match=r"'v' has no slice with a foreground share"):
        ExtractSlicesd("image")({**LoadCased("image")({"image": tmp_path / "v.nii.gz"}), "name": "v"})


def test_mr_percentiles_ignore_the_background():
    image = torch.zeros(1, 100, 100)
    image[0, :10] = torch.linspace(100, 200, 1000).view(10, 100)
    scaled = ScaleForegroundPercentiles(lower=10, upper=90)(image)
    assert scaled[0, 10:].abs().max() == 0
    assert abs(float(scaled[0, :10].median()) - 0.5) < 0.01


def test_mr_keeps_negative_values_of_the_foreground_above_the_background():
    image = torch.tensor([[[0.0, -10.0, 0.0, 30.0]]])
    assert ScaleForegroundPercentiles(lower=0, upper=100)(image)[0, 0, 3] == 1


def test_an_empty_image_scales_to_zeros():
    assert torch.equal(ScaleForegroundPercentiles()(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_a_constant_foreground_scales_to_ones():
    assert torch.equal(ScaleForegroundPercentiles()(torch.full((1, 4, 4), 7.0)), torch.ones(1, 4, 4))


@pytest.mark.parametrize("window", HOUNSFIELD_WINDOWS)
def test_ct_windows_map_their_ends_to_0_and_1(window):
    low, high = HOUNSFIELD_WINDOWS[window]
    scaled = ScaleHounsfieldWindow(window)(torch.tensor([[low - 1, low, (low + high) / 2, high, high + 1]]))
    torch.testing.assert_close(scaled, torch.tensor([[0, 0, 0.5, 1, 1]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleIntensityByModalityd("image", "ct_long"), "did you mean 'ct_lung'"),
        (lambda: ScaleHounsfieldWindow("ct_bome"), "did you mean 'ct_bone'"),
        (lambda: OrientSlicesd("image", "axail"), "did you mean 'axial'"),
        (lambda: ScaleForegroundPercentiles(90, 10), "lower < upper"),
        (lambda: ExtractSlicesd("image", [2, 1]), r"slice_range is \[2, 1\]"),
        (lambda: ExtractSlicesd("image", 0.5), r"slice_range is 0.5: give"),
        (lambda: ExtractSlicesd("image", [0.5]), r"slice_range is \[0.5\]"),
        (lambda: ExtractSlicesd("image", min_foreground=-1), "min_foreground"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(BundleError, match=message):
        make()


def bad_files(folder):
    """Files that no one should train on, and what must be said of each."""
    (folder / "truncated.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:200])
    Image.new("L", (1, 1)).save(folder / "pixel.png")
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 4, 3), np.float32), np.eye(4)), folder / "rank4.nii.gz")
    nib.save(nib.Nifti1Image(np.full((20, 20, 4), np.nan, np.float32), np.eye(4)), folder / "nan.nii.gz")
    (folder / "text.dcm").write_text("not an image")
    return {
        "truncated.png": "cannot read .*truncated.png",
        "pixel.png": r"pixel\.png' has slices of 1x1 pixels: at least 16x16",
        "rank4.nii.gz": "has 4 axes of 20x20x4x3",
        "nan.nii.gz": "holds NaN",
        "text.dcm": "text.dcm' is no DICOM file",
        "missing.png": "no file at .*missing.png",
    }


@pytest.mark.parametrize(
    "name", ["truncated.png", "pixel.png", "rank4.nii.gz", "nan.nii.gz", "text.dcm", "missing.png"]
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name):
    message = bad_files(tmp_path)[name]
    with pytest.raises(BundleError, match=message) as caught:
        LoadCased("image")({"image": tmp_path / name})
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_is_named(tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    Image.new("L", (20, 30)).save(tmp_path / "m.png")
    with pytest.raises(BundleError, match=r"a\.png' 20x20x1, '.*m\.png' 20x30x1"):
        LoadCased(["image", "mask"])({"image": tmp_path / "a.png", "mask": tmp_path / "m.png"})


def test_mask_values_count_by_the_rule():
    mask = torch.tensor([[[0.0, 58.0, 255.0]]])
    case = {"image": torch.zeros(1, 1, 3), "mask": mask, "label": 1, "name": "a"}
    assert ReadMaskd(">0")(case)["mask"].tolist() == [[[0, 1, 1]]]
    assert ReadMaskd("==255")(case)["mask"].tolist() == [[[0, 0, 1]]]


@pytest.mark.parametrize("rule", ["=255", ">", "255", "", "any"])
def test_a_misspelled_mask_rule_is_refused_with_examples(rule):
    with pytest.raises(BundleError, match="try '>0' or '==255'"):
        ReadMaskd(rule)


def test_a_healthy_image_without_mask_has_an_empty_one_and_an_anomalous_one_has_none():
    image = torch.ones(1, 2, 3)
    assert ReadMaskd()({"image": image, "label": 0, "name": "a"})["mask"].sum() == 0
    assert "mask" not in ReadMaskd()({"image": image, "label": 1, "name": "a"})


@pytest.mark.parametrize("rule", [">0", "==255"])
@pytest.mark.parametrize("name", ["brain", "liver", "retina"])
def test_masks_at_240_by_448_pixels_equal_the_authors(tmp_path, name, rule):
    golden = np.load(GOLDEN / "paper240_masks.npz", allow_pickle=False)
    Image.fromarray(golden[name]).save(tmp_path / "mask.png")
    read = Compose([LoadCased("mask"), OrientSlicesd("mask"), ReadMaskd(rule), ToEvaluationGridd(240, 448)])
    case = read({"mask": tmp_path / "mask.png", "pred_patch_map": torch.rand(1, 28, 28, 1)})
    expected = golden[f"{name}_240"] > 0 if rule == ">0" else golden[f"{name}_240"] == 255
    np.testing.assert_array_equal(case["metric_mask"].numpy()[0, ..., 0], expected)


def test_maps_at_240_pixels_equal_the_authors():
    golden = load_file(GOLDEN / "paper_causal_dil4.safetensors")
    patch_maps = golden["patch_map"].movedim(0, -1)[None]  # of two images, as slices
    metric_map = ToEvaluationGridd(240, 448)({"pred_patch_map": patch_maps})["metric_map"]
    torch.testing.assert_close(metric_map[0].movedim(-1, 0), golden["image_map_240"][:, 0], atol=1e-6, rtol=0)


def test_every_slice_of_a_volume_is_brought_to_the_evaluation_size_alone():
    mask, patch_map = (torch.rand(1, 30, 50, 3) > 0.5).float(), torch.rand(1, 4, 6, 3)
    to_grid = ToEvaluationGridd(20, 40)
    whole = to_grid({"mask": mask, "pred_patch_map": patch_map})
    for index in range(3):
        alone = to_grid({"mask": mask[..., [index]], "pred_patch_map": patch_map[..., [index]]})
        for key in ("metric_mask", "metric_map"):
            torch.testing.assert_close(whole[key][..., [index]], alone[key], rtol=0, atol=0)


def test_without_a_detour_a_mask_takes_the_pixel_whose_center_is_nearest():
    mask = torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(3).expand(1, 9, 9)[..., None]
    found = ToEvaluationGridd(3)({"mask": mask, "pred_patch_map": torch.rand(1, 2, 2, 1)})["metric_mask"]
    assert found[0, ..., 0].tolist() == [[0, 1, 0]] * 3


def test_without_an_evaluation_size_map_and_mask_are_compared_as_they_are():
    case = {
        "pred_map": torch.rand(1, 5, 7, 2),
        "pred_patch_map": torch.rand(1, 2, 2, 2),
        "mask": torch.ones(1, 5, 7, 2),
    }
    found = ToEvaluationGridd(None, 448)(case)
    assert found["metric_map"] is case["pred_map"] and found["metric_mask"] is case["mask"]


@pytest.mark.parametrize("size", [None, 20])
def test_without_a_mask_there_is_none_on_the_evaluation_grid(size):
    case = {"pred_map": torch.rand(1, 5, 7, 1), "pred_patch_map": torch.rand(1, 2, 2, 1)}
    assert "metric_mask" not in ToEvaluationGridd(size)(case)


@pytest.mark.parametrize("side", [0, -1, 240.0, "240", True, [240, 240]])
def test_an_evaluation_size_that_is_no_number_of_pixels_is_refused(side):
    with pytest.raises(BundleError, match="evaluation_size is .*: give a whole number of pixels"):
        ToEvaluationGridd(side)
    with pytest.raises(BundleError, match="mask_via is .*: give a whole number of pixels"):
        ToEvaluationGridd(240, side)


ANGLES = [(np.pi / 4, 0, 0), (0, np.pi / 4, 0), (0, 0, np.pi / 4), (np.pi / 4, np.pi / 4, 0), (0.3, -1.2, 2.0)]


@pytest.mark.parametrize("plane", ["acquired", "axial", "coronal", "sagittal"])
@pytest.mark.parametrize("angles", ANGLES)
def test_orientation_is_undone_exactly_at_every_angle(tmp_path, plane, angles):
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles) @ np.diag([1.0, 1.5, 4.0]), [1, 2, 3])
    values = save_volume(tmp_path / "v.nii.gz", affine)
    orient = OrientSlicesd("image", plane)
    back = orient.inverse(orient(LoadCased("image")({"image": tmp_path / "v.nii.gz"})))["image"]
    np.testing.assert_array_equal(back.numpy()[0], values)
    np.testing.assert_allclose(back.affine.numpy(), affine, atol=1e-5)


def test_the_affine_of_the_file_counts_whatever_its_voxel_sizes_say(tmp_path):
    affine = np.array([[0, 0, 1.0, -9], [2.0, 0, 0, -8], [0, 3.0, 0, -7], [0, 0, 0, 1]])
    save_volume(tmp_path / "v.nii", affine)
    image = nib.load(tmp_path / "v.nii")
    image.header["pixdim"][1:4] = 1
    image.header["qform_code"] = 0
    nib.Nifti1Image(image.get_fdata(), None, image.header).to_filename(tmp_path / "odd.nii")
    loaded = LoadCased("image")({"image": tmp_path / "odd.nii"})["image"]
    np.testing.assert_allclose(loaded.affine.numpy(), nib.load(tmp_path / "odd.nii").affine)


def test_an_affine_that_is_none_is_refused(tmp_path):
    save_volume(tmp_path / "v.nii")
    image = nib.load(tmp_path / "v.nii")
    image.header["srow_x"] = [0, 0, 0, 0]
    nib.Nifti1Image(image.get_fdata(), None, image.header).to_filename(tmp_path / "flat.nii")
    with pytest.raises(BundleError, match="affine that is not finite or not invertible"):
        LoadCased("image")({"image": tmp_path / "flat.nii"})


def test_a_mask_may_be_stored_with_other_axes_than_its_image(tmp_path):
    values = save_volume(tmp_path / "v.nii.gz", AFFINES["oblique"])
    mask = nib.Nifti1Image((values > 0.9).astype(np.uint8), AFFINES["oblique"])
    turn = nib.orientations.axcodes2ornt("LIP")
    nib.save(mask.as_reoriented(turn), tmp_path / "m.nii.gz")
    case = LoadCased(["image", "mask"])({"image": tmp_path / "v.nii.gz", "mask": tmp_path / "m.nii.gz"})
    np.testing.assert_array_equal(case["mask"].numpy()[0], values > 0.9)


def test_a_mask_with_other_axes_is_cut_along_the_slices_of_its_image(tmp_path):
    values = save_volume(tmp_path / "m.nii.gz", np.diag([1.0, 1.0, 4.0, 1.0]))
    image = nib.load(tmp_path / "m.nii.gz")
    nib.save(image.as_reoriented(nib.orientations.axcodes2ornt("ASR")), tmp_path / "v.nii.gz")
    case = LoadCased(["image", "mask"])({"image": tmp_path / "v.nii.gz", "mask": tmp_path / "m.nii.gz"})
    assert case["image"].meta["slice_axis"] != 2
    oriented = OrientSlicesd(["image", "mask"])(case)
    np.testing.assert_array_equal(oriented["mask"].numpy(), oriented["image"].numpy())
    assert oriented["mask"].shape[-1] == values.shape[2]


def test_a_volume_without_orientation_is_named(tmp_path, caplog):
    save_volume(tmp_path / "v.nii")
    image = nib.load(tmp_path / "v.nii")
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.Nifti1Image(image.get_fdata(), None, image.header).to_filename(tmp_path / "lost.nii")
    LoadCased("image")({"image": tmp_path / "lost.nii"})
    assert "lost.nii' tells no orientation" in caplog.text
    caplog.clear()
    LoadCased("image")({"image": tmp_path / "v.nii"})
    assert not caplog.text
