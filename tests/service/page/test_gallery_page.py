"""The gallery in the page: looking through it, correcting and erasing what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, TimeoutError, expect

from service.api.schemas import BatchItem, GalleryItem
from service.auth.keys import KeyFile
from service.client import Client, ServiceProblem
from tests.service.conftest import Serve
from tests.service.hostile import KEPT, UNSEEN
from tests.service.page.browser import Watch, assert_accessible, assert_fits, screenshot
from tests.service.page.conftest import EXAMPLES, Demo, OpenTab

QUERY = EXAMPLES / "queries" / "0062_cam6_0003.jpg"


@pytest.fixture
def strangers(demo: Demo) -> Iterator[list[GalleryItem]]:
    """Two items of a person of this test's own."""
    with demo.client() as client:
        items = [client.enroll(QUERY, person_id="stranger", camera_id="gate") for _ in range(2)]
        yield items
        for person_id in ("stranger", "acquaintance"):
            client.erase(person_id)


def cards(page: Page) -> Any:
    """The items that are shown."""
    return page.get_by_test_id("item")


def test_the_gallery_is_looked_through_page_by_page(demo: Demo, tab: OpenTab) -> None:
    page = tab("#/gallery")
    total = len(demo.items)
    expect(page.get_by_test_id("total")).to_contain_text(f"1–60 of {total} items")
    expect(cards(page)).to_have_count(60)
    first = cards(page).first.get_by_role("img")
    item = demo.items[0]
    expect(first).to_have_attribute(
        "alt", f"person {item.person_id}, camera {item.camera_id}, visible"
    )
    expect(first).to_have_js_property("naturalHeight", 256)
    pages = page.get_by_role("navigation", name="Pages")
    pages.get_by_role("link", name="Next").click()
    expect(page.get_by_test_id("total")).to_contain_text(f"61–{total}")
    expect(pages.get_by_role("link", name="Next")).to_have_count(0)
    page.go_back()
    expect(page.get_by_test_id("total")).to_contain_text("1–60")
    page.go_forward()
    pages.get_by_role("link", name="Previous").click()
    expect(page.get_by_test_id("total")).to_contain_text("1–60")
    # Back from an item one is where one was.
    cards(page).nth(55).click()
    expect(page.get_by_role("heading", name="Person")).to_be_in_viewport()
    expect(page.locator("main")).to_be_focused()
    page.go_back()
    expect(cards(page).nth(55).get_by_role("link")).to_be_focused()
    expect(cards(page).nth(55)).to_be_in_viewport()


def test_items_are_found_by_person_camera_modality_and_time(demo: Demo, tab: OpenTab) -> None:
    page = tab("#/gallery")
    form = page.get_by_role("search", name="Gallery")
    form.get_by_label("Person").fill("62")
    page.keyboard.press("Enter")
    wanted = [item for item in demo.items if item.person_id == "62"]
    expect(cards(page)).to_have_count(len(wanted))
    camera = wanted[0].camera_id or ""
    form.get_by_label("Camera").fill(camera)
    form.get_by_role("button", name="Show").click()
    both = [item for item in wanted if item.camera_id == camera]
    assert 0 < len(both) < len(wanted)
    expect(cards(page)).to_have_count(len(both))
    form.get_by_label("Modality").select_option("infrared")
    form.get_by_role("button", name="Show").click()
    expect(page.get_by_text("Nothing matches")).to_be_visible()
    assert_accessible(page)
    page.get_by_role("link", name="Show everything").click()
    expect(form.get_by_label("Person")).to_have_value("")
    # The first hour, without its end: items come every ten minutes, and each fifth has no time.
    form.get_by_label("Captured from").fill("2026-03-01T09:00")
    form.get_by_label("Captured until").fill("2026-03-01T10:00")
    form.get_by_role("button", name="Show").click()
    expect(cards(page)).to_have_count(5)
    page.reload()
    expect(cards(page)).to_have_count(5)
    expect(form.get_by_label("Captured from")).to_have_value("2026-03-01T09:00")


