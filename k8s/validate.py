"""Are the manifests what Kubernetes and KubeRay take, and do they agree with each other and with the code?

    python -m k8s.validate

In:  the overlays; KubeRay's custom resource definitions where they lie beside the checkout.  Out: faults, one a line.
Knows nothing of a running cluster.
"""

import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from cluster.config import EngineConfig, load_recipe
from cluster.errors import ConfigError
from cluster.imports import load_target
from k8s.render import Object, render

HERE = Path(__file__).parent
CRDS = HERE.parent.parent / "shared" / "kuberay-crds"
OVERLAYS = ("laptop", "cpu", "gpu")
KUBERNETES = "1.31"
UNCHECKED = ("PodMonitor",)
"""Kinds whose definitions are neither Kubernetes' own nor KubeRay's."""
SECRETS = {"recloop-ray": {"auth_token"}, "recloop-redis": {"password"}, "recloop-keys": {"keys.json"}}
"""What k8s/README.md has people make, by name."""


def main() -> None:
    """Print the faults, and end with 1 where there are any."""
    definitions = read_definitions(CRDS)
    faults = [f"{name}: {fault}" for name in OVERLAYS for fault in find_faults(render_overlay(name), definitions)]
    print(*faults, sep="\n", end="\n" if faults else "")
    if not definitions:
        print(f"k8s: objects of KubeRay not checked: no definitions in {CRDS}")
    sys.exit(bool(faults))


def render_overlay(name: str) -> list[Object]:
    """Return the objects of an overlay."""
    return render(HERE / "overlays" / name)


