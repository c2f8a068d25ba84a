"""Ranks of next items: no look ahead, the order that is served, and hand-made models that show each rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.events import Event, events_table
from cluster.log import Interaction
from embeddings.vocabulary import Vocabulary
from training.evaluation.next_item import UNRANKED, Catalogue, rank_next_items
from training.models.served import ServedModel
from training.models.two_stage import ModelConfig, TwoStage
from training.models.version import USER_ROWS, VersionState
from training.stream import History, build_history

ITEMS = 30
RATING_OF = {0: None, 1: 3.0, 2: 5.0}


def random_events(users: int, length: int, seed: int = 0) -> list[Event]:
    """Users u0, u1, … meet items one after the other, none twice."""
    rng = np.random.default_rng(seed)
    met = rng.permuted(np.tile(np.arange(ITEMS), (users, 1)), axis=1)[:, :length]
    return [
        Event(
            user_id=f"u{user}",
            item_id=f"i{met[user, place]}",
            kind="click" if (rating := RATING_OF[(user + place) % 3]) is None else "rating",
            value=rating,
            ts_us=(place * 1_000 + user) * 1_000_000,
        )
        for place in range(length)
        for user in range(users)
    ]


def history_of(events: list[Event], model: ServedModel) -> History:
    return build_history(events_table(events), Vocabulary(model.item_ids, ITEMS), Vocabulary(model.state.user_ids, 10))


def after_the_first(history: History) -> np.ndarray:
    """Return the indices of all interactions but each user's first."""
    return np.setdiff1d(np.arange(len(history)), history.starts)


def catalogue_of(model: ServedModel) -> Catalogue:
    return Catalogue(item_ID=model.item_ID, user_UD=model.state.rows[USER_ROWS])


@pytest.fixture
def model(version: VersionState) -> ServedModel:
    return ServedModel.build(version, {})


def test_the_rank_is_the_place_in_what_is_served(model: ServedModel) -> None:
    events = random_events(users=6, length=25)
    history = history_of(events, model)
    targets = after_the_first(history)
    ranks = rank_next_items(model.dense, catalogue_of(model), history, targets, batch_size=16)
    candidates = model.dense.config.candidates
    served = []
    for target in targets:
        told = events[history.order[target]]
        before = [
            Interaction(event.item_id, event.kind, event.value, event.ts_us, seq=-1)
            for event in events[: history.order[target]]
            if event.user_id == told.user_id
        ]
        exclude = frozenset(entry.item_id for entry in before)
        shown = model.recommend(told.user_id, before, candidates, exclude).item_ids
        served.append(shown.index(told.item_id) + 1 if told.item_id in shown else UNRANKED)
    assert ranks.tolist() == served
    assert set(range(candidates + 1)) == set(served)


def test_a_rank_does_not_know_what_comes_after(model: ServedModel) -> None:
    events = random_events(users=6, length=12)
    cut = 6 * 8
    other = events[:cut] + [replace(event, kind="share", value=None) for event in events[cut:][::-1]]
    ranks = []
    for told in (events, other):
        history = history_of(sorted(told, key=lambda event: event.ts_us), model)
        targets = after_the_first(history)
        known = targets[history.order[targets] < cut]
        ranks.append(rank_next_items(model.dense, catalogue_of(model), history, known).tolist())
    assert ranks[0] == ranks[1]


def test_batches_of_any_size_give_the_same_ranks(model: ServedModel) -> None:
    history = history_of(random_events(users=6, length=20), model)
    targets = after_the_first(history)
    ranks = [rank_next_items(model.dense, catalogue_of(model), history, targets, size).tolist() for size in (1, 7, 999)]
    assert ranks[0] == ranks[1] == ranks[2]


def test_no_targets_have_no_ranks(model: ServedModel) -> None:
    history = history_of(random_events(users=3, length=4), model)
    assert rank_next_items(model.dense, catalogue_of(model), history, np.array([], np.int64)).tolist() == []


@pytest.fixture
def by_row() -> TwoStage:
    """A model that scores an item by its product with the user's row and nothing else."""
    dense = TwoStage(ModelConfig(history="pool", candidates=ITEMS), dim=4, text_dim=2)
    torch.nn.init.zeros_(dense.bilinear.weight)
    return dense


def rank(dense: TwoStage, scores: list[float], *met: int) -> list[int]:
    """Return the ranks of all items met but the first, by a user who scores items so."""
    item_ID = torch.zeros(len(scores), 4)
    item_ID[:, 0] = torch.tensor(scores)
    events = [Event(user_id="u", item_id=str(item), kind="click", ts_us=at) for at, item in enumerate(met)]
    items = Vocabulary([str(row) for row in range(len(scores))], len(scores))
    history = build_history(events_table(events), items, Vocabulary(["u"], 1))
    catalogue = Catalogue(item_ID=item_ID, user_UD=torch.tensor([[1.0, 0, 0, 0]]))
    return rank_next_items(dense, catalogue, history, np.arange(1, len(met))).tolist()


def test_what_the_user_has_is_out_of_the_ranking(by_row: TwoStage) -> None:
    assert rank(by_row, [5, 4, 3, 2], 0, 3, 1) == [3, 1]


def test_an_item_met_again_has_no_rank(by_row: TwoStage) -> None:
    assert rank(by_row, [5, 4, 3, 2], 0, 1, 0) == [1, UNRANKED]


def test_an_item_beyond_the_candidates_has_no_rank(by_row: TwoStage) -> None:
    by_row.config = replace(by_row.config, candidates=2)
    assert rank(by_row, [5, 4, 3, 2], 0, 2) == [2]
    assert rank(by_row, [5, 4, 3, 2], 0, 3) == [UNRANKED]


def test_a_model_that_scores_all_alike_does_not_win(by_row: TwoStage) -> None:
    ranks = [rank(by_row, [1.0] * 21, 20, item)[0] for item in range(20)]
    assert sorted(ranks) == list(range(1, 21))


def test_a_model_of_nan_has_no_ranks(by_row: TwoStage) -> None:
    assert rank(by_row, [float("nan")] * 4, 0, 1, 2) == [UNRANKED, UNRANKED]
