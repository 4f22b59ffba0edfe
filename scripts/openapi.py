"""Write the OpenAPI document of the service, with keys, to a file: `make openapi`.

Clients in other languages are generated from docs/openapi.json; a test keeps it equal to what a
running service answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from service.api.openapi import openapi_document
from service.app import create_app
from service.settings import Settings


def document() -> str:
    """The document as text. The order is that of the routes, which is the order of the source."""
    with TemporaryDirectory() as nowhere:
        settings = Settings(checkpoint=Path(nowhere), data_dir=Path(nowhere))
        content = openapi_document(create_app(settings), keys=True)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs" / "openapi.json"
    target.write_text(document(), encoding="utf-8")
    sys.stdout.write(f"{target}\n")
