"""The report of a run: counts that are right, a page that loads nothing and runs no name, and copies without names."""

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from sklearn import metrics as sk

from bundle.errors import BundleError
from bundle.figures import Placement
from bundle.networks.likeness import patch_rates
from bundle.networks.scores import conformal_threshold
from bundle.provenance import DataSet
from bundle.report import Report, Truth
from bundle.report.copying import copy_report, read_report, reports_in, show_reports
from bundle.report.page import _number, page_of
from bundle.report.pictures import Extremes, pictures_of
from bundle.report.rates import Tally, curves_of, edges_of, kept_rates, tally_of_scores
from bundle.results import CaseResult, heat
from bundle.tracking import Tracker

EVIL = "</script><script>alert(1)</script>"


# ---- counts ----


def test_a_tally_counts_what_exceeds_each_edge_by_sample():
    tally = Tally(np.array([0.0, 1.0, 2.0]))
    tally.add(True, "p", np.array([-1.0, 0.0, 0.5, 1.5, 9.0]), np.array([False, False, True, False, True]))
    healthy, lesion, labels = tally.above()
    assert healthy.tolist() == [[3, 1, 1, 0]]
    assert lesion.tolist() == [[2, 2, 1, 1]]
    assert labels.tolist() == [True]


def test_cases_of_a_patient_are_one_sample():
    tally = Tally(np.array([0.0]))
    for owner in ("a", "a", "b"):
        tally.add(False, owner, np.ones(2), np.zeros(2, bool))
    assert sorted(tally.above()[0][:, 0].tolist()) == [2, 4]


def test_memory_does_not_grow_with_patients(monkeypatch):
    monkeypatch.setattr("bundle.report.rates.MOST_SAMPLES", 10)
    tally = Tally(np.array([0.0]))
    for owner in range(1000):
        tally.add(False, owner, np.ones(1), np.zeros(1, bool))
    assert len(tally.samples) == 10
    assert tally.above()[0][:, 0].sum() == 1000


def test_processes_together_count_what_one_would():
    edges, random = np.linspace(-2, 2, 9), np.random.default_rng(0)
    values = random.normal(size=(6, 50))
    whole, parts = Tally(edges), [Tally(edges), Tally(edges)]
    for owner, row in enumerate(values):
        for tally in (whole, parts[owner % 2]):
            tally.add(False, owner, row, row > 1)
    parts[0].join(parts[1], 1)
    for mine, theirs in zip(whole.above()[:2], parts[0].above()[:2], strict=True):
        np.testing.assert_array_equal(mine.sum(axis=0), theirs.sum(axis=0))


@pytest.fixture(scope="module")
def scored():
    random = np.random.default_rng(1)
    labels = np.arange(120) % 3 == 0
    return random.normal(size=120).round(2) + 1.5 * labels, labels


