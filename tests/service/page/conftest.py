"""The page in a real Chromium, over a real service with the gallery of the demo."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from service.api.schemas import BatchItem, GalleryItem
from service.client import Client
from tests.paths import ROOT
from tests.service.page.browser import Watch, chromium
from tests.service.processes import ServiceProcess, assert_no_defect

expect.set_options(timeout=15_000)  # beside other tests five seconds may not be enough

EXAMPLES = ROOT / "examples"
STARTED = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
"""When the first item of the gallery was captured; the next ones followed every ten minutes."""


@dataclass(frozen=True)
class Demo:
    """The service that all tests of the page share, and what it holds.

    Every fifth item has no time. Tests that change something use labels of their own, and delete
    what they enrolled. A fixture that does so is asked for before `tab`, which then closes first.
    """

    url: str
    items: list[GalleryItem]

    def client(self) -> Client:
        """A client, to see what the page has done."""
        return Client(self.url)


class OpenTab(Protocol):
    """Opens a view in a new window.

    view: as in the address, such as "#/gallery". url: of another service than the demo's.
    zone: the time zone of the reader.
    """

    def __call__(
        self,
        view: str = "",
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        url: str | None = None,
        zone: str = "Europe/Berlin",
    ) -> Page: ...


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The service with the demo's checkpoint and gallery."""
    chromium()  # skip before anything is started
    with (EXAMPLES / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["role"] == "gallery"]
    images: list[Path | bytes] = [EXAMPLES / row["file"] for row in rows]
    labels = [
        BatchItem(
            person_id=row["person_id"],
            camera_id=row["camera_id"],
            captured_at=None if place % 5 == 4 else STARTED + timedelta(minutes=10 * place),
        )
        for place, row in enumerate(rows)
    ]
    data = tmp_path_factory.mktemp("page")
    with ServiceProcess(data, EXAMPLES / "compact.safetensors", log_format="json") as service:
        with Client(service.url) as client:
            results = client.enroll_batch(images, labels)
        items = [one.item for one in results if one.item is not None]
        assert len(items) == len(rows)
        yield Demo(service.url, items)
        assert_no_defect(service)


# Not for the session: an event loop of Playwright's runs as long as this lives, and other tests on
# the same process start their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium without a window."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            chromium_sandbox=False,  # which does not work for root in containers
            args=["--disable-dev-shm-usage", "--force-color-profile=srgb"],
        )
        yield browser
        browser.close()


@pytest.fixture
def watch() -> Watch:
    """What goes wrong in the tabs of a test; it may add what it expects to `watch.expected`."""
    return Watch()


@pytest.fixture
def tab(demo: Demo, browser: Browser, watch: Watch) -> Iterator[OpenTab]:
    """Open views; at the end nothing unexpected went wrong in any of them."""
    with ExitStack() as contexts:

        def open_tab(
            view: str = "",
            *,
            width: int = 1280,
            height: int = 900,
            dark: bool = False,
            url: str | None = None,
            zone: str = "Europe/Berlin",
        ) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                locale="en-GB",
                timezone_id=zone,
                accept_downloads=True,
            )
            contexts.callback(context.close)
            context.set_default_timeout(15_000)
            watch.over(context)
            page = context.new_page()
            page.goto(f"{url or demo.url}/{view}")
            return page

        yield open_tab
    assert watch.unexpected() == []
