"""Metrics of anomaly maps against scikit-learn on all pixels and a direct computation of AUPRO."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import ignite.distributed as idist
import ignite.metrics
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator
from scipy import ndimage
from sklearn import metrics as sk

from bundle.errors import BundleError
from bundle.metrics import MAX_BINS, MAX_STATE_BYTES, METRIC_NAMES, AnomalyMetric, AnomalyMetrics

ROOT = Path(__file__).parents[1]
PROMISE = 1e-4
PIXELS = 2_000_000  # more different values than the histogram has bins

DISTRIBUTIONS = {
    "uniform": lambda rng, n, lesion: 0.8 * rng.random(n) + 0.2 * lesion * rng.random(n),
    "normal with both signs": lambda rng, n, lesion: rng.normal(size=n) + 1.5 * lesion,
    "negative": lambda rng, n, lesion: rng.normal(-50, 3, n) + 5 * lesion,
    "chi-square of 768 degrees": lambda rng, n, lesion: rng.chisquare(768, n) + 60 * lesion,
    "chi-square of 3 degrees": lambda rng, n, lesion: rng.chisquare(3, n) * (1 + 2 * lesion),
    "Cauchy": lambda rng, n, lesion: rng.standard_cauchy(n) + 3 * lesion,
    "log-normal over many magnitudes": lambda rng, n, lesion: np.exp(5 * (rng.normal(size=n) + lesion)),
    "Pareto": lambda rng, n, lesion: rng.pareto(1, n) * (1 + 9 * lesion),
    "narrow band far from zero": lambda rng, n, lesion: 1000 + 0.8 * rng.random(n) + 0.2 * lesion * rng.random(n),
    "8-bit integers": lambda rng, n, lesion: np.clip(rng.normal(100 + 40 * lesion, 30, n).round(), 0, 255),
    "mostly equal": lambda rng, n, lesion: np.where(rng.random(n) < 0.9 - 0.5 * lesion, 0.25, 0.75),
}


def images(
    count: int, size: tuple[int, int] = (32, 48), seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray, float, bool]]:
    """Maps of smooth noise; every second image has lesions, of several sizes, that score higher."""
    rng = np.random.default_rng(seed)
    result = []
    for index in range(count):
        scores = ndimage.gaussian_filter(rng.normal(size=size), 1)
        anomalous = index % 2 == 1
        mask = (ndimage.gaussian_filter(rng.normal(size=size), 2) > 0.15) & anomalous
        scores = (scores + 0.3 * mask).astype(np.float32)
        result.append((scores, mask, float(scores.max()), anomalous))
    return result


def accumulate(data, threshold: float = 0.2) -> AnomalyMetrics:
    metrics = AnomalyMetrics(threshold)
    for image in data:
        metrics.update(*image)
    return metrics


def exact_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Bergmann et al.: mean overlap of each region at each threshold, integrated by trapezoids up to the FPR limit."""
    regions = []
    for index, mask in enumerate(masks):
        labeled, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [np.sort(maps[index][labeled == region]) for region in range(1, count + 1)]
    healthy = np.sort(maps[~masks])
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        fpr = 1 - np.searchsorted(healthy, threshold) / healthy.size
        points.append((fpr, np.mean([1 - np.searchsorted(region, threshold) / region.size for region in regions])))
    area = 0.0
    for (left, low), (right, high) in itertools.pairwise(points):
        if left < limit and right > left:
            end = min(right, limit)
            at_end = low + (high - low) * (end - left) / (right - left)
            area += (end - left) * (low + at_end) / 2
    return area / limit


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_pixel_ranking_agrees_with_scikit_learn_on_all_pixels(name):
    rng = np.random.default_rng(0)
    mask = rng.random(PIXELS) < 0.005
    scores = DISTRIBUTIONS[name](rng, PIXELS, mask).astype(np.float32)
    metrics = AnomalyMetrics(threshold=0.0)
    metrics.update(scores.reshape(2, 1000, 1000), mask.reshape(2, 1000, 1000), [0, 1], [0, 1])
    got = metrics.compute()
    fpr, tpr, _ = sk.roc_curve(mask, scores, drop_intermediate=False)
    expected = {
        "pixel_auroc": sk.auc(fpr, tpr),
        "pixel_ap": sk.average_precision_score(mask, scores),
        "pixel_fpr_at_95_tpr": fpr[np.argmax(tpr >= 0.95)],
    }
    for metric, value in expected.items():
        error = abs(got[metric] - value)
        assert error < PROMISE, metric
        assert error <= metrics.error_bounds()[metric] + 1e-12, metric


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_agrees_with_a_direct_computation(limit):
    data = images(6, (24, 24))
    metrics = AnomalyMetrics(0.0, limit)
    for image in data:
        metrics.update(*image)
    maps, masks = (np.stack([image[part] for image in data]) for part in (0, 1))
    assert metrics.compute()["aupro"] == pytest.approx(exact_aupro(maps, masks, limit), abs=1e-12)


