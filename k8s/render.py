"""Render an overlay as `kubectl kustomize` does, as far as the overlays here use it; anything else is an error.

In:  the folder of a kustomization.  Out: Kubernetes objects as plain values.
Knows nothing of what the objects are for.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]  # Any: whatever YAML holds
KNOWN = {"apiVersion", "kind", "namespace", "resources", "labels", "images", "patches"} | {
    "configMapGenerator",
    "generatorOptions",
}
CLUSTER_WIDE = ("Namespace",)


def render(folder: Path) -> list[Object]:
    """Return the overlay's objects. Raises `ValueError` for what is not known here, or points nowhere."""
    told: Object = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    if unknown := set(told) - KNOWN:
        raise ValueError(f"{folder}: {', '.join(sorted(unknown))}: is not rendered here")
    objects: list[Object] = []
    for name in told.get("resources", ()):
        path = folder / name
        found = render(path) if path.is_dir() else [one for one in yaml.safe_load_all(path.read_text("utf-8")) if one]
        objects += copy.deepcopy(found)  # what YAML anchors share is patched in one place alone
    for generated in told.get("configMapGenerator", ()):
        _generate(objects, folder, generated)
    for patch in told.get("patches", ()):
        matching = [one for one in objects if _matches(one, patch["target"])]
        if len(matching) != 1:
            raise ValueError(f"{folder}: {patch['target']}: matches {len(matching)} objects")
        for operation in yaml.safe_load(patch["patch"]):
            _apply(matching[0], operation)
    for one in objects:
        if (namespace := told.get("namespace")) and one["kind"] not in CLUSTER_WIDE:
            one["metadata"]["namespace"] = namespace
        for labels in told.get("labels", ()):
            one["metadata"].setdefault("labels", {}).update(labels["pairs"])
        for image in told.get("images", ()):
            _set_image(one, image["name"], image["newTag"])
    return objects


def _matches(one: Object, target: Object) -> bool:
    return one["kind"] == target["kind"] and one["metadata"]["name"] == target["name"]


def _generate(objects: list[Object], folder: Path, told: Object) -> None:
    made: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": told["name"]}}
    made["data"] = {name: (folder / name).read_text("utf-8") for name in told["files"]}
    same = [one for one in objects if _matches(one, {"kind": "ConfigMap", "name": told["name"]})]
    if bool(same) != (told.get("behavior") == "replace"):
        raise ValueError(
            f"{folder}: configMapGenerator {told['name']}: replaces what is not there, or is there already"
        )
    for one in same:
        made["metadata"] = one["metadata"]
        objects.remove(one)
    objects.append(made)


def _apply(one: Object, operation: Object) -> None:
    """Do one operation of a JSON patch (RFC 6902): add to an object, or replace."""
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = one
    for part in path:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if operation["op"] not in ("add", "replace") or isinstance(place, list):
        raise ValueError(f"{operation}: is not rendered here")
    if operation["op"] == "replace" and last not in place:
        raise ValueError(f"{operation['path']}: is not there to be replaced")
    place[last] = operation["value"]


def _set_image(value: Any, name: str, tag: str) -> None:  # noqa: ANN401  (whatever YAML holds)
    if isinstance(value, dict):
        if str(value.get("image", "")).rpartition(":")[0] == name:
            value["image"] = f"{name}:{tag}"
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _set_image(part, name, tag)
