from __future__ import annotations

import csv
import importlib.util
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage, Orientation
from numpy.random import RandomState
from PIL import Image
from scipy import ndimage

from bundle.errors import BundleError
from bundle.samples import cohort
from bundle.samples.cohort import LESION_KINDS, Slab, Subject, make_sample_cohort, make_slab, synthesize
from scripts.samples import cohort as script

SMALLEST = {"train_subjects": 1, "valid_subjects": 0, "test_subjects": 0, "slices_per_subject": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One healthy training subject, two to validate, and one test subject of each kind and a healthy one."""
    directory = tmp_path_factory.mktemp("cohort") / "small"
    return make_sample_cohort(directory, train_subjects=1, valid_subjects=2, test_subjects=6, slices_per_subject=3)


@pytest.fixture(scope="module")
def tissues() -> torch.Tensor:
    return cohort.load_tissues()


@pytest.fixture(scope="module")
def slab() -> Slab:
    return make_slab(3)


def manifest(directory: Path) -> list[dict[str, str]]:
    with (directory / "manifest.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def png(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def mask_path(image_path: Path) -> Path:
    return image_path.parent.with_name("label") / image_path.name


def displayed(volume_path: Path) -> np.ndarray:
    volume = LoadImage(image_only=True, ensure_channel_first=True)(volume_path)
    return Orientation(axcodes="PLS", labels=None)(volume)[0].numpy()


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_png_is_the_slice_of_the_volume_in_radiological_display(small: Path) -> None:
    for row in manifest(small):
        volume = displayed(small / "volumes" / row["split"] / f"{row['subject']}_flair.nii.gz")
        assert np.array_equal(png(small / row["file"]), np.round(255 * volume[..., int(row["slice"])]))


def test_mask_png_is_the_slice_of_the_lesion_volume(small: Path) -> None:
    for row in (row for row in manifest(small) if row["split"] != "train"):
        lesion = displayed(small / "volumes" / row["split"] / f"{row['subject']}_lesion.nii.gz")
        assert np.array_equal(png(mask_path(small / row["file"])), 255 * lesion[..., int(row["slice"])])


def test_volume_tells_its_orientation_spacing_and_that_it_is_synthetic(small: Path) -> None:
    image = nib.nifti1.Nifti1Image.from_filename(small / "volumes/train/sub-0001_flair.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (1, 1, 6)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["descrip"].item().decode() == "SYNTHETIC dinov3_spatial_ar"


def test_volume_lies_where_the_template_does(small: Path) -> None:
    image = nib.nifti1.Nifti1Image.from_filename(small / "volumes/train/sub-0001_flair.nii.gz")
    middle = ndimage.center_of_mass(image.get_fdata() > 0)
    assert np.allclose(nib.affines.apply_affine(image.affine, middle), [0, -18, 28], atol=8)


def test_slices_of_few_and_of_many_stay_in_the_slab() -> None:
    for slices, low, high in ((1, 28, 28), (12, -5, 61), (40, -5, 61)):
        heights = make_slab(slices).points[2, 0, 0]
        assert (heights[0].item(), heights[-1].item()) == pytest.approx((low, high))


def test_good_slices_have_no_lesion_and_others_at_least_30_pixels(small: Path) -> None:
    for row in (row for row in manifest(small) if row["split"] != "train"):
        pixels = np.count_nonzero(png(mask_path(small / row["file"])))
        assert pixels == int(row["lesion_pixels"])
        assert pixels == 0 if row["label"] == "good" else pixels >= 30


@pytest.mark.parametrize(("pixels", "label"), [(0, "good"), (1, None), (29, None), (30, "Ungood")])
def test_slice_with_few_lesion_pixels_is_left_out(tmp_path: Path, pixels: int, label: str | None) -> None:
    for folder in cohort.FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
    lesion = (np.arange(64) < pixels).reshape(8, 8, 1)
    rows = cohort.write_slices(tmp_path, "test", "sub-0001", "bright", Subject(np.zeros_like(lesion, float), lesion))
    assert [row[4] for row in rows] == ([label] if label else [])
    assert len(list(tmp_path.rglob("*.png"))) == 2 * len(rows)


def test_manifest_names_every_image(small: Path) -> None:
    images = {path for path in (small / "slices").rglob("*.png") if path.parent.name != "label"}
    assert {small / row["file"] for row in manifest(small)} == images


def test_test_subjects_show_every_kind_and_health(small: Path) -> None:
    kinds = {row["lesion_kind"] for row in manifest(small) if row["split"] == "test"}
    assert kinds == {*LESION_KINDS, "none"}


def test_training_subjects_are_healthy(small: Path) -> None:
    assert {row["lesion_kind"] for row in manifest(small) if row["split"] == "train"} == {"none"}
    assert not list((small / "volumes/train").glob("*_lesion.nii.gz"))


def test_same_parameters_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (make_sample_cohort(tmp_path / name, **SMALLEST) for name in ("first", "second"))
    assert files(first) == files(second)


def test_other_seed_gives_other_images(tmp_path: Path) -> None:
    first, second = (make_sample_cohort(tmp_path / str(seed), seed=seed, **SMALLEST) for seed in (0, 1))
    name = "slices/train/good/sub-0001_slice-00.png"
    assert files(first)[name] != files(second)[name]


def test_subject_does_not_depend_on_the_others(tmp_path: Path) -> None:
    alone = make_sample_cohort(tmp_path / "alone", **SMALLEST)
    among = make_sample_cohort(tmp_path / "among", **{**SMALLEST, "train_subjects": 2, "test_subjects": 1})
    name = "volumes/train/sub-0001_flair.nii.gz"
    assert files(alone)[name] == files(among)[name]


def test_complete_cohort_is_left_alone(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "write_cohort", lambda *_: pytest.fail("written again"))
    again = make_sample_cohort(small, train_subjects=1, valid_subjects=2, test_subjects=6, slices_per_subject=3)
    assert again == small


def test_other_parameters_replace_the_cohort(tmp_path: Path) -> None:
    make_sample_cohort(tmp_path / "cohort", **SMALLEST)
    make_sample_cohort(tmp_path / "cohort", **{**SMALLEST, "slices_per_subject": 2})
    assert len(manifest(tmp_path / "cohort")) == 2


def test_lost_file_is_written_again(tmp_path: Path) -> None:
    volume = make_sample_cohort(tmp_path / "cohort", **SMALLEST) / "volumes/train/sub-0001_flair.nii.gz"
    volume.unlink()
    make_sample_cohort(tmp_path / "cohort", **SMALLEST)
    assert volume.is_file()


def test_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cohort, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_sample_cohort(tmp_path / "cohort", **SMALLEST)
    assert not list(tmp_path.iterdir())


def test_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match=r"thesis\.txt.* new or empty directory"):
        make_sample_cohort(tmp_path, **SMALLEST)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_cohort_with_a_foreign_file_is_not_replaced(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path / "cohort")
    (tmp_path / "cohort/slices/notes.txt").touch()
    with pytest.raises(BundleError, match=r"notes\.txt"):
        make_sample_cohort(tmp_path / "cohort", **SMALLEST)


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cohort").touch()
    with pytest.raises(BundleError, match="is a file"):
        make_sample_cohort(tmp_path / "cohort", **SMALLEST)


@pytest.mark.parametrize("wrong", [{"slices_per_subject": 0}, {"train_subjects": -1}, {"seed": -1}, {"seed": 0.5}])
def test_number_out_of_range_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(BundleError, match=next(iter(wrong))):
        make_sample_cohort(tmp_path / "cohort", **{**SMALLEST, **wrong})


def test_missing_nilearn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BundleError, match="extra 'sample'"):
        cohort.load_tissues()


def test_tissues_fill_the_brain_with_its_ventricles(tissues: torch.Tensor) -> None:
    at_ventricles = tissues[:, :, :, 90].sum(0).numpy() > 0.5
    assert np.array_equal(at_ventricles, ndimage.binary_fill_holes(at_ventricles))


def test_deformation_is_about_3_mm(slab: Slab) -> None:
    noise = cohort.smooth_noise(RandomState(0), slab, cohort.DEFORMATION_SIGMA_MM, channels=3)
    length = cohort.DEFORMATION_MM / 3**0.5 * noise.norm(dim=0)
    assert length.square().mean().sqrt().item() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("kind", [kind for kind, look in LESION_KINDS.items() if not look.pushes])
def test_lesion_changes_only_what_it_covers(tissues: torch.Tensor, slab: Slab, kind: str) -> None:
    healthy, diseased = synthesize(tissues, slab, 0, 1), synthesize(tissues, slab, 0, 1, kind)
    change = np.abs(diseased.image - healthy.image)
    around = ndimage.distance_transform_edt(~diseased.lesion, sampling=slab.spacing) > LESION_KINDS[kind].radius[1]
    assert change[diseased.lesion].mean() > 0.05
    assert not change[around].any()


def test_mass_pushes_tissue_outside_its_mask(tissues: torch.Tensor, slab: Slab) -> None:
    healthy, diseased = synthesize(tissues, slab, 0, 1), synthesize(tissues, slab, 0, 1, "mass_effect")
    change = np.abs(diseased.image - healthy.image) > 0.1
    assert change[~diseased.lesion].sum() > diseased.lesion.sum()


def test_mass_leaves_the_surface_of_the_brain_in_place(tissues: torch.Tensor, slab: Slab) -> None:
    healthy, diseased = synthesize(tissues, slab, 0, 1), synthesize(tissues, slab, 0, 1, "mass_effect")
    assert np.mean((healthy.image > 0) != (diseased.image > 0)) < 1e-3


@pytest.mark.parametrize("kind", [kind for kind, look in LESION_KINDS.items() if look.core is None])
def test_mask_is_where_the_lesion_has_half_of_its_effect(kind: str) -> None:
    level = torch.linspace(0, 2, 101).reshape(-1, 1, 1)
    gray_matter = torch.cat([torch.ones(1, 101, 1, 1), torch.zeros(2, 101, 1, 1)])
    painted, mask = cohort.paint_lesion(RandomState(0), LESION_KINDS[kind], torch.zeros_like(level), level, gray_matter)
    assert torch.equal(mask, painted >= painted.max() / 2)


def test_ring_has_a_bright_rim_and_a_dark_core() -> None:
    level = torch.tensor([0.0, 0.85]).reshape(-1, 1, 1)
    gray_matter = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 2, 1, 1)
    tissue = torch.full_like(level, 0.6)
    painted, _ = cohort.paint_lesion(RandomState(0), LESION_KINDS["ring"], tissue, level, gray_matter)
    assert painted[0] < 0.4 < 0.7 < painted[1]


def test_script_tells_where_everything_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train", "1", "--valid", "0", "--test", "0", "--slices", "1"]
    monkeypatch.setattr(sys, "argv", ["make_sample_cohort", "--out", str(tmp_path / "cohort"), *options])
    script.main()
    places = [Path(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "slices" not in line]
    assert len(places) == 3
    assert all(place.exists() for place in places)


def test_script_says_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").touch()
    monkeypatch.setattr(sys, "argv", ["make_sample_cohort", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*thesis\.txt"):
        script.main()
