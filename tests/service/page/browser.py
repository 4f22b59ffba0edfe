"""Chromium as the tests of the page use it: found, watched, photographed, checked by axe."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, Response

from tests.paths import ROOT

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MISSING = (
    "no Chromium is installed, and the page is tested in one; install it (Debian, Ubuntu: apt-get "
    "install chromium), or name one in TEST_BROWSER"
)
# Told to the console, where `Watch` reads it.
_TELL_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => console.error(
  `CSP violation: ${event.violatedDirective} of ${event.blockedURI} ${event.sample}`));
"""


def chromium() -> str:
    """The path of a Chromium. Without one the test is skipped, and fails where CI=true."""
    named = os.environ.get("TEST_BROWSER")
    found = [path for name in ([named] if named else _NAMES) if (path := shutil.which(name))]
    if not found:
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(_MISSING)
        pytest.skip(_MISSING)
    return found[0]


@dataclass
class Watch:
    """What goes wrong in pages: errors on the console, violated policies, requests that fail.

    expected: patterns of what a test provokes; each may match any number of problems.
    """

    expected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        """Watch all pages of a context."""
        context.add_init_script(_TELL_VIOLATIONS)
        context.on("console", self._console)
        context.on("weberror", lambda error: self.problems.append(f"uncaught: {error.error}"))
        context.on("requestfailed", self._failed)
        context.on("response", self._answered)

    def unexpected(self) -> list[str]:
        """Problems that no pattern of the test matches."""
        return [
            problem
            for problem in self.problems
            if not any(re.search(pattern, problem) for pattern in self.expected)
        ]

    def _console(self, message: ConsoleMessage) -> None:
        # What failed to load is told by `_answered` and `_failed`, with its method.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(f"console: {message.text}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page no longer wants the answer
            self.problems.append(f"failed: {request.method} {request.url}: {request.failure}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            request = response.request
            self.problems.append(f"{response.status}: {request.method} {request.url}")


def screenshot(page: Page, name: str) -> None:
    """Keep a picture of the whole page in build/screenshots, or in the folder TEST_SCREENSHOTS."""
    folder = Path(os.environ.get("TEST_SCREENSHOTS") or ROOT / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True, animations="disabled")


def assert_accessible(page: Page) -> None:
    """axe finds nothing serious or critical in what is shown."""
    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    grave = [
        f"{one['id']} ({one['impact']}): {one['help']}\n"
        + "\n".join(
            f"  {node['html'][:200]}\n  {node['failureSummary']}" for node in one["nodes"][:3]
        )
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not grave, "\n".join(grave)


def assert_fits(page: Page) -> None:
    """Nothing is wider than the window."""
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"the page is {wide} pixels wider than the window"
