"""Slates narrowed to categories and a domain, and what is told of a user."""

import pytest

from cluster.catalogue import Item
from cluster.manifest import VersionRef
from serving.fallbacks import Fallbacks
from serving.recommender import Query, Recommendation
from serving.refresh import Residents
from tests.serving.conftest import ITEMS
from training.models.served import ServedModel
from training.models.tags import PutTags
from training.policies import Slate


def ids(answer: dict) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_a_slate_is_narrowed_to_any_of_the_categories_and_to_the_domain(alone):
    whole = ids(alone.recommend("u1", k=500))
    even = [item_id for item_id in whole if item_id in {f"i{row}" for row in range(0, ITEMS, 2)}]
    assert ids(alone.recommend("u1", k=500, categories=["even"])) == even
    tenth = alone.recommend("u1", k=2, categories=["tenth", "unheard of"])
    assert ids(tenth) == [item_id for item_id in whole if item_id in {f"i{row}" for row in range(0, ITEMS, 10)}][:2]
    late = {f"i{row}" for row in range(ITEMS // 2, ITEMS)}
    assert ids(alone.recommend("u1", k=500, categories=["even"], domain="late")) == [i for i in even if i in late]
    assert ids(alone.recommend("a stranger", k=500, domain="late"))[0] == f"i{ITEMS // 2}"  # the most popular of them
    assert ids(alone.recommend("u1", k=5, categories=["unheard of"])) == []


def test_an_item_put_is_found_by_its_newest_categories_whatever_the_version_was_told(alone):
    put = [
        {"item_id": "saga", "text": "a saga of the fjords", "categories": ["nordic"], "domain": "books"},
        {"item_id": "i4", "text": "film number 4, cut anew", "categories": ["nordic"]},
    ]
    assert alone.request("PUT", "/v1/items", put).status == 200
    assert set(ids(alone.recommend("u1", k=500, categories=["nordic"]))) == {"saga", "i4"}
    assert ids(alone.recommend("u1", k=500, categories=["nordic"], domain="books")) == ["saga"]
    assert "i4" not in ids(alone.recommend("u1", k=500, categories=["even"]))
    assert alone.request("PUT", "/v1/items", {**put[1], "categories": ["even"]}).status == 200
    assert ids(alone.recommend("u1", k=500, categories=["nordic"])) == ["saga"]
    assert "i4" in ids(alone.recommend("u1", k=500, categories=["even"]))


def test_what_is_boosted_is_narrowed_too(alone):
    odd = ids(alone.recommend("u2", k=500, categories=["odd"]))
    boosted = ids(alone.recommend("u2", k=3, categories=["odd"], boost=[odd[-1], "i8", "nowhere"]))
    assert boosted == [odd[-1], *odd[:2]]


@pytest.fixture
def residents(versions) -> Residents:
    model = ServedModel.load(versions.registry, VersionRef(1))
    return Residents(live=model, pinned=None, tags=PutTags().with_items([Item(item_id="i9", text="t")], {}))


def remembered(item_ids: list[str], **narrowed: object) -> Fallbacks:
    fallbacks = Fallbacks()
    slate = Slate(item_ids=item_ids, scores=[1.0] * len(item_ids), propensities=[1.0] * len(item_ids))
    found = Recommendation(
        request_id="r",
        version="1.0",
        learned_seq=0,
        state_seq=0,
        state_fallback=False,
        reflects_min_seq=None,
        cold_start=False,
        slate=slate,
        texts=[None] * len(item_ids),
    )
    fallbacks.remember(Query(user_id="u1", k=len(item_ids), arm="live", **narrowed), found)
    return fallbacks


def test_what_is_late_is_narrowed_too(residents):
    odd = Query(user_id="u1", k=2, arm="live", categories=("odd",))
    found, name = remembered(["i4", "i7", "i9", "i5"]).find(odd, residents)
    assert (found.slate.item_ids, name) == (["i7", "i5"], "cached")  # i9 was put anew, without a category
    found, name = remembered(["i4", "i7", "i6"]).find(odd, residents)
    assert (found.slate.item_ids, name) == (["i1", "i3"], "popular")  # too few of the last slate are left
    narrowed = remembered(["i7", "i5", "i3"], categories=("odd",))
    assert narrowed.find(Query(user_id="u1", k=2, arm="live"), residents)[1] == "popular"  # was not all the user's


def test_a_user_is_shown_as_the_system_sees_them(alone):
    seq = alone.post("someone/with a slash", "i9", "purchase")
    about = alone.request("GET", "/v1/users/someone%2Fwith%20a%20slash?k=5")
    assert about.status == 200, about
    assert (about.body["user_id"], about.body["state_seq"]) == ("someone/with a slash", seq)
    assert (about.body["items"], about.body["has_row"]) == (1, False)
    (entry,) = about.body["history"]
    assert (entry["item_id"], entry["kind"], entry["seq"]) == ("i9", "purchase", seq)
    assert entry["text"] == "film number 9"
    known = alone.request("GET", "/v1/users/u0").body
    assert known["has_row"]
    assert [entry["item_id"] for entry in known["history"]][:2] == ["i0", "i1"]
    assert all(entry["seq"] <= 0 for entry in known["history"][:2])
    nobody = alone.request("GET", "/v1/users/nobody").body
    assert (nobody["items"], nobody["history"], nobody["state_seq"]) == (0, [], 0)
    assert alone.request("GET", "/v1/users/u0?k=0").status == 422
    assert alone.request("GET", f"/v1/users/{'u' * 10_000}").status == 422
