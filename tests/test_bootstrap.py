"""The bootstrap over test images: equal to scikit-learn on resampled images, paired, and honest about what it knows."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from bundle.errors import BundleError
from bundle.metrics import AnomalyMetric, AnomalyMetrics
from scripts.benchmarks.bootstrap import compare, draw, evaluate
from scripts.benchmarks.common import METRICS
from scripts.benchmarks.tables import PARTS, ImageTables, TabledMetric, part_of, patient_of
from scripts.benchmarks.words import difference_words

SIDE = 96


def test_image(seed, contrast=1.0, levels=None):
    """A smooth map with some signal on one or two lesions, mask, score and label; odd seeds are anomalous."""
    random = np.random.default_rng(seed)
    mask = np.zeros((SIDE, SIDE), bool)
    for _ in range(random.integers(1, 3) if seed % 2 else 0):
        (row, column), (height, width) = random.integers(0, 70, 2), random.integers(4, 26, 2)
        mask[row : row + height, column : column + width] = True
    noise = ndimage.gaussian_filter(random.normal(size=(SIDE, SIDE)), 3) * 10
    values = noise + contrast * mask * random.uniform(0, 3)
    if levels:
        values = np.clip(np.round(values * 2), 0, levels - 1)
    return values.astype(np.float32), mask, float(np.sort(values.ravel())[-90:].mean()), seed % 2


test_image.__test__ = False


def tables_in(folder, count=40, masks=True, **kind):
    """Tables of ``count`` images, and the metrics that the bundle gives."""
    metric = TabledMetric(folder / "tables.npz", threshold=1.0)
    for start in range(0, count, 4):
        images = [test_image(seed, **kind) for seed in range(start, min(start + 4, count))]
        output = [list(one) for one in zip(*images, strict=True)]
        output[1] = output[1] if masks else [None] * len(images)
        batch = [{"name": f"{'Ungood' if one[3] else 'good'}/{start + index}"} for index, one in enumerate(images)]
        metric.iteration_completed(SimpleNamespace(state=SimpleNamespace(output=output, batch=batch)))
    return folder / "tables.npz", metric.compute()


@pytest.mark.parametrize("kind", [{}, {"contrast": 4.0}, {"levels": 7}])
def test_without_resampling_the_numbers_are_those_of_the_bundle(tmp_path, kind):
    path, expected = tables_in(tmp_path, **kind)
    tables = ImageTables.read(path)
    found = evaluate(tables, np.ones((1, 40), np.float32))
    for metric in METRICS:
        assert found[metric][0] == pytest.approx(expected[metric], abs=1e-4)


def test_a_drawn_test_set_has_the_numbers_of_one_that_holds_its_images_so_often(tmp_path):
    tables = ImageTables.read(tables_in(tmp_path)[0])
    (_, counts) = draw(tables.labels, 1)
    whole = AnomalyMetrics(1.0)
    for seed, count in enumerate(counts):
        for _ in range(int(count)):
            whole.update(*test_image(seed))
    found, expected = evaluate(tables, counts[None]), whole.compute()
    for metric in METRICS:
        assert found[metric][0] == pytest.approx(expected[metric], abs=1e-4)


def test_keeping_tables_changes_no_number(tmp_path):
    plain = AnomalyMetric(1.0)
    plain.update(tuple(map(list, zip(*[test_image(seed) for seed in range(40)], strict=True))))
    assert tables_in(tmp_path)[1] == plain.compute()


def test_a_draw_holds_as_many_healthy_and_anomalous_images_as_there_are():
    labels = np.arange(30) < 8
    counts = draw(labels, 200)
    assert (counts[0] == 1).all()
    assert (counts[:, labels].sum(axis=1) == 8).all()
    assert (counts[:, ~labels].sum(axis=1) == 22).all()
    assert 0 in counts[1:] and counts.max() > 2
    np.testing.assert_array_equal(counts, draw(labels, 200))


def test_images_of_a_patient_are_drawn_together_and_patients_with_a_lesion_apart():
    patients = [f"p{index // 4}" for index in range(40)]
    labels = np.arange(40) >= 30  # p7 has healthy and anomalous images
    counts = draw(labels, 200, patients)
    by_patient = counts.reshape(len(counts), 10, 4)
    assert (by_patient == by_patient[..., :1]).all()
    assert (by_patient[:, :7, 0].sum(axis=1) == 7).all()
    assert (by_patient[:, 7:, 0].sum(axis=1) == 3).all()


def test_copies_of_an_image_make_intervals_no_narrower_where_the_patient_is_known(tmp_path):
    metric = TabledMetric(tmp_path / "tables.npz", threshold=1.0)
    for copy in range(4):
        images = [test_image(seed) for seed in range(40)]
        batch = [{"name": f"patient_{seed:02}_slice_{copy}"} for seed in range(40)]
        output = [list(one) for one in zip(*images, strict=True)]
        metric.iteration_completed(SimpleNamespace(state=SimpleNamespace(output=output, batch=batch)))
    metric.compute()
    paths = {"ours": [tmp_path / "tables.npz"]}
    by_image, by_patient = (
        compare(paths, "ours", "all", patient_pattern=pattern)["rows"]["ours"]["pixel_ap"]["interval"]
        for pattern in (None, r"patient_(\d+)")
    )
    assert np.diff(by_patient) > 1.6 * np.diff(by_image)


@pytest.mark.parametrize(
    ("pattern", "patient"),
    [(None, "good/p12_s3"), (r"p(\d+)_", "12"), (r"p\d+", "p12"), ("nobody", "good/p12_s3")],
)
def test_the_pattern_finds_the_patient_in_a_name(pattern, patient):
    assert patient_of("good/p12_s3", pattern) == patient


def test_all_images_of_a_patient_are_in_the_same_half(tmp_path):
    tables = ImageTables.read(tables_in(tmp_path)[0])
    patients = [{name[-1] for name in tables.part(part, r"\d$").names} for part in ("report", "development")]
    assert patients[0] | patients[1] == set("0123456789")
    assert not patients[0] & patients[1]


def test_the_interval_holds_the_value_and_shrinks_with_more_images(tmp_path):
    widths = []
    for count in (40, 160):
        (tmp_path / str(count)).mkdir()
        path, _ = tables_in(tmp_path / str(count), count)
        row = compare({"ours": [path]}, "ours", "all")["rows"]["ours"]
        for metric in METRICS:
            assert row[metric]["interval"][0] < row[metric]["seeds"][0] < row[metric]["interval"][1]
        widths.append(np.diff(row["pixel_ap"]["interval"])[0])
    assert widths[1] < 0.8 * widths[0]


def test_differences_are_paired_and_so_surer_than_the_numbers_themselves(tmp_path):
    paths = {}
    for name, contrast in {"ours": 1.0, "twin": 1.0, "better": 1.4}.items():
        (tmp_path / name).mkdir()
        paths[name] = [tables_in(tmp_path / name, contrast=contrast)[0]]
    rows = compare(paths, "ours", "all")["rows"]
    assert rows["ours"]["pixel_ap"]["difference"] is None
    assert rows["twin"]["pixel_ap"]["difference"] == [0, 0, 0]
    value, low, high = rows["better"]["pixel_ap"]["difference"]
    assert 0 < low < value < high
    assert high - low < 0.5 * np.diff(rows["better"]["pixel_ap"]["interval"])[0]


def test_seeds_are_averaged_within_each_draw(tmp_path):
    paths = []
    for name, contrast in {"a": 1.0, "b": 1.4}.items():
        (tmp_path / name).mkdir()
        paths.append(tables_in(tmp_path / name, contrast=contrast)[0])
    rows = compare({"ours": paths[:1], "both": paths, "other": paths[1:]}, "ours", "all")["rows"]
    both, other = rows["both"]["aupro"], rows["other"]["aupro"]
    assert both["seeds"] == rows["ours"]["aupro"]["seeds"] + other["seeds"]
    np.testing.assert_allclose(both["difference"], np.array(other["difference"]) / 2, atol=1e-9)


def test_image_labels_alone_give_image_metrics_alone(tmp_path):
    with pytest.warns(UserWarning, match="undefined"):
        path, expected = tables_in(tmp_path, masks=False)
    row = compare({"ours": [path]}, "ours", "all")["rows"]["ours"]
    assert row["pixel_ap"] == row["aupro"] == {"seeds": [None], "interval": None, "difference": None}
    assert row["image_auroc"]["seeds"] == pytest.approx([expected["image_auroc"]])


def test_methods_that_saw_other_images_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = tables_in(tmp_path / "a", 8)[0], tables_in(tmp_path / "b", 12)[0]
    with pytest.raises(BundleError, match="is of other test images"):
        compare({"ours": [one], "other": [other]}, "ours", "all")
    with pytest.raises(BundleError, match="measure the cell again"):
        compare({"ours": [tmp_path / "nothing.npz"]}, "ours")


def test_a_thousand_draws_of_many_images_take_seconds(tmp_path):
    random = np.random.default_rng(0)
    count, bins = 1000, 1000
    ImageTables(
        np.array([f"{index:04}" for index in range(count)]),
        np.arange(count) % 2 == 1,
        random.normal(size=count),
        *random.integers(0, 99, (3, count, bins)).astype(np.float32),
        np.zeros(bins, bool),
        0.3,
    ).write(tmp_path / "tables.npz")
    started = time.perf_counter()
    compare({"ours": [tmp_path / "tables.npz"]}, "ours", "all")
    assert time.perf_counter() - started < 15


def test_each_half_has_about_half_of_the_images_and_the_name_alone_decides():
    halves = [part_of(f"test/good/slice_{index}") for index in range(2000)]
    assert set(halves) == {"report", "development"}
    assert 900 < halves.count("report") < 1100
    for index in range(20):
        assert part_of(f"a/b/1.2.{index}") == part_of(f"1.2.{index}") == part_of(f"elsewhere/1.2.{index}")


def test_the_halves_are_apart_and_together_all(tmp_path):
    tables = ImageTables.read(tables_in(tmp_path)[0])
    names = {part: set(tables.part(part).names) for part in PARTS}
    assert not names["report"] & names["development"]
    assert names["report"] | names["development"] == names["all"] == set(tables.names)
    assert all(part_of(name) == "report" for name in names["report"])


def test_the_rows_of_a_part_stay_together(tmp_path):
    tables = ImageTables.read(tables_in(tmp_path)[0])
    half = tables.part("report")
    for name, label, score, lesion in zip(half.names, half.labels, half.scores, half.lesion, strict=True):
        (row,) = np.flatnonzero(tables.names == name)
        assert (label, score) == (tables.labels[row], tables.scores[row])
        np.testing.assert_array_equal(lesion, tables.lesion[row])


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ([0.012, -0.01, 0.03], "+1.2 [-1.0, +3.0] undecided"),
        ([-0.05, -0.08, -0.02], "-5.0 [-8.0, -2.0]"),
        ([0.0, 0.0, 0.0], "+0.0 [+0.0, +0.0] undecided"),
        (None, "-"),
    ],
)
def test_a_difference_is_undecided_where_its_interval_holds_zero(difference, words):
    assert difference_words(difference) == words
