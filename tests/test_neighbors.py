"""Slices of a volume see their neighbors: a lesion goes on there, noise does not."""

import logging
import math
from functools import cache

import pytest
import torch
from builders import random_maps, small_detector
from monai.data import MetaTensor

from bundle.errors import BundleError
from bundle.inferers import SliceBatchInferer
from bundle.networks.neighbors import PlacedSlices, SlicePooling, Volume
from bundle.networks.scores import LOWEST, ImageScore
from scripts.integrations.monai_deploy.study import StudyDetector

SLICES, SIDE = 12, 8


def z_scores(volumes=20, alike=0.0, slices=SLICES, seed=0):
    """Healthy z-scores [volumes, slices, h, w], of which those of neighboring slices correlate by ``alike``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(volumes, slices, SIDE, SIDE, generator=generator)
    z = noise.clone()
    for index in range(1, slices):
        z[:, index] = alike * z[:, index - 1] + math.sqrt(1 - alike**2) * noise[:, index]
    return z


@cache
def calibrated(alike=0.0, **settings):
    """On healthy volumes of slices 6 mm apart."""
    pooling = SlicePooling(6.0, **settings)
    pooling.calibrate([Volume(one, 6.0 * torch.arange(SLICES)) for one in z_scores(alike=alike)], ImageScore())
    return pooling


def pooled(pooling, maps, spacing=6.0, counts=None):
    """Patch maps of a volume whose slices all count, unless ``counts`` says otherwise."""
    counts = torch.ones(len(maps), dtype=torch.bool) if counts is None else counts
    return pooling(maps, torch.zeros(len(maps)), spacing, counts)[0]


def test_a_lesion_that_goes_on_in_the_next_slice_scores_higher_than_noise_in_one():
    maps = torch.zeros(SLICES, SIDE, SIDE)
    maps[4, 1, 1] = maps[5, 1, 1] = 3.0
    maps[4, 6, 6] = 3.0
    found = pooled(calibrated(), maps)
    assert float(found[4, 1, 1]) > float(found[4, 6, 6]) + 1
    assert float(found[4, 1, 1]) > 3.0 > float(found[4, 6, 6])


@pytest.mark.parametrize("alike", [0.0, 0.6])
def test_pooled_healthy_patches_are_as_rare_as_those_of_a_normal_at_the_ends_too(alike):
    pooling = calibrated(alike=alike)
    found = torch.stack([pooled(pooling, one) for one in z_scores(60, alike, seed=1)])
    for index in (0, 1, SLICES // 2, SLICES - 1):
        assert float((found[:, index] > 2).float().mean()) == pytest.approx(0.0228, abs=0.008)
        assert float(found[:, index].std()) == pytest.approx(1, abs=0.08)


def test_the_length_over_which_healthy_slices_are_alike_is_found():
    independent, alike = calibrated(), calibrated(alike=math.exp(-6 / 8))
    assert float(independent.length) < 2 and float(alike.length) == 8


def test_what_is_far_in_millimeters_is_no_neighbor():
    maps = torch.zeros(SLICES, SIDE, SIDE)
    maps[5] = 3.0
    pooling = calibrated()
    near, far = (pooled(pooling, maps, spacing)[:, 0, 0] for spacing in (1.0, 5.0))
    at_5_mm = [float(near[10]), float(far[6])]
    assert min(at_5_mm) > 0.3
    assert float(near[9]) > 0.5 and abs(float(far[9])) < 0.2  # four slices on
    assert abs(float(pooled(pooling, maps, 50.0)[6, 0, 0])) < 0.1


def test_background_stays_lowest_and_does_not_drag_its_neighbors_down():
    maps = z_scores(1)[0]
    pooling = calibrated()
    whole = pooled(pooling, maps)
    holed = maps.clone()
    holed[4, 2:4] = LOWEST
    found = pooled(pooling, holed)
    assert (found[4, 2:4] == LOWEST).all() and (found[4, 4:] > LOWEST).all()
    assert float((found[5, 2:4] - whole[5, 2:4]).abs().mean()) < 1
    assert torch.equal(found[:, 4:], whole[:, 4:])


def test_slices_that_do_not_count_are_no_neighbors():
    maps, counts = z_scores(1)[0], torch.ones(SLICES, dtype=torch.bool)
    counts[0] = False
    wild = maps.clone()
    wild[0] += 5
    pooling = calibrated()
    assert torch.equal(pooled(pooling, wild, counts=counts)[1:], pooled(pooling, maps, counts=counts)[1:])


@pytest.mark.parametrize(
    ("pooling", "slices", "spacing"),
    [
        (calibrated(), 1, 6.0),  # one slice
        (calibrated(), SLICES, 0.0),  # nobody knows the spacing
        (SlicePooling(6.0), SLICES, 6.0),  # no volume was there to calibrate on
        (SlicePooling(0.0), SLICES, 6.0),  # not wanted
    ],
)
def test_slices_that_have_no_neighbors_keep_their_scores_bit_for_bit(pooling, slices, spacing):
    maps, scores = z_scores(1)[0, :slices], torch.randn(slices)
    found = pooling(maps, scores, spacing, torch.ones(slices, dtype=torch.bool))
    assert found[0] is maps and found[1] is scores


def test_squared_errors_are_pooled_and_not_brought_to_quantiles():
    pooling = calibrated(score_scale="squared_error")
    assert torch.equal(pooling.normal_scale.knots, pooling.normal_scale.levels)
    assert not torch.equal(pooled(pooling, z_scores(1)[0]), z_scores(1)[0])


@pytest.mark.parametrize("width", [-1.0, 1000.0])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(BundleError, match=f"slice_pooling is {width}: give 0 for none"):
        SlicePooling(width)


# the detector


def batches_of_volumes(features, volumes=20, slices=3):
    """Healthy maps, the cases of their slices, and where these lie."""
    generator = torch.Generator().manual_seed(1)
    batches = [random_maps(features, slices, generator=generator) for _ in range(volumes)]
    cases = [case for case in range(volumes) for _ in range(slices)]
    places = [5.0 * index for index in range(slices)]
    return batches, cases, [PlacedSlices([slices * case + i for i in range(slices)], places) for case in range(volumes)]


def detector_of_volumes(features, **settings):
    detector = small_detector(features, **settings).eval()
    batches, cases, volumes = batches_of_volumes(features)
    detector.calibrate(batches, cases, volumes=volumes)
    return detector


def volume(slices=5, spacing=5.0):
    image = torch.rand(1, 48, 40, slices, generator=torch.Generator().manual_seed(2))
    return MetaTensor(image, affine=torch.diag(torch.tensor([1.0, 1.0, spacing, 1.0])), meta={"slice_axis": 2})


@torch.no_grad()
def scored_volumes(detector):
    """Pooled patch maps and image scores [slices] of the healthy volumes, as in use."""
    batches, _, _ = batches_of_volumes(detector.features)
    scored = [detector.score_patches(batch) for batch in batches]
    counts = torch.ones(3) > 0
    return [detector.slice_pooling(maps, detector.image_score(maps, inside), 5.0, counts) for maps, inside in scored]


def test_thresholds_of_volumes_keep_their_promise(features):
    detector = detector_of_volumes(features)
    scored = scored_volumes(detector)
    patches = torch.cat([maps.flatten() for maps, _ in scored])
    assert 0.005 < float((patches > detector.threshold).float().mean()) <= 0.01
    worst = max(float(scores.max()) for _, scores in scored)
    assert float(detector.image_threshold) == pytest.approx(worst, abs=1e-4)  # of 20, at 5 %
    alone = small_detector(features, slice_pooling=0.0)
    alone.calibrate(batches_of_volumes(features)[0], batches_of_volumes(features)[1])
    assert float(alone.image_threshold) != float(detector.image_threshold)


def test_without_volumes_nothing_changes(features):
    batches, _, _ = batches_of_volumes(features)
    pictures, off = small_detector(features), small_detector(features, slice_pooling=0.0)
    off.density.load_state_dict(pictures.density.state_dict())
    pictures.calibrate(batches)
    off.calibrate(batches)
    ours, theirs = pictures.state_dict(), off.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - {"identity"})
    assert ours["slice_pooling.length"] == 0  # nothing is pooled


def test_a_volume_is_pooled_and_one_of_its_slices_is_a_picture(features):
    detector, image = detector_of_volumes(features), volume()
    found = SliceBatchInferer(2)(image[None], detector)
    alone = [detector.detect(one) for one in image.as_tensor()[None].unbind(-1)]
    maps, scores = torch.cat([one.patch_map for one in alone]), torch.cat([one.image_score for one in alone])
    expected = detector.slice_pooling(maps, scores, 5.0, torch.ones(5) > 0)
    torch.testing.assert_close(found["patch_map"][0, 0].movedim(-1, 0), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["slice_scores"][0], expected[1], atol=1e-4, rtol=1e-4)
    single = SliceBatchInferer(2)(image[None, ..., :1], detector)
    assert torch.equal(single["patch_map"][0, 0, ..., 0], alone[0].patch_map[0])
    assert torch.equal(single["slice_scores"][0], alone[0].image_score)
    assert not torch.equal(single["patch_map"][..., 0], found["patch_map"][..., 0])


def test_raw_values_are_not_pooled(features):
    detector, image = detector_of_volumes(features), volume()
    found = SliceBatchInferer(raw=True)(image[None], detector)["patch_map"]
    expected = detector.detect(image.as_tensor()[None, ..., 2], raw=True).patch_map
    torch.testing.assert_close(found[0, ..., 2], expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_from_before_pools_nothing(features):
    detector = detector_of_volumes(features, slice_pooling=0.0)
    old = {key: value for key, value in detector.state_dict().items() if not key.startswith("slice_pooling")}
    detector.load_state_dict(old)
    found = SliceBatchInferer()(volume()[None], detector)["patch_map"]
    torch.testing.assert_close(found[0, ..., 2], detector.detect(volume().as_tensor()[None, ..., 2]).patch_map)


def test_what_was_found_of_volumes_is_logged(features, caplog):
    with caplog.at_level(logging.INFO):
        detector_of_volumes(features)
    assert "slices of 20 healthy volumes are pooled over 6 mm" in caplog.text


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_study_is_pooled_as_by_the_inferer(features):
    detector, image = detector_of_volumes(features), volume()
    expected = SliceBatchInferer(2)(image[None], detector)
    found = torch.jit.script(StudyDetector(detector, [0.0, 1.0], 0.05, 2))(image.as_tensor()[None], 5.0)
    torch.testing.assert_close(found["map"], expected["map"][0].as_tensor(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["slice_scores"].flatten(), expected["slice_scores"][0], atol=1e-4, rtol=1e-4)
