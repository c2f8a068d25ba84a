"""Windows tile every interaction; workers' batches partition the global ones."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from cluster.events import KINDS, Event, events_table
from embeddings.batch import PAD, Batch
from embeddings.vocabulary import Vocabulary
from training.stream import (
    DataConfig,
    History,
    NegativeSampler,
    build_history,
    build_sequences,
    count_batches,
    cut_windows,
    stream_batches,
    windows_before,
)

ITEMS = Vocabulary([f"i{row}" for row in range(60)], 60)
USERS = Vocabulary([f"u{row}" for row in range(20)], 20)
TEXT = np.zeros((60, 2), np.float32)


def history_of(*per_user: Sequence[int]) -> History:
    """Users u0, u1, … meet the items listed, in turns."""
    events = [
        Event(user_id=f"u{user}", item_id=f"i{item}", kind="click", ts_us=(place * 100 + user) * 1_000_000)
        for user, items in enumerate(per_user)
        for place, item in enumerate(items)
    ]
    return build_history(events_table(sorted(events, key=lambda event: event.ts_us)), ITEMS, USERS)


def long_and_short() -> History:
    """Twenty users with 1, 2, … interactions, each item at most once."""
    return history_of(*[list(range(user * 3 + 1)) for user in range(20)])


def stream(history: History, *, rank: int = 0, workers: int = 1, epoch: int = 0, seed: int = 0) -> list[Batch]:
    config = DataConfig(batch_sequences=4, negatives=3)
    sampler = NegativeSampler(np.zeros(60), config)
    return list(
        stream_batches(
            history, TEXT, sampler, config, max_history=7, seed=seed, epoch=epoch, rank=rank, workers=workers
        )
    )


def targets(batch: Batch) -> list[tuple[int, int]]:
    """Return the (user row, item row) of everything to be learned."""
    owner, _ = (batch.target_BL != PAD).nonzero(as_tuple=True)
    items = batch.item_rows_N[batch.target_BL[batch.target_BL != PAD]]
    return list(zip(batch.user_row_B[owner].tolist(), items.tolist(), strict=True))


def test_history_is_sorted_by_user_then_time_and_holds_interactions_only() -> None:
    told = [("u1", "i3", "click"), ("u0", "i5", "like"), ("u1", "i1", "skip"), ("u1", "i2", "rating")]
    events = [
        Event(user_id=user, item_id=item, kind=kind, ts_us=at * 1_000_000, value=4.0 if kind == "rating" else None)
        for at, (user, item, kind) in enumerate(told)
    ]
    history = build_history(events_table(events), ITEMS, USERS)
    assert history.user_row.tolist() == [0, 1, 1]
    assert history.item_row.tolist() == [5, 3, 2]
    assert [KINDS[kind] for kind in history.kind] == ["like", "click", "rating"]
    np.testing.assert_array_equal(history.value, np.array([np.nan, np.nan, 4.0], np.float32))
    assert history.ts_s.tolist() == history.order.tolist() == [1, 0, 3]
    assert list(zip(history.starts, history.ends, strict=True)) == [(0, 1), (1, 3)]


def test_no_events_are_an_empty_history() -> None:
    history = build_history(events_table([]), ITEMS, USERS)
    assert len(history) == len(history.starts) == len(history.ends) == 0
    assert stream(history) == []


@pytest.mark.parametrize(("user", "item", "message"), [("new", "i0", "user_id new"), ("u0", "new", "item_id new")])
def test_an_id_without_a_row_is_named(user: str, item: str, message: str) -> None:
    with pytest.raises(DataError, match=f"{message} occurs in the events but not in the vocabulary"):
        build_history(events_table([Event(user_id=user, item_id=item, kind="click", ts_us=0)]), ITEMS, USERS)


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_windows_hold_every_interaction_but_each_user_s_first_as_a_target_once(length: int) -> None:
    history = long_and_short()
    for seed in range(5):
        windows = cut_windows(history, length, np.random.default_rng(seed))
        assert (windows.last - windows.first).max() <= length
        spans = [range(a, b) for a, b in zip(windows.first + 1, windows.last + 1, strict=True)]
        targeted = Counter(index for span in spans for index in span)
        assert targeted == Counter(set(range(len(history))) - set(history.starts.tolist()))
        owners = [set(history.user_row[a : b + 1].tolist()) for a, b in zip(windows.first, windows.last, strict=True)]
        assert {len(owner) for owner in owners} == {1}


def test_windows_are_cut_elsewhere_in_every_epoch() -> None:
    history = history_of(range(50))
    cuts = {tuple(sorted(cut_windows(history, 7, np.random.default_rng(seed)).first)) for seed in range(20)}
    assert len(cuts) == 7


def test_a_window_reads_what_its_targets_follow() -> None:
    sequences = build_sequences(
        history_of([1, 2, 3, 4], [5, 6]), windows_before(history_of([1, 2, 3, 4], [5, 6]), np.array([3, 5]), 2)
    )
    assert sequences.item_row_BL.tolist() == [[2, 3], [PAD, 5]]
    assert sequences.target_row_BL.tolist() == [[3, 4], [PAD, 6]]
    assert sequences.user_row_B.tolist() == [0, 1]


def test_what_is_seen_before_a_target_never_reaches_into_another_user() -> None:
    history = long_and_short()
    later = np.setdiff1d(np.arange(len(history)), history.starts)
    windows = windows_before(history, later, 10)
    assert (windows.last == later).all()
    assert (history.user_row[windows.first] == history.user_row[later]).all()
    assert (windows.last - windows.first == np.minimum(later - history.starts[history.user_row[later]], 10)).all()


def test_an_epoch_s_batches_hold_every_target_once() -> None:
    history = long_and_short()
    expected = Counter((user, item) for user in range(20) for item in range(1, user * 3 + 1))
    assert Counter(pair for batch in stream(history) for pair in targets(batch)) == expected


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_batches_partition_the_global_batches(workers: int) -> None:
    whole = stream(long_and_short())
    shares = [stream(long_and_short(), rank=rank, workers=workers) for rank in range(workers)]
    assert {len(share) for share in shares} == {len(whole)}
    for step, batch in enumerate(whole):
        dealt = Counter(pair for share in shares for pair in targets(share[step]))
        assert dealt == Counter(targets(batch))


def test_workers_draw_negatives_of_their_own() -> None:
    drawn = [
        [batch.item_rows_N[batch.negative_S].tolist() for batch in stream(long_and_short(), rank=rank, workers=2)]
        for rank in (0, 1)
    ]
    assert drawn[0] != drawn[1]


def test_seed_and_epoch_alone_decide_an_epoch() -> None:
    def seen(**which: int) -> list[list[tuple[int, int]]]:
        return [targets(batch) for batch in stream(long_and_short(), **which)]

    assert seen(seed=1, epoch=2) == seen(seed=1, epoch=2)
    assert seen(seed=1, epoch=2) != seen(seed=1, epoch=3)
    assert seen(seed=1, epoch=2) != seen(seed=2, epoch=2)


def test_batches_are_counted_about_right() -> None:
    # Windows of 7: Σ ⌈3u / 7⌉ over u = 0 … 19; a random offset may cut one more for each long user.
    expected = sum(-(-3 * user // 7) for user in range(20)) // 4
    config = DataConfig(batch_sequences=4)
    assert count_batches(long_and_short(), config, max_history=7) == expected
    assert expected <= len(stream(long_and_short())) <= expected + 20 // 4 + 1


def test_negatives_follow_smoothed_popularity() -> None:
    # (count + 1)^1/2 over counts 0, 3, 8: 1, 2, 3 of 6.
    sampler = NegativeSampler(np.array([0, 3, 8]), DataConfig(negatives=2, negative_power=0.5))
    np.testing.assert_allclose(np.exp(sampler.log_q), [1 / 6, 2 / 6, 3 / 6], rtol=1e-6)
    rng = np.random.default_rng(0)
    drawn = np.bincount(np.concatenate([sampler.draw(rng) for _ in range(30_000)]), minlength=3) / 60_000
    np.testing.assert_allclose(drawn, [1 / 6, 2 / 6, 3 / 6], atol=0.01)


@pytest.mark.parametrize("negatives", [4, 9])
def test_of_a_catalogue_with_no_more_items_each_is_a_negative_once(negatives: int) -> None:
    sampler = NegativeSampler(np.array([0, 3, 8, 0]), DataConfig(negatives=negatives))
    assert sorted(sampler.draw(np.random.default_rng(0)).tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(np.exp(sampler.log_q), [1 / 4] * 4, rtol=1e-6)


@pytest.mark.parametrize(
    "setting", [{"train_fraction": 1.0}, {"validation_fraction": 0.0}, {"batch_sequences": 0}, {"negatives": 0}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=rf"data\.{name}={value}"):
        DataConfig(**setting)
