"""Items and users one by one and in bulk: shown, told of, deleted, brought back, compared."""

import dataclasses

import pytest
import torch

from cluster.client import Client
from cluster.errors import RefusedError
from cluster.manifest import VersionRef
from serving.access import needed_role
from serving.entities import nearest_by_row
from training.models.classical import build_resident
from training.models.version import USER_ROWS, read_version


@pytest.fixture
def client(alone):
    with Client(alone.url) as client:
        yield client


def test_an_item_of_the_version_is_shown_with_what_it_was_told_to_be(client):
    shown = client.item("i10")
    assert shown["text"] == "film number 10"
    assert (shown["categories"], shown["domain"]) == (["even", "tenth"], "early")
    assert (shown["available"], shown["deleted"], shown["has_row"]) == (True, False, True)


def test_an_item_that_was_put_is_shown_as_it_was_put(client):
    client.put_items(
        [{"item_id": "put/here", "text": "a lighthouse keeper", "categories": ["sea"], "available_from_us": 2**61}]
    )
    shown = client.item("put/here")
    assert (shown["text"], shown["categories"], shown["domain"]) == ("a lighthouse keeper", ["sea"], "default")
    assert (shown["available"], shown["deleted"], shown["has_row"]) == (False, False, False)


def test_an_item_that_nobody_knows_is_not_found(alone):
    for method in ("GET", "DELETE"):
        answer = alone.request(method, "/v1/items/no/such")
        assert answer.status == 404
        assert "no/such" in answer.body["detail"]


@pytest.mark.parametrize("arm", ["live", "state", "frozen"])
def test_a_deleted_item_is_gone_from_every_answer_until_it_is_put_again(alone, client, arm):
    def found() -> set[str]:
        slate = client.recommend("stranger", k=500, arm=arm, boost=["i7"], deadline_ms=5_000)["items"]
        similar = client.similar("i8", 500)["items"]
        return {item["item_id"] for item in slate} & {item["item_id"] for item in similar}

    assert "i7" in found()
    client.delete_items(["i7"])
    assert "i7" not in found()
    assert {"item_id": "i7", "reason": "unavailable"} in client.rank("stranger", ["i7", "i9"], arm=arm)["unranked"]
    assert (client.item("i7")["deleted"], client.item("i7")["available"]) == (True, False)
    assert client.item("i7")["categories"] == ["odd"]
    assert alone.log.find_item("i7").is_deleted  # durable, as another process reads it
    client.put_items([{"item_id": "i7", "text": "film number 7", "categories": ["odd"], "domain": "early"}])
    assert "i7" in found()


def test_an_item_put_and_deleted_is_gone_and_its_id_may_hold_slashes(alone, client):
    client.put_items([{"item_id": "a/b ü", "text": "a ghost story"}])
    assert alone.request("DELETE", "/v1/items/a/b%20%C3%BC").body == {"deleted": 1, "rejected": []}
    assert "a/b ü" not in {item["item_id"] for item in client.recommend("stranger", k=500)["items"]}
    assert alone.request("DELETE", "/v1/items/a/b%20%C3%BC").body["deleted"] == 1  # again is as once


def test_many_are_deleted_and_those_that_are_not_are_named(alone, client):
    client.put_items([{"item_id": f"many{number}", "text": "one of many"} for number in range(3)])
    answer = client.delete_items(["many0", "nowhere", "many2"])
    assert answer == {"deleted": 2, "rejected": [{"index": 1, "field": "items", "reason": "is unknown"}]}
    refused = alone.request("POST", "/v1/items/delete", {"items": [7, "nul\x00"]})
    assert refused.status == 422
    assert [entry["reason"] for entry in refused.body["rejected"]] == ["must be an id", "is unknown"]


def test_what_is_told_of_users_is_durable_and_shown(alone, client):
    told = [{"user_id": "u/1", "attributes": {"country": "NO", "plan": "family"}}, {"user_id": "u2"}, {"user_id": ""}]
    answer = client.put_users(told)
    assert answer["accepted"] == 2
    assert [(entry["index"], entry["field"]) for entry in answer["rejected"]] == [(2, "user_id")]
    assert client.user("u/1")["attributes"] == {"country": "NO", "plan": "family"}
    assert alone.log.find_user("u/1").attributes["plan"] == "family"
    client.put_users([{"user_id": "u/1", "attributes": {"country": "SE"}}])
    assert client.user("u/1")["attributes"] == {"country": "SE"}
    assert client.user("never told of")["attributes"] == {}


@pytest.mark.parametrize("attributes", [7, {"age": 7}, {"": "x"}, {"x": "nul\x00"}, {str(n): "x" for n in range(257)}])
def test_attributes_that_are_no_texts_by_name_are_refused(alone, attributes):
    answer = alone.request("PUT", "/v1/users", {"user_id": "u1", "attributes": attributes})
    assert answer.status == 422
    assert answer.body["rejected"][0]["field"].startswith("attributes")


def test_users_without_a_row_are_like_those_who_have_the_same_items(alone, client):
    for user_id, item_ids in {"twin a": ("i20", "i21"), "twin/b": ("i20", "i21"), "half": ("i21", "i22")}.items():
        for item_id in item_ids:
            alone.post(user_id, item_id)
    found = client.similar_users("twin a")
    assert found["by"] == "history"
    assert [(user["user_id"], user["score"]) for user in found["users"]] == [
        ("twin/b", pytest.approx(1)),
        ("half", pytest.approx(1 / 2)),
    ]
    assert client.similar_users("twin/b", k=1)["users"][0]["user_id"] == "twin a"


def test_users_with_a_row_are_like_those_whose_rows_point_the_same_way(versions):
    state = read_version(versions.registry, VersionRef(1))
    row_UD = torch.zeros_like(state.rows[USER_ROWS])
    row_UD[:3, :2] = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    model = build_resident(dataclasses.replace(state, rows={**state.rows, USER_ROWS: row_UD}), {}, None)
    found = nearest_by_row(model, "u0", 2)
    assert found == [("u1", pytest.approx(3 / 5)), ("u2", 0)]
    assert nearest_by_row(model, "u3", 2) is None  # a row that has learned nothing
    assert nearest_by_row(model, "stranger", 2) is None


def test_a_user_that_nobody_knows_is_like_nobody(client):
    with pytest.raises(RefusedError, match="unknown"):
        client.similar_users("nobody at all")


def test_a_reader_s_key_changes_nothing_and_personal_paths_are_for_administrators():
    assert needed_role("GET", "/v1/items/i1") == "read"
    assert needed_role("DELETE", "/v1/items/i1") == needed_role("POST", "/v1/items/delete") == "write"
    assert needed_role("PUT", "/v1/users") == "write"
    assert needed_role("GET", "/v1/users/u1/similar") == "admin"
