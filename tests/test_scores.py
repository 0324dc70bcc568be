"""A score says how unusual a patch or an image is among healthy ones, and thresholds keep what they promise."""

import logging

import pytest
import torch
from torch.nn import functional as F

from bundle.errors import BundleError
from bundle.networks.scores import (
    Healthy,
    ImageScore,
    NormalScale,
    PatchScore,
    conformal_threshold,
    largest_of_each,
    rate_interval,
    weighted_mean,
)

FIT = {"kind": "full", "rank": 2, "shrinkage": None}


def residuals(images=60, seed=0, grid=8, channels=5):
    """Healthy residuals, four times as large in the left half as in the right one, with correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, channels, grid, grid, generator=generator)
    values[:, 1] = 0.9 * values[:, 0] + 0.1 * values[:, 1]
    values[..., : grid // 2] *= 4
    return values


def healthy(*arguments, inside=None, **settings):
    """One batch of healthy residuals, all of them foreground, or where ``inside`` says so."""
    values = residuals(*arguments, **settings)
    return [Healthy(values, torch.ones_like(values[:, 0], dtype=torch.bool) if inside is None else inside)]


def everywhere(maps):
    return torch.ones_like(maps, dtype=torch.bool)


def fitted(images=60, **settings):
    fit = FIT | {"kind": settings.pop("covariance", "full")}
    score = PatchScore(5, [8, 8], fit, **{"pooling": 0.0, "per_position": True, "smoothing": 0.0, **settings})
    score.fit(healthy(images))
    return score


def test_healthy_patches_have_mean_0_and_deviation_1_after_calibration():
    score = fitted()
    score.calibrate(healthy(seed=1))
    z = score(residuals(seed=1))
    assert abs(float(z.mean())) < 1e-4 and abs(float(z.std()) - 1) < 1e-3


def test_per_position_every_position_has_the_same_scale():
    z = fitted(600)(residuals(300, seed=1))
    left, right = z[..., :4], z[..., 4:]
    assert abs(float(left.mean() - right.mean())) < 0.1
    pooled = fitted(600, per_position=False)(residuals(300, seed=1))
    assert float(pooled[..., :4].mean() - pooled[..., 4:].mean()) > 1


def test_few_images_trust_the_moments_of_one_position_less():
    scores = fitted(3), fitted(300)
    step = [float(score.position_mean[:, :4].mean() - score.position_mean[:, 4:].mean()) for score in scores]
    assert 0 < step[0] < 0.5 * step[1]


def test_a_full_covariance_sees_what_breaks_the_correlation_of_channels():
    odd = torch.zeros(1, 5, 8, 8)
    odd[0, 0], odd[0, 1] = 2.0, -2.0  # small for each channel, never seen together
    assert float(fitted()(odd).mean()) > float(fitted(covariance="isotropic")(odd).mean()) + 1


def test_pooling_finds_what_points_the_same_way_in_neighboring_patches():
    before = residuals(seed=2)
    lesion = before.clone()
    lesion[:, :, 2:5, 5:8] += 0.9
    alone, together = fitted(), fitted(pooling=1.0)
    gains = [float((score(lesion) - score(before))[:, 3, 6].mean()) for score in (alone, together)]
    assert gains[1] > 2 * gains[0]


def test_pooling_is_a_gaussian_mean_with_replicated_borders():
    score, values = PatchScore(5, [8, 8], FIT, pooling=1.0), residuals(2)
    kernel = torch.outer(score.weights, score.weights).expand(5, 1, 5, 5)
    expected = F.conv2d(F.pad(values, (2, 2, 2, 2), mode="replicate"), kernel, groups=5)
    torch.testing.assert_close(weighted_mean(values, score.weights), expected)
    assert torch.equal(weighted_mean(values, PatchScore(5, [8, 8], FIT, pooling=0.0).weights), values)


def test_the_squared_error_is_the_papers_up_to_scale():
    score = PatchScore(5, [8, 8], FIT | {"kind": "isotropic"}, "squared_error", pooling=0.0, per_position=False)
    values = residuals(4)
    torch.testing.assert_close(score(values), values.square().mean(dim=1))
    score.fit(healthy())
    score.calibrate(healthy(seed=1))
    correlation = torch.corrcoef(torch.stack([score(values).flatten(), values.square().mean(dim=1).flatten()]))
    assert float(correlation[0, 1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "log"}, "log_radius"),
        ({"pooling": -1.0}, "residual_pooling is -1.0"),
        ({"smoothing": -1.0}, "position_smoothing is -1.0"),
        ({"per_position": "often"}, "per_position is 'often': give auto, true or false"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(BundleError, match=message):
        PatchScore(5, [8, 8], FIT, **settings)


def test_moments_are_those_of_foreground_patches():
    inside = torch.zeros(60, 8, 8, dtype=torch.bool)
    inside[..., 4:] = True  # the quiet half
    score = PatchScore(5, [8, 8], FIT, pooling=0.0, per_position=False)
    score.fit(healthy(inside=inside))
    score.calibrate(healthy(inside=inside))
    z = score(residuals())
    assert abs(float(z[inside].mean())) < 1e-3 and float(z[~inside].mean()) > 2


def test_smoothed_moments_are_means_over_near_positions():
    sharp, smooth = fitted(300), fitted(300, smoothing=1.0)
    step = [score.position_mean.mean(0) for score in (sharp, smooth)]
    assert float(step[0][3] - step[0][4]) > 2 * float(step[1][3] - step[1][4]) > 0
    torch.testing.assert_close(step[0][0], step[1][0], atol=0.1, rtol=0)


def test_the_variance_at_a_position_is_that_of_a_mixture_with_all_patches():
    score = PatchScore(5, [8, 8], FIT, pooling=0.0, per_position=True, smoothing=0.0)
    score.fit(healthy(10))
    values = score.surprise(residuals(10)).double()
    mean, near = values.mean(), values.mean(0)
    within = 0.5 * values.var(0, unbiased=False) + 0.5 * values.var(unbiased=False)  # 10 images beside 10
    expected = (within + 0.25 * (near - mean).square()).sqrt()
    torch.testing.assert_close(score.position_std.double(), expected, atol=1e-5, rtol=1e-4)


def test_positions_are_compared_where_they_differ_and_not_where_they_do_not(caplog):
    alike = torch.randn(80, 5, 8, 8, generator=torch.Generator().manual_seed(3))
    found = []
    with caplog.at_level(logging.INFO):
        for values in (residuals(80), alike):
            score = PatchScore(5, [8, 8], FIT, pooling=0.0, per_position="auto")
            score.fit([Healthy(values, everywhere(values[:, 0]))])
            found.append(float(score.position_mean.std()))
    assert found[0] > 0.5 and found[1] < 0.02
    assert "patches are compared by position" in caplog.messages[0] and "by 0.0" not in caplog.messages[0]
    assert "patches are compared all alike" in caplog.messages[1]


def test_on_the_normal_scale_healthy_patches_are_as_rare_as_under_a_normal():
    skewed = torch.distributions.Gamma(2.0, 1.0).sample((20000,))
    scale = NormalScale()
    scale.fit(skewed)
    new = scale(torch.distributions.Gamma(2.0, 1.0).sample((1, 300, 1000)))
    for z in (-2.0, 0.0, 1.0, 2.0, 3.0):
        expected = float(1 - torch.special.ndtr(torch.tensor(z)))
        assert float((new > z).double().mean()) == pytest.approx(expected, rel=0.25)


def test_the_normal_scale_keeps_the_order_of_all_scores_even_beyond_its_quantiles():
    scale = NormalScale()
    for scores in (torch.randn(300, generator=torch.Generator().manual_seed(0)).round(), torch.zeros(300)):  # ties
        scale.fit(scores)
        z = scale(torch.linspace(-30, 30, 601).view(1, 1, -1)).flatten()
        assert (z.diff() > 0).all() and torch.isfinite(z).all()


def test_too_few_patches_to_know_a_quantile_leave_the_scale_as_it_is():
    scale = NormalScale()
    scale.fit(torch.randn(40) * 5)
    torch.testing.assert_close(scale(torch.tensor([[[-4.0, 0.0, 4.0]]])), torch.tensor([[[-4.0, 0.0, 4.0]]]))


def test_an_unfitted_normal_scale_changes_nothing():
    values = torch.linspace(-9, 9, 50).view(1, 5, 10)
    torch.testing.assert_close(NormalScale()(values), values)


# images


def noisy_maps(images=400, seed=0):
    """Healthy patch maps whose level and spread differ from image to image, as noise and contrast make them."""
    generator = torch.Generator().manual_seed(seed)
    level, spread = torch.randn(2, images, 1, 1, generator=generator)
    return level + torch.exp(0.3 * spread) * torch.randn(images, 20, 20, generator=generator)


def with_lesion(maps):
    maps = maps.clone()
    maps[:, 5:7, 5:7] += 3
    return maps


def separation(score, healthy, sick):
    scores = score(sick, everywhere(sick)), score(healthy, everywhere(healthy))
    return float((scores[0][:, None] > scores[1][None]).float().mean())


def test_the_adjusted_image_score_is_robust_to_noise_and_contrast():
    plain, adjusted = ImageScore("top_patches"), ImageScore("adjusted")
    adjusted.fit(noisy_maps(), everywhere(noisy_maps()))
    healthy, sick = noisy_maps(seed=1), with_lesion(noisy_maps(seed=2))
    assert separation(adjusted, healthy, sick) > separation(plain, healthy, sick) + 0.1


def test_the_covariates_do_not_see_a_lesion_of_a_tenth_of_the_image():
    maps = noisy_maps(50)
    sick = maps.clone()
    sick[:, :, :2] += 20
    before, after = (ImageScore().statistics(one, everywhere(one))[1] for one in (maps, sick))
    assert float((after - before).abs().max()) < 0.5


def test_the_plain_image_score_is_the_mean_of_the_top_patches():
    maps = noisy_maps(3)
    expected = maps.flatten(1).sort(dim=1, descending=True).values[:, :4].mean(dim=1)  # 1 % of 20 x 20
    torch.testing.assert_close(ImageScore("top_patches")(maps, everywhere(maps)), expected)


def test_the_image_score_looks_at_the_foreground_alone():
    maps = noisy_maps(3)
    inside = torch.zeros_like(maps, dtype=torch.bool)
    inside[:, 5:15, 5:15] = True
    noisy_air = torch.where(inside, maps, maps + 50)
    expected = maps[:, 5:15, 5:15].flatten(1).amax(dim=1)  # 1 % of 100 patches
    for values in (maps, noisy_air):
        torch.testing.assert_close(ImageScore()(values, inside), expected)


def test_the_image_score_does_not_follow_the_size_of_the_organ():
    maps = torch.randn(300, 40, 40, generator=torch.Generator().manual_seed(0))
    scores = []
    for side in (40, 20):
        inside = torch.zeros_like(maps, dtype=torch.bool)
        inside[:, :side, :side] = True
        scores.append(float(ImageScore()(maps, inside).mean()))
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_a_larger_lesion_never_lowers_the_image_score():
    maps, last = noisy_maps(20), None
    for side in range(0, 21, 2):
        sick = maps.clone()
        sick[:, :side, :side] += 4
        scores = ImageScore()(sick, everywhere(sick))
        assert last is None or (scores >= last).all()
        last = scores


def test_an_image_without_foreground_has_the_score_of_its_map():
    maps = torch.full((2, 4, 4), -6.0)
    assert ImageScore()(maps, torch.zeros_like(maps, dtype=torch.bool)).tolist() == [-6.0, -6.0]


def test_healthy_images_have_mean_0_and_deviation_1():
    score, maps = ImageScore("adjusted"), noisy_maps(seed=1)
    score.fit(noisy_maps(), everywhere(maps))
    returned = score.calibrate(maps, everywhere(maps))
    assert abs(float(returned.mean())) < 1e-6 and float(returned.std()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(score(maps, everywhere(maps)).double(), returned, atol=1e-4, rtol=0)


# thresholds


def test_a_study_has_the_score_of_its_worst_slice():
    scores = torch.tensor([1.0, 5.0, 2.0, -3.0, -1.0])
    assert largest_of_each(scores, [0, 0, 1, 3, 3]).tolist() == [5.0, 2.0, -1.0]


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (99, 0.01), (30, 0.2)])
def test_a_new_healthy_score_exceeds_the_conformal_threshold_no_more_often_than_promised(count, rate):
    generator = torch.Generator().manual_seed(0)
    exceeded = []
    for _ in range(3000):
        scores = torch.rand(count + 1, generator=generator)
        exceeded.append(float(scores[-1]) > conformal_threshold(scores[:-1], rate, "images"))
    share = sum(exceeded) / len(exceeded)
    assert share <= rate + 0.01  # three deviations of the mean of 3000
    assert share >= rate - 1 / (count + 1) - 0.01


def test_a_patch_of_a_new_image_exceeds_the_threshold_by_one_in_images_plus_one_more_at_most():
    generator = torch.Generator().manual_seed(0)
    rate, images = 0.05, 9
    exceeded = []
    for _ in range(3000):
        # what an image has of its own moves all of its patches, the worst case for a bound over patches
        patches = torch.randn(images + 1, 1, generator=generator) + 0.1 * torch.randn(
            images + 1, 50, generator=generator
        )
        exceeded.append((patches[-1] > conformal_threshold(patches[:-1], rate, "patches")).double().mean())
    share = float(torch.stack(exceeded).mean())
    assert rate + 0.02 < share <= rate + 1 / (images + 1) + 0.02


def test_too_few_images_to_promise_the_rate_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        assert conformal_threshold(torch.tensor([1.0, 3.0, 2.0]), 0.05, "images") == 3.0
    assert "3 scores of healthy validation images can't promise a false positive rate of 0.05, only 0.25" in caplog.text


@pytest.mark.parametrize("rate", [0.0, 1.0, 7])
def test_refuses_a_rate_out_of_range(rate):
    with pytest.raises(BundleError, match=r"must be in \(0, 1\)"):
        conformal_threshold(torch.rand(5), rate, "patches")


@pytest.mark.parametrize(("count", "rate"), [(25, 0.05), (100, 0.05), (5, 0.05), (30, 0.2)])
def test_nine_of_ten_sites_have_a_true_rate_in_the_interval_and_as_many_lie_below_as_above(count, rate):
    generator = torch.Generator().manual_seed(0)
    low, high = rate_interval(count, rate)
    sites = torch.rand(4000, count, generator=generator)  # the true rate above a threshold t is 1 - t
    rates = torch.tensor([1 - conformal_threshold(scores, rate, "images") for scores in sites])
    assert float((rates < low).float().mean()) == pytest.approx(0.05, abs=0.012)
    assert float((rates > high).float().mean()) == pytest.approx(0.05, abs=0.012)