def test_aupro_agrees_with_a_direct_computation_under_ties():
    data = [(np.round(image[0], 1), *image[1:]) for image in images(6, (24, 24))]
    maps, masks = (np.stack([image[part] for image in data]) for part in (0, 1))
    assert accumulate(data).compute()["aupro"] == pytest.approx(exact_aupro(maps, masks, 0.3), abs=1e-12)


@pytest.mark.filterwarnings("ignore:undefined")
def test_each_region_weighs_the_same_in_aupro_whatever_its_area():
    mask = np.zeros((20, 20), bool)
    mask[:10, :10] = mask[15, 15] = True
    metrics = AnomalyMetrics(0.5)
    metrics.update(np.where(np.arange(20) < 12, 1.0, 0.0) * mask, mask, 1.0, 1)
    # the large region is found before any healthy pixel, the single pixel together with all of them
    assert metrics.compute()["aupro"] == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_diagonal_neighbors_form_one_region():
    metrics = AnomalyMetrics(0.5)
    metrics.update(np.eye(4), np.eye(4, dtype=bool), 1.0, 1)
    assert metrics.regions == 1


@pytest.mark.parametrize(
    ("scores_of", "aupro", "auroc"),
    [(lambda mask: mask, 1.0, 1.0), (lambda mask: ~mask, 0.0, 0.0), (lambda mask: 0 * mask, 0.15, 0.5)],
    ids=["perfect", "inverted", "constant"],
)
def test_aupro_stays_in_range_at_the_extremes(scores_of, aupro, auroc):
    metrics = AnomalyMetrics(0.5)
    for _, mask, _, label in images(7):
        metrics.update(scores_of(mask).astype(np.float32), mask, float(label), label)
    result = metrics.compute()
    assert 0 <= result["aupro"] <= 1
    assert (result["aupro"], result["pixel_auroc"]) == (pytest.approx(aupro), pytest.approx(auroc))


def test_dice_and_sensitivity_pool_all_pixels_strictly_above_the_threshold():
    data = images(8)
    maps, masks = (np.stack([image[part] for image in data]) for part in (0, 1))
    threshold = float(maps.ravel()[17])  # a score that occurs
    result = accumulate(data, threshold).compute()
    predicted = maps > threshold
    assert result["dice"] == pytest.approx(sk.f1_score(masks.ravel(), predicted.ravel()))
    assert result["sensitivity"] == pytest.approx(sk.recall_score(masks.ravel(), predicted.ravel()))


def test_image_metrics_are_those_of_scikit_learn():
    data = images(20)
    scores, labels = [image[2] for image in data], [image[3] for image in data]
    result = accumulate(data).compute()
    assert result["image_auroc"] == sk.roc_auc_score(labels, scores)
    assert result["image_ap"] == sk.average_precision_score(labels, scores)