def read_definitions(folder: Path) -> dict[str, Object]:
    """Return the schema of each kind that is defined in a folder, strict about fields that it does not know."""
    schemas: dict[str, Object] = {}
    for path in sorted(folder.glob("*.yaml")):
        told = yaml.safe_load(path.read_text("utf-8"))["spec"]
        version = next(version for version in told["versions"] if version["served"] and version["storage"])
        schemas[told["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return schemas


def find_faults(objects: list[Object], definitions: dict[str, Object]) -> Iterator[str]:
    """Yield what is wrong with objects, by their schemas and among themselves."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        yield from (f"{name}: {fault}" for fault in _schema_faults(one, definitions))
        for pod in find_pods(one):
            yield from (f"{name}: {fault}" for fault in _pod_faults(pod, objects))
        if one["kind"] in ("RayService", "RayJob"):
            yield from (f"{name}: {fault}" for fault in _ray_faults(one, objects))
    yield from _selector_faults(objects)


def find_pods(value: Any) -> Iterator[Object]:  # noqa: ANN401  (whatever YAML holds)
    """Yield every pod template in an object."""
    if isinstance(value, dict):
        if isinstance(value.get("template"), dict) and "containers" in value["template"].get("spec", {}):
            yield value["template"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from find_pods(part)


def _schema_faults(one: Object, definitions: dict[str, Object]) -> Iterator[str]:
    kind = one["kind"]
    if kind in definitions:
        known: Object = {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
        schema = {**definitions[kind], "properties": {**definitions[kind]["properties"], **known}}
        for error in jsonschema.Draft7Validator(schema).iter_errors(one):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    elif kind not in UNCHECKED and not one["apiVersion"].startswith("ray.io/"):
        try:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message}"


def _strict(schema: Any) -> Any:  # noqa: ANN401  (whatever a schema holds)
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(part) for name, part in schema.items()}
    if isinstance(strict.get("properties"), dict) and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    return strict


def _pod_faults(pod: Object, objects: list[Object]) -> Iterator[str]:
    spec = pod["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    claims = {one["metadata"]["name"] for one in objects if one["kind"] == "PersistentVolumeClaim"}
    maps = {one["metadata"]["name"] for one in objects if one["kind"] == "ConfigMap"}
    accounts = {one["metadata"]["name"] for one in objects if one["kind"] == "ServiceAccount"}
    if spec.get("serviceAccountName") not in accounts:
        yield f"service account {spec.get('serviceAccountName')!r} is not there"
    if not spec.get("securityContext", {}).get("runAsNonRoot"):
        yield "runs as root: set securityContext.runAsNonRoot"
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in claims:
            yield f"volume {volume['name']}: claim {claim!r} is not there"
        if (name := volume.get("configMap", {}).get("name")) is not None and name not in maps:
            yield f"volume {volume['name']}: config map {name!r} is not there"
        if (name := volume.get("secret", {}).get("secretName")) is not None and name not in SECRETS:
            yield f"volume {volume['name']}: nobody is told to make secret {name!r}"
    for container in spec["containers"]:
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"container {container['name']}: must drop all capabilities and privilege escalation"
        if "memory" not in container.get("resources", {}).get("limits", {}):
            yield f"container {container['name']}: has no limit of memory"
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes and not _claimed(mount["name"], objects):
                yield f"container {container['name']}: volume {mount['name']!r} is not there"
        for variable in container.get("env", ()):
            wanted = variable.get("valueFrom", {}).get("secretKeyRef")
            if wanted and wanted["key"] not in SECRETS.get(wanted["name"], ()):
                yield f"{variable['name']}: nobody is told to make {wanted['name']}/{wanted['key']}"


def _claimed(volume: str, objects: list[Object]) -> bool:
    sets = (one["spec"].get("volumeClaimTemplates", ()) for one in objects if one["kind"] == "StatefulSet")
    return any(claim["metadata"]["name"] == volume for claim in itertools.chain.from_iterable(sets))


def _ray_faults(one: Object, objects: list[Object]) -> Iterator[str]:
    """Yield where the object and the code disagree: import strings, recipes, paths, Ray's version."""
    import ray

    spec = one["spec"]
    ray_cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    if ray_cluster["rayVersion"] != ray.__version__:
        yield f"rayVersion {ray_cluster['rayVersion']}: this code is tested with {ray.__version__}"
    mounts = [
        mount["mountPath"]
        for pod in find_pods(one)
        for container in pod["spec"]["containers"]
        for mount in container.get("volumeMounts", ())
    ]
    for application in yaml.safe_load(spec.get("serveConfigV2", "{}")).get("applications", ()):
        try:
            load_target(application["import_path"])
        except (ImportError, AttributeError) as error:
            yield f"import_path {application['import_path']}: {error}"
        for name, path in application.get("args", {}).items():
            if not any(path.startswith(mount) for mount in mounts):
                yield f"{application['name']}: {name}={path}: nothing is mounted there"
    for told in objects:
        if told["kind"] == "ConfigMap" and "recipe.toml" in told["data"]:
            yield from _recipe_faults(told["data"]["recipe.toml"], mounts, objects)


def _recipe_faults(text: str, mounts: list[str], objects: list[Object]) -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(text, "utf-8")
        try:
            recipe = load_recipe(str(path))
            engine = recipe.section(EngineConfig)
            recipe.section(load_target("serving.config:ServeConfig"))
        except ConfigError as error:
            yield f"recipe.toml: {error}"
            return
    if not any(str(engine.registry_uri).startswith(mount) for mount in mounts) and "://" not in str(
        engine.registry_uri
    ):
        yield f"recipe.toml: engine.registry_uri={engine.registry_uri}: is on no volume that pods share"
    services = {told["metadata"]["name"]: told for told in objects if told["kind"] == "Service"}
    addresses = [engine.redis_url.split("//")[-1].split("/")[0], *engine.kafka_servers.split(",")]
    for host, _, port in (address.partition(":") for address in addresses):
        if "." not in host and (
            host not in services or int(port) not in {told["port"] for told in services[host]["spec"]["ports"]}
        ):
            yield f"recipe.toml: {host}:{port}: there is no such service"


def _selector_faults(objects: list[Object]) -> Iterator[str]:
    """Yield selectors that match no pod, and ports by name that no container has."""
    pods = [pod for one in objects for pod in find_pods(copy.deepcopy(one))]
    labelled = [pod["metadata"]["labels"] for pod in pods]
    ports = {port["name"] for pod in pods for box in pod["spec"]["containers"] for port in box.get("ports", ())}
    for one in objects:
        name, spec = f"{one['kind']}/{one['metadata']['name']}", one.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector") or {}
        wanted = selector.get("matchLabels", selector if one["kind"] == "Service" else {})
        if wanted and not any(wanted.items() <= labels.items() for labels in labelled):
            yield f"{name}: selects no pod: {wanted}"
        named = [port.get("targetPort") for port in spec.get("ports", ()) if one["kind"] == "Service"]
        named += [endpoint.get("port") for endpoint in spec.get("podMetricsEndpoints", ())]
        yield from (
            f"{name}: no container has port {port!r}" for port in named if isinstance(port, str) and port not in ports
        )


if __name__ == "__main__":
    main()
