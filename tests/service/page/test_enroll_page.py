"""Enrolling by the page: many files and folders, what fails, and what is tried again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from service.auth.keys import KeyFile
from service.client import Client
from service.client.patterns import PathPattern
from tests.service.conftest import Serve
from tests.service.hostile import KEPT
from tests.service.page.browser import Watch, assert_accessible, assert_fits, screenshot
from tests.service.page.conftest import EXAMPLES, Demo, OpenTab

CROPS = sorted((EXAMPLES / "queries").glob("*.jpg"))[:5]


@pytest.fixture
def gallery(demo: Demo) -> Iterator[Client]:
    """A client of the demo's gallery; what a test enrolled is deleted again."""
    kept = {item.id for item in demo.items}
    with demo.client() as client:
        yield client
        for item in client.list(limit=1000).items:
            if item.id not in kept:
                client.delete(item.id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in folders of cameras and people, among what other programs leave there."""
    root = tmp_path / "cameras"
    for place, crop in enumerate(CROPS):
        target = root / f"cam {place % 2}" / f"Zoë {place}" / f"20260301T1{place}0000.jpg"
        target.parent.mkdir(parents=True)
        shutil.copy(crop, target)
    (root / "cam 0" / "list.csv").write_text("no picture")
    (root / "@eaDir").mkdir()
    shutil.copy(CROPS[0], root / "@eaDir" / "thumb.jpg")
    shutil.copy(CROPS[0], root / "._other.jpg")
    return root


def choose(page: Page, files: list[Path] | Path, label: str = "Choose pictures") -> None:
    """Choose files as with the browser's own dialog."""
    page.get_by_label(label).set_input_files(files)


def rows(page: Page, kind: str) -> Any:
    """The files of a kind."""
    return page.locator(f"[data-testid=file][data-kind={kind}]")


def button(page: Page) -> Any:
    """The button that enrolls."""
    return page.get_by_role("button", name=re.compile(r"Enroll \d"))


def enroll(page: Page) -> None:
    """Press the button that enrolls."""
    button(page).click()


def test_many_files_are_enrolled_once_each(demo: Demo, gallery: Client, tab: OpenTab) -> None:
    page = tab("#/enroll")
    choose(page, CROPS)
    expect(rows(page, "waiting")).to_have_count(5)
    page.get_by_label("Person").fill("newcomer")
    page.get_by_role("combobox", name="Camera", exact=True).fill("gate")
    page.get_by_label("Captured").fill("2026-05-04T12:30:15")
    page.get_by_label("Modality").select_option("infrared")
    enroll(page)
    expect(rows(page, "enrolled")).to_have_count(5)
    expect(page.get_by_test_id("progress")).to_have_text("5 of 5 pictures enrolled.")
    items = gallery.list(person_id="newcomer").items
    assert len(items) == 5
    assert {(item.camera_id, item.modality, item.modality_source) for item in items} == {
        ("gate", "ir", "given")
    }
    assert {str(item.captured_at) for item in items} == {"2026-05-04 10:30:15+00:00"}
    # Other views may be opened meanwhile; the list is kept.
    page.get_by_role("link", name="Gallery", exact=True).click()
    page.get_by_role("link", name="Enroll", exact=True).click()
    expect(rows(page, "enrolled")).to_have_count(5)
    page.get_by_role("button", name="Clear the list").click()
    choose(page, CROPS)
    enroll(page)
    expect(rows(page, "known")).to_have_count(5)
    assert gallery.list(person_id="newcomer").total == 5
    rows(page, "known").first.get_by_role("link").click()
    expect(page.get_by_role("heading", name="Person newcomer")).to_be_visible()


def test_a_folder_tells_person_camera_and_time_by_its_paths(
    gallery: Client, tab: OpenTab, folder: Path
) -> None:
    page = tab("#/enroll")
    choose(page, folder, "Choose a folder")
    expect(rows(page, "waiting")).to_have_count(5)
    expect(page.get_by_text("3 files passed over")).to_be_visible()
    pattern = page.get_by_label("Labels from paths")
    pattern.fill("{camera}/{who}/*.jpg")
    expect(page.get_by_role("alert")).to_contain_text("{who} is no field")
    expect(button(page)).to_be_disabled()
    pattern.fill("{camera}/*.jpg")
    expect(page.get_by_text("5 paths do not fit the pattern")).to_be_visible()
    pattern.fill("{camera}/{person}/{time}.jpg")
    expect(page.get_by_test_id("preview")).to_contain_text("person Zoë 0")
    for width, dark in ((360, True), (900, False), (1600, True)):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme="dark" if dark else "light")
        assert_fits(page)
        screenshot(page, f"enroll-folder-{width}-{'dark' if dark else 'light'}")
    assert_accessible(page)
    enroll(page)
    expect(rows(page, "enrolled")).to_have_count(5)
    for place in range(5):
        [item] = gallery.list(person_id=f"Zoë {place}").items
        assert item.camera_id == f"cam {place % 2}"
        assert str(item.captured_at) == f"2026-03-01 {9 + place:02}:00:00+00:00"