@pytest.mark.slow
def test_memory_stays_within_the_bound_and_stops_growing():
    rng = np.random.default_rng(0)
    metrics, sizes = AnomalyMetrics(0.0), []
    mask = np.zeros((160, 160), bool)
    mask[:20, :20] = True
    for index in range(1000):
        metrics.update(rng.standard_normal((160, 160), np.float32), mask, 0.0, index % 2)
        sizes.append(metrics.nbytes)
    assert sizes[9] < max(sizes) <= MAX_STATE_BYTES < 1000 * 160 * 160 * 4
    assert max(sizes[500:]) < 1.05 * max(sizes[:500])
    assert metrics.histogram.keys.size <= MAX_BINS


@pytest.mark.slow
def test_scores_that_the_bins_cannot_resolve_are_reported():
    rng = np.random.default_rng(0)
    mask = rng.random(PIXELS) < 0.005
    wide = np.exp(40 * rng.uniform(-1, 1, PIXELS)) * rng.choice([-1, 1], PIXELS)
    narrow = 1000 + 0.8 * rng.random(PIXELS) + 0.2 * mask
    scores = np.where(rng.random(PIXELS) < 0.9, wide, narrow).astype(np.float32)
    metrics = AnomalyMetrics(0.0)
    metrics.update(scores.reshape(2, 1000, 1000), mask.reshape(2, 1000, 1000), [0, 1], [0, 1])
    with pytest.warns(UserWarning, match="pixel_auroc by at most"):
        result = metrics.compute()
    bounds = metrics.error_bounds()
    assert abs(result["pixel_auroc"] - sk.roc_auc_score(mask, scores)) <= bounds["pixel_auroc"]
    assert abs(result["pixel_ap"] - sk.average_precision_score(mask, scores)) <= bounds["pixel_ap"]


def test_without_lesions_pixel_metrics_are_none_with_a_reason():
    metrics = AnomalyMetrics(0.0)
    metrics.update(np.ones((2, 4, 4)), np.zeros((2, 4, 4), bool), [1.0, 2.0], [0, 1])
    with pytest.warns(UserWarning, match="pixel_auroc.*from 0 lesion and 32 healthy pixels") as caught:
        result = metrics.compute()
    assert len(caught) == 1
    assert [name for name in METRIC_NAMES if result[name] is None] == list(METRIC_NAMES[:6])


def test_with_healthy_images_only_image_metrics_are_none_with_a_reason():
    metrics = AnomalyMetrics(0.0)
    metrics.update(np.eye(4), np.eye(4), 1.0, 0)
    with pytest.warns(UserWarning, match="image_auroc, image_ap, from 0 anomalous and 1 healthy images"):
        result = metrics.compute()
    assert [name for name in METRIC_NAMES if result[name] is None] == ["image_auroc", "image_ap"]


@pytest.mark.filterwarnings("ignore:undefined")
def test_without_any_image_all_metrics_are_none():
    assert AnomalyMetrics(0.0).compute() == dict.fromkeys(METRIC_NAMES)


def test_metrics_that_are_all_defined_and_exact_come_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate(images(4)).compute()


@pytest.mark.slow
def test_the_order_of_updates_does_not_matter():
    data = images(30, (300, 300))  # enough different values for the resolution to adapt
    forward, backward = accumulate(data), accumulate(data[::-1])
    assert forward.compute() == pytest.approx(backward.compute(), abs=1e-12)
    assert forward.histogram.shift == backward.histogram.shift > 0
    assert np.array_equal(forward.histogram.keys, backward.histogram.keys)


@pytest.mark.slow
def test_merged_shards_equal_the_whole():
    data = images(31, (300, 300))
    whole, merged = accumulate(data), accumulate(data[:3])
    merged.merge(accumulate(data[3:]))
    assert merged.compute() == pytest.approx(whole.compute(), abs=1e-12)
    assert np.array_equal(merged.histogram.keys, whole.histogram.keys)


def test_shards_of_another_threshold_are_refused():
    with pytest.raises(BundleError, match=r"0\.1.*0\.2"):
        AnomalyMetrics(0.1).merge(AnomalyMetrics(0.2))


