"""The numbers in the README and the model card are those of ``make train``."""

import json
import re

import pytest
from commands import ROOT, TRAIN, succeed

COLUMNS = {
    "pixel AUROC": "pixel_auroc",
    "pixel AP": "pixel_ap",
    "AUPRO": "aupro",
    "FPR at 95 % TPR": "pixel_fpr_at_95_tpr",
    "Dice": "dice",
    "image AUROC": "image_auroc",
    "image AP": "image_ap",
}
PAGES = ("README.md", "docs/README.md")
OTHER_MACHINES = 0.01  # how far the numbers of another processor may be off


def published(page):
    """The numbers of the sample cohort on a page, by metric."""
    head, row = re.search(r"^\| (pixel AUROC .*) \|\n\|[- |]+\|\n\| (.*) \|$", (ROOT / page).read_text(), re.M).groups()
    return {COLUMNS[name]: float(number) for name, number in zip(head.split(" | "), row.split(" | "), strict=True)}


def test_the_readme_and_the_model_card_have_the_same_numbers():
    first, second = map(published, PAGES)
    assert first == second
    assert list(first) == list(COLUMNS.values())


@pytest.mark.slow
def test_the_readme_and_the_model_card_have_the_numbers_of_the_main_job(tmp_path):
    cohort = tmp_path / "sample_cohort"
    places = {"cohort_dir": cohort, "dataset_dir": cohort / "slices", "output_dir": tmp_path / "output"}
    succeed("training", TRAIN, **places, backbone="efficientnet_lite0", device="cpu", tracking_uri="off")
    report = json.loads((tmp_path / "output/metrics.json").read_text())
    for page in PAGES:
        assert {name: report[name] for name in COLUMNS.values()} == pytest.approx(published(page), abs=OTHER_MACHINES)
    card = (ROOT / "docs/README.md").read_text()
    assert "{healthy} healthy and {anomalous} anomalous ones to test".format(**report["images"]) in card