def test_patterns_mean_what_they_mean_on_the_command_line(tab: OpenTab) -> None:
    patterns = [
        "{camera}/{person}/*.jpg",
        "{camera_id}/**/{person}_*.png",
        "**/{person}-c?{camera}.jpg",
        "./{person}/{camera}/{time}",
        "{person}/{person}.jpg",
        "{modality}/{polarity}/{time}.jpg",
        "a+b (1)/{person}.jpg",
    ]
    paths = [
        "gate/anna/1.jpg",
        "Gate/Anna/1.JPG",
        "gate/anna/1.png",
        "gate/a/b/c/anna_7.png",
        "gate/anna_7.png",
        "x/y/anna-c1gate.jpg",
        "anna-c1gate.jpg",
        "anna/gate/20260301T140500Z.jpg",
        "anna/gate/2026-03-01 14.05.09,25+0100.png",
        "anna/anna.jpg",
        "anna/berta.jpg",
        "Thermal/BLACK_HOT/2026-03-01T14:05:00Z.jpg",
        "visible/white_hot/20260301-140500+01:00.jpg",
        "A+B (1)/Zoe\u0308.jpg",
    ]
    page = tab("#/enroll")
    found = page.evaluate(
        """async ([patterns, paths]) => {
          const { readPattern } = await import("./page/js/enroll/pattern.js");
          return patterns.map((pattern) => paths.map((path) => readPattern(pattern)(path)));
        }""",
        [patterns, paths],
    )
    matched = 0
    for pattern, row in zip(patterns, found, strict=True):
        read = PathPattern(pattern, UTC)
        for path, labels in zip(paths, row, strict=True):
            texts = read.match(path)
            wanted = None if texts is None else read.labels(texts)
            if wanted is not None and "polarity" in wanted:
                wanted["polarity"] = wanted["polarity"].lower()
            time = None if labels is None else labels.pop("captured_at", None)
            assert labels == wanted, (pattern, path)
            if texts is not None and time is not None:
                try:
                    told = read.time(texts)
                except ValueError:  # the page leaves it to the service to say so
                    continue
                assert datetime.fromisoformat(time) == told
            matched += wanted is not None
    assert matched >= len(patterns)
    for wrong in ("{camera}/{who}", "{camera}{person}/*", "{camera", "*/*.jpg", "*{person}.jpg"):
        page.get_by_label("Labels from paths").fill(wrong)
        expect(page.get_by_role("alert")).to_be_visible()


def test_a_dropped_folder_is_read_to_its_last_file(
    gallery: Client, tab: OpenTab, folder: Path
) -> None:
    page = tab("#/enroll")
    expect(page.get_by_text("Drop pictures or folders here")).to_be_visible()
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(folder), str(CROPS[0])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
    expect(rows(page, "waiting")).to_have_count(6)
    expect(page.get_by_text("cameras/cam 1/Zoë 3/")).to_be_visible()