def test_zero_and_negative_zero_are_equal_scores():
    metrics = AnomalyMetrics(0.0)
    metrics.update(np.array([[0.0, -0.0]]), np.array([[True, False]]), 0.0, 1)
    assert metrics._has_both_classes() and metrics.histogram.keys.size == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_float_type_are_accepted(dtype):
    metrics = AnomalyMetrics(0.5)
    metrics.update(torch.eye(4, dtype=dtype)[None], torch.eye(4, dtype=torch.uint8)[None], torch.tensor(1.0), 1)
    assert metrics.true_positive == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_scores_that_are_not_finite_are_refused_in_one_line(bad):
    scores = np.zeros((4, 4))
    scores[0, 0] = bad
    with pytest.raises(BundleError, match="anomaly map has 1 of 16 values that are not finite") as error:
        AnomalyMetrics(0.0).update(scores, np.zeros((4, 4)), 0.0, 0)
    assert "\n" not in str(error.value)


def test_an_image_score_that_is_not_finite_is_refused():
    with pytest.raises(BundleError, match="image score has 1 of 1"):
        AnomalyMetrics(0.0).update(np.zeros((4, 4)), np.zeros((4, 4)), float("nan"), 0)


def test_a_mask_of_another_size_is_refused_with_both_shapes():
    with pytest.raises(BundleError, match=r"\(4, 4\).*\(4, 5\)"):
        AnomalyMetrics(0.0).update(np.zeros((4, 4)), np.zeros((4, 5)), 0.0, 0)


def test_a_mask_with_other_values_is_refused():
    with pytest.raises(BundleError, match="mask has values other than 0 and 1, up to 255"):
        AnomalyMetrics(0.0).update(np.zeros((2, 2)), np.full((2, 2), 255, np.uint8), 0.0, 0)


def test_a_batch_with_too_few_scores_is_refused():
    with pytest.raises(BundleError, match="2 anomaly maps came with 1 image scores"):
        AnomalyMetrics(0.0).update(np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), 0.0, [0, 0])


@pytest.mark.parametrize("limit", [0.0, 1.5])
def test_an_fpr_limit_out_of_range_is_refused(limit):
    with pytest.raises(BundleError, match="aupro_fpr_limit is .*: choose a false positive rate"):
        AnomalyMetric(0.0, limit)


def test_the_aupro_fpr_limit_of_the_config_is_that_of_the_metric_and_of_its_protocol():
    config = ConfigParser(ConfigParser.load_config_files(str(ROOT / "configs/train.json")))
    config["aupro_fpr_limit"] = 0.1
    config["test::metric::threshold"] = 0.2
    report = next(index for index, one in enumerate(config["test::handlers"]) if "protocol" in one)
    assert config.get_parsed_content("test::metric").local.fpr_limit == 0.1
    assert config.get_parsed_content(f"test::handlers::{report}::protocol")["aupro_fpr_limit"] == 0.1


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_map_is_refused_while_the_threshold_is_not_calibrated(threshold):
    with pytest.raises(BundleError, match="calibrate one"):
        AnomalyMetrics(threshold).update(np.zeros((4, 4)), np.zeros((4, 4)), 0.0, 0)


def test_a_volume_is_one_image_of_many_slices():
    metrics = AnomalyMetrics(0.2)
    metrics.update(np.ones((5, 4, 4)), np.zeros((5, 4, 4), bool), 1.0, 0)
    assert metrics.image_scores == [1.0]
    metrics.flush()
    assert metrics.histogram.weights[0].sum() == 5 * 4 * 4


def test_an_image_without_mask_counts_for_image_metrics_only():
    metrics = AnomalyMetrics(0.2)
    metrics.update(np.ones((4, 4)), None, 1.0, 1)
    metrics.update(np.zeros((4, 4)), None, 0.0, 0)
    with pytest.warns(UserWarning):
        values = metrics.compute()
    assert (values["image_auroc"], values["pixel_auroc"], values["dice"]) == (1.0, None, None)


