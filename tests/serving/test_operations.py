"""What operators ask of a running server: items withdrawn, users alike, reasons, feedback by arm, the pointer moved."""

import time

import pytest

from cluster.client import Client
from cluster.errors import RefusedError
from cluster.home import Home
from serving.stats import FeedbackStats


@pytest.fixture
def client(alone):
    with Client(alone.url) as opened:
        yield opened


def shown(alone, user_id, **fields):
    return [item["item_id"] for item in alone.recommend(user_id, k=100, **fields)["items"]]


def test_a_deleted_item_is_shown_to_nobody_and_put_again_it_is(alone, client):
    item_id = shown(alone, "u1")[0]
    before = client.item(item_id)
    assert (before["available"], before["is_new"]) == (True, False)
    assert client.delete_items([item_id, "nowhere"]) == {"deleted": 1, "unknown": ["nowhere"]}
    assert client.item(item_id)["available"] is False
    for arm in ("live", "state", "frozen"):
        assert item_id not in shown(alone, "u1", arm=arm)
    assert item_id not in shown(alone, "u1", boost=[item_id])
    client.put_items([{"item_id": item_id, "text": before["text"]}])
    assert item_id in shown(alone, "u1")


def test_one_item_is_deleted_by_its_address_and_one_that_nobody_knows_is_not_found(alone, client):
    client.put_items([{"item_id": "a/b", "text": "a short one"}])
    assert alone.request("DELETE", "/v1/items/a%2Fb").body == {"deleted": 1, "unknown": []}
    assert "a/b" not in shown(alone, "u1")
    assert alone.request("DELETE", "/v1/items/nowhere").status == 404
    assert alone.request("GET", "/v1/items/nowhere").status == 404


def test_users_alike_are_those_with_rows_that_are(alone, client):
    assert client.similar_users("u1") == {"user_id": "u1", "version": "1.0", "users": []}  # nobody has learned a row
    with pytest.raises(RefusedError, match="user 'nobody' is unknown to version"):
        client.similar_users("nobody")


def test_an_explanation_says_which_interactions_a_score_rests_on(alone, client):
    item_id = shown(alone, "u2")[0]
    told = client.explain("u2", item_id)
    assert (told["interactions"], told["cold_start"]) == (2, False)
    assert {reason["item_id"] for reason in told["because"]} == {"i0", "i1"}
    ranked = alone.request("POST", "/v1/rank", {"user_id": "u2", "items": [item_id]}).body["items"][0]
    assert told["score"] == pytest.approx(ranked["score"])
    adds = [abs(reason["adds"]) for reason in told["because"]]
    assert adds == sorted(adds, reverse=True)
    assert adds[0] > 0
    assert client.explain("a stranger", item_id)["cold_start"]
    with pytest.raises(RefusedError, match="unknown to version"):
        client.explain("u2", "nowhere")


def test_feedback_is_counted_by_the_arm_of_the_slate_that_it_answers(alone, client):
    def of(arm):
        rows = [row for row in alone.request("GET", "/v1/stats").body["feedback"] if row["arm"] == arm]
        return [sum(row[name] for row in rows) for name in ("impressions", "clicks", "slates")]

    before = {arm: of(arm) for arm in ("live", "state")}
    first, second = (alone.recommend("u3", k=3, arm=arm) for arm in ("live", "state"))
    assert first["request_id"].startswith("live-")
    events = [
        {"user_id": "u3", "item_id": item["item_id"], "kind": kind, "request_id": slate["request_id"]}
        for slate, kinds in ((first, ("impression", "click")), (second, ("impression",)))
        for item in slate["items"][:2]
        for kind in kinds
    ]
    client.feedback([*events, {"user_id": "u3", "item_id": "i9", "kind": "click", "request_id": "somebody's own"}])
    assert [now - then for now, then in zip(of("live"), before["live"], strict=True)] == [2, 2, 1]
    assert [now - then for now, then in zip(of("state"), before["state"], strict=True)] == [2, 0, 1]
    again = FeedbackStats(alone.log).describe()  # as another replica, or this one after a restart, counts
    assert again == alone.request("GET", "/v1/stats").body["feedback"]


def test_traffic_tells_of_requests_and_their_latency(alone):
    alone.recommend("u1")
    alone.request("POST", "/v1/recommend", raw=b"not JSON")
    slices = alone.request("GET", "/v1/stats").body["replica"]["slices"]
    assert sum(slice["requests"] for slice in slices) >= 2
    assert 0 < slices[-1]["p50_ms"] <= slices[-1]["p99_ms"]


def test_a_version_is_promoted_and_rolled_back_over_http(run_alone, tmp_path):
    with run_alone(Home(tmp_path)) as served, Client(served.url) as client:
        second = served.versions.publish_version(seed=1, promote=False)
        assert client.promote("2", "better") == {"promoted": "2.0", "before": "1.0"}
        served.wait_until_served(second)
        assert served.registry.history()[-1].reason == "better"
        assert client.roll_back() == {"promoted": "1.0", "before": "2.0"}
        deadline_s = time.monotonic() + 10
        while served.recommend("u1")["version"] != "1.0":
            assert time.monotonic() < deadline_s
        for version, status in (("9", 404), ("x", 422), ("", 422), ("1.7", 404)):
            answer = served.request("POST", "/v1/versions/promote", {"version": version})
            assert answer.status == status, answer
