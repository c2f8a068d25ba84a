"""Slates and the probability with which each item stands where it stands."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from cluster.errors import ConfigError
from training.policies import POLICIES, EpsilonGreedyPolicy, PolicyConfig, build_policy

ITEMS = ["a", "b", "c", "d"]
SCORES = np.array([4.0, 3.0, 2.0, 1.0], np.float32)


@pytest.mark.parametrize("name", POLICIES)
class TestEveryPolicy:
    def test_a_slate_shows_k_of_the_candidates_once_each_with_their_scores(self, name: str) -> None:
        policy = build_policy(PolicyConfig(name=name, epsilon=0.5), seed=1)
        for _ in range(50):
            slate = policy.slate(ITEMS, SCORES, 3)
            assert len(slate.item_ids) == len(slate.scores) == len(slate.propensities) == 3
            assert len(set(slate.item_ids)) == 3
            assert slate.scores == [float(SCORES[ITEMS.index(item)]) for item in slate.item_ids]
            assert all(0 < propensity <= 1 for propensity in slate.propensities)

    def test_fewer_candidates_than_asked_for_are_all_shown(self, name: str) -> None:
        slate = build_policy(PolicyConfig(name=name), seed=1).slate(ITEMS, SCORES, 100)
        assert sorted(slate.item_ids) == ITEMS

    def test_no_candidates_are_an_empty_slate(self, name: str) -> None:
        slate = build_policy(PolicyConfig(name=name), seed=1).slate([], np.empty(0, np.float32), 10)
        assert (slate.item_ids, slate.scores, slate.propensities) == ([], [], [])

    def test_the_same_seed_draws_the_same_slates(self, name: str) -> None:
        config = PolicyConfig(name=name, epsilon=0.5)
        one, other = build_policy(config, seed=3), build_policy(config, seed=3)
        assert [one.slate(ITEMS, SCORES, 4) for _ in range(20)] == [other.slate(ITEMS, SCORES, 4) for _ in range(20)]


def test_greedy_shows_the_best_for_certain() -> None:
    slate = build_policy(PolicyConfig(), seed=1).slate(ITEMS, SCORES, 2)
    assert slate.item_ids == ["a", "b"]
    assert slate.propensities == [1.0, 1.0]


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.0])
def test_propensities_over_the_candidates_of_a_position_sum_to_1(epsilon: float) -> None:
    policy, stated = EpsilonGreedyPolicy(epsilon, seed=0), {}
    for _ in range(500):
        slate = policy.slate(ITEMS, SCORES, 1)
        stated[slate.item_ids[0]] = slate.propensities[0]
    assert sum(stated.values()) == pytest.approx(1.0)


def test_propensities_are_those_of_the_draw() -> None:
    # ε = 2/5 over 4 then 3 left: the best of them 3/5 + 2/20 = 7/10, then 3/5 + 2/15 = 11/15; another 1/10, then 2/15.
    expected = {
        ("a", "b"): (Fraction(7, 10), Fraction(11, 15)),
        ("a", "d"): (Fraction(7, 10), Fraction(2, 15)),
        ("c", "a"): (Fraction(1, 10), Fraction(11, 15)),
        ("c", "b"): (Fraction(1, 10), Fraction(2, 15)),
    }
    policy, found = EpsilonGreedyPolicy(0.4, seed=0), {}
    for _ in range(1000):
        slate = policy.slate(ITEMS, SCORES, 2)
        found[tuple(slate.item_ids)] = slate.propensities
    for shown, propensities in expected.items():
        assert found[shown] == pytest.approx([float(p) for p in propensities])


def test_slates_come_as_often_as_their_propensities_say() -> None:
    draws = 20_000
    policy, seen, stated = EpsilonGreedyPolicy(0.4, seed=0), Counter(), {}
    for _ in range(draws):
        slate = policy.slate(ITEMS, SCORES, 2)
        seen[tuple(slate.item_ids)] += 1
        stated[tuple(slate.item_ids)] = float(np.prod(slate.propensities))
    assert sum(stated.values()) == pytest.approx(1.0)
    for shown, probability in stated.items():
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert abs(seen[shown] / draws - probability) < 4 * deviation, shown


def test_an_estimate_that_divides_by_the_propensity_is_unbiased() -> None:
    # The value of uniform choice, 10/4, seen through what an epsilon-greedy policy happened to show.
    policy = EpsilonGreedyPolicy(0.4, seed=0)
    slates = [policy.slate(ITEMS, SCORES, 1) for _ in range(20_000)]
    estimate = np.mean([0.25 / slate.propensities[0] * slate.scores[0] for slate in slates])
    assert estimate == pytest.approx(10 / 4, abs=0.05)


def test_an_unknown_policy_and_an_impossible_share_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.name='best': is none of greedy, epsilon_greedy"):
        PolicyConfig(name="best")
    with pytest.raises(ConfigError, match=r"policy\.epsilon=1\.5"):
        PolicyConfig(epsilon=1.5)