def test_curves_are_thin_and_keep_the_area():
    metrics = accumulate(images(30))
    result = metrics.compute()
    (fpr, tpr), (recall, precision) = metrics.roc_curve(), metrics.pr_curve()
    assert len(fpr) == len(tpr) <= 1000 and len(recall) == len(precision) <= 1000
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and (recall[0], recall[-1]) == (0, 1)
    assert sk.auc(fpr, tpr) == pytest.approx(result["pixel_auroc"], abs=1e-3)
    assert sk.auc(recall, precision) == pytest.approx(result["pixel_ap"], abs=1e-2)


def test_curves_without_lesions_are_none():
    metrics = accumulate(images(1))
    assert metrics.roc_curve() is None and metrics.pr_curve() is None


def batches(data, size: int = 4):
    """(maps, masks, scores, labels) as lists of [1, H, W] tensors and numbers."""
    for start in range(0, len(data), size):
        maps, masks, scores, labels = zip(*data[start : start + size], strict=True)
        yield [torch.tensor(m)[None] for m in maps], [torch.tensor(m)[None] for m in masks], list(scores), list(labels)


@pytest.mark.parametrize("as_key", [True, False])
def test_a_monai_evaluator_reports_all_metrics(as_key):
    data = images(6)
    loader = [
        [{"map": torch.tensor(m)[None], "mask": torch.tensor(k)[None], "label": label}] for m, k, _, label in data
    ]
    metric = AnomalyMetric(
        0.2,
        output_transform=lambda output: (
            [item["map"] for item in output],
            [item["mask"] for item in output],
            [item["map"].max() for item in output],
            [item["label"] for item in output],
        ),
    )
    other = ignite.metrics.Average(lambda output: 0.0)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        loader,
        torch.nn.Identity(),
        iteration_update=lambda engine, batch: batch,
        decollate=False,
        key_val_metric={"pixel_auroc": metric} if as_key else {"other": other},
        additional_metrics={"other": other} if as_key else {"anomaly": metric},
    )
    expected = accumulate(data).compute()
    for _ in range(2):  # the second run starts afresh
        evaluator.run()
        assert {name: evaluator.state.metrics[name] for name in METRIC_NAMES} == pytest.approx(expected)


def test_values_are_plain_numbers_for_json():
    assert {type(value) for value in accumulate(images(4)).compute().values()} == {float}


def test_batched_tensors_and_lists_give_the_same():
    data = images(4)
    listed, batched = AnomalyMetric(0.2), AnomalyMetric(0.2)
    for maps, masks, scores, labels in batches(data):
        listed.update((maps, masks, scores, labels))
        batched.update((torch.stack(maps), torch.stack(masks), torch.tensor(scores), torch.tensor(labels)))
    assert listed.compute() == batched.compute()


def test_a_batch_of_unequal_lists_is_refused():
    maps, masks, scores, labels = next(batches(images(4)))
    with pytest.raises(BundleError, match="4 maps, 4 masks, 3 scores and 4 labels"):
        AnomalyMetric(0.2).update((maps, masks, scores[1:], labels))


def _rank(local_rank: int, path: str) -> None:
    """Rank 0 has one healthy image, rank 1 all others."""
    torch.set_num_threads(1)
    data = images(9)
    metric = AnomalyMetric(0.2)
    for batch in batches(data[:1] if local_rank == 0 else data[1:]):
        metric.update(batch)
    assert metric.compute() == metric.compute()  # computing does not change what a rank has seen
    torch.save((metric.compute(), metric.pooled.roc_curve()[1].tolist()), f"{path}/{local_rank}.pt")


@pytest.mark.slow
def test_two_ranks_with_uneven_shards_report_the_values_of_one(tmp_path):
    with idist.Parallel(backend="gloo", nproc_per_node=2) as parallel:
        parallel.run(_rank, str(tmp_path))
    whole = accumulate(images(9))
    for rank in range(2):
        values, tpr = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert values == pytest.approx(whole.compute(), abs=1e-12)
        assert tpr == pytest.approx(whole.roc_curve()[1].tolist())
