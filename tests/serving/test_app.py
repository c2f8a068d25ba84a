"""The app over HTTP, on a real Ray Serve behind HAProxy."""

import threading
import time

import pytest

from cluster.manifest import VersionRef


def item_ids(answer):
    return [item["item_id"] for item in answer["items"]]


def test_a_slate_names_its_version_positions_and_propensities(served):
    answer = served.recommend("u0", k=3, with_text=True)
    assert [(item["position"], item["propensity"]) for item in answer["items"]] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert all(item["text"] for item in answer["items"])
    assert answer["version"].startswith("1.")
    assert not answer["cold_start"]


def test_an_unknown_user_gets_what_is_popular(served):
    answer = served.recommend("nobody", k=3)
    assert answer["cold_start"]
    assert answer["state_seq"] == 0
    assert item_ids(answer) == ["i0", "i1", "i2"]


def test_a_user_with_an_empty_history_gets_what_is_popular(served):
    seq = served.post("looker", "i3", "impression")
    answer = served.recommend("looker", k=3)
    assert answer["cold_start"]
    assert answer["state_seq"] == seq
    assert item_ids(answer) == ["i0", "i1", "i2"]


def test_k_beyond_the_catalogue_returns_what_there_is(served):
    answer = served.recommend("u1", k=500, exclude=["i7"])
    catalogue = served.request("GET", "/v1/versions").body["items"]
    assert len(set(item_ids(answer))) == len(answer["items"]) == catalogue - 3
    assert not {"i0", "i1", "i7"} & set(item_ids(answer))  # the first two are u1's already


def test_feedback_changes_the_very_next_recommendation(served):
    chosen = item_ids(served.recommend("u2", k=5))[0]
    seq = served.post("u2", chosen)
    after = served.recommend("u2", k=5, min_seq=seq)
    assert after["reflects_min_seq"]
    assert after["state_seq"] == seq
    assert chosen not in item_ids(after)
    assert not served.recommend("u2", min_seq=seq + 1_000)["reflects_min_seq"]


def test_arms_differ_in_weights_and_state_but_none_offers_what_the_user_has(served):
    served.wait_until_served(served.publish_delta(seed=1))
    seq = served.post("u3", "i9")
    live, state, frozen = (served.recommend("u3", k=30, arm=arm, min_seq=seq) for arm in ("live", "state", "frozen"))
    assert frozen["version"] == state["version"] == "1.0" != live["version"]
    assert (live["state_seq"], state["state_seq"], frozen["state_seq"]) == (seq, seq, 0)
    assert (live["reflects_min_seq"], state["reflects_min_seq"], frozen["reflects_min_seq"]) == (True, True, False)
    assert all("i9" not in item_ids(answer) for answer in (live, state, frozen))
    scores = [[item["score"] for item in answer["items"]] for answer in (live, state, frozen)]
    assert scores[0] != scores[1] != scores[2]


def test_a_swap_under_traffic_fails_no_request_and_each_answer_has_one_version(served):
    answers, failures, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            answer = served.request("POST", "/v1/recommend", {"user_id": "u0", "k": 3})
            (answers if answer.status == 200 else failures).append(answer.body)

    before = served.recommend("u0")["version"]
    traffic = threading.Thread(target=ask)
    traffic.start()
    after = served.publish_delta(seed=2)
    served.wait_until_served(after)
    asked_before = len(answers) + 1  # one may have been on its way
    while len(answers) <= asked_before and not failures:
        time.sleep(0.01)
    stop.set()
    traffic.join()
    assert failures == []
    assert {answer["version"] for answer in answers} == {before, str(after)}
    of_version = {name: {str(a["items"]) for a in answers if a["version"] == name} for name in (before, str(after))}
    assert [len(slates) for slates in of_version.values()] == [1, 1]


def test_a_rollback_is_served_in_place(served):
    before = VersionRef.parse(served.recommend("u0")["version"])
    slate = served.recommend("u0")["items"]
    served.wait_until_served(served.publish_delta(seed=3))
    assert served.recommend("u0")["items"] != slate
    served.registry.promote(before, "worse")
    served.wait_until_served(before)
    assert served.recommend("u0")["items"] == slate
    newest = served.registry.deltas(before.version)[-1].ref
    served.registry.promote(newest)
    served.wait_until_served(newest)


