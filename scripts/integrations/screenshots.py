"""Pictures of results in OHIF, as a person sees them.

python -m scripts.integrations.screenshots FOLDER --study UID --out docs

Needs Chromium, which draws in software, and `playwright`, which the extra `test` includes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bundle.errors import BundleError
from bundle.files import whole_file
from scripts.integrations.viewer import viewing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OBJECTS = {"mask": "Anomaly mask", "map": "Anomaly map", "overlay": "Anomaly overlay", "report": "Anomaly report"}
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
CANVAS = "canvas.cornerstone-canvas"
THUMBNAIL = "[data-cy^=study-browser-thumbnail]"
WINDOW_OF_MAPS = r"/W:\s*100/.test(document.body.innerText)"  # OHIF has one for all maps
NOTICE_OF_MAPS = "multiplied by 100"
WIDTH, HEIGHT = 1000, 800
PAGE_SECONDS = 60
DRAWN_SECONDS = 3


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium without a window.

    Raises:
        BundleError: if there is none on this machine.
    """
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise BundleError("no chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        # its sandbox needs rights that containers lack; it opens pages of this machine alone
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *SOFTWARE_GL])
        yield opened
        opened.close()


@contextmanager
def new_page(opened: Browser) -> Iterator[Page]:
    """A page, [HEIGHT, WIDTH] pixels."""
    page = opened.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.set_default_timeout(1000 * PAGE_SECONDS)
    yield page
    page.close()


def open_object(page: Page, address: str, study: str, description: str) -> None:
    """Open the series whose description begins so.

    Args:
        page: to open it in.
        address: of the viewer.
        study: UID.
        description: of the series.
    """
    page.goto(f"{address}/viewer?StudyInstanceUIDs={study}")
    page.get_by_text("Confirm and Hide").click()  # that this is for research
    page.locator(THUMBNAIL, has_text=description).dblclick()
    if description == OBJECTS["mask"]:
        page.get_by_text("Yes", exact=True).click()  # that it shall be drawn
    if description == OBJECTS["map"]:
        page.wait_for_function(WINDOW_OF_MAPS)
        page.get_by_text(NOTICE_OF_MAPS).first.wait_for()  # which lies over the picture for some seconds
        page.get_by_text(NOTICE_OF_MAPS).first.wait_for(state="hidden")


def slice_shown(page: Page) -> int:
    """The number of the slice, from 1, that the viewer tells."""
    shown = re.search(r"I:\s*\d+ \((\d+)/\d+\)", page.inner_text("body"))
    return int(shown[1]) if shown else 0


def show_slice(page: Page, number: int) -> None:
    """Scroll to the slice of this number."""
    page.locator(CANVAS).hover()
    while slice_shown(page) != number:
        page.keyboard.press("ArrowUp" if slice_shown(page) > number else "ArrowDown")
        page.wait_for_timeout(200)


def main() -> None:
    """Write a picture of each object."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of results, or of DICOM files")
    parser.add_argument("--study", required=True, metavar="UID")
    parser.add_argument("--slice", type=int, default=1, help="its number in the viewer, from 1 (default: 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        with viewing(arguments.folders, port=0) as address, browser() as opened:
            for name, description in OBJECTS.items():
                with new_page(opened) as page, whole_file(arguments.out / f"viewer_{name}.png") as partial:
                    open_object(page, address, arguments.study, description)
                    page.wait_for_timeout(1000 * DRAWN_SECONDS)
                    if name != "report":  # which has no slices
                        show_slice(page, arguments.slice)
                        page.wait_for_timeout(1000 * DRAWN_SECONDS)
                    page.screenshot(path=partial)
    except BundleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