def test_metrics_of_scores_are_those_of_scikit_learn_and_lie_in_their_intervals(scored):
    scores, labels = scored
    found = curves_of(tally_of_scores(scores, labels, list(range(120))), 1.0)["metrics"]
    expected = {
        "auroc": sk.roc_auc_score(labels, scores),
        "ap": sk.average_precision_score(labels, scores),
        "sensitivity": sk.recall_score(labels, scores > 1.0),
        "dice": sk.f1_score(labels, scores > 1.0),
    }
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=0.03 if name in ("sensitivity", "dice") else 1e-9)
        assert found[name]["low"] < value < found[name]["high"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        labels = np.arange(100) < 50
        scores = random.normal(size=100) + labels
        interval = curves_of(tally_of_scores(scores, labels, list(range(100))), 0.0)["metrics"]["auroc"]
        inside += interval["low"] < 0.7602 < interval["high"]  # Phi(1 / sqrt 2)
    assert inside >= 34  # 38 are expected; fewer have a probability below 2 %


def test_patients_with_many_alike_cases_make_the_interval_wide():
    random = np.random.default_rng(0)
    patient = np.repeat(np.arange(20), 10)
    labels = patient >= 10
    scores = random.normal(size=20)[patient] + labels + 1e-3 * random.normal(size=200)
    widths = []
    for owners in (list(range(200)), patient.tolist()):
        found = curves_of(tally_of_scores(scores, labels, owners), 0.0)["metrics"]["auroc"]
        widths.append(found["high"] - found["low"])
    assert widths[1] > 2 * widths[0]


def test_curves_need_both_classes():
    assert curves_of(tally_of_scores([1.0, 2.0], [False, False], [0, 1]), 1.0) is None


def test_measured_rates_are_those_of_healthy_values_above_the_threshold():
    tally = Tally(np.linspace(0, 1, 1001))
    for owner in range(20):
        tally.add(False, owner, np.linspace(0, 1, 500), np.zeros(500, bool))
    points = kept_rates(np.array([0.1, 0.5]), np.array([0.9, 0.5]), tally)
    assert [point["measured"] for point in points] == pytest.approx([0.1, 0.5], abs=0.01)


@pytest.mark.parametrize("threshold", [2.3, 500.0, -1.0, np.inf])
def test_edges_ascend_around_every_threshold(threshold):
    edges = edges_of(threshold)
    assert (np.diff(edges) > 0).all()
    if 0 < threshold < np.inf:
        assert np.abs(edges / threshold - 1).min() < 0.01


def test_a_model_keeps_what_shares_of_healthy_patches_exceed(detector):
    scores = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    detector.case_likeness.keep_patches(scores)
    for rate, kept in zip(patch_rates()[10::20], detector.case_likeness.healthy_patches[10::20], strict=True):
        assert float((scores > kept).float().mean()) == pytest.approx(float(rate), abs=1e-4)


def test_a_state_without_these_shares_loads(detector):
    likeness = detector.case_likeness
    state = {name: value for name, value in likeness.state_dict().items() if name != "healthy_patches"}
    likeness.keep_patches(torch.ones(5))
    likeness.load_state_dict(state)
    assert not likeness.healthy_patches.any()


# ---- pictures ----


def result(name="a", score=1.0, slices=1, value=3.0, **options):
    anomaly_map = np.full((1, 40, 30, slices), -6.0, np.float32)
    anomaly_map[:, 10:20, 5:15] = value
    scores = np.arange(slices, dtype=np.float32)[::-1] + score
    return CaseResult(name, f"{name}.png", anomaly_map, scores, np.ones(slices, bool), 2.0, 1.5, **options)


def test_only_the_extremes_of_a_group_are_kept_and_made():
    made, extremes = [], Extremes(2)
    for score in (5, 1, 9, 3, 7, 2, 8, 6):
        extremes.add("g", score, f"n{score}", lambda score=score: made.append(score) or {"score": score})
    assert sorted(one.score for one in extremes.groups["g"]) == [1, 2, 8, 9]
    assert [one.score for one in extremes.in_turn()] == [9, 1, 8, 2]
    assert made == [5, 1, 9, 3, 7, 2, 8]  # 6 lies between


def test_pictures_of_a_volume_hold_the_worst_slice_and_spread_ones():
    image = torch.rand(1, 40, 30, 50)
    found = pictures_of(result(slices=50), image, None, -1.0, Placement((1.0, 2.0), "RLAP"), slices=7)
    positions = [frame["slice"] for frame in found["frames"]]
    assert positions[found["start"]] == 0
    assert len(positions) in (7, 8) and positions == sorted(positions)
    assert found["millimeters"] == 60.0 and found["edges"] == "RLAP"


def test_the_picture_of_a_map_keeps_the_colors_of_all_pictures_and_no_air():
    image = torch.zeros(1, 40, 30, 1)
    image[:, 8:30, 3:25] = 0.5
    truth = np.zeros((40, 30, 1))
    truth[12, 8] = 1
    frame = pictures_of(result(value=2.0), image, truth, 0.02, None)["frames"][0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame["map"].split(",")[1]))))
    assert pixels.shape == (40, 30)
    assert pixels[15, 10] == round(255 * float(heat(np.array(2.0), 2.0)))
    assert pixels[0, 0] == 0
    lesion = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame["truth"].split(",")[1]))))
    assert lesion.sum() == 1 and lesion[12, 8]


# ---- the page ----


