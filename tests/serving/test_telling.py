"""What a server tells whoever runs it: request ids, lines of JSON, metrics by stage, a Grafana dashboard of them."""

import dataclasses
import io
import json
import re
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.ray_session import find_free_port
from serving.config import ServeConfig
from serving.local import running_locally
from serving.request_log import MOST_WAITING, RequestLog
from tests.serving.test_command import post

GRAFANA = Path(__file__).parents[2] / "k8s" / "grafana" / "recloop.json"


def test_every_answer_names_its_request_by_the_client_s_id_where_that_is_plain(alone):
    minted = {alone.request("GET", "/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(minted) == 3
    assert alone.request("GET", "/not/there").headers["x-request-id"]
    for given, taken in (("order-7.a_B", True), ("a b", False), ("x" * 65, False)):
        answer = alone.request("GET", "/healthz", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) == taken


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


def test_requests_are_logged_as_json_where_that_is_asked_for_without_saying_who_was_asked_about(versions, home, capfd):
    recipe = versions.recipe.with_overrides(["serve.log_requests=true"])
    with running_locally(recipe, home, "127.0.0.1", find_free_port()) as url:
        post(f"{url}/v1/recommend", {"user_id": "somebody", "k": 3})
        deadline_s, lines = time.monotonic() + 10, ""
        while "/v1/recommend" not in lines:
            assert time.monotonic() < deadline_s
            lines += capfd.readouterr().err
    told = next(json.loads(line) for line in lines.splitlines() if "/v1/recommend" in line)
    assert (told["status"], told["method"], told["route"]) == (200, "POST", "/v1/recommend")
    assert (told["arm"], told["version"], told["fallback"], told["key_id"]) == ("live", "1.0", None, None)
    assert told["ms"] > 0
    assert "somebody" not in lines


class Stuck(io.StringIO):
    """A stream that nobody reads until it is let go."""

    stuck = True

    def write(self, text):
        while self.stuck:
            time.sleep(0.01)
        return super().write(text)


def test_lines_that_nobody_takes_are_dropped_and_counted():
    stream = Stuck()
    log = RequestLog(stream)
    for number in range(MOST_WAITING + 100):
        log.add({"number": number})
    stream.stuck = False
    deadline_s = time.monotonic() + 10
    while stream.getvalue().count("\n") < MOST_WAITING:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    log.add({"number": "last"})
    while "last" not in stream.getvalue():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    dropped = sum(json.loads(line).get("dropped_before", 0) for line in stream.getvalue().splitlines())
    assert dropped >= 99


def test_settings_of_copies_are_checked():
    assert dataclasses.replace(ServeConfig(), max_replicas=4).most_replicas == 4
    with pytest.raises(ConfigError, match=r"serve\.max_replicas=1: must be at least serve\.replicas=2"):
        ServeConfig(replicas=2, max_replicas=1)
