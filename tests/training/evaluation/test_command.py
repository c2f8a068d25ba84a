"""`recloop evaluate` of a version whose figures can be counted: it names what it is made to name."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest

from cluster.cli import main
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, write_dataset
from cluster.errors import DataError
from cluster.events import Event, events_table
from cluster.log import Interaction
from cluster.manifest import VersionRef
from training.evaluation import scoreboard
from training.evaluation.command import describe, ease_beside, headlines
from training.evaluation.system import VersionSystem
from training.inputs import is_training_event
from training.models.served import ServedModel
from training.models.version import ROOT, read_version, write_version
from training.stream import DataConfig


def write_events(path, tiny, events):
    return write_dataset(
        path,
        name="shop",
        events=events_table(events),
        items=pa.Table.from_pylist(
            [{"item_id": f"i{n}", "domain": "default", "text": "", "categories": []} for n in range(tiny.ITEMS)],
            schema=ITEM_SCHEMA,
        ),
        users=pa.Table.from_pylist(
            [{"user_id": user_id, "attributes": []} for user_id in sorted({event.user_id for event in events})],
            schema=USER_SCHEMA,
        ),
        label="clicks",
        sources=[],
        rejected={},
    )


def load(tiny) -> ServedModel:
    return ServedModel.load(tiny.registry, VersionRef(1))


def evaluate(model, dataset):
    """Return what the command tells of one version, of a dataset that it need not be trained on."""
    known_N = is_training_event(dataset.events(), model.state.recipe.section(DataConfig))
    board = scoreboard.evaluate({model.name: VersionSystem(model)}, dataset, known_N)
    return {"scores": headlines(describe(board)[1])} | ease_beside(dataset, known_N)


def served_rank(model, past, event) -> int:
    """Return the place at which serving would have shown the event's item; 0 for nowhere."""
    history = [Interaction(e.item_id, e.kind, e.value, e.ts_us, n) for n, e in enumerate(past, 1)]
    shown = model.recommend(event.user_id, history, 1_000, frozenset(e.item_id for e in past)).item_ids
    return shown.index(event.item_id) + 1 if event.item_id in shown else 0


def test_the_figures_are_those_of_what_serving_would_have_shown(build_home, tmp_path):
    tiny = build_home("data.train_fraction=0.5")
    newcomers = [
        Event(user_id="new", item_id=item_id, kind="click", ts_us=10**9 + n)
        for n, item_id in enumerate(("i0", "i29", "i4", "i17"))
    ]
    events = [*tiny.events(60), *newcomers]
    model = load(tiny)
    found = evaluate(model, write_events(tmp_path / "data", tiny, events))

    ranks = {
        n: served_rank(model, [e for e in events[:n] if e.user_id == event.user_id], event)
        for n, event in enumerate(events)
        if n >= 32
    }
    rows = {row["segment"]: row for row in found["scores"]}
    for segment, chosen in (("all", range(32, 64)), ("warm users", range(32, 60)), ("cold users", range(60, 64))):
        hits = [1 <= ranks[n] <= 10 for n in chosen]
        assert rows[segment]["events"] == len(chosen)
        assert rows[segment]["hit_at_10"] == pytest.approx(sum(hits) / len(hits))
        gains = [1 / math.log2(1 + ranks[n]) if hit else 0.0 for n, hit in zip(chosen, hits, strict=True)]
        assert rows[segment]["ndcg_at_10"] == pytest.approx(sum(gains) / len(gains))
        assert rows[segment]["hit_at_10_low"] <= rows[segment]["hit_at_10"] <= rows[segment]["hit_at_10_high"]
    assert 0 <= found["ease_refitted"]["hit_at_10"] <= 1


def test_later_events_do_not_change_what_was_named_before(build_home, tmp_path):
    tiny = build_home("data.train_fraction=0.5")
    one = tiny.events(60)
    other = [*one[:59], Event(event_id="other", user_id=one[59].user_id, item_id="i0", kind="click", ts_us=10**9)]
    few = [evaluate(load(tiny), write_events(tmp_path / str(n), tiny, e)) for n, e in enumerate((one, other))]
    hits = [found["scores"][0]["hit_at_10"] * 30 for found in few]
    assert abs(hits[0] - hits[1]) <= 1 + 1e-9