def test_an_item_is_opened_corrected_and_searched_for(
    demo: Demo, strangers: list[GalleryItem], tab: OpenTab
) -> None:
    page = tab("#/gallery?person_id=stranger")
    cards(page).first.click()
    expect(page.get_by_role("heading", name="Person stranger")).to_be_visible()
    expect(page.get_by_role("img", name="person stranger")).to_have_js_property(
        "naturalHeight", strangers[0].height
    )
    form = page.get_by_role("form", name="Correct")
    form.get_by_label("Person").fill("acquaintance")
    form.get_by_label("Camera").fill("")
    form.get_by_label("Captured").fill("2026-05-04T12:30:15")
    form.get_by_role("button", name="Save").click()
    expect(form.get_by_role("status")).to_contain_text("Saved")
    expect(page.get_by_role("heading", name="Person acquaintance")).to_be_visible()
    with demo.client() as client:
        saved = client.get(strangers[0].id)
        assert (saved.person_id, saved.camera_id) == ("acquaintance", None)
        assert saved.captured_at is not None
        assert saved.captured_at.isoformat() == "2026-05-04T10:30:15+00:00"
    for width, dark in ((360, True), (900, False), (1600, False)):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme="dark" if dark else "light")
        assert_fits(page)
        assert_accessible(page)
        screenshot(page, f"item-{width}-{'dark' if dark else 'light'}")
    page.get_by_role("button", name="Search for this person").click()
    best = page.get_by_test_id("result").first
    expect(best).to_contain_text("acquaintance")


def test_what_nobody_touched_is_never_sent(demo: Demo, tab: OpenTab) -> None:
    times = (
        "2026-05-04T01:30:00Z",
        "2025-11-02T06:30:00Z",  # 01:30 in New York for the second time that night
        "2026-05-04T01:30:07.123456Z",
        "0001-01-01T00:00:00Z",  # in the year 0 in New York
        "9999-12-31T23:59:59.5Z",
    )
    with demo.client() as client:
        items = [
            client.enroll(
                QUERY, person_id="timed", camera_id="gate", captured_at=datetime.fromisoformat(time)
            )
            for time in times
        ]
        try:
            page = tab(zone="America/New_York")
            form = page.get_by_role("form", name="Correct")
            sent: list[Any] = []
            page.on(
                "request",
                lambda request: (
                    sent.append(request.post_data_json) if request.method == "PATCH" else None
                ),
            )
            for item in items:
                page.goto(f"{demo.url}/#/item/{item.id}")
                form.get_by_label("Person").fill("timed too")
                form.get_by_role("button", name="Save").click()
                expect(form.get_by_role("status")).to_contain_text("Saved")
                # The other labels are not written back, whoever changed them meanwhile.
                client.update(item.id, camera_id="yard")
                form.get_by_label("Person").fill("timed")
                form.get_by_role("button", name="Save").click()
                expect(page.get_by_role("heading", name="Person timed", exact=True)).to_be_visible()
                saved = client.get(item.id)
                assert saved.captured_at == item.captured_at
                assert (saved.person_id, saved.camera_id) == ("timed", "yard")
            assert sent == [{"person_id": "timed too"}, {"person_id": "timed"}] * len(items)
            # What is touched is sent: a time to the second, and none.
            form.get_by_label("Captured").fill("2026-05-04T12:30")
            form.get_by_role("button", name="Save").click()
            expect(form.get_by_role("status")).to_contain_text("Saved")
            assert sent[-1] == {"captured_at": "2026-05-04T16:30:00.000Z"}
            form.get_by_label("Captured").fill("")
            form.get_by_role("button", name="Save").click()
            expect(form.get_by_role("status")).to_contain_text("Saved")
            assert sent[-1] == {"captured_at": None}
            page.close()  # before what it shows is erased
        finally:
            for item in items:
                client.delete(item.id)


