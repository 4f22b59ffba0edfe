"""Where a person was seen: drawn as cameras by time, and told as a table."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import expect

from service.client import Client
from tests.service.hostile import KEPT
from tests.service.page.browser import assert_accessible, assert_fits, screenshot
from tests.service.page.conftest import EXAMPLES, Demo, OpenTab

CROP = EXAMPLES / "queries" / "0062_cam6_0003.jpg"
WALKER = KEPT["attribute"]


@pytest.fixture
def walk(demo: Demo) -> Iterator[Client]:
    """A person who was seen at three cameras and at none, at known times and at an unknown one."""
    noon = datetime(2026, 6, 1, 10, 0, tzinfo=UTC)
    seen = [
        ("north", noon),
        ("south gate 10", noon + timedelta(minutes=4)),
        (KEPT["longest"], noon + timedelta(hours=2)),
        (KEPT["longest"], noon + timedelta(hours=2, seconds=1)),
        (None, noon + timedelta(hours=30)),
        ("north", None),
    ]
    with demo.client() as client:
        for camera_id, captured_at in seen:
            client.enroll(CROP, person_id=WALKER, camera_id=camera_id, captured_at=captured_at)
        yield client
        client.erase(WALKER)


def test_sightings_are_drawn_and_told_in_their_order(walk: Client, tab: OpenTab) -> None:
    page = tab("#/timeline")
    page.get_by_role("combobox", name="Person").fill(WALKER)
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("summary")).to_contain_text("5 sightings at 4 cameras")
    expect(page.get_by_test_id("summary")).to_contain_text("1 item has no time")
    rows = page.get_by_test_id("sighting")
    expect(rows).to_have_count(5)
    told = [(row.locator("td").nth(1), row.locator("td").nth(2)) for row in rows.all()]
    expect(told[0][0]).to_have_text("1 Jun 2026, 12:00:00")
    expect(told[0][1]).to_have_text("north")
    expect(told[2][1]).to_have_text(KEPT["longest"])
    expect(told[4][1]).to_have_text("no camera")
    # Two of one second are one dot; each camera has a lane of its own.
    chart = page.get_by_test_id("chart")
    expect(chart.locator(".lane")).to_have_count(4)
    expect(chart.locator(".dot")).to_have_count(4)
    expect(chart.locator(".dot text")).to_have_text("2")
    expect(page.get_by_role("heading", name="Without a time")).to_be_visible()
    expect(page.get_by_test_id("item")).to_have_count(1)
    for width, dark in ((360, True), (900, False), (1600, True), (1600, False)):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme="dark" if dark else "light")
        expect(chart).to_be_visible()
        assert_fits(page)
        screenshot(page, f"timeline-walk-{width}-{'dark' if dark else 'light'}")
        assert_accessible(page)
    page.get_by_role("link", name="1 Jun 2026, 12:00:00").click()
    expect(page.get_by_label("Person", exact=True)).to_have_value(WALKER)
    page.get_by_role("link", name="Where seen").click()
    expect(rows).to_have_count(5)


def test_people_are_suggested_and_unknown_ones_are_said_to_be(tab: OpenTab) -> None:
    page = tab("#/timeline")
    page.get_by_role("link", name="62", exact=True).click()
    expect(page.get_by_test_id("summary")).to_contain_text("sightings")
    page.get_by_role("combobox", name="Person").fill("nobody at all")
    page.get_by_role("button", name="Show where seen").click()
    expect(page.get_by_text("Nobody of this name")).to_be_visible()


@pytest.mark.parametrize(
    ("days", "words"), [(0, "12:00"), (3, "2 Jun"), (1500, "2028")], ids=["one", "days", "years"]
)
def test_the_scale_of_time_is_as_long_as_the_walk(
    demo: Demo, tab: OpenTab, days: int, words: str
) -> None:
    noon = datetime(2026, 6, 1, 10, 0, tzinfo=UTC)
    with demo.client() as client:
        for moment in {noon, noon + timedelta(days=days)}:
            client.enroll(CROP, person_id="traveller", camera_id="gate", captured_at=moment)
        try:
            page = tab("#/timeline?person_id=traveller")
            ticks = page.get_by_test_id("chart").locator(".tick text")
            expect(ticks.filter(has_text=words).first).to_be_visible()
            assert 1 <= ticks.count() <= 16
            page.close()  # before what it shows is erased
        finally:
            client.erase("traveller")
