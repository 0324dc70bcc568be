"""Pictures of MLflow's pages of runs, as a person sees them.

python -m scripts.integrations.mlflow_screenshots output/runs.db --out docs

Takes an output folder, or a database that several trainings share. The page of a run, of a data set and of a model are
those of the latest one. Needs what scripts.integrations.screenshots needs.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bundle.browse import CHARTS, browsing
from bundle.errors import BundleError
from bundle.files import whole_file
from scripts.integrations.screenshots import PAGE_SECONDS, browser

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZE = {"width": 1850, "height": 950}  # MLflow draws only the columns that fit
DRAWN_SECONDS = 3
RUNS = "a[href*='/runs/']"
MODELS = "a[href*='/models/m-']"
MODE = "?workflowType=machine_learning"  # without it a page opens in the mode for chats
METRICS = ("pixel_auroc", "pixel_ap", "aupro")  # whose columns are chosen
MORE_COLUMNS = "[data-component-id*=addcolumncta]"  # a plus beside the table
ASSISTANT = "button[aria-label='Close']"  # of the panel that stands open at the first visit


def pictures(page: Page, url: str, out: Path) -> None:
    """Write ``mlflow_NAME.png`` of the table of runs, the charts, a data set, a run and its model.

    Args:
        page: to open them in.
        url: of the table of runs.
        out: the folder.
    """

    def take(name: str) -> None:
        page.wait_for_timeout(1000 * DRAWN_SECONDS)
        with whole_file(out / f"mlflow_{name}.png") as partial:
            page.screenshot(path=partial)

    page.goto(url)
    page.locator(RUNS).first.wait_for()
    with suppress(Exception):  # it may be closed
        page.locator(ASSISTANT).last.click(timeout=3000)
    for name in METRICS:
        page.locator(MORE_COLUMNS).first.click()
        page.get_by_text(name, exact=True).first.click()
        page.keyboard.press("Escape")
    take("runs")
    page.get_by_role("button").filter(has_text="(").first.click()
    take("dataset")
    page.goto(f"{url}{CHARTS}")
    take("charts")
    for name, links, table in (("run", RUNS, url), ("model", MODELS, url.replace("/runs?", "/models?"))):
        page.goto(table)
        place = str(page.locator(links).first.get_attribute("href"))
        page.goto(f"{url.partition('#')[0]}{place.partition('?')[0]}{MODE}")
        page.get_by_text("About this").wait_for()
        take(name)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        with browsing(arguments.results) as url, browser() as opened:
            page = opened.new_page(viewport=SIZE)  # type: ignore[arg-type]
            page.set_default_timeout(1000 * PAGE_SECONDS)
            pictures(page, url, arguments.out)
    except BundleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
