"""Hostile texts that the tests share, and what every answer to one has to be."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

# Text that means something elsewhere. All of it is text here: kept to the character.
KEPT = {
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "scheme": "javascript:alert(document.domain)",
    "entity": "&lt;b&gt; &amp; &#x3c;i&#x3e;",
    "template": "{{7*7}} ${7*7} {% raw %} %s %n {0} #{7*7}",
    "path": "../../../../../../tmp/hostile-escape",
    "absolute": "/tmp/hostile-escape",
    "windows": "C:\\hostile-escape\\..\\x",
    "shell": "$(touch hostile-escape) `touch hostile-escape`; touch hostile-escape",
    "sql": "'; DROP TABLE items; --",
    "or": "' OR '1'='1",
    "like": "100%_\\%",
    "quotes": "\"'`«»",
    "right-to-left": "gnp.exe \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "combining": "e\u0301 vs \u00e9, Z\u0351\u036b\u0343\u0350\u0311",
    "joined": "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "emoji": "\U0001f9cd\U0001f3fd \u2642",
    "null word": "null",
    "number": "0012e3",
    "formula": '=HYPERLINK("http://evil.example","x")',
    "longest": "\U0001f600" * 128,
}
# No label, because it looks like another one; as metadata it is kept.
UNSEEN = {
    "override": "\u202egnp.exe\u202c",
    "invisible": "ex\u200b\ufeff\u2060am",
    "lines": "\u2028\u2029",
    "joiner": "\U0001f9cd\u200d\u2642\ufe0f",
    "noncharacter": "\uffff\U0010ffff",
    "spaces": "  leading and trailing  ",
    "other space": "leading\u00a0and\u3000trailing",
    "mark alone": "\u0301e",
}
REFUSED = {
    **UNSEEN,
    "NUL": "a\0b",
    "escape": "\x1b[31mred",
    "line": "one\r\nSet-Cookie: two",
    "control": "\x85\x9f",
    "too long": "x" * 129,
    "much too long": "y" * 100_000,
}

FOLDER_NAME = "hostile-escape"  # a part of every text that would be a path


def assert_is_data(answer: httpx.Response) -> None:
    """JSON or an image that no browser runs, sniffs or frames; and no defect of the service."""
    assert answer.status_code < 500
    if answer.status_code == 204:
        return
    kind = "application/json" if answer.is_success else "application/problem+json"
    assert answer.request.url.path.endswith("/image") or answer.headers["content-type"] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "sandbox" in policy
    assert "set-cookie" not in answer.headers


@pytest.fixture(autouse=True)
def answers_are_data(http: httpx.Client) -> Iterator[None]:
    """Every answer of these tests is data, and the service stays ready."""
    http.event_hooks["response"] = [assert_is_data]
    yield
    http.event_hooks["response"] = []
    assert http.get("/readyz").status_code == 200
