"""The report of a replay: figures that can be checked by hand, the table, the picture."""

import json
import math

import numpy as np
import pytest

from training.baselines.ease import Replay
from training.evaluation.replay import ReplayRecord
from training.evaluation.report import draw, render_table, summarise

RANKS = {"frozen": [0, 0, 0, 2], "state": [0, 3, 0, 1], "live": [1, 3, 11, 1]}
USERS = ["ann", "bob", "ann", "cy"]
SECOND, THIRD = 1 / math.log2(3), 1 / 2  # NDCG of an item at that place


def record(ranks=RANKS, users=USERS, cold=(False, False, False, True), **given) -> ReplayRecord:
    fields = {
        "user_ids": list(users),
        "cold": np.array(cold, bool),
        "ranks": {arm: np.array(found, np.int64) for arm, found in ranks.items()},
        "acked_seqs": np.arange(1, len(users) + 1),
        "state_ms": np.array([1.0, 3.0]),
        "weights_ms": np.arange(101.0),
        "version": "1.2",
        "seconds": 2.5,
    }
    return ReplayRecord(**(fields | given))


def ease(hits=(1.0, 0.0, 0.0, 0.0)) -> Replay:
    values = np.array(hits)
    return Replay(user_ids=USERS, ranks=values.astype(int), hits=values, ndcg=values / 2, cold=np.zeros(4, bool))


def test_the_figures_are_those_of_the_ranks():
    summary = summarise(record())
    assert summary["hit_at_10"] == {"frozen": 1 / 4, "state": 2 / 4, "live": 3 / 4}
    assert summary["ndcg_at_10"] == pytest.approx({"frozen": SECOND / 4, "state": (THIRD + 1) / 4, "live": 2.5 / 4})
    assert summary["warm_users"]["events"] == 3
    assert summary["warm_users"]["hit_at_10"] == {"frozen": 0.0, "state": 1 / 3, "live": 2 / 3}
    assert summary["cold_users"] == {
        "events": 1,
        "hit_at_10": {"frozen": 1.0, "state": 1.0, "live": 1.0},
        "ndcg_at_10": {"frozen": pytest.approx(SECOND), "state": 1.0, "live": 1.0},
    }
    assert summary["freshness_ms"] == {"state_p50": 2.0, "state_p99": 2.98, "weights_p50": 50.0, "weights_p99": 99.0}
    assert (summary["events"], summary["version"], summary["replay_s"]) == (4, "1.2", 2.5)


def test_an_interval_covers_its_mean_and_the_contrasts_of_arms_are_paired():
    summary = summarise(record())
    for metric in ("hit_at_10", "ndcg_at_10"):
        intervals = summary["ci95"][metric]
        assert set(intervals) == {*RANKS, "live_minus_frozen", "live_minus_state", "state_minus_frozen"}
        for arm in RANKS:
            assert intervals[arm][0] <= summary[metric][arm] <= intervals[arm][1]
    # Whole users are drawn. Live less frozen: ann +1 of 2 events, bob +1 of 1, cy 0 of 1, so never below 0.
    low, high = summary["ci95"]["hit_at_10"]["live_minus_frozen"]
    assert (low, high) == (0.0, 1.0)


def test_equal_arms_differ_by_exactly_nothing():
    summary = summarise(record({"live": RANKS["live"], "frozen": RANKS["live"]}))
    assert summary["ci95"]["hit_at_10"]["live_minus_frozen"] == [0.0, 0.0]


def test_the_summary_is_json_with_the_keys_that_are_promised():
    summary = json.loads(json.dumps(summarise(record(), ease()), allow_nan=False))
    assert {"hit_at_10", "ndcg_at_10", "ci95", "freshness_ms", "events", "version"} <= set(summary)
    assert set(summary["hit_at_10"]) == set(summary["ndcg_at_10"]) == {"frozen", "state", "live"}
    assert set(summary["freshness_ms"]) == {"state_p50", "state_p99", "weights_p50", "weights_p99"}
    assert summary["ease"] == {"hit_at_10": 0.25, "ndcg_at_10": 0.125}


def test_the_table_has_a_row_an_arm_and_ease_beside_them():
    lines = render_table(summarise(record(), ease())).splitlines()
    of_arm = {line.split()[0]: line for line in lines if line}
    assert "0.2500 [" in of_arm["frozen"]
    assert "0.7500 [" in of_arm["live"]
    assert of_arm["live"].rstrip().endswith("0.6667                1.0000")
    assert "0.2500" in of_arm["EASE,"]


def test_one_arm_without_cold_users_and_without_freshness_is_a_report_too(tmp_path):
    alone = record({"live": RANKS["live"]}, cold=[False] * 4, state_ms=np.array([]), weights_ms=np.array([]))
    summary = summarise(alone)
    assert summary["cold_users"] == {"events": 0}
    assert summary["freshness_ms"] == {"state_p50": None, "state_p99": None, "weights_p50": None, "weights_p99": None}
    assert set(summary["ci95"]["hit_at_10"]) == {"live"}
    assert "ease" not in summary
    assert "EASE" not in render_table(summary)
    draw(alone, None, tmp_path / "one.png")


@pytest.mark.parametrize("cold", [[False, False, True, True], [False] * 4, [True] * 4])
def test_the_picture_is_a_png_whoever_the_users_are(tmp_path, cold):
    picture = tmp_path / "reports" / "replay.png"
    draw(record(cold=cold), ease(), picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000


def test_a_replay_of_a_single_event_is_drawn_with_an_interval_of_no_width(tmp_path):
    single = record({"live": [1]}, users=["ann"], cold=[False])
    assert summarise(single)["ci95"]["hit_at_10"]["live"] == [1.0, 1.0]
    draw(single, None, tmp_path / "single.png")