def test_an_address_shows_and_changes_its_own_item_only(
    demo: Demo, strangers: list[GalleryItem], tab: OpenTab, watch: Watch
) -> None:
    watch.expected.append("^404: GET .*/gallery/")
    one, other = strangers
    page = tab(f"#/item/{one.id}")
    expect(page.get_by_text(one.id)).to_be_visible()
    page.get_by_role("button", name="Delete this item").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route(f"**/gallery/{other.id}", hold)
    page.evaluate("id => { location.hash = `#/item/${id}`; }", other.id)
    # Nothing of the first one stands under the second one's address while that is on its way.
    expect(page.get_by_text("Loading the item")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_text(one.id)).to_have_count(0)
    expect(page.get_by_role("button", name="Save")).to_have_count(0)
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.unroute(f"**/gallery/{other.id}")
    expect(page.get_by_text(other.id)).to_be_visible()
    page.get_by_role("button", name="Delete this item").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("main")).to_contain_text("The item is deleted")
    page.go_back()
    expect(page.get_by_text(one.id)).to_be_visible()
    expect(page.locator("main").get_by_text("The item is deleted", exact=True)).to_have_count(0)
    page.go_forward()
    expect(page.get_by_text("This item is not there")).to_be_visible()
    with demo.client() as client:
        assert client.get(one.id).person_id == "stranger"


def test_what_the_service_refuses_is_said_beside_the_field(
    strangers: list[GalleryItem], tab: OpenTab, watch: Watch
) -> None:
    watch.expected.append("^422: PATCH")
    page = tab(f"#/item/{strangers[0].id}")
    form = page.get_by_role("form", name="Correct")
    form.get_by_label("Person").fill("\u202egnp.exe")
    form.get_by_role("button", name="Save").click()
    expect(form.get_by_role("alert")).to_contain_text("U+202E (RIGHT-TO-LEFT OVERRIDE)")
    expect(form.get_by_label("Person")).to_have_value("\u202egnp.exe")


def test_an_item_is_deleted_once_that_is_confirmed(
    demo: Demo, strangers: list[GalleryItem], tab: OpenTab
) -> None:
    page = tab(f"#/item/{strangers[0].id}")
    page.get_by_role("button", name="Delete this item").click()
    dialog = page.get_by_role("dialog", name="Delete this item?")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    assert_accessible(page)
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("button", name="Delete this item")).to_be_focused()
    with demo.client() as client:
        client.get(strangers[0].id)
    page.keyboard.press("Enter")
    dialog.get_by_role("button", name="Delete").click()
    expect(page.locator("main")).to_contain_text("The item is deleted")
    expect(page.locator("main")).to_be_focused()
    page.get_by_role("link", name="To the gallery").click()
    expect(page.get_by_test_id("total")).to_contain_text(f"of {len(demo.items) + 1} items")
    with demo.client() as client, pytest.raises(ServiceProblem, match="no item"):
        client.get(strangers[0].id)


def test_a_person_is_erased_once_that_is_confirmed(
    demo: Demo, strangers: list[GalleryItem], tab: OpenTab
) -> None:
    page = tab("#/gallery?person_id=stranger")
    page.get_by_role("button", name="Erase this person").click()
    dialog = page.get_by_role("dialog", name="Erase this person?")
    expect(dialog).to_contain_text("2 items of person stranger")
    screenshot(page, "erase")
    dialog.get_by_role("button", name="Erase").click()
    expect(page.get_by_text("Nothing matches")).to_be_visible()
    expect(page.locator("main")).to_be_focused()  # the button that had been is gone
    with demo.client() as client:
        assert client.list(person_id="stranger").total == 0
        assert client.list().total == len(demo.items)


def test_an_address_of_nothing_says_so(demo: Demo, tab: OpenTab, watch: Watch) -> None:
    watch.expected.append("^404: GET .*/gallery/")
    page = tab()
    for identifier in (
        "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10",
        "nonsense",
        "%3Cscript%3E",
        "..",
        ".",
        "../model",
        "%2e%2e",
        "",
    ):
        page.goto("about:blank")
        page.goto(f"{demo.url}/#/item/{identifier}")
        expect(page.get_by_text("This item is not there")).to_be_visible()
    page.goto(f"{demo.url}/#/search?like=..")
    expect(page.get_by_role("alert")).to_contain_text("No item has this address")


