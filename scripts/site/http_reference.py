"""A hook of the documentation's site: the HTTP reference, written from the service's own OpenAPI.

The document is asked of the application at each build, so the page cannot fall behind. It is plain
Markdown: it can be searched, linked to and printed, and needs no script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scripts.openapi import document
from service.auth.authorization import ROUTE_SCOPES

PAGE, PLACE = "reference/http.md", "<!-- the operations come here -->"
_METHODS = ("get", "put", "post", "delete", "patch")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Write the operations into their page."""
    if page.file.src_uri != PAGE:
        return markdown
    assert PLACE in markdown, f"docs/{PAGE} must say where the operations go: {PLACE}"
    return markdown.replace(PLACE, reference(json.loads(document())))


def reference(told: dict[str, Any]) -> str:
    """The reference as Markdown."""
    models = told["components"]["schemas"]
    parts = [
        # One level down: these headings of the document stand below the page's title.
        told["info"]["description"].replace("\n### ", "\n## "),
        "## Operations",
    ]
    for path, operations in told["paths"].items():
        parts += [
            operation(method.upper(), path, operations[method], models)
            for method in _METHODS
            if method in operations
        ]
    parts.append("## Models")
    for name, schema in models.items():
        if name not in {"HTTPValidationError", "ValidationError"}:
            parts.append(model(name, schema))
    return "\n\n".join(parts) + "\n"


def operation(method: str, path: str, told: dict[str, Any], models: dict[str, Any]) -> str:
    """One call: what it does, what it takes, what it answers."""
    scope = ROUTE_SCOPES[method, path]
    parts = [
        f"### `{method} {path}`",
        told.get("description") or told.get("summary", ""),
        "Open to all." if scope is None else f"Scope `{scope}`.",
    ]
    if told.get("parameters"):
        rows = [
            (f"`{one['name']}`", one["in"], shown(one["schema"]), note(one, one["required"]))
            for one in told["parameters"]
        ]
        parts.append(table(("parameter", "in", "type", ""), rows))
    for media, content in told.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        parts.append(
            f"Body: `{media}`, {shown(schema)}" if "$ref" in schema else f"Body: `{media}`"
        )
        named = models[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
        if named.get("properties"):
            parts.append(fields(named))
    answers = []
    for status, answer in told["responses"].items():
        bodies = answer.get("content", {})
        kinds = ", ".join(
            shown(one["schema"]) if one.get("schema") else f"`{media}`"
            for media, one in bodies.items()
        )
        answers.append((status, cell(answer["description"]), kinds))
    return "\n\n".join([*parts, table(("status", "", "body"), answers)])


def model(name: str, schema: dict[str, Any]) -> str:
    """One schema with its fields."""
    parts = [f"### {name}", schema.get("description", "")]
    if schema.get("properties"):
        parts.append(fields(schema))
    elif schema.get("enum"):
        parts.append(", ".join(f"`{value}`" for value in schema["enum"]))
    return "\n\n".join(part for part in parts if part)


def fields(schema: dict[str, Any]) -> str:
    """The table of an object's fields."""
    needed = schema.get("required", [])
    rows = [
        (f"`{name}`", shown(one), note(one, name in needed))
        for name, one in schema["properties"].items()
    ]
    return table(("field", "type", ""), rows)


def note(one: dict[str, Any], required: bool) -> str:
    """What a parameter or field means, whether it must be there, and what stands for it if not."""
    schema = one.get("schema", one)
    default = schema.get("default")
    parts = [
        one.get("description") or schema.get("description", ""),
        "Required." if required and "default" not in schema else "",
        f"Default: `{json.dumps(default)}`." if default not in (None, "", []) else "",
    ]
    return cell(" ".join(part for part in parts if part))


def shown(schema: dict[str, Any]) -> str:
    """A type in a few words, with a link where it has a name."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for way in ("anyOf", "oneOf", "allOf"):
        if way in schema:
            return " or ".join(dict.fromkeys(shown(one) for one in schema[way]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {shown(schema.get('items', {}))}"
    if schema.get("format"):
        kind = f"{kind} ({schema['format']})"
    names = {
        "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<",
        "minLength": "length ≥", "maxLength": "length ≤",
    }  # fmt: skip
    limits = [f"{sign} {schema[key]:g}" for key, sign in names.items() if key in schema]
    return f"{kind}, {', '.join(limits)}" if limits else str(kind)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text that fits one cell."""
    return " ".join(text.split()).replace("|", "\\|")