def test_a_dataset_without_cold_users_has_no_such_row(build_home, tmp_path):
    tiny = build_home()
    found = evaluate(load(tiny), write_events(tmp_path / "data", tiny, tiny.events(60)))
    assert {"all", "warm users"} <= {row["segment"] for row in found["scores"]}
    assert "cold users" not in {row["segment"] for row in found["scores"]}


def test_feedback_that_chose_nothing_is_not_predicted(build_home, tmp_path):
    tiny = build_home("data.train_fraction=0.5")
    shown = [Event(user_id="u0", item_id="i3", kind="impression", ts_us=10**9 + n) for n in range(20)]
    found = evaluate(load(tiny), write_events(tmp_path / "data", tiny, [*tiny.events(60), *shown]))
    assert found["scores"][0]["events"] == 20  # forty of eighty events may be trained on, twenty more are clicks
    assert "ease_refitted" not in found


def test_items_that_the_version_does_not_know_are_named(build_home, tmp_path):
    tiny = build_home()
    foreign = [*tiny.events(20), Event(user_id="u0", item_id="a stranger", kind="click", ts_us=10**9)]
    with pytest.raises(DataError, match="a stranger"):
        evaluate(load(tiny), write_events(tmp_path / "data", tiny, foreign))


def test_a_dataset_with_nothing_left_to_name_is_an_error(build_home, tmp_path):
    tiny = build_home("data.train_fraction=0.5")
    shown = [Event(user_id="u0", item_id="i3", kind="impression", ts_us=10**9 + n) for n in range(20)]
    with pytest.raises(DataError, match="holds no interactions but the 20 known events"):
        evaluate(load(tiny), write_events(tmp_path / "data", tiny, [*tiny.events(20), *shown]))


def past_and(tiny, count: int) -> list[Event]:
    """Return the events that a home's versions were trained on, and `count` after them."""
    past = tiny.events(tiny.USERS * tiny.CLICKS, prefix="past")
    return [*past, *tiny.events(count, first=len(past))]


def test_the_command_scores_the_promoted_version_or_the_one_named(build_home, tmp_path, capsys):
    tiny = build_home()
    tiny.publish_version(seed=1)
    write_events(tmp_path / "data", tiny, past_and(tiny, 60))
    words = ["evaluate", "--home", str(tiny.home.path), "--data", str(tmp_path / "data"), "--json"]
    versions = []
    for extra in ([], ["1"]):
        assert main([*words, *extra]) == 0
        versions.append(json.loads(capsys.readouterr().out)["version"])
    assert versions == ["2.0", "1.0"]
    assert main([*words, "7"]) == 4
    assert "7.0 is not published" in capsys.readouterr().err


def test_versions_are_compared_with_the_first_and_the_page_stands_alone(build_home, tmp_path, capsys):
    tiny = build_home()
    tiny.publish_version(seed=1)
    write_events(tmp_path / "data", tiny, past_and(tiny, 60))
    page = tmp_path / "pages" / "scores.html"
    words = ["evaluate", "1", "2", "1", "--home", str(tiny.home.path), "--data", str(tmp_path / "data")]
    words += ["--page", str(page), "--segments", "item.domain"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["others"], found["page"]) == ("1.0", ["2.0"], str(page))
    value = {(row["metric"], row["version"]): row for row in found["metrics"]}
    for name in ("ndcg_at_10", "map_at_10", "novelty_bits", "diversity_text", "serendipity"):
        first, other = value[name, "1.0"], value[name, "2.0"]
        assert first["low"] <= first["value"] <= first["high"]
        assert "difference" not in first
        assert other["difference"] == pytest.approx(other["value"] - first["value"])
        assert 0 < other["p"] <= 1
        assert other["p_holm"] == other["p"]  # one comparison
    scored = {(row["version"], row["metric"]): row["value"] for row in found["segments"] if row["segment"] == "all"}
    of_choices = {key: row for key, row in value.items() if key[0].startswith("choice_")}
    assert of_choices.keys() >= {(f"choice_{name}", "2.0") for name in ("log_loss", "ne")}
    assert all(scored[key[::-1]] == row["value"] for key, row in value.items() if key not in of_choices)
    assert {row["segment"] for row in found["scores"]} >= {"all", "warm users", "item.domain=default"}
    text = page.read_text("utf-8")
    assert "<svg" in text
    assert re.findall(r'(?:src|href)="[^#"]|@import|url\([^#]', text) == []

    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "p_holm" in shown
    assert "segments:" not in shown  # hundreds of rows: they are on the page