def test_a_dropped_file_is_searched_for_wherever_it_falls(demo: Demo, tab: OpenTab) -> None:
    page = tab("#/gallery")
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(QUERY)], "dragOperationsMask": 1}
    for view in ("gallery", "timeline", f"item/{demo.items[0].id}"):
        page.goto(f"{demo.url}/#/{view}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        # Chromium makes a leave of a drop that comes before the page has answered the dragover.
        for _ in range(5):
            for kind in ("dragEnter", "dragOver", "drop"):
                devtools.send(
                    "Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data}
                )
            with suppress(TimeoutError):
                page.wait_for_url("**/#/search*", timeout=2_000)
                break
        expect(page.get_by_test_id("result").first).to_be_visible()
        expect(page.get_by_role("link", name="Search", exact=True)).to_have_attribute(
            "aria-current", "page"
        )
    assert page.url.startswith(f"{demo.url}/#/search")


def test_errors_name_fields_as_the_forms_do(demo: Demo, tab: OpenTab, watch: Watch) -> None:
    watch.expected.append("^422: GET")
    page = tab("#/gallery?from=2026-03-02T00:00&to=2026-03-01T00:00")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("Captured until: must not be before “Captured from”.")
    page.goto(page.url + "&modality=sonar")
    expect(alert.get_by_role("listitem")).to_have_count(2)
    expect(alert).to_contain_text("Modality: ")
    for raw in ("captured_", "person_id", "modality.0"):
        expect(alert).not_to_contain_text(raw)
    assert_accessible(page)
    screenshot(page, "gallery-wrong-fields")


def test_a_time_typed_in_part_is_never_left_out(
    strangers: list[GalleryItem], demo: Demo, tab: OpenTab
) -> None:
    page = tab("#/gallery")
    form = page.get_by_role("search", name="Gallery")
    form.get_by_label("Captured from").focus()
    page.keyboard.type("0105")
    form.get_by_role("button", name="Show").click()
    expect(form.get_by_role("alert")).to_contain_text("This time is not complete")
    expect(cards(page)).to_have_count(60)
    assert page.url.endswith("#/gallery")
    page.goto(f"{demo.url}/#/item/{strangers[0].id}")
    form = page.get_by_role("form", name="Correct")
    form.get_by_label("Captured").focus()
    page.keyboard.type("0105")
    form.get_by_role("button", name="Save").click()
    expect(form.get_by_role("alert")).to_contain_text("This time is not complete")
    screenshot(page, "item-half-a-time")
    with demo.client() as client:
        assert client.get(strangers[0].id).captured_at is None


def test_a_page_number_of_the_address_is_not_believed(demo: Demo, tab: OpenTab) -> None:
    page = tab("#/gallery?page=1e9")
    total = page.get_by_test_id("total")
    expect(total).to_have_text(f"1–60 of {len(demo.items)} items")
    page.get_by_role("link", name="Next").click()
    expect(total).to_contain_text("61–")
    address = page.url
    for wrong in ("999999999", "0", "-3", "1e9", "1", ""):
        page.goto(address.replace("page=2", f"page={wrong}"))
        expect(total).to_have_text(f"{len(demo.items) - 60} of {len(demo.items)} items")
    page.get_by_role("link", name="First page").click()
    expect(total).to_contain_text("1–60")


def test_an_empty_gallery_leads_to_enrolling(serve: Serve, tab: OpenTab, tmp_path: Path) -> None:
    with serve(tmp_path / "data") as url:
        page = tab("#/gallery", url=url)
        expect(page.get_by_text("The gallery is empty")).to_be_visible()
        assert_accessible(page)
        page.get_by_role("link", name="Enroll pictures").click()
        expect(page.get_by_role("heading", name="Enroll", level=1)).to_be_visible()


def test_a_service_with_keys_asks_for_one(
    serve: Serve, tab: OpenTab, watch: Watch, tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, token = keys.create("reader", ["query"])
    _, writer = keys.create("writer", ["enroll"])
    _, keeper = keys.create("keeper", ["query", "enroll"])
    # A new key asks for the pictures again, here while the item of one is being deleted.
    watch.expected += ["^401: GET", "^403: (DELETE|PATCH)", "^404: GET .*/image$"]
    with serve(tmp_path / "data", api_keys_file=keys.path) as url:
        with Client(url, api_key=writer) as client:
            item = client.enroll(QUERY, person_id="kept")
        page = tab("#/gallery", url=url)
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("API key").fill(token)
        page.keyboard.press("Enter")
        expect(cards(page)).to_have_count(1)
        # Thumbnails come with the key, too.
        expect(cards(page).get_by_role("img")).to_have_js_property("naturalHeight", 256)
        cards(page).click()
        # What was refused is done once a key is entered that may do it.
        form = page.get_by_role("form", name="Correct")
        form.get_by_label("Person").fill("renamed")
        form.get_by_role("button", name="Save").click()
        dialog = page.get_by_role("dialog", name="This service needs a key")
        expect(dialog).to_contain_text("may not do that")
        page.keyboard.press("Escape")
        form.get_by_role("alert").get_by_role("button", name="Enter a key").click()
        dialog.get_by_label("API key").fill(keeper)
        page.keyboard.press("Enter")
        expect(form.get_by_role("status")).to_contain_text("Saved")
        expect(page.get_by_role("alert")).to_have_count(0)
        page.get_by_role("button", name="Key set").click()
        page.get_by_role("dialog").get_by_label("API key").fill(token)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Delete this item").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(dialog).to_contain_text("may not do that")
        with Client(url, api_key=token) as client:
            assert client.get(item.id).person_id == "renamed"
        dialog.get_by_label("API key").fill(keeper)
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_contain_text("The item is deleted")


def test_what_does_not_answer_can_be_tried_again(tab: OpenTab, watch: Watch) -> None:
    watch.expected += ["^failed: GET", "^429: GET"]
    page = tab("#/enroll")
    page.route("**/gallery?*", lambda route: route.abort())
    page.get_by_role("link", name="Gallery").click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("does not answer")
    page.unroute("**/gallery?*")
    alert.get_by_role("button", name="Try again").click()
    expect(cards(page)).to_have_count(60)
    page.route(
        "**/gallery?*",
        lambda route: route.fulfill(
            status=429,
            headers={"Retry-After": "1", "Content-Type": "application/problem+json"},
            body='{"title": "Overloaded", "status": 429, "detail": "busy", "code": "overloaded"}',
        ),
    )
    page.get_by_role("link", name="Next").click()
    expect(alert).to_contain_text("Overloaded")
    assert_accessible(page)
    page.unroute("**/gallery?*")
    alert.get_by_role("button", name="Try again").click()
    expect(page.get_by_test_id("total")).to_contain_text("61–")


def test_what_others_wrote_is_text(demo: Demo, tab: OpenTab) -> None:
    labels = list(KEPT.values())
    with demo.client() as client:
        results = client.enroll_batch(
            [QUERY] * len(labels),
            [
                BatchItem(
                    person_id=label, camera_id=labels[-place], metadata={label: label, **UNSEEN}
                )
                for place, label in enumerate(labels)
            ],
        )
        items = [result.item for result in results if result.item is not None]
        assert len(items) == len(labels)
        try:
            for width in (360, 1280):
                page = tab("#/gallery?modality=ir", width=width)
                expect(cards(page)).to_have_count(len(items))
                for place, item in enumerate(items):
                    expect(cards(page).nth(place).locator("b")).to_have_text(item.person_id or "")
                assert_fits(page)
                screenshot(page, f"gallery-hostile-{width}")
                for item in (items[0], items[1], items[-1]):
                    page.goto(f"{demo.url}/#/item/{item.id}")
                    expect(page.get_by_label("Person", exact=True)).to_have_value(
                        item.person_id or ""
                    )
                    assert_fits(page)
                    screenshot(page, f"item-hostile-{width}")
                assert page.locator("main script, main img[src=x]").count() == 0
                assert_accessible(page)
                page.close()  # before what it shows is erased
        finally:
            for item in items:
                client.delete(item.id)
