"""Manifests hold as they are, and each kind of fault in them is found."""

import copy
import re

import pytest

from k8s.render import render
from k8s.validate import CRDS, OVERLAYS, find_faults, find_pods, read_definitions, render_overlay

DEFINITIONS = read_definitions(CRDS)
needs_definitions = pytest.mark.skipif(not DEFINITIONS, reason="KubeRay's definitions are not beside the checkout")


def find(objects, kind, name=None):
    return next(one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"]))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_holds_and_is_in_one_namespace(overlay):
    objects = render_overlay(overlay)
    assert list(find_faults(objects, DEFINITIONS)) == []
    assert {one["metadata"].get("namespace") for one in objects if one["kind"] != "Namespace"} == {"recloop"}
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))


def test_gpus_are_asked_for_where_there_are_some_and_not_where_serving_is():
    objects = render_overlay("gpu")
    asking = [
        container["resources"]["limits"].get("nvidia.com/gpu")
        for kind in ("RayJob", "RayService")
        for pod in find_pods(find(objects, kind))
        for container in pod["spec"]["containers"]
    ]
    assert asking == [None, "1", None, None]
    images = {box["image"] for one in objects for pod in find_pods(one) for box in pod["spec"]["containers"]}
    assert "recloop:0.1.0-cuda" in images
    assert "recloop:0.1.0" not in images


def no_such_field(objects):
    find(objects, "Service", "redis")["spec"]["prots"] = []


def root(objects):
    find(objects, "StatefulSet", "redis")["spec"]["template"]["spec"]["securityContext"] = {}


def capable(objects):
    del next(find_pods(find(objects, "RayService")))["spec"]["containers"][0]["securityContext"]["capabilities"]


def other_claim(objects):
    find(objects, "PersistentVolumeClaim")["metadata"]["name"] = "other"


def other_code(objects):
    service = find(objects, "RayService")
    service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace("build_app", "build_nothing")


def other_labels(objects):
    find(objects, "PodDisruptionBudget", "redis")["spec"]["selector"]["matchLabels"] = {"app": "nobody"}


def other_port(objects):
    find(objects, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] = "nowhere"


def other_secret(objects):
    pod = next(find_pods(find(objects, "StatefulSet", "redis")))
    pod["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]["key"] = "pass"


def other_setting(objects):
    recipe = find(objects, "ConfigMap")
    recipe["data"]["recipe.toml"] = recipe["data"]["recipe.toml"].replace("arms", "arm")


def other_broker(objects):
    find(objects, "Service", "kafka")["spec"]["ports"][0]["port"] = 9094


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (no_such_field, "Service/redis: .*prots"),
        (root, "StatefulSet/redis: runs as root"),
        (capable, "RayService/recloop: container ray: must drop all capabilities"),
        (other_claim, "claim 'recloop-shared' is not there"),
        (other_code, "build_nothing"),
        (other_labels, "PodDisruptionBudget/redis: selects no pod"),
        (other_port, "no container has port 'nowhere'"),
        (other_secret, "nobody is told to make recloop-redis/pass"),
        (other_setting, "did you mean serve.arms"),
        (other_broker, "kafka:9092: there is no such service"),
    ],
)
def test_a_fault_is_found(breaks, said):
    objects = copy.deepcopy(render_overlay("laptop"))
    breaks(objects)
    faults = list(find_faults(objects, DEFINITIONS))
    assert faults
    assert any(re.search(said, fault) for fault in faults), faults


@needs_definitions
def test_a_misspelt_field_of_kuberay_is_found():
    objects = copy.deepcopy(render_overlay("laptop"))
    cluster = find(objects, "RayService")["spec"]["rayClusterConfig"]
    cluster["headGroupSpecs"] = cluster.pop("headGroupSpec")
    assert any("headGroupSpecs" in fault for fault in find_faults(objects, DEFINITIONS))


def test_what_the_renderer_does_not_know_is_an_error(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("components: [x]\n")
    with pytest.raises(ValueError, match="components: is not rendered here"):
        render(tmp_path)
