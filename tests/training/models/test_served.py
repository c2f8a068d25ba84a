"""A version's answers: the contract that serving builds on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.events import KIND_INDEX, events_table
from cluster.log import Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.quantized import QuantizedRows
from training.models.interests import Interests
from training.models.served import ServedModel
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    Change,
    VersionState,
    write_delta,
    write_version,
)

TEXT_DIM = 384


@pytest.fixture
def model(version: VersionState) -> ServedModel:
    return ServedModel.build(version, {})


def history(*items: str) -> list[Interaction]:
    return [Interaction(item_id, "click", None, 1_000_000 * at, seq=-1) for at, item_id in enumerate(items)]


def text_vector(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=TEXT_DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def answers(model: ServedModel) -> tuple[list[str], bytes]:
    found = model.recommend("u1", history("i3", "i7"), 10)
    return found.item_ids, found.scores.tobytes()


def test_candidates_come_best_first_with_their_scores(model: ServedModel) -> None:
    found = model.recommend("u1", history("i3", "i7"), 10)
    assert not found.cold_start
    assert len(set(found.item_ids)) == len(found.scores) == 10
    assert (np.diff(found.scores) <= 0).all()
    assert found.item_ids == model.recommend("u1", history("i3", "i7"), 12).item_ids[:10]


@pytest.mark.parametrize("user_id", ["u1", "nobody"])
@pytest.mark.parametrize("items", [[], ["i3"]])
def test_k_beyond_the_catalogue_gives_the_catalogue(model: ServedModel, user_id: str, items: list[str]) -> None:
    found = model.recommend(user_id, history(*items), 10_000, exclude=frozenset(items))
    assert sorted(found.item_ids) == sorted(set(model.item_ids) - set(items))
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize("items", [[], ["i3", "i7"]])
def test_what_is_excluded_is_never_shown(model: ServedModel, items: list[str]) -> None:
    exclude = frozenset({"i0", "i1", "i2", "i3", "not there"})
    for k in (1, 10, 1_000):
        assert not exclude & set(model.recommend("u1", history(*items), k, exclude).item_ids)


@pytest.mark.parametrize("items", [[], ["i3"]])
def test_with_everything_excluded_nothing_is_shown(model: ServedModel, items: list[str]) -> None:
    found = model.recommend("u1", history(*items), 10, exclude=frozenset(model.item_ids))
    assert (found.item_ids, found.scores.size) == ([], 0)


@pytest.mark.parametrize("user_id", ["u1", "nobody"])
@pytest.mark.parametrize("items", [[], ["unheard of"]])
def test_without_a_usable_history_the_popular_is_shown(model: ServedModel, user_id: str, items: list[str]) -> None:
    # The version counts 30, 29, … interactions of i0, i1, …
    found = model.recommend(user_id, history(*items), 3)
    assert found.cold_start
    assert found.item_ids == ["i0", "i1", "i2"]
    np.testing.assert_allclose(np.exp(found.scores), np.array([31, 30, 29]) / sum(range(2, 32)), rtol=1e-5)


def test_an_unknown_user_is_known_by_what_they_did(model: ServedModel) -> None:
    stranger = [model.recommend("nobody", history(*items), 5) for items in (["i3", "i7"], ["i20", "i9"])]
    assert not stranger[0].cold_start
    assert stranger[0].item_ids != stranger[1].item_ids
    assert model.recommend("somebody else", history("i3", "i7"), 5).item_ids == stranger[0].item_ids
    assert model.recommend("u1", history("i3", "i7"), 5).scores.tolist() != stranger[0].scores.tolist()


def test_unknown_items_of_the_history_are_as_if_they_had_not_been(model: ServedModel) -> None:
    told = history("i3", "unheard of", "i7")
    known = [entry for entry in told if entry.item_id != "unheard of"]
    with_unknown, without = (model.recommend("u1", entries, 5) for entries in (told, known))
    assert with_unknown.item_ids == without.item_ids
    assert with_unknown.scores.tolist() == without.scores.tolist()


def test_no_number_of_unknown_items_hides_a_known_one(model: ServedModel) -> None:
    told = history("i3", *["unheard of"] * model.max_history)
    assert model.recommend("u1", told, 5).item_ids == model.recommend("u1", told[:1], 5).item_ids


def test_it_looks_back_on_the_newest_interactions_only(model: ServedModel) -> None:
    newest = [f"i{n}" for n in range(model.max_history)]
    shown = [model.recommend("u1", history(first, *newest)[-len(newest) - 1 :], 5) for first in ("i28", "i29")]
    assert shown[0].item_ids == shown[1].item_ids
    assert shown[0].scores.tolist() == shown[1].scores.tolist()


def test_similar_items_are_nearest_first_without_the_item_itself(model: ServedModel) -> None:
    neighbours = model.similar("i3", 1_000)
    assert len(neighbours) == model.item_count - 1
    assert "i3" not in dict(neighbours)
    unit_ID = torch.nn.functional.normalize(model.item_ID, dim=1)
    expected = (unit_ID @ unit_ID[3]).tolist()
    assert dict(neighbours) == pytest.approx({f"i{n}": expected[n] for n in range(30) if n != 3}, abs=1e-6)
    assert [score for _, score in neighbours] == sorted((score for _, score in neighbours), reverse=True)
    assert model.similar("i3", 2) == neighbours[:2]
    with pytest.raises(KeyError):
        model.similar("unheard of", 3)


def test_what_it_knows_of_items(model: ServedModel) -> None:
    assert model.item_count == 30
    assert (model.knows("i4"), model.text_of("i4")) == (True, "film number 4")
    assert (model.knows("unheard of"), model.text_of("unheard of")) == (False, None)


class TestAnItemPut:
    def test_is_recommendable_similar_and_readable_at_once(self, model: ServedModel) -> None:
        after = model.with_items([("new", "a new film")], text_vector(1)[None])
        assert after.item_count == 31
        assert after.text_of("new") == "a new film"
        assert "new" in after.recommend("u1", history("i3"), 1_000).item_ids
        assert "new" in after.recommend("nobody", [], 1_000).item_ids
        assert "new" in dict(after.similar("i5", 30))
        assert not after.recommend("nobody", history("new"), 5).cold_start

    def test_is_nearest_to_an_item_of_the_same_text(self, model: ServedModel) -> None:
        put = model.with_items(
            [("a", "text"), ("b", "same text"), ("c", "other")], np.stack([text_vector(n) for n in (1, 1, 2)])
        )
        ((nearest, cosine),) = put.similar("a", 1)
        assert nearest == "b"
        assert cosine == pytest.approx(1, abs=1e-5)

    def test_leaves_the_others_answers_and_the_model_before_as_they_were(self, model: ServedModel) -> None:
        before = model.recommend("u1", history("i3"), 1_000)
        after = model.with_items([("new", "text")], text_vector(1)[None]).recommend("u1", history("i3"), 1_000)
        kept = [(item, score) for item, score in zip(after.item_ids, after.scores, strict=True) if item != "new"]
        assert [item for item, _ in kept] == before.item_ids
        np.testing.assert_allclose([score for _, score in kept], before.scores, atol=1e-5)
        assert not model.knows("new")

    def test_again_is_read_anew(self, model: ServedModel) -> None:
        once = model.with_items([("new", "text")], text_vector(1)[None])
        again = once.with_items([("new", "another text")], text_vector(2)[None])
        assert again.item_count == once.item_count
        assert again.text_of("new") == "another text"
        assert not torch.equal(again.item_ID[-1], once.item_ID[-1])

    def test_that_the_version_knows_keeps_its_row(self, model: ServedModel) -> None:
        after = model.with_items([("i3", "told anew")], text_vector(1)[None])
        assert after.item_count == model.item_count
        assert after.text_of("i3") == "told anew"
        with torch.inference_mode():
            expected = model.dense.item_vectors(model.state.rows["item"][3:4], torch.tensor(text_vector(1)[None]))
        torch.testing.assert_close(after.item_ID[3:4], expected)
        assert torch.equal(after.item_ID[4], model.item_ID[4])


class TestAModelBuiltBesideAResidentOne:
    """Whatever it shares, it answers to the bit as one built alone."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: {"dense": {name: tensor * 1.1 for name, tensor in state.dense.items()}},
            lambda state: {"rows": {**state.rows, ITEM_ROWS: state.rows[ITEM_ROWS] * 1.1}},
            lambda state: {"item_ids": state.item_ids[::-1], "item_texts": state.item_texts[::-1]},
            lambda state: {"user_ids": [*state.user_ids[1:], state.user_ids[0]]},
            lambda state: {"user_ids": ["newcomer", *state.user_ids[1:]]},
            lambda state: {"item_ids": state.item_ids[:9], "rows": {n: r[:9] for n, r in state.rows.items()}},
            lambda state: {
                "item_ids": [*state.item_ids, "new"],
                "item_texts": [*state.item_texts, "text"],
                "rows": {name: torch.cat([rows, rows[:1]]) for name, rows in state.rows.items()},
            },
        ],
        ids=["weights", "rows", "order", "users", "user reused", "fewer", "more"],
    )
    @pytest.mark.parametrize("items", [0, 2])
    def test_answers_as_if_alone(
        self, version: VersionState, change: Callable[[VersionState], dict[str, Any]], items: int
    ) -> None:
        put = {f"put-{n}": ("told", text_vector(n)) for n in range(items)}
        state = replace(version, **change(version))
        alone, beside = ServedModel.build(state, put), ServedModel.build(state, put, ServedModel.build(version, put))
        assert answers(beside) == answers(alone)
        assert beside.similar("i3", 9) == alone.similar("i3", 9)
        assert (beside.item_ids, beside.index_of, beside.user_row) == (alone.item_ids, alone.index_of, alone.user_row)

    def test_leaves_the_resident_one_as_it_was(self, model: ServedModel) -> None:
        before = answers(model)
        other = {name: tensor * 1.1 for name, tensor in model.state.dense.items()}
        assert answers(model.with_state(replace(model.state, dense=other))) != before
        assert answers(model) == before

    def test_forgets_of_what_was_put_what_the_version_has_learned(self, model: ServedModel) -> None:
        row = model.state.rows[TEXT_ROWS][3].numpy()
        put = model.with_items([("i3", "film number 3"), ("i4", "told anew")], np.stack([row, row]))
        assert list(put.put) == ["i4"]


