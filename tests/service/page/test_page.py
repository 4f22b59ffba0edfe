"""The page's files as the service hands them out, and the frame around every view."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from playwright.sync_api import expect

from tests.paths import ROOT
from tests.service.conftest import Serve
from tests.service.page.browser import assert_accessible, assert_fits, screenshot
from tests.service.page.conftest import OpenTab

PAGE = ROOT / "service" / "web" / "page"
VIEWS = ["gallery", "timeline", "enroll"]  # the search view's own tests have more to show
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def test_every_file_of_the_page_is_served_as_what_it_is(http: httpx.Client) -> None:
    files = [file for file in PAGE.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        answer = http.get(f"/page/{file.relative_to(PAGE)}")
        assert answer.content == file.read_bytes()
        kind = KINDS.get(file.suffix, "text/plain")
        assert answer.headers["content-type"].partition(";")[0] == kind
        assert answer.headers["cache-control"] == "no-cache"
        tag = answer.headers["etag"]
        again = http.get(answer.request.url, headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        # A browser takes these over for what it has kept.
        for name in ("content-security-policy", "cache-control", "content-type"):
            assert again.headers[name] == answer.headers[name]
        head = http.head(answer.request.url)
        assert (head.status_code, head.content) == (200, b"")
    assert http.get("/").content == (PAGE / "index.html").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/js",
        "/page/js/",
        "/page/nothing.js",
        "/page//index.html",
        "/page/../docs.html",
        "/page/..%2fdocs.html",
        "/page/js/%2e%2e/%2e%2e/docs.html",
        "/page/..%5cdocs.html",
        "/page/%2fetc/passwd",
        "/page/index.html%00",
        "/index.html",
    ],
)
def test_nothing_else_is_served(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "route_not_found")


def test_the_policy_lets_the_page_load_only_what_is_here(http: httpx.Client) -> None:
    policy = dict(
        part.strip().split(" ", 1)
        for part in http.get("/").headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "font-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    for file in [*PAGE.rglob("*.html"), *PAGE.rglob("*.css")]:
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//|url\(|@import", file.read_text())


def test_the_page_works_where_the_service_is_mounted(
    serve: Serve, tab: OpenTab, tmp_path: Path
) -> None:
    with serve(tmp_path / "data", root_path="/reid/desk") as url:
        page = tab("reid/desk", url=url)
        expect(page.get_by_role("navigation")).to_be_visible()
        sources = page.locator("script[src]").evaluate_all("all => all.map(one => one.src)")
        assert sources
        assert all(one.startswith(urljoin(url, "/reid/desk/page/")) for one in sources)
        page.goto(f"{url}/reid/desk/#/gallery")
        expect(page.get_by_role("heading", name="Gallery", level=1)).to_be_visible()


def test_the_keyboard_reaches_every_view_and_skips_to_what_is_shown(tab: OpenTab) -> None:
    page = tab("#/gallery")
    expect(page.get_by_test_id("item").first).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("combobox", name="Person")).to_be_focused()
    page.get_by_role("link", name="Timeline", exact=True).press("Enter")
    expect(page.get_by_role("heading", name="Timeline", level=1)).to_be_visible()
    expect(page.get_by_role("link", name="Timeline", exact=True)).to_have_attribute(
        "aria-current", "page"
    )


def test_the_theme_is_kept(tab: OpenTab) -> None:
    page = tab("#/timeline")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_label("Theme").select_option("Dark")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    expect(page.get_by_label("Theme")).to_have_value("dark")
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_at_every_width_in_light_and_dark(tab: OpenTab, view: str) -> None:
    for dark in (False, True):
        page = tab(f"#/{view}", dark=dark)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        for width in (360, 900, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_load_state("networkidle")
            assert_fits(page)
            screenshot(page, f"{view}-{width}-{'dark' if dark else 'light'}")
        assert_accessible(page)
