"""Pictures: shape and scale by the spacing, letters by the affine, colors in the body alone, the threshold on a bar."""

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from monai.data import MetaTensor
from PIL import ImageDraw

from bundle.figures import (
    BAR,
    BAR_ROOM,
    COLORMAP,
    GAP,
    LONG,
    OPPOSITE,
    Example,
    Placement,
    blend,
    blend_slices,
    body,
    gallery,
    marks,
    overlay,
    placement,
    scale_length,
)
from bundle.networks.foreground import AUTO, Foreground
from bundle.planes import PLANES
from bundle.results import OUTLINE, heat
from bundle.transforms import LoadCased, OrientSlicesd

THRESHOLD = 2.5
OUTSIDE = -6.0
COLORS = colormaps[COLORMAP](np.linspace(0, 1, 256))[:, :3]
# severity 1.0 of Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009), on linear RGB
SIGHTS = {
    "all cones": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}


def cie_lab(rgb, sight="all cones"):
    """sRGB in [0, 1], [..., 3], as it is seen, in CIELab with the white D65."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ SIGHTS[sight].T
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratios = np.clip(linear, 0, 1) @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.moveaxis(np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def placed(affine, shape=(20, 30, 4), **meta):
    return MetaTensor(torch.zeros(1, *shape), torch.as_tensor(affine), {"slice_axis": 2, "oriented": True, **meta})


def disc(side=64, radius=24):
    """A gray disc with a black hole in black air."""
    rows, columns = np.mgrid[:side, :side] - side // 2
    distance = np.hypot(rows, columns)
    return np.where((distance < radius) & (distance > radius / 3), 0.5, 0.0), distance < radius


def plain_overlay(image, place, value=OUTSIDE):
    return np.asarray(overlay(image, np.full(image.shape[:2], value), THRESHOLD, AUTO, place, "caption"))


def panel_of(picture):
    """Height and width of the left one of two pictures that are white."""
    white = (picture == 255).all(-1)
    return int(white[:, 0].sum()), int(np.argmin(white[60]))


@pytest.fixture
def written(monkeypatch):
    """The texts of all pictures with their places."""
    texts = []
    draw = ImageDraw.ImageDraw.text

    def write(self, xy, text, *args, **kwargs):
        texts.append((text, xy))
        return draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    return texts


# shape and scale


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((20, 60), (3.0, 1.0)), ((300, 100), (0.5, 2.0)), ((96, 96), (0.9, 0.9)), ((24, 512), (10.0, 1.0))],
)
def test_pictures_have_the_proportions_of_the_patient(shape, spacing):
    affine = np.diag([-spacing[0], -spacing[1], 5.0, 1.0])
    place = placement(placed(affine, (*shape, 3)))
    assert place.spacing == pytest.approx(spacing)
    height, width = panel_of(plain_overlay(np.ones(shape), Placement(place.spacing, "")))
    assert height / width == pytest.approx(shape[0] * spacing[0] / (shape[1] * spacing[1]), rel=0.01)
    assert height >= 256


def test_pixels_are_squares_where_no_spacing_is_known():
    assert panel_of(plain_overlay(np.ones((64, 128)), None)) == (256, 512)


@pytest.mark.parametrize("spacing", [(1e5, 1.0), (1.0, 1e5)])
def test_no_spacing_makes_a_picture_huge(spacing):
    assert max(plain_overlay(np.ones((32, 32)), Placement(spacing, "RLAP")).shape) < 3 * LONG


@pytest.mark.parametrize("side", [1e-9, 1e9])
def test_pixels_that_are_no_part_of_a_patient_have_no_place(side):
    assert placement(placed(np.diag([side, 1.0, 1.0, 1.0]))) is None


@pytest.mark.parametrize(("width", "length"), [(240, 50), (100, 20), (61, 20), (59, 10), (3, 1), (0.5, 0.1)])
def test_the_scale_bar_has_a_round_length(width, length):
    assert scale_length(width) == pytest.approx(length)


@pytest.mark.parametrize(("columns", "spacing"), [(200, (0.8, 0.8)), (60, (0.7, 3.1)), (512, (5.0, 0.47))])
def test_the_scale_bar_is_as_long_as_it_says(columns, spacing, written):
    shape = (80, columns)
    picture = plain_overlay(np.zeros(shape), Placement(spacing, ""))
    [words, (left, top)] = next(one for one in written if one[0].endswith(" mm"))
    bar = (picture[top + 5] == 255).all(-1)
    pixels = int(np.argmin(bar[left:]))
    width = (picture.shape[1] - BAR_ROOM[0]) // 2 - GAP
    assert pixels * columns * spacing[1] / width == pytest.approx(float(words.removesuffix(" mm")), rel=0.02)


# letters


@pytest.mark.parametrize(("plane", "edges"), [("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI")])
@pytest.mark.parametrize("stored", ["RAS", "LPS", "PSR", "ILA"])
@pytest.mark.parametrize("tilt", [0, 30])
def test_letters_are_those_of_radiological_display(plane, edges, stored, tilt):
    affine = np.zeros((4, 4))
    for axis, (to, sign) in enumerate(nib.orientations.axcodes2ornt(stored)):
        affine[int(to), axis] = sign
    affine[3, 3] = 1
    cosine, sine = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    affine = np.array([[1, 0, 0, 0], [0, cosine, -sine, 0], [0, sine, cosine, 0], [0, 0, 0, 1]]) @ affine
    image = OrientSlicesd("image", plane)({"image": placed(affine, (20, 20, 20))})["image"]
    assert "".join(nib.aff2axcodes(image.affine)) == PLANES[plane]
    assert placement(image).edges == edges


def test_letters_stand_at_the_edges_that_they_name(written):
    plain_overlay(np.zeros((300, 300)), Placement((1.0, 1.0), "RLAP"))
    x, y = ({letter: at[axis] for letter, at in written if letter in OPPOSITE} for axis in (0, 1))
    assert (x["R"] < 10, x["L"] > 290, y["A"] < 10, y["P"] > 290) == (True,) * 4


def test_a_header_without_directions_gets_a_scale_bar_and_no_letters(tmp_path):
    volume = nib.Nifti1Image(np.random.default_rng(0).random((20, 20, 6), np.float32), None)
    volume.header.set_zooms((2.0, 1.0, 4.0))
    volume.set_qform(None, 0)
    volume.set_sform(None, 0)
    nib.save(volume, tmp_path / "a.nii.gz")
    loaded = OrientSlicesd("image")(LoadCased("image")({"image": str(tmp_path / "a.nii.gz")}))["image"]
    assert placement(loaded) == Placement((1.0, 2.0), "")


def test_a_flat_picture_has_neither_scale_bar_nor_letters(written):
    assert placement(placed(np.eye(4), slice_axis=None)) is None
    plain_overlay(np.zeros((64, 64)), None)
    assert not [text for text, _ in written if text.endswith(" mm") or text in OPPOSITE]


# colors


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_lightness_of_the_colors_rises_for_every_sight(sight):
    lightness = cie_lab(COLORS, sight)[:, 0]
    assert (np.diff(lightness) > 0).all()
    assert np.ptp(lightness) > 90


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_outline_has_a_color_that_no_heat_has(sight):
    outline = cie_lab(np.array(OUTLINE) / 255, sight)
    assert np.linalg.norm(cie_lab(COLORS, sight) - outline, axis=1).min() > 30


def test_the_outline_is_far_lighter_than_the_threshold_that_it_follows():
    at_threshold = cie_lab(COLORS[128])[0]
    assert cie_lab(np.array(OUTLINE) / 255)[0] - at_threshold > 40


def test_pixels_are_in_the_body_by_the_rule_of_patches():
    brightness = torch.rand(5, 16, 24, generator=torch.Generator().manual_seed(0)) ** 8
    for foreground in ("auto", "all", 0.1):
        rule = Foreground([16, 24], foreground)
        for image, expected in zip(brightness, rule(brightness), strict=True):
            np.testing.assert_array_equal(body(image.numpy(), rule.air), expected.numpy())


def test_a_scripted_model_tells_what_is_air():
    assert torch.jit.script(Foreground([4, 4], 0.1)).air == pytest.approx(0.1)


def test_there_is_no_color_in_the_air():
    image, inside = disc()
    painted = blend(image, np.full(image.shape, 9.0), THRESHOLD, AUTO)
    colored = np.ptp(painted.astype(int), axis=-1) > 0
    np.testing.assert_array_equal(colored, inside)  # the hole is a part of the body


def test_a_model_that_knows_no_air_colors_all_of_the_map():
    image, _ = disc()
    assert (np.ptp(blend(image, np.full(image.shape, 9.0), THRESHOLD, -1.0).astype(int), axis=-1) > 0).all()


def test_slices_have_no_color_in_the_air():
    image, inside = disc()
    stack = np.stack([image, 0 * image], axis=-1)[None]
    painted = blend_slices(stack, np.full(stack.shape[1:], 9.0), THRESHOLD, AUTO)
    colored = np.ptp(painted.astype(int), axis=-1) > 0
    np.testing.assert_array_equal(colored[0], inside.T)
    assert not colored[1].any()


def test_overlay_and_gallery_have_no_color_in_the_air():
    black, hot = np.zeros((40, 40)), np.full((40, 40), 9.0)
    pictures = (
        overlay(black, hot, THRESHOLD, AUTO, None, "a"),
        gallery([Example("a", black, hot, None, 1.0)], THRESHOLD, AUTO, "title"),
    )
    for picture in pictures:
        slices = np.asarray(picture).astype(int)[:, : -BAR_ROOM[0]]
        assert np.ptp(slices, axis=-1).max() <= 4  # the lowest color is nearly black


# the color bar


def test_the_threshold_stands_at_its_color_on_the_bar(written):
    picture = plain_overlay(np.zeros((64, 64)), None)
    bar = picture[:, -BAR_ROOM[0] + GAP : -BAR_ROOM[0] + GAP + BAR[0]]
    [at] = np.flatnonzero((bar == OUTLINE).all((1, 2)))
    expected = 255 * np.array(colormaps[COLORMAP](float(heat(np.array(THRESHOLD), THRESHOLD)))[:3])
    around = bar[[at - 1, at + 1], 0].mean(0)
    assert np.abs(around - expected).max() < 3
    [_, (_, y)] = next(one for one in written if one[0] == f"{THRESHOLD} threshold")
    assert y == at


def test_ticks_of_the_bar_are_z_scores_at_their_colors(written):
    picture = plain_overlay(np.zeros((64, 64)), None)
    left = picture.shape[1] - BAR_ROOM[0]
    assert [z for _, z in marks(THRESHOLD)] == [0, 2.5, 5, 7.5]
    for _, z in marks(THRESHOLD):
        [_, (_, y)] = next(one for one in written if one[0].split()[0] == f"{z:.3g}")
        if z != THRESHOLD:
            expected = 255 * np.array(colormaps[COLORMAP](float(heat(np.array(z), THRESHOLD)))[:3])
            assert np.abs(picture[y, left + GAP + 2] - expected).max() < 3


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("inf")])
def test_a_threshold_without_multiples_has_one_tick(threshold):
    assert marks(threshold) == [(0.5, threshold)]


# galleries


def test_a_gallery_shows_each_case_by_its_shape_and_name(written):
    examples = [
        Example("flat", np.ones((50, 50)), np.zeros((50, 50)), np.ones((50, 50), bool), 1.0),
        Example("p" * 300, np.ones((30, 60, 3)), np.zeros((30, 60)), None, 2.0, Placement((4.0, 1.0), "RLSI")),
    ]
    picture = gallery(examples, THRESHOLD, AUTO, "title")
    texts = [text for text, _ in written]
    assert "flat: score 1.0" in texts
    assert any(text.startswith("...") and text.endswith("p: score 2.0") for text in texts)
    assert {"R", "L", "S", "I", "20 mm", "2.5 threshold"} <= set(texts)
    assert texts.count("none") == 1
    assert picture.width < 1300
