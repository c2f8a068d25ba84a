"""A version in training: what changes, what a delta holds of it, and that serving would say the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.events import events_table
from cluster.log import Interaction
from cluster.manifest import VersionRef
from embeddings.batch import PAD, build_batch
from training.models.served import ServedModel
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    ROW_TENSORS,
    TEXT_ROWS,
    USER_ROWS,
    read_version,
    write_delta,
    write_version,
)
from training.online.model import LiveModel
from training.online.sequences import LiveHistory, build_live_sequences
from training.step import StepConfig

pytestmark = pytest.mark.usefixtures("process_group")
STEP = StepConfig(learning_rate=0.01, weight_decay=0.0, clip_norm=1.0)


def take_up(tiny, ref=None) -> LiveModel:
    state = read_version(tiny.registry, ref or VersionRef(1), with_optimizer=True)
    return LiveModel(state, STEP, 1.0, torch.device("cpu"), seed=0)


def history(user_row: int, *item_ids: str) -> LiveHistory:
    entries = [Interaction(item_id, "click", None, seq * 1_000_000, seq) for seq, item_id in enumerate(item_ids, 1)]
    return LiveHistory(user_row, entries, first_new_seq=1)


def learn(live: LiveModel, *histories: LiveHistory, negatives=(7, 8)) -> None:
    sequences = build_live_sequences(histories, live.items)
    log_q = np.full(len(live.items), -np.log(len(live.items)), np.float32)
    live.learn(build_batch(sequences, np.array(list(negatives)), live.text, log_q), loss_scale=1.0)


def publish(tiny, live: LiveModel) -> VersionRef:
    draft = tiny.registry.draft_delta(1)
    write_delta(draft, live.change())
    live.mark_published()
    first = [tiny.registry.manifest(VersionRef(1)), *tiny.registry.deltas(1)][-1].last_seq + 1
    return draft.publish(first_seq=first, last_seq=first)


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    differs = (before != after[: len(before)]).reshape(len(before), -1).any(1)
    return set(differs.nonzero().flatten().tolist())


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_version_taken_up_is_bit_for_bit_the_one_published(build_home):
    tiny = build_home()
    state = read_version(tiny.registry, VersionRef(1), with_optimizer=True)
    rows, dense, optimizer = take_up(tiny).tensors()
    assert_same_tensors(rows, dict(state.rows))
    assert_same_tensors(dense, dict(state.dense))
    assert_same_tensors(optimizer, dict(state.optimizer))


def test_a_model_that_learned_nothing_has_no_changed_rows(build_home):
    change = take_up(build_home()).change()
    assert not change.new_items
    assert not change.new_users
    assert all(len(index) == 0 for index, _ in [*change.rows.values(), *change.optimizer_rows.values()])


def test_a_step_moves_the_rows_of_its_batch_and_no_other(build_home):
    tiny = build_home()
    live = take_up(tiny)
    before = live.tensors()[0]
    learn(live, history(2, "i3", "i5", "i9"))
    after = live.tensors()[0]
    items = {3, 5, 9, 7, 8}
    # The user row is hidden in half of all steps (model.user_row_dropout).
    assert changed_rows(before[ITEM_ROWS], after[ITEM_ROWS]) == items
    assert changed_rows(before[USER_ROWS], after[USER_ROWS]) <= {2}
    assert torch.equal(before[TEXT_ROWS], after[TEXT_ROWS])
    index, _ = live.change().rows[ITEM_ROWS]
    assert set(index.tolist()) >= items


def test_deltas_over_the_version_give_the_learned_state_bit_for_bit(build_home):
    tiny = build_home()
    live = take_up(tiny)
    for step in range(3):
        live.describe(f"new item {step}", "just in", np.ones(tiny.TEXT_DIM, np.float32))
        live.count(f"new item {step}", f"new user {step}")
        live.count("i4", "u1")
        learn(live, history(step, "i1", f"new item {step}", "i4"), history(PAD, "i9", "i2"))
        ref = publish(tiny, live)
    state = read_version(tiny.registry, ref, with_optimizer=True)
    rows, dense, optimizer = live.tensors()
    assert_same_tensors(rows, dict(state.rows))
    assert_same_tensors(dense, dict(state.dense))
    assert_same_tensors(optimizer, dict(state.optimizer))
    assert state.item_ids[-3:] == ["new item 0", "new item 1", "new item 2"]
    assert state.user_ids[-3:] == ["new user 0", "new user 1", "new user 2"]


def test_learning_goes_on_after_a_reload_as_if_there_had_been_none(build_home):
    tiny = build_home("model.dropout=0.0", "model.user_row_dropout=0.0")
    live = take_up(tiny)
    learn(live, history(0, "i1", "i2", "i3"))
    reloaded = take_up(tiny, publish(tiny, live))
    for model in (live, reloaded):
        torch.manual_seed(0)  # of the order in which the ranker meets its targets
        learn(model, history(1, "i4", "i5"), history(0, "i2", "i3"))
    for found, expected in zip(reloaded.tensors(), live.tensors(), strict=True):
        assert_same_tensors(found, expected)


def test_a_delta_holds_only_what_changed_since_the_last(build_home):
    live = take_up(build_home())
    live.count("new", "u0")
    learn(live, history(0, "i1", "i2"), negatives=(7,))
    live.mark_published(live.change())
    live.count("i20", "u3")
    change = live.change()
    assert not change.new_items
    assert not change.new_users
    assert change.rows[COUNT_ROWS][0].tolist() == [20]
    assert change.rows[ITEM_ROWS][0].tolist() == []
    assert change.rows[USER_ROWS][0].tolist() == [3]
    assert change.rows[TEXT_ROWS][0].tolist() == []


def test_an_interaction_counts_once_for_its_item(build_home):
    tiny = build_home()
    live = take_up(tiny)
    before = live.tensors()[0][COUNT_ROWS]
    live.count("i4", "u0")
    live.count("i4", "nobody yet")
    live.count("in no catalogue", "u0")
    after = live.tensors()[0][COUNT_ROWS]
    assert (after[: tiny.ITEMS] - before).tolist() == [2 if row == 4 else 0 for row in range(tiny.ITEMS)]
    assert len(after) == tiny.ITEMS


def test_a_described_item_has_its_text_in_the_delta_whether_known_or_new(build_home):
    tiny = build_home()
    live = take_up(tiny)
    vector = np.eye(tiny.TEXT_DIM, dtype=np.float32)[5]
    live.describe("i2", "another text", vector)
    live.describe("new", "a new text", vector)
    live.count("seen first", "u0")
    live.describe("seen first", "described later", 2 * vector)
    change = live.change()
    assert change.new_items == [("new", "a new text"), ("seen first", "described later")]
    index, rows = change.rows[TEXT_ROWS]
    assert index.tolist() == [2, tiny.ITEMS, tiny.ITEMS + 1]
    assert rows.value.sum(1).tolist() == [1.0, 1.0, 2.0]


def test_full_tables_leave_new_ids_out_and_go_on(build_home):
    tiny = build_home("tables.spare_rows=0")
    live = take_up(tiny)
    live.describe("new", "no room for it", np.ones(tiny.TEXT_DIM, np.float32))
    live.count("new", "newcomer")
    learn(live, history(PAD, "i1", "i2"))
    change = live.change()
    assert not change.new_items
    assert not change.new_users
    assert len(live.tensors()[0][ITEM_ROWS]) == tiny.ITEMS


def test_before_learning_the_model_and_its_base_predict_alike_and_afterwards_only_the_base_stands_still(build_home):
    live = take_up(build_home())
    sequences = build_live_sequences([history(0, "i1", "i2", "i3"), history(PAD, "i4", "i5")], live.items)
    before = live.predict(sequences).loss_P
    np.testing.assert_array_equal(live.predict_base(sequences).loss_P, before)
    assert before.shape == (3,)
    for _ in range(20):
        learn(live, history(0, "i1", "i2", "i3"), negatives=range(30))
    np.testing.assert_array_equal(live.predict_base(sequences).loss_P, before)
    assert live.predict(sequences).loss_P[:2].mean() < before[:2].mean()


def test_the_predicted_loss_is_that_of_a_softmax_over_what_serving_scores(build_home):
    tiny = build_home()
    live = take_up(tiny)
    one = history(1, "i1", "i2", "i3")
    found = live.predict(build_live_sequences([one], live.items))
    served = ServedModel.load(tiny.registry, VersionRef(1))
    log_p_I = (served.item_ID @ served.user_vector("u1", one.interactions[:2])).log_softmax(0)
    assert found.loss_P[-1] == pytest.approx(-log_p_I[3].item(), rel=1e-5)
    assert found.rank_P[-1] == 1 + (log_p_I > log_p_I[3]).sum().item()
    assert found.confidence_P[-1] == pytest.approx(log_p_I.max().exp().item(), rel=1e-5)
    assert found.hits[-1] == (log_p_I.argmax().item() == 3)


def test_new_items_and_users_are_predicted_by_base_and_model(build_home):
    live = take_up(build_home())
    live.count("new", "newcomer")
    sequences = build_live_sequences([history(live.users.row("newcomer"), "i1", "new", "i2")], live.items)
    assert np.isfinite(live.predict(sequences).loss_P).all()
    assert np.isfinite(live.predict_base(sequences).loss_P).all()


def test_the_tensors_of_a_whole_version_are_a_version_again(build_home):
    tiny = build_home()
    live = take_up(tiny)
    live.count("new", "newcomer")
    learn(live, history(0, "i1", "new"))
    rows, dense, optimizer = live.tensors()
    state = replace(
        read_version(tiny.registry, VersionRef(1)),
        item_ids=live.items.ids,
        item_texts=live.item_texts,
        user_ids=live.users.ids,
        rows=rows,
        dense=dense,
        optimizer=optimizer,
    )
    draft = tiny.registry.draft_version()
    write_version(draft, state, events_table([]))
    again = take_up(tiny, draft.publish(offset=0, metrics={}))
    for found, expected in zip(again.tensors(), live.tensors(), strict=True):
        assert_same_tensors(found, expected)
    assert set(rows) == set(ROW_TENSORS)


def test_a_new_user_takes_over_the_row_that_learned_least_once_the_table_is_full(build_home):
    tiny = build_home("tables.spare_rows=1")
    live = take_up(tiny)
    for row in range(tiny.USERS):
        live.part.pieces["user.momentum"].values[row] = 1.0 + (row != 2)
        live.part.pieces["user"].values[row] = 5.0
    live.count("i1", "first newcomer")  # takes the spare row
    live.count("i1", "second newcomer")
    assert live.users.row("second newcomer") == 2
    assert live.users.row("u2") == -1
    assert live.part.pieces["user"].values[2].tolist() == [0.0] * 8
    assert live.part.pieces["user.momentum"].values[2] == 0.0


def test_serving_and_a_trainer_that_starts_again_see_the_row_s_new_owner_alone(build_home):
    tiny = build_home("tables.spare_rows=1")
    live = take_up(tiny)
    live.part.pieces["user.momentum"].values[: tiny.USERS] = torch.arange(1.0, tiny.USERS + 1)
    for name in ("first newcomer", "second newcomer"):
        live.count("i1", name)
    learn(live, history(live.users.row("second newcomer"), "i1", "i2", "i3"))
    ref = publish(tiny, live)
    served = ServedModel.load(tiny.registry, ref)
    assert served.user_row["second newcomer"] == 0
    assert "u0" not in served.user_row
    assert torch.equal(served.state.rows[USER_ROWS][0], live.part.pieces["user"].values[0])
    again = take_up(tiny, ref)
    assert again.users.ids == live.users.ids
    assert_same_tensors(again.tensors()[0], live.tensors()[0])


def test_a_row_in_use_since_the_last_delta_is_not_taken_away(build_home):
    tiny = build_home("tables.spare_rows=1")
    live = take_up(tiny)
    for name in ("first newcomer", *(f"u{n}" for n in range(tiny.USERS)), "second newcomer"):
        live.count("i1", name)
    assert live.users.row("second newcomer") == -1
    live.mark_published()
    live.count("i1", "second newcomer")
    assert live.users.row("second newcomer") != -1
