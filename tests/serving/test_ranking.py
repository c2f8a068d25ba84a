"""The caller's candidates in order, rules of what stands before and behind, and answers by a deadline."""

import threading
import time
from dataclasses import fields, replace

import pytest

from cluster.events import Event
from cluster.log import EventLog
from cluster.manifest import VersionRef
from serving.fallbacks import KEPT_ITEMS, Fallbacks
from serving.recommender import Query, Recommender
from serving.refresh import Residents
from training.models.served import ServedModel
from training.policies import PolicyConfig, Slate


def item_ids(answer):
    return [item["item_id"] for item in answer["items"]]


def rank(served, user_id, items, **fields):
    answer = served.request("POST", "/v1/rank", {"user_id": user_id, "items": items, **fields})
    assert answer.status == 200, answer
    return answer.body


def test_candidates_are_ranked_as_a_recommendation_ranks_them_those_the_user_has_too(alone):
    whole = item_ids(alone.recommend("u1", k=500))
    some = whole[20:2:-3]
    answer = rank(alone, "u1", some)
    assert item_ids(answer) == [item_id for item_id in whole if item_id in some]
    assert (answer["unranked"], answer["cold_start"]) == ([], False)
    assert {"i0", "i1"} <= set(item_ids(rank(alone, "u1", ["i0", "i5", "i1"])))  # u1 has both


def test_a_stranger_s_candidates_are_ranked_by_popularity(alone):
    answer = rank(alone, "a stranger to all", ["i9", "i2", "i5", "i2"])
    assert (item_ids(answer), answer["cold_start"]) == (["i2", "i5", "i9"], True)


def test_candidates_that_are_left_out_are_named_with_the_reason(alone):
    past = {"item_id": "over", "text": "a matinee", "available_from_us": 1, "available_until_us": 2}
    assert alone.request("PUT", "/v1/items", past).status == 200
    answer = rank(alone, "u1", ["i3", "nowhere", "over", "i4"], exclude=["i4"])
    assert item_ids(answer) == ["i3"]
    assert answer["unranked"] == [
        {"item_id": "nowhere", "reason": "unknown"},
        {"item_id": "over", "reason": "unavailable"},
        {"item_id": "i4", "reason": "excluded"},
    ]
    assert item_ids(rank(alone, "u1", ["nowhere"])) == []


def test_interests_have_a_part_in_ranking(alone):
    items = [{"item_id": "whale", "text": "a captain hunts the white whale"}, {"item_id": "tax", "text": "tax law"}]
    assert alone.request("PUT", "/v1/items", items).status == 200
    alone.recommend("warm", interests="anything")
    assert item_ids(rank(alone, "a stranger to all", ["tax", "whale"], interests="no tax law"))[-1] == "tax"


def test_what_is_boosted_stands_first_and_what_is_buried_last(alone):
    plain = item_ids(alone.recommend("u2", k=20))
    answer = item_ids(alone.recommend("u2", k=20, boost=[plain[15], plain[10], "nowhere"], bury=[plain[0]]))
    assert answer[:2] == [plain[10], plain[15]]
    assert plain[0] not in answer
    assert (
        answer[2:]
        == [item_id for item_id in item_ids(alone.recommend("u2", k=500)) if item_id not in {plain[0], *answer[:2]}][
            :18
        ]
    )
    ranked = item_ids(rank(alone, "u2", plain[:4], boost=[plain[3]], bury=[plain[0], plain[1]]))
    assert ranked == [plain[3], plain[2], plain[0], plain[1]]


def test_an_item_is_boosted_from_wherever_it_stands_but_not_past_an_exclusion(versions, home):
    model = ServedModel.load(versions.registry, VersionRef(1))
    with EventLog(home.log) as log:
        recommender = Recommender(log, lambda: Residents(live=model, pinned=None), PolicyConfig(), seed=0, candidates=5)
        last = recommender.recommend(Query(user_id="nobody", k=30, arm="live")).slate.item_ids[-1]
        found = recommender.recommend(Query(user_id="nobody", k=3, arm="live", boost=frozenset([last])))
        assert found.slate.item_ids[0] == last
        barred = Query(user_id="nobody", k=3, arm="live", boost=frozenset([last]), exclude=frozenset([last]))
        assert last not in recommender.recommend(barred).slate.item_ids


class Repeating(ServedModel):
    """A model that offers what users have."""

    repeats = True


