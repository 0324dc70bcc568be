"""An image goes in, a calibrated map of its size comes out, and only the matching checkpoint is accepted."""

import json

import numpy as np
import pytest
import torch
from builders import PREPROCESSING, random_maps, small_detector
from monai.transforms import NormalizeIntensity, RepeatChannel
from torch.nn import functional as F

from bundle.checkpoint import load_checkpoint, save_checkpoint
from bundle.errors import BundleError
from bundle.networks import AnomalyDetector, FeatureNetwork, SpatialARDensity
from bundle.networks.density import squared_error


def healthy_batches(features, count=6):
    generator = torch.Generator().manual_seed(1)
    return [random_maps(features, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (17, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_map_has_the_size_of_the_image(detector, size, channels):
    assert detector(torch.rand(2, channels, *size)).shape == (2, 1, *size)


def test_gray_is_the_same_as_three_equal_channels(detector):
    image = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(detector(image), detector(image.expand(-1, 3, -1, -1)))


def test_preparation_equals_monai_transforms(detector):
    image = torch.rand(1, 64, 64)
    normalize = NormalizeIntensity(subtrahend=[0.498] * 3, divisor=[0.502] * 3, channel_wise=True)
    expected = normalize(RepeatChannel(3)(image))
    np.testing.assert_allclose(detector.features.normalize(detector.resize(image[None]))[0], expected, atol=1e-6)


def test_raw_map_is_the_squared_error_brought_to_the_image(detector):
    image = torch.rand(1, 1, 50, 70)
    embeddings = detector.unpack(detector.embed(image)).embeddings
    patch_map = squared_error(detector.density(embeddings), embeddings)
    expected = F.interpolate(patch_map[:, None], (50, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(detector(image, raw=True), expected)


def test_image_score_is_the_mean_of_the_top_patches(features):
    detector = small_detector(features, 320)
    found = detector.detect(torch.rand(2, 1, 320, 320))
    expected = found.patch_map.flatten(1).sort(dim=1, descending=True).values[:, :16].mean(dim=1)  # 1 % of 40 x 40
    torch.testing.assert_close(found.image_score, expected)


def test_calibrated_scores_of_healthy_patches_are_as_rare_as_those_of_a_normal(detector):
    detector.calibrate(healthy_batches(detector.features))
    scores = torch.cat([detector.score_patches(batch)[0].flatten() for batch in healthy_batches(detector.features)])
    for level, share in ((0.0, 0.5), (1.0, 0.1587), (2.0, 0.0228)):
        assert float((scores > level).float().mean()) == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
def test_the_wanted_share_of_healthy_patches_exceeds_the_threshold(detector, rate):
    detector.calibrate(healthy_batches(detector.features), false_positive_rate=rate)
    scores = torch.cat([detector.score_patches(batch)[0].flatten() for batch in healthy_batches(detector.features)])
    share = float((scores > detector.threshold).float().mean())
    assert rate - 2 / len(scores) <= share <= rate


def test_the_wanted_rates_are_in_the_checkpoint(features, detector):
    assert detector.false_positive_rate.isnan() and detector.image_false_positive_rate.isnan()
    detector.calibrate(healthy_batches(detector.features), false_positive_rate=0.02, image_false_positive_rate=0.1)
    other = small_detector(features)
    other.load_state_dict(detector.state_dict())
    assert (float(other.false_positive_rate), float(other.image_false_positive_rate)) == (0.02, 0.1)


def test_standardization_gives_every_channel_the_same_scale(detector):
    maps = random_maps(detector.features, 50)
    maps[:, :152] = maps[:, :152] * torch.linspace(0.1, 10, 152).view(1, -1, 1, 1) + 3
    moments = maps.transpose(0, 1).flatten(1)
    detector.set_standardization(moments.mean(dim=1), moments.std(dim=1))
    standardized = detector.standardized(maps).transpose(0, 1).flatten(1)
    torch.testing.assert_close(standardized.mean(dim=1), torch.zeros(152), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardized.std(dim=1), torch.ones(152), atol=1e-3, rtol=0)


def test_the_papers_recipe_does_not_standardize(features):
    detector = small_detector(features, 64, standardize=False)
    channels = random_maps(features).shape[1]
    detector.set_standardization(torch.ones(channels), torch.full((channels,), 2.0))
    embeddings = torch.randn(1, 152, 4, 4)
    assert torch.equal(detector.standardize(embeddings), embeddings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_equals_eager_at_every_size(detector, tmp_path):
    detector.calibrate(healthy_batches(detector.features))
    torch.jit.script(detector).save(str(tmp_path / "model.ts"))
    scripted = torch.jit.load(str(tmp_path / "model.ts"))
    for size in ((64, 64), (50, 70)):
        image = torch.rand(2, 1, *size)
        found, expected = scripted.detect(image), detector.detect(image)
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)
        torch.testing.assert_close(found.image_score, expected.image_score)
        torch.testing.assert_close(scripted(image, raw=True), detector(image, raw=True))
    assert float(scripted.threshold) == float(detector.threshold)
    assert json.loads(bytes(scripted.identity.tolist()))["backbone"] == "efficientnet_lite0"


def test_a_checkpoint_restores_maps_and_threshold_and_holds_no_backbone(detector, features, tmp_path):
    detector.calibrate(healthy_batches(detector.features))
    save_checkpoint(detector, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not [key for key in state if key.startswith("features")]
    other = small_detector(features, 64)
    load_checkpoint(other, tmp_path / "model.pt")
    image = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(other(image), detector(image))
    assert other.threshold == detector.threshold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 80}, r"image_size \[64, 64\], not \[80, 80\]"),
        ({"hidden_channels": 16}, "hidden_channels 8, not 16"),
        ({"mode": "causal"}, "mode 'guarded', not 'causal'"),
        ({"preprocessing": {**PREPROCESSING, "intensity": "mr"}}, "intensity 'auto', not 'mr'"),
        ({"preprocessing": {**PREPROCESSING, "min_foreground": 0.1}}, r"min_foreground 0.05, not 0.1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(features, tmp_path, change, message):
    save_checkpoint(small_detector(features, preprocessing=PREPROCESSING), tmp_path / "model.pt")
    other = small_detector(features, **{"preprocessing": PREPROCESSING, **change})
    with pytest.raises(BundleError, match=message):
        load_checkpoint(other, tmp_path / "model.pt")


def test_a_checkpoint_of_another_backbone_is_refused_with_both_names(detector, tmp_path):
    save_checkpoint(detector, tmp_path / "model.pt")
    other = small_detector(FeatureNetwork("dinov3_vits16", "random"))
    with pytest.raises(BundleError, match="backbone 'efficientnet_lite0', not 'dinov3_vits16'"):
        load_checkpoint(other, tmp_path / "model.pt")


def test_a_checkpoint_of_other_weights_is_refused(detector, tmp_path):
    save_checkpoint(detector, tmp_path / "model.pt")
    other = small_detector(FeatureNetwork("efficientnet_lite0", "random"))
    with pytest.raises(BundleError, match="weights '5b46.*, not 'random:.*: give --weights those of the training"):
        load_checkpoint(other, tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_file_that_is_no_checkpoint_is_named(detector, tmp_path, content):
    if content is not None:
        (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.pt") as caught:
        load_checkpoint(detector, tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_a_pickled_checkpoint_is_not_executed(detector, tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"threshold": Malice()}, tmp_path / "model.pt")
    with pytest.raises(BundleError, match="no checkpoint of this bundle"):
        load_checkpoint(detector, tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [100, [64, 50], 0, [64, 64, 64]])
def test_an_image_size_off_the_patch_grid_is_refused_with_a_near_one(features, size):
    with pytest.raises(BundleError, match="multiples of the patch size 16: try"):
        small_detector(features, size)


def test_only_the_density_is_trained(detector):
    trained = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert trained == {f"density.{name}" for name, _ in detector.density.named_parameters()}


# foreground and details


def body_with_air(size=64):
    """A gray body on the right half of an image, black air on the left, with a black cyst inside the body."""
    image = torch.zeros(1, 1, size, size)
    image[..., size // 2 :] = 0.5
    return image


def test_the_map_is_lowest_in_the_air_and_nowhere_lower(detector):
    detector.calibrate(healthy_batches(detector.features))
    found = detector.detect(body_with_air())
    assert (found.patch_map[..., :4] == -6).all() and (found.patch_map[..., 4:] >= -6).all()
    assert (found.patch_map[..., 4:] > -6).any()


def test_air_has_no_part_in_thresholds_and_image_scores(features):
    air, whole = small_detector(features), small_detector(features, foreground="all")
    batches = healthy_batches(features)
    for batch in batches:
        batch[:, -1, :, :2] = 0  # the left half is air, where everything is wild
        batch[:, :-1, :, :2] *= 30
    for one in (air, whole):
        one.calibrate(batches)
    score, inside = air.score_patches(batches[0])
    assert float((score[inside] > 2).float().mean()) == pytest.approx(0.0228, abs=0.02)
    assert air.image_score(score, inside).isfinite().all()
    assert inside.float().mean() == 0.5 and whole.score_patches(batches[0])[1].all()


def test_a_blank_image_has_the_lowest_map_and_score(detector):
    detector.calibrate(healthy_batches(detector.features))
    blank, body = detector.detect(torch.zeros(1, 1, 64, 64)), detector.detect(torch.rand(1, 1, 64, 64))
    assert (blank.anomaly_map == -6).all() and float(blank.image_score) < float(body.image_score)


def test_validation_images_without_foreground_are_refused(detector):
    batches = healthy_batches(detector.features)
    for batch in batches:
        batch[:, -1] = 0
    with pytest.raises(BundleError, match="no healthy validation image has any foreground: give foreground all"):
        detector.calibrate(batches)


def test_without_details_the_patch_map_has_the_grid_of_the_patches(features):
    assert small_detector(features, detail_weight=0.0).detect(torch.rand(1, 1, 64, 64)).patch_map.shape == (1, 4, 4)
    assert small_detector(features).detect(torch.rand(1, 1, 64, 64)).patch_map.shape == (1, 8, 8)
    coarse = FeatureNetwork("efficientnet_lite0", detail_layers=[])
    assert small_detector(coarse).detail_score is None


def test_a_lesion_of_half_a_patch_stands_in_its_own_half_of_the_map(features):
    detector = small_detector(features, 64)
    generator = torch.Generator().manual_seed(0)
    images = [0.5 + 0.02 * torch.randn(8, 1, 64, 64, generator=generator) for _ in range(6)]
    maps = [detector.embed(batch) for batch in images]
    together = torch.cat(maps).transpose(0, 1).flatten(1)
    detector.set_standardization(together.mean(1), together.std(1))
    detector.fit_before_training(maps, maps)
    detector.fit_after_training(maps)
    detector.calibrate(maps)
    image = torch.full((1, 1, 64, 64), 0.5)
    image[..., 34:38, 26:30] = 1.0
    found = detector.detail_score.residual(*detector._detailed(detector.embed(image))[:2])[0].square().mean(0)
    assert divmod(int(found.flatten().argmax()), 8) == (4, 3)


# finer and fewer features


def test_every_tile_is_embedded_as_an_image_of_its_own(features):
    detector = small_detector(features, 128, tiles=2)
    image = torch.rand(2, 1, 128, 128)
    embeddings = detector.unpack(detector.embed(image)).embeddings
    assert embeddings.shape == (2, 152, 8, 8)
    for row in range(2):
        for column in range(2):
            tile = image[:, :, 64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
            expected = features(features.normalize(tile))
            found = embeddings[:, :, 4 * row : 4 * (row + 1), 4 * column : 4 * (column + 1)]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_tiles_of_an_oblong_image_keep_their_places(features):
    detector = small_detector(features, [64, 160], tiles=2)
    image = torch.zeros(1, 1, 64, 160)
    image[..., 40:56, 100:110] = 1  # in the lower right tile
    maps, dark = (detector.unpack(detector.embed(one)) for one in (image, torch.zeros_like(image)))
    changed = (maps.embeddings - dark.embeddings).abs().sum(dim=1)[0]
    assert (changed[2:, 5:] > 1).all() and (changed[:2] < 1e-3).all() and (changed[:, :5] < 1e-3).all()


def test_pooled_embeddings_are_means_over_near_patches_across_tiles_too(features):
    image = torch.rand(1, 1, 128, 128)
    detectors = [small_detector(features, 128, tiles=2, feature_pooling=side) for side in (1, 3)]
    alone, pooled = (detector.unpack(detector.embed(image)).embeddings for detector in detectors)
    inside = alone[:, :, 3:6, 2:5].mean(dim=(2, 3))  # the seam of the tiles is at 4
    corner = alone[:, :, :2, :2].sum(dim=(2, 3)) / 9
    torch.testing.assert_close(pooled[:, :, 4, 3], inside, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled[:, :, 0, 0], corner, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [0, 2])
def test_a_square_without_a_middle_is_refused(features, side):
    with pytest.raises(BundleError, match=f"feature_pooling is {side}: give an odd number"):
        small_detector(features, feature_pooling=side)


def test_a_checkpoint_of_single_embeddings_is_refused_where_they_are_pooled(features):
    with pytest.raises(BundleError, match="feature_pooling 1, not 3"):
        small_detector(features, feature_pooling=3).load_state_dict(small_detector(features).state_dict())


@pytest.mark.parametrize(
    ("size", "tiles", "message"), [(80, 2, "multiples of"), (64, 0, "tiles is 0"), (64, [1, 2], "tiles is")]
)
def test_tiles_off_the_patch_grid_are_refused(features, size, tiles, message):
    with pytest.raises(BundleError, match=message):
        small_detector(features, size, tiles=tiles)


def test_reduced_features_are_the_leading_principal_components(features):
    detector = small_detector(features, feature_components=6)
    maps = random_maps(features, 40)
    maps[:, :152] *= torch.linspace(3, 0.1, 152).view(1, -1, 1, 1)
    maps[:, 1] = maps[:, 0]  # the same twice: the leading component of standardized channels
    moments = maps.transpose(0, 1).flatten(1)
    detector.set_standardization(moments.mean(dim=1), moments.std(dim=1))
    detector.fit_before_training([maps], [maps])
    reduced = detector.standardized(maps)
    assert reduced.shape == (40, 6, 4, 4)
    covariance = torch.cov(reduced.transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.diag(covariance.diag()), atol=0.05, rtol=0)
    assert float(covariance[0, 0]) > 1.9
    assert detector(torch.rand(1, 1, 64, 64)).shape == (1, 1, 64, 64)


def test_more_components_than_channels_are_refused(features):
    with pytest.raises(BundleError, match="feature_components is 153: give 1 to 152"):
        small_detector(features, feature_components=153)


def test_a_density_of_other_channels_is_refused(features):
    with pytest.raises(BundleError, match="the density has 8 channels, but the embeddings 152"):
        AnomalyDetector(features, SpatialARDensity(8, linear_components=2))
