"""Take the pictures of the contact sheet and of the page that documents show.

A real Chromium over a real service with the demo's gallery.

Example: python -m scripts.screenshots
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from scripts.demo_service import EXAMPLES, IMAGES, ROOT, demo_service

# Cards are drawn, and their crops loaded, as they come near.
_SHOWN = """() => [...document.querySelectorAll('[data-testid=result], [data-testid=item]')]
  .filter((card) => card.getBoundingClientRect().top < innerHeight)
  .every((card) => {
    const image = card.querySelector('img');
    return image && image.complete && image.naturalWidth > 0 && !image.hidden;
  })"""
QUERY = EXAMPLES / "queries" / "0122_cam6_0001.jpg"


def contact_sheet(browser: Browser, folder: Path) -> None:
    """The sheet that `cmt demo` writes, down to its fourth query."""
    with tempfile.TemporaryDirectory() as place:
        sheet = Path(place) / "sheet.html"
        command = [sys.executable, "-c", "from model.cli import main; main()", "demo", "--once"]
        subprocess.run([*command, "--html", str(sheet), "--port", "0"], cwd=ROOT, check=True)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(sheet.as_uri())
        fourth = page.locator("section").nth(3).bounding_box()
        assert fourth is not None
        height = fourth["y"] + fourth["height"] + 16
        page.set_viewport_size({"width": 1100, "height": int(height)})
        page.screenshot(path=folder / "contact-sheet.png")
        page.close()


def views(browser: Browser, url: str, folder: Path) -> None:
    """The page's views: an answer, the gallery, where a person was seen; an answer on a phone."""

    def opened(view: str, width: int = 1280, height: int = 900, **options: Any) -> Page:
        page = browser.new_page(
            viewport={"width": width, "height": height},
            timezone_id="UTC",
            locale="en-GB",
            **options,
        )
        page.goto(f"{url}/{view}")
        return page

    def shot(page: Page, name: str) -> None:
        page.wait_for_function(_SHOWN)
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(500)  # what fades in
        page.screenshot(path=folder / f"page-{name}.png")
        page.close()

    phone = opened("", 390, 844, color_scheme="dark", device_scale_factor=2)
    for name, page in (("search", opened("")), ("phone", phone)):
        page.locator("input[type=file]").first.set_input_files(QUERY)
        page.get_by_test_id("result").first.wait_for()
        shot(page, name)
    page = opened("#/gallery")
    page.get_by_test_id("item").first.wait_for()
    shot(page, "gallery")
    page = opened("#/timeline?person_id=62")
    page.get_by_test_id("sighting").first.wait_for()
    shot(page, "timeline")


def main() -> None:
    """Take all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the pictures go")
    parser.add_argument("--skip-sheet", action="store_true", help="the page's views only")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="its path")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=given.chromium,
            chromium_sandbox=False,  # which does not work for root in containers
        )
        if not given.skip_sheet:
            contact_sheet(browser, given.folder)
        with demo_service() as (url, _):
            views(browser, url, given.folder)
        browser.close()


if __name__ == "__main__":
    main()
