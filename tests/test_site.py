"""What makes a site of the documents: references, docstrings, and nothing from elsewhere."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

from scripts.site import docstrings, http_reference, offline
from scripts.site.blocks import outside_code
from tests.paths import ROOT


def test_the_http_reference_has_every_operation_with_its_scope_and_fields() -> None:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text())
    text = http_reference.reference(document)
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"### `{method.upper()} {path}`\n" in text
    [query] = [part for part in text.split("\n### ") if part.startswith("`POST /query`")]
    assert "Scope `query`." in query
    assert "| `top_k` | integer, ≥ 1, ≤ 1000 | Default: `20`. |" in query
    assert "[QueryAnswer](#queryanswer)" in query
    assert "\n### QueryAnswer\n" in text


def test_descriptions_in_docstrings_become_a_list() -> None:
    docstring = (
        "Open the gallery.\n\nIt is made if missing. device: where features live,\n"
        "such as cuda. left, right: both of\nthem. Raises Locked where it is in use.\n\n"
        "    note: this is code"
    )
    assert docstrings.listed(docstring, {"device", "left", "right"}) == (
        "Open the gallery.\n\nIt is made if missing.\n\n- `device`: where features live,\n"
        "  such as cuda.\n- `left`, `right`: both of\n  them.\n\nRaises Locked where it is in use."
        "\n\n    note: this is code"
    )


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        "<img alt='' src='http://elsewhere.example/a.png'>",
    ],
)
def test_a_page_that_loads_something_from_elsewhere_is_refused(element: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    own = '<a href="https://example.org">a link</a><img src="images/a.png">'
    assert offline.on_post_page(own, page=page, config=None) == own
    with pytest.raises(PluginError, match=r"index\.md loads"):
        offline.on_post_page(own + element, page=page, config=None)


def test_code_is_left_alone() -> None:
    text = "a `a` a\n\n```sh\na\n```\n\na"
    assert outside_code(text, str.upper) == "A `a` A\n\n```sh\na\n```\n\nA"
