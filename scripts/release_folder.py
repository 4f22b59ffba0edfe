"""Write what a release leaves on a disk: a fixture for tests of upgrades from it.

A real service of the release that runs this enrolls a few rendered crops, changes, erases and
searches, backs itself up and stops. Beside its data folder, checkpoint, keys and backup, told.json
says what it answered. Run it for every release, before its tag:

    python -m scripts.release_folder 0.2.0

An older release writes its own with its code first on the path, from its checkout:

    PYTHONPATH=. python /path/to/new/scripts/release_folder.py 0.1.0
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch

from model import CMT, CMTConfig, save_checkpoint

DATA = Path(__file__).parents[1] / "tests" / "data"
CROPS = DATA / "synth-sysu-mini"
CMT_COMMAND = [sys.executable, "-c", "import sys; from model.cli import main; sys.exit(main())"]
QUERY = "cam3/0007/0002.jpg"
REQUEST_KEY = "sent-twice"


def main(release: str) -> None:
    """Make tests/data/releases/RELEASE."""
    folder = DATA / "releases" / release
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = folder / "checkpoint.safetensors"
    save_checkpoint(checkpoint, network(), training={"dataset": "none", "identities": [1, 2]})
    keys = folder / "keys.json"
    made = [*CMT_COMMAND, "keys", "create", "--file", str(keys), "--name", "test"]
    scopes = [word for scope in ("query", "enroll", "admin") for word in ("--scope", scope)]
    printed = subprocess.run([*made, *scopes], check=True, capture_output=True, text=True).stdout
    (token,) = re.findall(r"cmt_[\w-]{43}", printed)
    options = [
        *("--checkpoint", checkpoint, "--data-dir", folder / "data", "--api-keys-file", keys),
        *("--port", "0", "--device", "cpu", "--runtime", "torch"),
    ]
    service = subprocess.Popen(
        [*CMT_COMMAND, "serve", *map(str, options)], stderr=subprocess.PIPE, text=True
    )
    assert service.stderr is not None
    url = next(
        found[1] for line in service.stderr if (found := re.search(r"(http://[\w.:]+)", line))
    )
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
    ) as http:
        while not ready(http):
            time.sleep(0.1)
        told = {"key": token, "query": QUERY, **filled(http)}
        backup = http.post("/admin/backup")
        backup.raise_for_status()
        (folder / "backup.zip").write_bytes(backup.content)
        told["audit"] = [one["action"] for one in get(http, "/admin/audit")["entries"]]
    service.send_signal(signal.SIGTERM)
    service.stderr.read()
    assert service.wait(60) == 0
    shutil.rmtree(folder / "data" / "cache", ignore_errors=True)
    for lock in (folder / "data" / "lock", folder / ".keys.json.lock"):
        lock.unlink(missing_ok=True)
    (folder / "told.json").write_text(json.dumps(told, indent=1) + "\n")
    code = find_spec("service")
    print(f"{folder} was written by {code and code.origin}")


def network() -> CMT:
    """As small as it goes, γ and β depending on the query."""
    torch.manual_seed(3)
    model = CMT(
        CMTConfig(
            backbone="resnet18", width=0.0625, input_height=96, input_width=48, dim=8, heads=2
        )
    )
    with torch.no_grad():
        for generator in (model.generator_gamma, model.generator_beta):
            assert generator is not None
            generator.outer.weight.add_(0.3 * torch.randn(generator.outer.weight.shape))
    return model.eval()


def filled(http: httpx.Client) -> dict[str, Any]:
    """Enroll, change, delete, erase, search → what the service told."""
    ids: dict[str, str] = {}
    first: dict[str, Any] = {}
    for camera, modality in (("cam1", "rgb"), ("cam3", "ir")):
        for person in sorted((CROPS / camera).iterdir())[:6]:
            crop = f"{camera}/{person.name}/0001.jpg"
            fields = {
                "person_id": f"Zo\u00eb {person.name}",
                "camera_id": camera,
                "captured_at": "2026-11-28T08:30:00+01:00",
                "modality": modality,
                "metadata": json.dumps({"crop": crop}),
            }
            headers = {} if first else {"Idempotency-Key": REQUEST_KEY}
            ids[crop] = enroll(http, crop, fields, headers)
            first = first or {"crop": crop, "fields": fields, "id": ids[crop]}
    unlabelled = enroll(http, "cam1/0007/0002.jpg", {}, {})
    moved = http.patch(f"/gallery/{unlabelled}", json={"camera_id": "gate/2"})
    moved.raise_for_status()
    gone = ids["cam3/0012/0001.jpg"]
    http.delete(f"/gallery/{gone}").raise_for_status()
    erased = http.delete("/gallery", params={"person_id": "Zo\u00eb 0018"})
    assert erased.json() == {"deleted": 2}
    cameras = http.put("/cameras/dome", json={"modality": "ir", "polarity": "black_hot"})
    answers = {}
    for modulation in ("true", "false"):
        answer = http.post(
            "/query",
            files={"image": (CROPS / QUERY).read_bytes()},
            data={"modulation": modulation, "modality": "ir", "top_k": "100"},
        )
        answer.raise_for_status()
        results = answer.json()["results"]
        answers[modulation] = {one["item"]["id"]: one["distance"] for one in results}
    return {
        "request_key": REQUEST_KEY,
        "first": first,
        "items": get(http, "/gallery?limit=1000")["items"],
        "gone": [gone],
        "cameras": cameras.is_success,
        "answers": answers,
    }


def enroll(http: httpx.Client, crop: str, fields: dict[str, str], headers: dict[str, str]) -> str:
    """POST /gallery → the item's id."""
    files = {"image": (CROPS / crop).read_bytes()}
    answer = http.post("/gallery", files=files, data=fields, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def get(http: httpx.Client, path: str) -> Any:
    """What a GET answers."""
    answer = http.get(path)
    answer.raise_for_status()
    return answer.json()


def ready(http: httpx.Client) -> bool:
    """Whether /readyz is 200."""
    try:
        return http.get("/readyz").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