def test_a_corrupt_delta_keeps_what_was_served_and_says_so(served):
    before = served.recommend("u0")
    corrupt = served.publish_delta(seed=4, promote=False)
    served.versions.flip_bit(corrupt, "rows.safetensors")
    served.registry.promote(corrupt)
    served.wait_for(lambda: "version" in served.request("GET", "/readyz").body["problems"])

    after = served.recommend("u0")
    assert (after["version"], after["items"]) == (before["version"], before["items"])
    problem = served.request("GET", "/v1/versions").body["problems"]["version"]
    assert "rows.safetensors: checksum differs" in problem
    assert 'swaps_total{outcome="refused"} 1.0' in served.request("GET", "/metrics").body["text"]

    served.versions.flip_bit(corrupt, "rows.safetensors")
    served.wait_until_served(served.publish_delta(seed=5))  # over the mended one
    assert served.request("GET", "/readyz").body["problems"] == {}


def test_a_delta_whose_scores_are_not_numbers_is_refused(served):
    before = served.recommend("u0")["version"]
    served.publish_delta(value=float("nan"))
    served.wait_for(lambda: "not finite" in served.request("GET", "/readyz").body["problems"].get("version", ""))
    assert served.recommend("u0")["version"] == before
    served.wait_until_served(served.publish_delta(seed=6))


def test_a_learned_event_counts_towards_freshness(served):
    served.wait_until_served(served.publish_delta(seed=8))
    versions = served.request("GET", "/v1/versions").body
    assert versions["learned_seq"] <= versions["head_seq"]
    assert versions["weights_freshness_ms"]["events"] > 0
    assert 0 < versions["weights_freshness_ms"]["p50"] < 10_000


def test_how_long_an_event_takes_to_be_in_state_rows_and_weights_is_shown(served):
    learned_seq = served.post("timed", "i6")
    served.versions.publish_delta(seed=12, last_seq=learned_seq)
    served.wait_for(lambda: served.recommend("timed")["learned_seq"] == learned_seq)
    freshness = served.request("GET", "/v1/versions").body["freshness_ms"]
    assert freshness.pop("adapter")["events"] == 0  # the encoder is not tuned here
    assert list(freshness) == ["state", "row", "dense"]
    assert all(0 < part["p50"] < 10_000 for part in freshness.values())
    exposed = served.request("GET", "/metrics").body["text"]
    for name, part in freshness.items():
        assert f"recloop_{name}_freshness_seconds_count {part['events']}.0" in exposed


def test_an_answer_names_its_version_and_the_newest_event_in_it(served):
    state_seq = served.post("reader", "i7", "click")
    answer = served.recommend("reader", min_seq=state_seq)
    learned_seq = served.registry.manifest(VersionRef.parse(answer["version"])).last_seq
    assert (answer["state_seq"], answer["learned_seq"]) == (state_seq, learned_seq)
    near = served.request("GET", "/v1/items/i7/similar").body
    assert (near["version"], near["learned_seq"]) == (answer["version"], learned_seq)


def test_a_server_says_what_it_knew_before_the_first_event(served):
    versions = served.request("GET", "/v1/versions").body
    assert (versions["training_events"], versions["knows_later_events"]) == (8, False)


def test_a_new_item_is_recommendable_and_has_neighbours_at_once(served):
    items = [
        {"item_id": "new/ä 1", "text": "a sea captain hunts a white whale", "categories": ["adventure"]},
        {"item_id": "new/ä 2", "text": "a captain at sea hunts the white whale"},
    ]
    answer = served.request("PUT", "/v1/items", {"items": items})
    assert (answer.status, answer.body["accepted"]) == (200, 2)
    assert {"new/ä 1", "new/ä 2"} <= set(item_ids(served.recommend("u0", k=500)))
    near = served.request("GET", "/v1/items/new%2F%C3%A4%201/similar?k=2")
    assert item_ids(near.body)[0] == "new/ä 2"
    assert served.request("GET", "/v1/items/new/%C3%A4%202/similar?k=500").body["items"][0]["item_id"] == "new/ä 1"
    assert served.recommend("u0", k=500, arm="frozen")["version"] == "1.0"


def test_a_new_item_outlives_a_swap(served):
    assert served.request("PUT", "/v1/items", {"item_id": "lasting", "text": "a quiet village"}).status == 200
    served.wait_until_served(served.publish_delta(seed=9))
    assert "lasting" in item_ids(served.recommend("u0", k=500))


def test_an_item_outside_its_time_is_not_recommended(served):
    past = {"item_id": "gone", "text": "a matinee", "available_from_us": 1, "available_until_us": 2}
    assert served.request("PUT", "/v1/items", past).status == 200
    assert "gone" not in item_ids(served.recommend("u0", k=500))


