"""The report of a run in a real browser: nothing goes wrong, nothing is asked for, and sliders move the pictures."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from bundle.provenance import DataSet
from bundle.report import Report, Truth
from bundle.results import CaseResult
from bundle.tracking import Tracker
from scripts.integrations.report_screenshots import LOOKS, opened_report
from scripts.integrations.screenshots import browser

CANVAS = "#gallery canvas"
SUM = (
    "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.reduce((a, b) => a + b, 0)"
)
CYAN = """canvas => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let at = 0; at < data.length; at += 4) count += data[at] === 51 && data[at + 1] === 255 && data[at + 2] === 255;
  return count;
}"""
CONTRAST = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((part) => Number(part) / 255);
    const line = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * line(r) + 0.7152 * line(g) + 0.0722 * line(b);
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!color.endsWith(', 0)')) return color;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest('svg, script')) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([element.tagName, element.textContent.slice(0, 30), ratio]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A report of pictures and volumes, half of them anomalous, by a model that knows healthy validation."""
    folder = tmp_path_factory.mktemp("reported")
    from builders import small_detector

    from bundle.networks import FeatureNetwork

    torch.manual_seed(0)
    detector = small_detector(FeatureNetwork("efficientnet_lite0"))
    detector.threshold.fill_(2.0)
    detector.image_threshold.fill_(1.5)
    (folder / "model.pt").write_bytes(b"model")
    random = np.random.default_rng(0)
    data = DataSet({"test": [{"name": "a", "image": str(folder / "model.pt")}]}, folder)
    tracker = Tracker("off", "evaluating", {"backbone": "b"}, data=data)
    report = Report("evaluating", folder, detector, folder / "model.pt", tracker)
    for number in range(40):
        label, slices = number % 2, 1 if number % 4 else 6
        values = random.normal(0, 0.5, (1, 48, 40, slices)).astype(np.float32)
        mask = np.zeros((48, 40, slices))
        mask[10:20, 10:20] = label
        values[:, 8:22, 8:22] += 3 * label
        scores = random.normal(2 * label, 0.5, slices).astype(np.float32)
        found = CaseResult(
            f"study-{number // 8}/case-{number:02d}", "x", values, scores, np.ones(slices, bool), 2.0, 1.5, unlike=()
        )
        image = MetaTensor(torch.from_numpy(random.uniform(0.3, 0.7, (1, 48, 40, slices)).astype(np.float32)), meta={})
        truth = Truth(label, number, mask, (values, mask[None] > 0))
        report.add_case(found, {"image": image, "pred_patch_map": torch.randn(1, 6, 6, slices)}, truth)
    report.add_metrics(dict.fromkeys(METRICS, 0.5), {"size": "native"})
    for epoch in (1, 2, 3):
        report.add_epoch(epoch, {"healthy_validation_loss": -70.0 - epoch, "learning_rate": 0.1 / epoch})
    report.finish()
    return report.file


METRICS = (
    *("pixel_auroc", "pixel_ap", "aupro", "pixel_fpr_at_95_tpr"),
    *("dice", "sensitivity", "image_auroc", "image_ap"),
)


@pytest.fixture(scope="module")
def opened():
    with browser() as chromium:
        yield chromium


@pytest.fixture
def page(opened, file):
    with opened_report(opened, file) as (page, found):
        yield page
        assert found["errors"] == []
        assert found["asked"] == [file.resolve().as_uri()]


def pixels(page, kind=SUM):
    page.wait_for_timeout(300)
    return page.locator(CANVAS).first.evaluate(kind)


def slide(page, name, value):
    page.locator(name).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_opacity_moves_every_picture(page):
    before = pixels(page)
    slide(page, "#opacity", 0)
    assert pixels(page) != before


def test_the_threshold_moves_outlines_and_what_is_said_of_it(page):
    drawn, says = pixels(page, CYAN), page.locator("#threshold_means").inner_text()
    assert drawn > 20 and "of the lesion pixels" in says and "healthy test patches" in says
    slide(page, "#threshold", 7.9)
    assert pixels(page, CYAN) == 0
    assert page.locator("#threshold_means").inner_text() != says
    page.locator("#reset_threshold").click()
    assert pixels(page, CYAN) == drawn


