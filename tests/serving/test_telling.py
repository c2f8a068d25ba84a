"""What a server tells whoever runs it: request ids, lines of JSON, metrics by stage, a Grafana dashboard of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from serving.config import ServeConfig

GRAFANA = Path(__file__).parents[2] / "k8s" / "grafana" / "recloop.json"


def test_stages_are_counted_and_labels_are_few(alone):
    for user in range(50):
        alone.recommend(f"stage {user}", arm=("live", "state", "frozen")[user % 3])
    text = alone.request("GET", "/metrics").body["text"]
    for stage in ("queue", "state", "candidates", "policy"):
        assert re.search(rf'recloop_stage_seconds_count{{stage="{stage}"}} [1-9]', text), stage
    assert 'recloop_kept_candidates_total{outcome="miss"}' in text
    assert "recloop_version 1.0" in text
    assert "recloop_requests_under_way 1.0" in text  # this one
    assert "stage 7" not in text


def test_grafana_asks_only_for_what_is_exposed(alone):
    alone.recommend("u1")
    alone.recommend("u1")
    exposed = set(re.findall(r"^# TYPE (recloop_\w+)", alone.request("GET", "/metrics").body["text"], re.MULTILINE))
    panels = json.loads(GRAFANA.read_text("utf-8"))["panels"]
    assert len(panels) >= 8
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            for name in re.findall(r"recloop_\w+", target["expr"]):
                assert {name, re.sub("_(bucket|count|sum)$", "", name), re.sub("_total$", "", name)} & exposed, name


def test_settings_of_copies_are_checked():
    assert dataclasses.replace(ServeConfig(), max_replicas=4).most_replicas == 4
    with pytest.raises(ConfigError, match=r"serve\.max_replicas=1: must be at least serve\.replicas=2"):
        ServeConfig(replicas=2, max_replicas=1)