def test_an_unknown_item_has_no_neighbours(served):
    answer = served.request("GET", "/v1/items/no%2Fsuch/similar")
    assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")
    assert "no/such" in answer.body["detail"]


def test_a_known_event_id_is_not_logged_twice(served):
    event = {"user_id": "twice", "item_id": "i4", "kind": "click", "event_id": "the same"}
    first = served.request("POST", "/v1/feedback", event).body
    head_seq = served.log.head_seq()
    again = served.request("POST", "/v1/feedback", {"events": [event]}).body
    assert (first["accepted"], again["accepted"], again["duplicates"]) == (1, 0, 1)
    assert again["results"] == [{"event_id": "the same", "seq": first["last_seq"], "duplicate": True}]
    assert served.log.head_seq() == head_seq


FAR_FUTURE_US = 2**61


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "stare"}, "kind"),
        ({"ts_us": FAR_FUTURE_US}, "ts_us"),
        ({"user_id": "x" * 10_000}, "user_id"),
        ({"item_id": ""}, "item_id"),
        ({"kind": "rating"}, "value"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_unsound_event_is_refused_by_field_and_the_sound_ones_beside_it_are_kept(served, fields, field):
    sound = {"user_id": "careful", "item_id": "i5", "kind": "click"}
    alone = served.request("POST", "/v1/feedback", sound | fields)
    assert (alone.status, [entry["field"] for entry in alone.body["rejected"]]) == (422, [field])
    head_seq = served.log.head_seq()
    beside = served.request("POST", "/v1/feedback", [sound, sound | fields, "not an object"])
    assert beside.status == 200
    assert [entry["index"] for entry in beside.body["rejected"]] == [1, 2]
    assert served.log.head_seq() == beside.body["last_seq"] == head_seq + 1


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/feedback"])
@pytest.mark.parametrize("raw", [b'{"user_id": ', b"", b"\xff\xfe", b"[" * 50_000, b'"\\ud800"'])
def test_malformed_json_is_a_bad_request(served, path, raw):
    answer = served.request("POST", path, raw=raw)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
    assert "not JSON" in answer.body["detail"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"user_id": "x" * 10_000}, "user_id"),
        ({"user_id": ""}, "user_id"),
        ({"k": 0}, "k"),
        ({"k": 501}, "k"),
        ({"k": "10"}, "k"),
        ({"arm": "bandit"}, "arm"),
        ({"limit": 3}, "limit"),
    ],
)
def test_an_unsound_query_is_refused_by_field(served, fields, field):
    answer = served.request("POST", "/v1/recommend", {"user_id": "u0"} | fields)
    assert (answer.status, [error["field"] for error in answer.body["errors"]]) == (422, [field])


@pytest.mark.parametrize(
    "raw", [b"[]", b'{"events": []}', b'{"events": 3}', b"7", b"null", b"{}", b'[{"value": 1e999}]']
)
def test_feedback_without_a_sound_event_is_refused(served, raw):
    assert served.request("POST", "/v1/feedback", raw=raw).status == 422


def test_a_body_beyond_the_limit_is_refused_and_the_client_hears_why(served):
    answer = served.request("POST", "/v1/feedback", raw=b"[" + b" " * 300_000 + b"]")
    assert answer.status == 413
    assert "300,002 bytes; at most 100,000" in answer.body["detail"]


def test_unknown_paths_and_methods_are_problems(served):
    assert served.request("GET", "/v2/recommend").body["status"] == 404
    assert served.request("GET", "/v1/recommend").body["status"] == 405


def test_health_readiness_metrics_and_documentation_answer(served):
    assert served.request("GET", "/healthz").status == 200
    assert served.request("GET", "/readyz").body["status"] == "ready"
    assert 'route="/v1/recommend"' in served.request("GET", "/metrics").body["text"]
    assert served.request("GET", "/docs").status == 200
    paths = served.request("GET", "/openapi.json").body["paths"]
    assert {"/v1/recommend", "/v1/feedback", "/v1/items", "/v1/versions", "/healthz", "/readyz"} <= set(paths)


def test_the_log_holds_after_all_of_this(served):
    assert served.log.verify().sound


