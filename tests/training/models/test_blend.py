"""EASE beside the two-stage model: one score of both, in what is retrieved and in what is shown first."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.events import Event, events_table
from cluster.log import Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.quantized import QuantizedRows
from embeddings.vocabulary import Vocabulary
from training.evaluation.next_item import Beside, Catalogue, rank_next_items
from training.models.blend import blended, standardised
from training.models.served import ServedModel
from training.models.version import ITEM_ROWS, USER_ROWS, Change, read_version, write_delta, write_version
from training.stream import build_history

WEIGHT = 0.5
HISTORY = [Interaction(f"i{item}", "click", None, 1_000_000 * at, seq=-1) for at, item in enumerate((3, 7, 11))]


def ease_scores(model: ServedModel, items=(3, 7, 11)) -> torch.Tensor:
    return model.state.system["weights"][list(items)].sum(0)


def test_scores_are_standardised_by_hand():
    assert standardised(torch.tensor([1.0, 3.0, 5.0, 100.0]), torch.tensor([True, True, True, False])).tolist() == (
        pytest.approx([-np.sqrt(3 / 2), 0.0, np.sqrt(3 / 2), 0.0])
    )
    assert standardised(torch.full((2, 3), 7.0)).tolist() == [[0.0] * 3] * 2
    assert blended(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 1.0]), 0.25).tolist() == [-0.75, 0.75]


def test_both_scores_choose_the_candidates_and_their_order(version, with_ease):
    model = ServedModel.build(with_ease(version, WEIGHT), {})
    found = model.recommend("u1", HISTORY, 10)
    with torch.inference_mode():
        user_D = model.user_vector("u1", HISTORY)
        both_I = blended(model.item_ID @ user_D, ease_scores(model), WEIGHT)
        candidate_K = both_I.topk(12).indices
        order_K = blended(model.order(user_D, model.item_ID[candidate_K]), ease_scores(model)[candidate_K], WEIGHT)
    best_K = order_K.argsort(descending=True)[:10]
    assert found.item_ids == [model.item_ids[index] for index in candidate_K[best_K].tolist()]
    assert found.scores == pytest.approx(order_K[best_K].numpy(), abs=1e-5)


def test_without_weight_the_order_is_that_of_the_model_alone_and_with_all_of_it_that_of_ease(version, with_ease):
    alone, none, all_of_it = (
        ServedModel.build(state, {}).recommend("u1", HISTORY, 12).item_ids
        for state in (version, with_ease(version, 0.0), with_ease(version, 1e6))
    )
    assert none == alone
    assert {int(item_id[1:]) % 2 for item_id in all_of_it} == {1}


def test_what_is_put_is_recommended_by_what_the_model_says_of_it(version, with_ease):
    model = ServedModel.build(with_ease(version, WEIGHT), {})
    put = model.with_items([("new", "a new film")], np.ones((1, 384), np.float32) / 20)
    assert "new" in put.recommend("u1", HISTORY, 1_000).item_ids
    clicked = put.recommend("u1", [*HISTORY, Interaction("new", "click", None, 9, 1)], 1_000)
    assert np.isfinite(clicked.scores).all()
    assert put.recommend("u1", [], 3).item_ids == ["i0", "i1", "i2"]


def test_a_click_beyond_the_model_s_window_counts_for_ease(version, with_ease):
    model = ServedModel.build(with_ease(version, WEIGHT), {})
    newest = [Interaction(f"i{item % 28}", "click", None, item, -1) for item in range(model.dense.config.max_history)]
    shown = [model.recommend("u1", [*more, *newest], 12) for more in ([], [Interaction("i29", "click", None, 0, -1)])]
    assert model.max_history == 100 > model.dense.config.max_history
    assert shown[0].scores.tolist() != shown[1].scores.tolist()


def test_a_delta_changes_the_model_and_leaves_ease_in_place(version, with_ease, tmp_path, build_home):
    registry, tiny = Registry(tmp_path / "registry"), build_home(name="other")
    draft = registry.draft_version()
    write_version(draft, with_ease(version, WEIGHT), tiny.registry.open_version(1).table("history"))
    draft.publish(offset=0, metrics={})
    before = ServedModel.load(registry, VersionRef(1))
    rows_ND = torch.randn(3, before.item_ID.shape[1], generator=torch.Generator().manual_seed(5))
    change = Change(
        new_items=[("i30", "thirty")],
        new_users=["another"],
        rows={name: (torch.tensor([2, 5, 30]), QuantizedRows(rows_ND)) for name in (ITEM_ROWS,)}
        | {
            "text": (torch.tensor([30]), QuantizedRows(torch.ones(1, 384) / 20)),
            "count": (torch.tensor([30]), QuantizedRows(torch.tensor([0]))),
            USER_ROWS: (torch.tensor([len(version.user_ids)]), QuantizedRows(rows_ND[:1].clone())),
        },
        optimizer_rows={},
        dense=version.dense,
        optimizer={},
    )
    draft = registry.draft_delta(1)
    write_delta(draft, change)
    draft.publish(1, 5)
    after = before.with_delta(registry.open_delta(1, 1))
    assert after.classical is not None
    assert after.classical.system is before.classical.system
    assert (
        after.recommend("another", HISTORY, 12).scores.tolist()
        != before.recommend("another", HISTORY, 12).scores.tolist()
    )
    late = ServedModel.load(registry, VersionRef(1, 1))
    assert late.recommend("u1", HISTORY, 31).scores.tolist() == after.recommend("u1", HISTORY, 31).scores.tolist()
    assert "i30" in late.recommend("u1", HISTORY, 31).item_ids
    assert torch.equal(read_version(registry, VersionRef(1, 1)).system["weights"], before.state.system["weights"])


def test_ranked_as_validation_does_an_item_has_the_place_at_which_it_is_served(version, with_ease):
    state, rng = with_ease(version, WEIGHT), np.random.default_rng(0)
    model = ServedModel.build(state, {})
    events = [
        Event(user_id=f"u{user}", item_id=f"i{item}", kind="click", ts_us=1_000_000 * at)
        for user in range(6)
        for at, item in enumerate(rng.permutation(np.arange(user % 2, 30, 2))[:12])
    ]
    history = build_history(events_table(events), Vocabulary(state.item_ids, 30), Vocabulary(state.user_ids, 6))
    targets = np.setdiff1d(np.arange(len(history)), history.starts)
    catalogue = Catalogue(item_ID=model.item_ID, user_UD=state.rows[USER_ROWS])
    assert Beside.of(ServedModel.build(version, {})) is None
    alone, both = (
        rank_next_items(model.dense, replace(catalogue, beside=given), history, targets, batch_size=7)
        for given in (None, Beside.of(model))
    )
    assert (both > 0).sum() > (alone > 0).sum() > 0
    for rank, target in zip(both, targets, strict=True):
        start = history.starts[np.searchsorted(history.starts, target, side="right") - 1]
        told = [
            Interaction(f"i{history.item_row[at]}", "click", None, int(history.ts_s[at]) * 1_000_000, -1)
            for at in range(start, target)
        ]
        user_id = state.user_ids[history.user_row[target]]
        found = model.recommend(user_id, told, model.dense.config.candidates, frozenset(e.item_id for e in told))
        item_id = f"i{history.item_row[target]}"
        assert rank == (found.item_ids.index(item_id) + 1 if item_id in found.item_ids else 0)