def a_report(detector, folder, names=("a", "b"), limit_mb=8.0, command="evaluating"):
    (folder / "model.pt").write_bytes(b"model")
    tracker = Tracker("off", command, {"backbone": "b"}, {"seed": 3, "dataset_dir": "/secret/place"})
    tracker.data = DataSet({"test": [{"name": name, "image": "x"} for name in names]}, folder)
    detector.threshold.fill_(2.0)
    detector.image_threshold.fill_(1.5)
    report = Report(command, folder, detector, folder / "model.pt", tracker, limit_mb)
    image = MetaTensor(torch.rand(1, 40, 30, 1, generator=torch.Generator().manual_seed(0)), meta={})
    for number, name in enumerate(names):
        found = result(name, float(number), unlike=() if number else None)
        mask = np.zeros((40, 30, 1))
        mask[12:18, 8:12] = number % 2
        truth = Truth(number % 2, number, mask, (found.anomaly_map, mask[None] > 0))
        report.add_case(found, {"image": image, "pred_patch_map": torch.randn(1, 4, 4, 1)}, truth, [f"{name}_map.tiff"])
    report.add_metrics({"pixel_auroc": 0.5}, {"size": "native"})
    return report


@pytest.fixture
def page(detector, tmp_path):
    report = a_report(detector, tmp_path, [EVIL, "__proto__", "patient b", "patient c"])
    report.metrics = dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro", "pixel_fpr_at_95_tpr"), 0.5)
    report.metrics |= dict.fromkeys(("dice", "sensitivity", "image_auroc", "image_ap"))
    report.finish()
    return report.file


def test_a_name_stays_text_wherever_it_stands(page):
    text = page.read_text("utf-8")
    assert EVIL not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("</script>") == 5  # three of data, two of programs
    record, pictures = read_report(page)
    assert (
        {case["name"] for case in record["cases"]} == {EVIL, "__proto__", "patient b", "patient c"} == pictures.keys()
    )


def test_the_page_loads_nothing_and_forbids_to(page):
    text = page.read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=", text)


def test_links_lead_to_files_beside_the_page(page):
    text = page.read_text("utf-8")
    assert 'href="./patient%20b_map.tiff"' in text


def test_a_limit_leaves_out_pictures_and_is_kept(detector, tmp_path):
    names = [f"case {number:03d}" for number in range(300)]
    report = a_report(detector, tmp_path, names)
    report.metrics, report.limit = {}, 1.2e6
    report.finish()
    assert report.file.stat().st_size <= 1.2e6
    record, pictures = read_report(report.file)
    assert len(record["cases"]) == 300 and 0 < len(pictures) < 300


def test_no_report_is_written_where_none_is_wanted(detector, tmp_path):
    report = a_report(detector, tmp_path, limit_mb=0)
    report.finish()
    assert not report.file.exists() and report.lines == []


def test_a_limit_without_room_for_the_page_is_refused(detector, tmp_path):
    with pytest.raises(BundleError, match="report_limit_mb is 0.5: give 2 or more, or 0"):
        a_report(detector, tmp_path, limit_mb=0.5)
    with pytest.raises(BundleError, match=r"takes .* MB without a picture, but report_limit_mb is 0.001"):
        page_of(BARE, [], [], 1e3)


BARE = {
    "format": 1, "command": "inferring", "made": "now", "model": "m", "unit": "z", "rates": dict.fromkeys(
        ("threshold", "image_threshold", "false_positive_rate", "image_false_positive_rate")),
    "data": {"name": "d", "words": "d", "counts": "1", "is_synthetic": False}, "epochs": [], "notes": [], "metrics": {},
    "protocol": {}, "cases": [], "left_out": 0, "validation": None, "of_pixels": None, "of_cases": None,
    "patches": None, "calibration": [], "facts": {}, "settings": {}, "versions": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "says"), [(1999, "1999"), (0.12345, "0.123"), (1234.5, "1234"), (None, "not defined"), (12.34, "12.3")]
)
def test_numbers_are_written_as_people_write_them(value, says):
    assert _number(value) == says


def test_a_page_of_squared_errors_promises_nothing_of_z_scores():
    assert "A z-score of 3" in page_of(BARE, [], [], 8e6)
    assert "A z-score of 3" not in page_of(BARE | {"unit": "squared error"}, [], [], 8e6)


def test_a_page_of_next_to_nothing_can_be_made():
    assert "Inference: d" in page_of(BARE, [], [], 8e6)