def test_a_version_on_trial_answers_its_users_and_nobody_else(served):
    current = served.registry.current()
    ref = served.versions.publish_version(seed=9, promote=False)
    canary = served.registry.start_canary(ref, 0.5, served.log.head_seq())
    try:
        taking = next(user for user in (f"t{n}" for n in range(100)) if canary.takes(user))
        other = next(user for user in (f"t{n}" for n in range(100)) if not canary.takes(user))
        served.wait_for(lambda: served.recommend(taking)["version"] == str(ref))
        assert served.recommend(other)["version"] == str(current)
        assert served.recommend(taking, arm="state")["version"] == "1.0"
        described = served.request("GET", "/v1/versions").body["canary"]
        assert described == {"version": str(ref), "share": 0.5, "from_seq": canary.from_seq, "served": True}
    finally:
        served.registry.end_canary(canary, "over")
    served.wait_for(lambda: served.recommend(taking)["version"] == str(current))


def test_a_version_on_trial_that_does_not_hold_is_served_to_nobody(served):
    current = served.registry.current()
    ref = served.versions.publish_version(seed=10, promote=False)
    served.versions.flip_bit(ref, "rows.safetensors")
    canary = served.registry.start_canary(ref, 0.5, 0)
    try:
        served.wait_for(lambda: "canary" in served.request("GET", "/readyz").body["problems"])
        assert {served.recommend(f"t{n}")["version"] for n in range(20)} == {str(current)}
        time.sleep(0.2)  # ten looks later it is still said
        assert "on trial but served to nobody" in served.request("GET", "/readyz").body["problems"]["canary"]
        assert not served.request("GET", "/v1/versions").body["canary"]["served"]
    finally:
        served.registry.end_canary(canary, "over")
        served.versions.flip_bit(ref, "rows.safetensors")
    served.wait_for(lambda: served.request("GET", "/readyz").body["problems"] == {})


def test_a_classical_version_and_a_two_stage_one_take_turns_in_place(served, publish_classical):
    before = VersionRef.parse(served.recommend("u0")["version"])
    slate = served.recommend("u0")["items"]
    ref = publish_classical(served.registry)
    served.wait_until_served(ref)
    stranger = served.recommend("odd one out", k=3)
    assert (stranger["cold_start"], item_ids(stranger)) == (True, ["i0", "i1", "i2"])
    for item_id in ("i5", "i7"):
        seq = served.post("odd one out", item_id)
        answer = served.recommend("odd one out", k=10, min_seq=seq)
        assert (answer["version"], answer["cold_start"], answer["reflects_min_seq"]) == (str(ref), False, True)
        assert item_id not in item_ids(answer)
        assert {int(name[1:]) % 2 for name in item_ids(answer)} == {1}
    about = served.request("GET", "/v1/versions").body
    assert (about["served"], about["learns"], about["items"], about["problems"]) == (str(ref), False, 30, {})
    served.registry.promote(before, "it learns")
    served.wait_until_served(before)
    assert served.recommend("u0")["items"] == slate
    served.wait_until_served(served.publish_delta(seed=11))
    served.registry.promote(ref, "again")
    served.wait_until_served(ref)
    assert {int(name[1:]) % 2 for name in item_ids(served.recommend("odd one out"))} == {1}
    served.registry.promote(served.registry.deltas(before.version)[-1].ref, "back")
    served.wait_until_served(served.registry.deltas(before.version)[-1].ref)
    assert served.request("GET", "/readyz").body["problems"] == {}


def test_an_item_put_while_a_classical_version_serves_is_known_and_not_recommended(served, publish_classical):
    before = served.registry.current()
    served.wait_until_served(publish_classical(served.registry))
    assert served.request("PUT", "/v1/items", {"item_id": "unplaced", "text": "a night train"}).status == 200
    assert "unplaced" not in item_ids(served.recommend("u0", k=500))
    assert len(served.request("GET", "/v1/items/unplaced/similar?k=3").body["items"]) == 3
    served.wait_until_served(publish_classical(served.registry, "content"))
    assert "unplaced" in item_ids(served.recommend("u0", k=500))
    served.registry.promote(before, "back")
    served.wait_until_served(before)
    assert "unplaced" in item_ids(served.recommend("u0", k=500))


def test_a_classical_version_can_be_on_trial(served, publish_classical):
    current = served.registry.current()
    ref = publish_classical(served.registry, promote=False)
    canary = served.registry.start_canary(ref, 0.5, served.log.head_seq())
    try:
        taking = next(user for user in (f"t{n}" for n in range(100)) if canary.takes(user))
        served.wait_for(lambda: served.recommend(taking)["version"] == str(ref))
    finally:
        served.registry.end_canary(canary, "over")
    served.wait_for(lambda: served.recommend(taking)["version"] == str(current))
