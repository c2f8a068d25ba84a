"""What operators ask of a running server: reasons, feedback by arm, traffic, how learning goes, the pointer moved."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.client import Client
from cluster.errors import RefusedError
from cluster.events import Event
from cluster.home import Home
from cluster.log import EventLog, Interaction
from cluster.manifest import VersionRef
from serving import stats
from serving.explanations import explain
from serving.stats import FeedbackStats
from training.models.resident import Candidates

ITEMS = ["a1", "a2", "a3", "b1", "b2", "c1"]


@pytest.fixture
def client(alone):
    with Client(alone.url) as opened:
        yield opened


def shown(alone, user_id, **fields):
    return [item["item_id"] for item in alone.recommend(user_id, k=100, **fields)["items"]]


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
    assert 1 <= told["place"] <= told["among"]
    assert (told["item_is_new"], told["uses_text"], told["rule"]) == (False, True, None)
    assert client.explain("u2", item_id, boost=[item_id])["rule"] == "boosted"
    with pytest.raises(RefusedError, match="unknown to version"):
        client.explain("u2", "nowhere")


def test_without_a_history_or_with_one_item_alone_nothing_is_added_up(alone, client):
    item_id = shown(alone, "u2")[0]
    stranger = client.explain("a stranger", item_id)
    assert (stranger["cold_start"], stranger["because"]) == (True, [])
    alone.post("had one", "i5")
    alone.post("had one", "i5", "click")
    (reason,) = client.explain("had one", item_id)["because"]
    assert (reason["item_id"], reason["kind"], reason["adds"]) == ("i5", "click", None)


def test_an_item_put_since_is_explained_as_placed_by_its_text(alone, client):
    client.put_items([{"item_id": "put since", "text": "a heist in the snow"}])
    told = client.explain("u2", "put since")
    assert (told["item_is_new"], told["uses_text"], told["text"]) == (True, True, "a heist in the snow")


def test_the_score_that_is_explained_is_one_among_others_where_it_says_something_among_others_only():
    class Standardising:  # as a blend does
        item_row = index_of = user_row = dict.fromkeys(ITEMS)
        has_texts = False
        state = SimpleNamespace(dense={})

        def knows(self, item_id):
            return True

        def text_of(self, item_id):
            return None

        def recommend(self, user_id, history, k):
            return self.rank(user_id, history, ITEMS)

        def rank(self, user_id, history, item_ids):
            liking_K = np.array([sum(entry.item_id[0] == item_id[0] for entry in history) for item_id in item_ids])
            scores_K = (liking_K - liking_K.mean()) / (liking_K.std() or 1)
            order = np.argsort(-scores_K, kind="stable")
            return Candidates(item_ids=[item_ids[place] for place in order], scores=scores_K[order], cold_start=False)

    past = [Interaction(item_id, "like", None, 0, 0) for item_id in ("a1", "a2", "b1")]
    told = explain(Standardising(), "u", past, "b2")
    adds = {reason["item_id"]: reason["adds"] for reason in told["because"]}
    assert adds["b1"] > 0  # liked for the one like it
    assert adds["a1"] < 0


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


def happened(request_id, item_id, kind, user_id="u"):
    return Event(user_id=user_id, item_id=item_id, kind=kind, ts_us=1, request_id=request_id)


def test_ctr_counts_each_item_of_a_slate_once_and_a_hit_counts_for_its_slate_s_first_minute(tmp_path, monkeypatch):
    with EventLog(tmp_path / "log.sqlite") as log:
        counted = FeedbackStats(log)
        shown_items = [happened(f"live-{slate}", f"i{item}", "impression") for slate in "ab" for item in range(4)]
        log.append(shown_items + [happened("live-a", "i0", kind) for kind in ("click", "click", "purchase")])
        log.append([happened("live-b", "i9", "click")])  # never shown, so no click of what was
        (before,) = counted.describe()
        assert (before["ctr"], before["hit_rate"], before["slates"]) == (1 / 8, 2 / 2, 2)
        monkeypatch.setattr(stats, "MINUTE_US", 1)  # from here on every event has a minute of its own
        log.append([happened("live-a", "i1", "click"), happened("frozen-c", "i1", "skip")])
        rows = {row["arm"]: row for row in counted.describe()}
        assert (rows["live"]["ctr"], rows["live"]["slates"]) == (2 / 8, 2)
        assert (rows["frozen"]["ctr"], rows["frozen"]["hit_rate"]) == (None, 0)


def test_what_is_counted_is_bounded(tmp_path, monkeypatch):
    for name, most in {"MOST_EVENTS": 60, "MOST_ITEMS": 20, "READ_EVENTS": 7, "MINUTES": 5}.items():
        monkeypatch.setattr(stats, name, most)
    with EventLog(tmp_path / "log.sqlite") as log:
        log.append([happened(f"live-{number}", "i", "click") for number in range(100)])
        counted = FeedbackStats(log)
        (row,) = counted.describe()
        assert row["slates"] == 60
        assert counted.describe() == [row]
        assert len(counted._slates) <= 20


def test_a_click_of_a_request_id_that_is_no_slate_s_counts_for_nobody(tmp_path):
    with EventLog(tmp_path / "log.sqlite") as log:
        log.append([happened(request_id, "i", "click") for request_id in (None, "live", "other-1", "0f3c")])
        assert FeedbackStats(log).describe() == []


def test_deltas_tell_how_well_events_were_foreseen(run_alone, tmp_path):
    with run_alone(Home(tmp_path)) as served, Client(served.url) as client:
        validation = {"log_loss": 2.5, "base_log_loss": 3, "ndcg_at_10": 0.2, "base_ndcg_at_10": 0.1, "segments": {}}
        told = [validation, {}]  # the first learned events that had no history to be foreseen from
        for number, figures in enumerate(told):
            last_seq = served.post("learned from", "i0", "impression")
            served.wait_until_served(served.versions.publish_delta(seed=number, last_seq=last_seq, validation=figures))
        (delta,) = client.stats()["learning"]
        assert delta == {"version": "1.1", "seq": 1} | {k: v for k, v in validation.items() if k != "segments"}
        (version,) = client.stats()["versions"]
        assert (version["version"], version["promoted"]) == ("1", "1.2")
        assert [move["version"] for move in client.stats()["moves"]] == ["1.0"]  # not from delta to delta


def test_traffic_tells_of_requests_and_their_latency(alone):
    alone.recommend("u1")
    alone.request("POST", "/v1/recommend", raw=b"not JSON")
    slices = alone.request("GET", "/v1/stats").body["replica"]["slices"]
    assert sum(slice["requests"] for slice in slices) >= 2
    assert 0 < slices[-1]["p50_ms"] <= slices[-1]["p99_ms"]


def test_a_version_is_promoted_and_rolled_back_over_http(run_alone, tmp_path):
    with run_alone(Home(tmp_path)) as served, Client(served.url) as client:
        second = served.versions.publish_version(seed=1, promote=False)
        assert client.promote("2", "better") == {"promoted": "2.0", "before": "1.0", "reason": "better"}
        served.wait_until_served(second)
        assert served.registry.history()[-1].reason == "better"
        assert client.roll_back() == {"promoted": "1.0", "before": "2.0", "reason": "rollback"}
        deadline_s = time.monotonic() + 10
        while served.recommend("u1")["version"] != "1.0":
            assert time.monotonic() < deadline_s
        assert client.promote(2)["before"] == "1.0"
        served.versions.flip_bit(VersionRef(1), "recipe.toml")
        with pytest.raises(RefusedError, match="checksum differs") as refused:
            client.promote("1")
        assert (refused.value.status, str(served.registry.current())) == (409, "2.0")
        for version, status in (("9", 404), ("x", 422), ("", 422), ("1.7", 404), (0, 422), (True, 422)):
            answer = served.request("POST", "/v1/versions/promote", {"version": version})
            assert answer.status == status, answer
