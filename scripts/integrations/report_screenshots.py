"""Pictures of the report of a run, as a person sees it, and how long it takes to open.

python -m scripts.integrations.report_screenshots output/training_report.html --out docs

Needs what scripts.integrations.screenshots needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bundle.errors import BundleError
from bundle.files import whole_file
from scripts.integrations.screenshots import PAGE_SECONDS, browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

READY = "html[data-ready=yes]"  # the page forbids to evaluate text, as Playwright's other ways to wait do


class Look(NamedTuple):
    """How a page is looked at.

    Attributes:
        size: of the window, width and height in pixels.
        media: ``screen`` or ``print``.
        scheme: ``light`` or ``dark``.
        at: the id of the heading that the picture begins with; empty: the top.
    """

    size: tuple[int, int]
    media: str = "screen"
    scheme: str = "light"
    at: str = ""


LOOKS = {
    "light": Look((1100, 1300)),
    "dark": Look((1100, 1300), scheme="dark", at="pictures"),
    "charts": Look((1100, 1300), at="scores"),
    "phone": Look((390, 844), at="pictures"),
    "print": Look((800, 1130), media="print"),
}


@contextmanager
def opened_report(opened: Browser, file: Path, look: Look = LOOKS["light"]) -> Iterator[tuple[Page, dict[str, Any]]]:
    """The page of a report, drawn; with what went wrong (``errors``), where it asked (``asked``), and ``seconds``.

    Args:
        opened: the browser.
        file: the report.
        look: how it is looked at.
    """
    width, height = look.size
    page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=look.scheme)  # type: ignore[arg-type]
    page.set_default_timeout(1000 * PAGE_SECONDS)
    found: dict[str, Any] = {"errors": [], "asked": []}
    page.on("console", lambda said: found["errors"].append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found["errors"].append(str(error)))
    page.on("request", lambda request: found["asked"].append(request.url))
    page.emulate_media(media=look.media)  # type: ignore[arg-type]
    begin = time.monotonic()
    page.goto(file.resolve().as_uri())
    page.locator(READY).wait_for()
    found["seconds"] = time.monotonic() - begin
    if look.at:
        page.locator(f"#{look.at}").evaluate("heading => heading.scrollIntoView()")
    yield page, found
    page.close()


def main() -> None:
    """Write a picture of each look, and print size and time."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prefix", default="report", help="of the names of the pictures (default: report)")
    arguments = parser.parse_args()
    try:
        with browser() as opened:
            for name, look in LOOKS.items():
                with opened_report(opened, arguments.report, look) as (page, found):
                    page.wait_for_timeout(500)
                    with whole_file(arguments.out / f"{arguments.prefix}_{name}.png") as partial:
                        page.screenshot(path=partial)
                    print(f"{name}: {found['seconds']:.2f} s, errors: {found['errors'] or 'none'}")
        print(f"{arguments.report.stat().st_size / 1e6:.2f} MB")
    except BundleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