def test_calibration_compares_wanted_rates_with_healthy_test_cases(detector, tmp_path, monkeypatch):
    healthy = torch.randn(256, generator=torch.Generator().manual_seed(0))
    detector.case_likeness.healthy_scores.copy_(healthy.sort().values)
    detector.case_likeness.keep_patches(torch.randn(5000, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(type(detector.case_likeness), "knows", property(lambda self: True))
    learned = SimpleNamespace(patients=50, cases={}, of_volumes=False)
    monkeypatch.setattr(type(detector.case_likeness), "learned", property(lambda self: learned))
    report = a_report(detector, tmp_path, [f"c{number}" for number in range(40)])
    record = report._record(report.lines, report.pixels, report.patches)
    of_images = [point for point in record["calibration"] if point["of"] == "images"]
    assert min(point["wanted"] for point in of_images) >= 1 / 51
    for point in of_images:
        limit = conformal_threshold(detector.case_likeness.healthy_scores, point["wanted"], "images")
        scores = [line["score"] for line in report.lines if line["label"] == 0]
        assert point["measured"] == pytest.approx(np.mean(np.array(scores) > limit), rel=1e-3)
    assert {point["of"] for point in record["calibration"]} == {"images", "patches"}
    assert json.dumps(record, allow_nan=False)


# ---- copies ----


def test_a_copy_without_names_has_none_of_them(page, tmp_path, capsys):
    copy_report(page, tmp_path / "copy.html", 8.0, hide_names=True)
    text = (tmp_path / "copy.html").read_text("utf-8")
    for name in ("patient b", "_map.tiff", "secret", tmp_path.name, "alert(1)"):
        assert name not in text
    record, pictures = read_report(tmp_path / "copy.html")
    assert [case["name"] for case in record["cases"]] == [f"case {number:04d}" for number in range(1, 5)]
    assert pictures.keys() == {case["name"] for case in record["cases"]}
    assert record["settings"] == {"seed": 3}


def test_a_copy_stands_in_the_place_of_no_other_file(page, tmp_path):
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(BundleError, match=r"notes\.html' is no report"):
        copy_report(page, tmp_path / "notes.html", 8.0)
    assert (tmp_path / "notes.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format":1', '"format":99'),
        ("data:image/webp;base64,", "https://elsewhere/"),
        ('"start":0', '"start":"0"'),
        ('id="record_data"', 'id="other"'),
    ],
)
def test_a_page_of_another_hand_is_read_as_data_or_refused(page, old, new):
    page.write_text(page.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises(BundleError, match="is no report of this version"):
        read_report(page)


def test_a_page_of_another_hand_that_lacks_something_has_no_copy(page, tmp_path):
    page.write_text(page.read_text("utf-8").replace('"protocol":', '"other":'), "utf-8")
    with pytest.raises(BundleError, match="is no report of this version"):
        copy_report(page, tmp_path / "copy.html", 8.0)
    assert not (tmp_path / "copy.html").exists()


def test_reports_of_folders_are_found_and_told(page, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert reports_in([page.parent]) == [page]
    show_reports([page.parent])
    assert opened == [page.resolve().as_uri()]
    assert "4 cases, 4 with pictures" in capsys.readouterr().out
    with pytest.raises(BundleError, match="no report at '.*nothing': give the output_dir"):
        reports_in([page.parent / "nothing"])


# ---- runs ----


def test_a_training_writes_a_report_of_training_and_test(trained):
    record, pictures = read_report(trained[0] / "training_report.html")
    table = json.loads((trained[0] / "metrics.json").read_text())
    assert record["metrics"]["pixel_auroc"] == table["pixel_auroc"]
    assert record["epochs"][-1]["epoch"] >= 1 and "healthy_validation_loss" in record["epochs"][0]
    assert len(record["notes"]) == 3
    assert len(record["cases"]) == sum(table["images"].values())
    assert record["validation"]["patches"] and record["calibration"]
    interval = record["of_pixels"]["metrics"]["auroc"]
    assert interval["value"] == pytest.approx(table["pixel_auroc"], abs=0.005)
    dice = record["of_pixels"]["metrics"]["dice"]["value"]
    assert dice == pytest.approx(table["dice"], abs=0.02)
    assert pictures.keys() <= {case["name"] for case in record["cases"]}