def test_what_fails_is_said_and_can_be_tried_again(
    gallery: Client, tab: OpenTab, watch: Watch, tmp_path: Path
) -> None:
    watch.expected.append("^(415|422): POST")
    broken = [tmp_path / "cut.jpg", tmp_path / "text.png"]
    broken[0].write_bytes(CROPS[0].read_bytes()[:3000])
    broken[1].write_text("no picture at all")
    page = tab("#/enroll")
    page.get_by_label("Person").fill("newcomer")
    choose(page, [*CROPS[:2], *broken])
    enroll(page)
    expect(rows(page, "enrolled")).to_have_count(2)
    expect(rows(page, "failed")).to_have_count(2)
    expect(rows(page, "failed").nth(1)).to_contain_text("no JPEG, PNG, WebP, BMP or TIFF")
    expect(page.get_by_test_id("progress")).to_contain_text("2 failed")
    page.get_by_role("button", name="Failed 2").click()
    expect(page.get_by_test_id("file")).to_have_count(2)
    assert_accessible(page)
    screenshot(page, "enroll-failed")
    # Refused for good by the label; with another one the same files can go.
    page.get_by_label("Person").fill("\u202egnp.exe")
    choose(page, CROPS[2:4])
    page.get_by_role("button", name="Go on").click()
    expect(rows(page, "failed")).to_have_count(4)
    page.get_by_label("Person").fill("second")
    page.get_by_role("button", name="Try 4 failed ones again").click()
    expect(page.get_by_test_id("progress")).to_contain_text("4 of 6 pictures enrolled, 2 failed")
    assert gallery.list(person_id="newcomer").total == 2
    assert gallery.list(person_id="second").total == 2