class TestADelta:
    @pytest.fixture
    def registry(self, tmp_path: Path, version: VersionState) -> Registry:
        """Version 1, and a delta that moves rows, adds the item and user "new" and has learned up to event 9."""
        registry = Registry(tmp_path / "registry")
        draft = registry.draft_version()
        write_version(draft, version, events_table([]))
        draft.publish(offset=0, metrics={})
        draft = registry.draft_delta(1)
        write_delta(draft, moved_rows(version))
        draft.publish(first_seq=1, last_seq=9)
        return registry

    def test_swapped_in_is_the_delta_loaded(self, registry: Registry) -> None:
        base, loaded = (ServedModel.load(registry, VersionRef(1, delta)) for delta in (0, 1))
        swapped = base.with_delta(registry.open_delta(1, 1))
        assert (base.name, swapped.name, loaded.name) == ("1.0", "1.1", "1.1")
        assert (base.learned_seq, swapped.learned_seq) == (0, 9)
        assert answers(swapped) == answers(loaded) != answers(base)
        assert swapped.similar("new", 30) == loaded.similar("new", 30)

    def test_leaves_the_model_before_as_it_was(self, registry: Registry) -> None:
        base = ServedModel.load(registry, VersionRef(1))
        before = answers(base)
        base.with_delta(registry.open_delta(1, 1))
        assert answers(base) == before
        assert not base.knows("new")

    def test_gives_a_row_to_an_item_put_before_it(self, registry: Registry) -> None:
        put = ServedModel.load(registry, VersionRef(1)).with_items(
            [("other", "text"), ("new", "text")], np.stack([text_vector(1), text_vector(2)])
        )
        after = put.with_delta(registry.open_delta(1, 1))
        assert after.item_count == put.item_count == 32
        assert sorted(after.item_ids) == sorted(put.item_ids)
        assert [after.text_of(item_id) for item_id in ("new", "other", "i4")] == ["text", "text", "film number 4"]
        (row,) = after.state.rows["item"][30:]
        assert row.count_nonzero() > 0
        with torch.inference_mode():
            expected = after.dense.item_vectors(row[None], torch.tensor(text_vector(2)[None]))
        torch.testing.assert_close(after.item_ID[after.index_of["new"]], expected[0])

    def test_brings_a_new_user_s_row(self, registry: Registry) -> None:
        loaded = ServedModel.load(registry, VersionRef(1, 1))
        known, unknown = (loaded.recommend(user_id, history("i3"), 5) for user_id in ("new", "nobody"))
        assert known.scores.tolist() != unknown.scores.tolist()


