"""What a person sees of a run in MLflow's pages, in a real browser."""

import re

import pytest
from PIL import Image

from bundle.browse import CHARTS, browsing
from bundle.provenance import DataSet
from bundle.tracking import Tracker, database
from scripts.integrations.screenshots import PAGE_SECONDS, browser

WIDE = {"width": 2600, "height": 1400}  # MLflow draws only the columns that fit

MORE_COLUMNS = "[data-component-id*=addcolumncta]"  # a plus beside the table, which offers metrics and parameters


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The table of runs of two seeds in a browser, and what went wrong in it."""
    folder = tmp_path_factory.mktemp("tracked")
    Image.new("RGB", (40, 30), "red").save(folder / "examples.png")
    for seed in (0, 1):
        data = DataSet({"training": [{"name": "a", "image": str(folder / "examples.png")}]}, folder / "scans")
        tags = {"git_commit": "abcdef0123"}
        tracker = Tracker(database(folder), "training", tags, {"seed": seed}, output_dir=folder, data=data)
        for epoch in (1, 2, 3):
            tracker.metrics({"healthy_validation_loss": 9.0 - epoch + seed, "learning_rate": 0.1 / epoch}, epoch)
        tracker.describe("| aupro | 0.512 |\n| --- | --- |", ["figures/examples.png"])
        tracker.log({"aupro": 0.512}, {"figures": [folder / "examples.png"]})
        tracker.finish()
    faults = []
    with browsing(folder) as url, browser() as opened:
        page = opened.new_page(viewport=WIDE)
        page.set_default_timeout(1000 * PAGE_SECONDS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("response", lambda answer: faults.append(answer.url) if answer.status >= 500 else None)
        page.goto(url)
        yield page, url, faults


def test_the_table_of_runs_has_names_data_sets_and_metrics(page):
    page, _, faults = page
    page.get_by_text("2 matching runs").wait_for()
    assert page.get_by_role("link", name="training 2").count() == 2
    assert page.get_by_text("scans (").count() == 2
    page.locator(MORE_COLUMNS).click()
    page.get_by_text("aupro", exact=True).click()
    page.get_by_text("0.512").first.wait_for()
    assert not faults


def test_a_data_set_opens_with_its_splits_and_its_path(page):
    page, url, faults = page
    page.goto(url)
    page.get_by_text("scans (").first.click()
    page.get_by_text("training: 1").wait_for()
    page.get_by_text(re.compile("Path: .*/scans")).wait_for()
    assert not faults


def test_both_seeds_are_curves_in_one_chart(page):
    page, url, faults = page
    page.goto(f"{url}{CHARTS}")
    page.get_by_text("healthy_validation_loss").first.wait_for()
    page.wait_for_function("document.querySelectorAll('.scatterlayer .trace').length >= 4")
    assert not faults


def test_the_page_of_a_run_has_source_data_set_and_a_description_with_its_picture(page):
    page, url, faults = page
    page.goto(url)
    page.get_by_role("link", name="training 2").first.click()
    page.get_by_text("About this run").wait_for()
    page.get_by_text("dinov3_spatial_ar training").wait_for()
    page.get_by_text("abcdef0").first.wait_for()
    page.get_by_text("scans (").first.wait_for()
    page.wait_for_function(
        "[...document.images].some(one => one.src.includes('get-artifact') && one.naturalWidth === 40)"
    )
    assert not faults