def test_a_versions_ratings_are_those_of_its_rating_head(build_home, tmp_path):
    tiny = build_home("data.train_fraction=0.5")
    rated = [
        Event(user_id=f"u{n % 6}", item_id=f"i{n % 30}", kind="rating", value=1.0 + n % 5, ts_us=10**9 + n)
        for n in range(30)
    ]
    model = load(tiny)
    board = scoreboard.evaluate(
        {"1.0": VersionSystem(model)},
        write_events(tmp_path / "data", tiny, [*tiny.events(30), *rated]),
        np.arange(60) < 30,
    )
    # An untrained head says 3 stars of everything: 2, 1, 0, 1 and 2 off in turn.
    assert {row["metric"]: pytest.approx(row["value"], abs=1e-6) for row in board.rating_rows()} == {
        "rating_rmse": 2**0.5,
        "rating_mae": 6 / 5,
        "rating_gauc": 1 / 2,
        "rating_auc": 1 / 2,
    }


def test_a_versions_probabilities_are_retrievals_over_all_items(build_home, tmp_path):
    tiny = build_home("data.train_fraction=0.5")
    model = load(tiny)
    dataset = write_events(tmp_path / "data", tiny, past_and(tiny, 30))
    board = scoreboard.evaluate({"1.0": VersionSystem(model)}, dataset, np.arange(dataset.info.events) < 30)
    found, rows = board.choices["1.0"], board.choice_rows()
    told = np.flatnonzero(np.isfinite(found.loss_P))
    assert 0 < len(told) <= len(found.loss_P)
    assert (found.confidence_P[told] >= np.exp(-found.loss_P[told]) - 1e-6).all()
    assert ((found.rank_P[told] == 1) == np.isclose(found.confidence_P[told], np.exp(-found.loss_P[told]))).all()
    (loss,) = (row["value"] for row in rows if row["metric"] == "choice_log_loss")
    assert loss == pytest.approx(found.loss_P[told].mean())


def test_a_page_that_cannot_be_written_and_an_unknown_segment_are_errors(build_home, tmp_path, capsys):
    tiny = build_home()
    write_events(tmp_path / "data", tiny, past_and(tiny, 60))
    words = ["evaluate", "--home", str(tiny.home.path), "--data", str(tmp_path / "data")]
    (tmp_path / "file").write_text("")
    assert main([*words, "--page", str(tmp_path / "file" / "page.html")]) == 2
    assert "--page" in capsys.readouterr().err
    assert main([*words, "--segments", "user.gender"]) == 3
    assert "user.gender: is no attribute" in capsys.readouterr().err


def test_a_version_is_not_scored_on_what_it_has_learned_or_on_another_dataset(build_home, tmp_path, capsys):
    tiny = build_home()
    write_events(tmp_path / "other", tiny, tiny.events(60))
    words = ["evaluate", "--home", str(tiny.home.path), "--data"]
    assert main([*words, str(tmp_path / "other")]) == 3
    assert "is not the dataset that version 1.0 was trained on" in capsys.readouterr().err
    state = read_version(tiny.registry, VersionRef(1))
    draft = tiny.registry.draft_version()
    write_version(draft, state, tiny.registry.open_version(1).table("history"))
    draft.publish(offset=40, metrics={ROOT: 1}, parent=VersionRef(1))
    write_events(tmp_path / "data", tiny, past_and(tiny, 60))
    assert main([*words, str(tmp_path / "data"), "2"]) == 3
    assert "has learned 40 live events" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1.0"


def test_without_a_version_or_a_dataset_the_command_says_what_makes_one(tmp_path, build_home, capsys):
    assert main(["evaluate", "--home", str(tmp_path / "empty")]) == 4
    assert "no version is published yet" in capsys.readouterr().err
    assert main(["evaluate", "--home", str(build_home().home.path)]) == 3
    assert "`recloop prepare` makes a dataset" in capsys.readouterr().err
