"""The part of kustomize that deploy/kubernetes uses; what it does not know fails.

Known are `resources`, `namespace`, `images`, and under `patches` lists of JSON patch operations
with a target, and `$patch: delete` of a whole object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}


def build(folder: Path) -> list[Manifest]:
    """All objects of a kustomization, as `kubectl kustomize` would print them."""
    customization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert customization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert customization["kind"] == "Kustomization"
    assert customization.keys() <= _KNOWN, customization.keys() - _KNOWN
    built: list[Manifest] = []
    for name in customization["resources"]:
        path = folder / name
        built += build(path) if path.is_dir() else documents(path)
    names = [(one["kind"], one["metadata"]["name"]) for one in built]
    assert len(set(names)) == len(names), "kustomize refuses an object that is there twice"
    for patch in customization.get("patches", []):
        _patch(built, patch)
    for image in customization.get("images", []):
        _rename(built, image)
    if "namespace" in customization:
        for one in built:
            if one["kind"] == "Namespace":
                one["metadata"]["name"] = customization["namespace"]
            else:
                one["metadata"]["namespace"] = customization["namespace"]
    return built


def documents(file: Path) -> list[Manifest]:
    """The objects of one file."""
    return [one for one in yaml.safe_load_all(file.read_text()) if one is not None]


def _patch(built: list[Manifest], patch: dict[str, Any]) -> None:
    operations = yaml.safe_load(patch["patch"])
    if isinstance(operations, dict):
        assert patch.keys() == {"patch"}
        assert operations.keys() == {"$patch", "apiVersion", "kind", "metadata"}
        assert operations["$patch"] == "delete"
        built.remove(_only(built, operations["kind"], operations["metadata"]["name"]))
        return
    assert patch.keys() == {"target", "patch"}
    assert patch["target"].keys() == {"kind", "name"}
    target = _only(built, **patch["target"])
    for operation in operations:
        _operate(target, **operation)


def _only(built: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (one for one in built if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found


def _operate(target: Any, op: str, path: str, value: Any) -> None:
    """One operation of RFC 6902."""
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:])
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    if isinstance(target, list):
        if (op, last) == ("add", "-"):
            target.append(value)
            return
        place: Any = int(last)
        there = place < len(target)
    else:
        place, there = last, last in target
    if op == "add":
        assert isinstance(target, dict), f"{path}: insertion in the middle is not known here"
        assert not there, f"{path} is there already: replace it"
        target[place] = value
    elif op == "replace":
        assert there, f"{path} is not there: add it"
        target[place] = value
    else:
        assert op == "test", f"{op} is not known here"
        assert target[place] == value, f"{path} is {target[place]!r}"


def _rename(built: list[Manifest], image: dict[str, str]) -> None:
    assert image.keys() == {"name", "newName", "newTag"}
    found = [
        container
        for one in built
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
        if container["image"] == image["name"]
    ]
    assert found, f"nothing runs the image {image['name']}"
    for container in found:
        container["image"] = f"{image['newName']}:{image['newTag']}"