def test_the_score_threshold_calls_cases_anew(page):
    assert "20 anomalous cases above" in page.locator("#limit_means").inner_text()
    above = page.locator("#case_table .call", has_text="above").count()
    slide(page, "#limit", 100)
    page.wait_for_timeout(300)
    assert "0 of 20 anomalous cases above" in page.locator("#limit_means").inner_text()
    assert above > 0 == page.locator("#case_table .call", has_text="above").count()


def test_the_table_is_sorted_and_filtered_by_keyboard(page):
    names = page.locator("#case_table tbody tr:visible th")
    page.locator("#case_table thead button", has_text="name").focus()
    page.keyboard.press("Enter")
    assert names.first.inner_text() == "study-0/case-00"
    assert page.locator("#case_table th[aria-sort=ascending]").count() == 1
    page.keyboard.press("Enter")
    assert names.first.inner_text() == "study-4/case-39"
    page.locator("#find").fill("case-3")
    assert names.count() == 10
    folders = page.locator("#folder_table tbody tr:visible th")
    assert folders.count() == 0
    page.locator("#find").fill("study-4")
    assert names.count() == 8 and folders.all_inner_texts() == ["study-4"]
    page.locator("#find").fill("")
    page.locator("#folder_table thead button", has_text="folder").click()
    assert folders.all_inner_texts() == [f"study-{number}" for number in range(5)]
    page.locator("#find").fill("case-3")
    assert page.locator("#case_count").inner_text() == "10 of 40 cases"
    page.locator("#which").select_option("alarm")
    assert names.count() < 6


def test_a_volume_opens_with_its_slices_and_closes_by_escape(page):
    page.locator("#find").fill("case-02")
    page.locator("#order").select_option("highest scores")
    button = page.locator("#case_table tbody tr:visible .open").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("#viewer_name").inner_text() == "study-0/case-02"
    assert page.locator("#slice_label").is_hidden()
    page.keyboard.press("Escape")
    assert page.locator("#viewer").is_hidden()
    page.locator("#find").fill("case-04")
    page.locator("#case_table tbody tr:visible .open").first.click()
    before = page.locator("#slice_says").inner_text()
    slide(page, "#slice", 0 if not before.startswith("0") else 5)
    assert page.locator("#slice_says").inner_text() != before


def test_every_chart_is_drawn(page):
    charts = page.locator(".chart")
    assert charts.count() == 7  # scores, two curves of cases, two of pixels, two of epochs
    for index in range(charts.count()):
        assert charts.nth(index).locator("svg path").count() > 5


def test_everything_that_can_be_looked_at_has_words(page):
    assert page.locator("canvas:not([aria-label])").count() == 1  # that of the viewer, which is closed
    assert (
        page.locator("input:not([type=checkbox])").count() == page.locator("label input:not([type=checkbox])").count()
    )
    levels = page.evaluate("() => [...document.querySelectorAll('h1,h2,h3')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    tables = page.locator("table")
    assert all(tables.nth(index).locator("caption, th[scope]").count() >= 2 for index in range(tables.count()))


@pytest.mark.parametrize("name", LOOKS)
def test_a_page_is_readable_in_every_look(opened, file, name):
    with opened_report(opened, file, LOOKS[name]) as (page, found):
        assert page.evaluate(CONTRAST) == []
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= LOOKS[name].size[0]
        assert found["errors"] == []


def test_it_prints_on_white_with_all_lines_of_its_tables(opened, file, tmp_path):
    with opened_report(opened, file, LOOKS["dark"]) as (page, _):
        page.emulate_media(media="print", color_scheme="dark")
        page.screenshot(path=tmp_path / "print.png")
        assert np.asarray(Image.open(tmp_path / "print.png").convert("L"))[-20:, :5].min() > 250
        assert page.locator("#case_table tbody tr:visible").count() == 40
        box = page.locator(".tall").first.evaluate("one => [one.scrollHeight, one.clientHeight]")
        assert box[0] == box[1]