def moved_rows(version: VersionState) -> Change:
    def grown(name: str, *indices: int) -> tuple[torch.Tensor, QuantizedRows]:
        shape = (len(indices), *version.rows[name].shape[1:])
        return torch.tensor(indices), QuantizedRows(torch.randn(shape, generator=torch.Generator().manual_seed(8)))

    return Change(
        new_items=[("new", "a new film")],
        new_users=["new"],
        rows={
            ITEM_ROWS: grown(ITEM_ROWS, 3, 9, 30),
            USER_ROWS: grown(USER_ROWS, len(version.user_ids)),
            TEXT_ROWS: grown(TEXT_ROWS, 30),
            COUNT_ROWS: (torch.tensor([30]), QuantizedRows(torch.tensor([1]))),
        },
        optimizer_rows={},
        dense=version.dense,
        optimizer={},
    )


def test_interests_are_an_item_that_the_user_had_and_weigh_less_beside_a_history(model: ServedModel) -> None:
    said = text_vector(7)
    interests = Interests(liked_E=said, disliked_NE=np.empty((0, TEXT_DIM), np.float32))
    put = model.with_items([("said", "what is said")], said[None])
    rows_ID = put.item_ID[put.index_of["said"]]
    user_D = model.dense.user_vectors(
        rows_ID[None, None],
        torch.tensor([[KIND_INDEX["like"]]]),
        torch.tensor([[torch.nan]]),
        torch.tensor([[0]]),
        torch.tensor([[True]]),
        torch.zeros(1, len(rows_ID)),
    )[0, -1]
    expected_I = (model.item_ID @ user_D).numpy()
    found_I = model.interest_scores(interests).numpy()
    np.testing.assert_allclose(found_I, (expected_I - expected_I.mean()) / expected_I.std(), atol=1e-4)

    everything = len(model.item_ids)
    stranger = model.recommend("nobody", [], everything, interests=interests)
    assert not stranger.cold_start
    assert stranger.item_ids != model.recommend("nobody", [], everything).item_ids
    assert sorted(stranger.item_ids) == sorted(model.item_ids)
    assert stranger.item_ids == model.rank("nobody", [], model.item_ids, interests).item_ids
    known = [model.recommend("u1", history("i3"), everything, interests=said).item_ids for said in (None, interests)]
    assert known[0] != known[1]


def test_candidates_are_ranked_alike_whether_asked_for_or_found(model: ServedModel) -> None:
    found = model.recommend("u1", history("i3", "i7"), 10)
    ranked = model.rank("u1", history("i3", "i7"), sorted(found.item_ids))
    assert ranked.item_ids == found.item_ids
    np.testing.assert_allclose(ranked.scores, found.scores, rtol=1e-5)
    assert model.rank("u1", history("i3"), []).item_ids == []
    assert (model.can_rank("i3"), model.can_rank("nowhere")) == (True, False)
