"""Candidates are kept for users who ask again, and for nobody whose state or version is another."""

from dataclasses import fields, replace

import pytest

from cluster.events import Event
from cluster.log import EventLog
from cluster.manifest import VersionRef
from serving.kept import Basis, KeptCandidates
from serving.recommender import Query, Recommender
from serving.refresh import Residents
from training.models.served import ServedModel
from training.policies import PolicyConfig


class Counting(ServedModel):
    """A model that counts for whom it has found candidates."""

    asked: list[str]

    def recommend(self, user_id, *args):
        self.asked.append(user_id)
        return super().recommend(user_id, *args)


class Asked:
    """A recommender over residents that can be replaced."""

    def __init__(self, log, model, kept_users=2):
        self.model = Counting(**{field.name: getattr(model, field.name) for field in fields(model)})
        object.__setattr__(self.model, "asked", [])
        self.residents = Residents(live=self.model, pinned=self.model)
        settings = {"seed": 0, "candidates": 20, "kept_users": kept_users}
        self.recommender = Recommender(log, lambda: self.residents, PolicyConfig(), **settings)

    def slate(self, user_id="u1", k=5, arm="live", **narrowed):
        return self.recommender.recommend(Query(user_id=user_id, k=k, arm=arm, **narrowed)).slate.item_ids

    def times(self, user_id="u1"):
        return self.model.asked.count(user_id)


@pytest.fixture
def log(home):
    with EventLog(home.log) as opened:
        yield opened


@pytest.fixture
def asked(versions, log):
    return Asked(log, ServedModel.load(versions.registry, VersionRef(1)))


def like(log, item_id, user_id="u1"):
    log.append([Event(event_id=f"{user_id} {item_id}", user_id=user_id, item_id=item_id, kind="like", ts_us=1)])


def test_who_asks_again_is_answered_alike_from_what_was_found(asked, log):
    like(log, "i3")
    first = asked.slate()
    assert (asked.slate(), asked.slate(k=3), asked.times()) == (first, first[:3], 1)


def test_an_event_of_the_user_s_has_candidates_found_anew_and_one_of_another_s_has_not(asked, log):
    first = asked.slate()
    like(log, first[0], user_id="u2")
    assert (asked.slate(), asked.times()) == (first, 1)
    like(log, first[0])
    assert first[0] not in asked.slate()
    assert asked.times() == 2


def test_the_answer_states_the_user_s_newest_event_and_min_seq_holds(asked, log):
    like(log, "i3")
    for _ in range(2):
        found = asked.recommender.recommend(Query(user_id="u1", k=5, arm="live", min_seq=1))
        assert (found.state_seq, found.reflects_min_seq) == (1, True)


def test_another_version_or_availability_has_candidates_found_anew(asked):
    gone = asked.slate()[0]
    asked.residents = replace(asked.residents, unavailable=frozenset([gone]))
    assert gone not in asked.slate()
    assert asked.times() == 2


@pytest.mark.parametrize(
    "narrowed",
    [
        {"exclude": frozenset(["i9"])},
        {"boost": frozenset(["i9"])},
        {"categories": ("even",)},
        {"k": 21},
        {"arm": "frozen"},
    ],
)
def test_a_request_that_is_not_like_everyone_s_neither_takes_nor_leaves_candidates(asked, narrowed):
    whole = asked.slate(**narrowed)
    plain = asked.slate()
    assert (asked.slate(**narrowed), asked.slate(), asked.times()) == (whole, plain, 3)


def test_those_asked_for_longest_ago_go_first_and_none_are_kept_where_none_are_wanted(asked, log):
    for user_id in ("u1", "u2", "u1", "u3", "u1", "u2"):
        asked.slate(user_id)
    assert [asked.times(user_id) for user_id in ("u1", "u2", "u3")] == [1, 2, 1]
    without = Asked(log, asked.model, kept_users=0)
    assert without.slate() == without.slate() == asked.slate()
    assert without.times() == 2


def test_residents_that_were_replaced_are_not_held_in_memory(asked):
    kept = KeptCandidates(1)
    found = asked.model.recommend("u1", (), 5)
    kept.keep("u1", "live", Basis(replace(asked.residents), 0, False), found)  # nobody else holds these residents
    assert kept._entries["u1", "live"].residents() is None