def test_a_busy_service_is_waited_for_and_a_lost_answer_doubles_nothing(
    gallery: Client, tab: OpenTab, watch: Watch
) -> None:
    watch.expected.append("^429: POST")
    keys: list[str] = []

    def answer(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 3:
            route.continue_()
            return
        route.fulfill(
            status=429,
            headers={"Retry-After": "1", "Content-Type": "application/problem+json"},
            body='{"title": "Busy", "status": 429, "detail": "busy", "code": "overloaded"}',
        )

    page = tab("#/enroll")
    page.route("**/gallery", answer)
    # What arrived and was stored, and nobody learnt of it: the first three answers are lost.
    page.evaluate("""() => {
      const real = fetch;
      let lost = 0;
      globalThis.fetch = async (...given) => {
        const answer = await real(...given);
        if (answer.status === 201 && lost++ < 3) throw new TypeError("Failed to fetch");
        return answer;
      };
    }""")
    page.get_by_label("Person").fill("newcomer")
    choose(page, CROPS[:3])
    enroll(page)
    expect(page.get_by_text("more to do than it can take")).to_be_visible()
    expect(rows(page, "known")).to_have_count(3, timeout=20_000)
    assert len(keys) == 9
    assert len(set(keys)) == 3
    assert gallery.list(person_id="newcomer").total == 3


def test_a_time_typed_in_part_is_not_dropped(gallery: Client, tab: OpenTab) -> None:
    page = tab("#/enroll")
    choose(page, CROPS[:2])
    page.get_by_label("Person").fill("newcomer")
    captured = page.get_by_label("Captured")
    captured.focus()
    page.keyboard.type("0405")
    page.get_by_label("Person").focus()
    expect(page.get_by_role("alert")).to_contain_text("This time is not complete")
    expect(captured).to_have_attribute("aria-invalid", "true")
    expect(button(page)).to_be_disabled()
    expect(rows(page, "waiting")).to_have_count(2)
    assert gallery.list(person_id="newcomer").total == 0
    assert_accessible(page)
    screenshot(page, "enroll-half-a-time")
    captured.fill("2026-05-04T12:30:15")
    expect(page.get_by_role("alert")).to_have_count(0)
    enroll(page)
    expect(rows(page, "enrolled")).to_have_count(2)
    items = gallery.list(person_id="newcomer").items
    assert {str(item.captured_at) for item in items} == {"2026-05-04 10:30:15+00:00"}


def test_what_is_waited_for_is_said(gallery: Client, tab: OpenTab, watch: Watch) -> None:
    watch.expected += ["^failed: POST", "^503: POST"]
    page = tab("#/enroll")
    page.route("**/gallery", lambda route: route.abort())
    page.get_by_label("Person").fill("newcomer")
    choose(page, CROPS[:1])
    enroll(page)
    expect(page.get_by_text("The service does not answer; going on in")).to_be_visible()
    expect(page.get_by_text("more to do than it can take")).to_have_count(0)
    page.unroute("**/gallery")
    page.route(
        "**/gallery",
        lambda route: route.fulfill(
            status=503,
            headers={"Retry-After": "1", "Content-Type": "application/problem+json"},
            body='{"title": "Starting", "status": 503, "detail": "it starts", "code": "not_ready"}',
        ),
    )
    expect(page.get_by_text("The service is not ready; going on in")).to_be_visible()
    page.unroute("**/gallery")
    expect(rows(page, "enrolled")).to_have_count(1, timeout=20_000)


def test_a_service_that_is_gone_stops_it_and_nothing_is_lost(
    gallery: Client, tab: OpenTab, watch: Watch
) -> None:
    watch.expected.append("^507: POST")
    page = tab("#/enroll")
    page.route(
        "**/gallery",
        lambda route: route.fulfill(
            status=507,
            headers={"Content-Type": "application/problem+json"},
            body='{"title": "Full", "status": 507, "detail": "the disk is full; make room", '
            '"code": "storage_full"}',
        ),
    )
    page.get_by_label("Person").fill("newcomer")
    choose(page, CROPS)
    enroll(page)
    expect(page.get_by_role("alert")).to_contain_text("The disk is full; make room.")
    expect(rows(page, "waiting")).to_have_count(5)
    page.unroute("**/gallery")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_test_id("progress")).to_contain_text("5 of 5 pictures enrolled")
    assert gallery.list(person_id="newcomer").total == 5


def test_a_key_that_may_enroll_is_asked_for(
    serve: Serve, tab: OpenTab, watch: Watch, tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, token = keys.create("writer", ["query", "enroll"])
    watch.expected.append("^401: ")
    with serve(tmp_path / "data", api_keys_file=keys.path) as url:
        page = tab("#/enroll", url=url)
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        choose(page, CROPS[:3])
        enroll(page)
        page.get_by_role("dialog").get_by_label("API key").fill(token)
        page.keyboard.press("Enter")
        expect(rows(page, "enrolled")).to_have_count(3)
        with Client(url, api_key=token) as client:
            assert client.list().total == 3


def test_names_and_labels_are_text(gallery: Client, tab: OpenTab, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    # Browsers take a backslash in the name of a file for a slash.
    names = ["x" + re.sub(r"[/\\]", "∕", label)[:60] for label in KEPT.values()]
    for place, name in enumerate(names):
        shutil.copy(CROPS[place % 5], folder / f"{name}.jpg")
    page = tab("#/enroll", width=360)
    page.get_by_role("combobox", name="Camera", exact=True).fill('"><img src=x onerror=alert(1)>')
    choose(page, folder, "Choose a folder")
    expect(page.get_by_test_id("file")).to_have_count(len(names))
    page.get_by_label("Labels from paths").fill("{person}.jpg")
    enroll(page)
    expect(rows(page, "enrolled")).to_have_count(len(names))
    assert page.locator("main img[src=x]").count() == 0
    assert_fits(page)
    screenshot(page, "enroll-hostile-360")
    assert len(gallery.list(camera_id='"><img src=x onerror=alert(1)>').items) == len(names)