def test_what_users_have_is_offered_again_where_the_version_says_so(versions, home):
    model = ServedModel.load(versions.registry, VersionRef(1))
    again = Repeating(**{field.name: getattr(model, field.name) for field in fields(model)})
    with EventLog(home.log) as log:
        log.append([Event(event_id="one", user_id="u1", item_id="i7", kind="purchase", ts_us=1)])
        for one, offered in ((model, False), (again, True)):
            recommender = Recommender(
                log, lambda one=one: Residents(live=one, pinned=None), PolicyConfig(), seed=0, candidates=500
            )
            assert ("i7" in recommender.recommend(Query(user_id="u1", k=500, arm="live")).slate.item_ids) == offered


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"items": []}, "items"),
        ({"items": [""]}, "items.0"),
        ({"items": ["i"] * 10_001}, "items"),
        ({"k": 3}, "k"),
        ({"boost": [1]}, "boost.0"),
    ],
)
def test_an_unsound_request_to_rank_is_refused_by_field(alone, fields, field):
    answer = alone.request("POST", "/v1/rank", {"user_id": "u0", "items": ["i1"]} | fields)
    assert (answer.status, answer.body["errors"][0]["field"]) == (422, field)


def test_an_answer_within_its_deadline_is_the_answer(alone):
    answer = alone.recommend("u3", k=5, deadline_ms=30_000)
    assert "fallback" not in answer
    assert answer["items"] == alone.recommend("u3", k=5)["items"]


@pytest.fixture
def busy(alone, monkeypatch):
    """The app, whose recommender is held up until the test ends."""
    leave, original = threading.Event(), Recommender.recommend

    def wait_first(self, query):
        leave.wait(20)
        return original(self, query)

    monkeypatch.setattr(Recommender, "recommend", wait_first)
    yield alone
    leave.set()


def test_what_is_popular_stands_in_for_an_answer_that_is_late(busy):
    began_s = time.monotonic()
    answer = busy.recommend("never answered", k=3, deadline_ms=50, exclude=["i1"], min_seq=1)
    assert time.monotonic() - began_s < 10
    assert (answer["fallback"], item_ids(answer), answer["cold_start"]) == ("popular", ["i0", "i2", "i3"], True)
    assert not answer["reflects_min_seq"]
    ranked = rank(busy, "never answered", ["i4", "nowhere", "i2"], deadline_ms=50)
    assert (ranked["fallback"], item_ids(ranked), len(ranked["unranked"])) == ("popular", ["i2", "i4"], 1)
    assert 'recloop_deadline_fallbacks_total{fallback="popular"}' in busy.request("GET", "/metrics").body["text"]


def test_a_user_s_last_slate_stands_in_less_what_is_excluded_now(alone, versions, home):
    model = ServedModel.load(versions.registry, VersionRef(1))
    residents, fallbacks = Residents(live=model, pinned=None), Fallbacks()
    with EventLog(home.log) as log:
        recommender = Recommender(log, lambda: residents, PolicyConfig(), seed=0, candidates=30)
        query = Query(user_id="u1", k=5, arm="live")
        found = recommender.recommend(query)
    fallbacks.remember(query, found)
    shown = found.slate.item_ids
    late, name = fallbacks.find(Query(user_id="u1", k=3, arm="live", exclude=frozenset(shown[:1])), residents)
    assert (late.slate.item_ids, name) == (shown[1:4], "cached")
    assert late.request_id != found.request_id
    assert fallbacks.find(Query(user_id="u2", k=3, arm="live"), residents)[1] == "popular"
    assert fallbacks.find(Query(user_id="u1", k=3, arm="live", exclude=frozenset(shown)), residents)[1] == "popular"


def test_of_a_long_slate_the_top_is_remembered(versions):
    model = ServedModel.load(versions.registry, VersionRef(1))
    residents, fallbacks = Residents(live=model, pinned=None), Fallbacks()
    query = Query(user_id="u1", k=500, arm="live")
    found, _ = fallbacks.find(query, residents)
    item_ids = [f"i{number}" for number in range(500)]
    long = Slate(item_ids=item_ids, scores=[0.0] * 500, propensities=[1.0] * 500)
    fallbacks.remember(query, replace(found, slate=long, texts=[None] * 500))
    late, name = fallbacks.find(query, residents)
    assert (late.slate.item_ids, name) == (item_ids[:KEPT_ITEMS], "cached")
    assert len(late.texts) == len(late.slate.scores) == KEPT_ITEMS
