"""Trials of a version: the interval at many looks, verdicts, and what becomes of the pointer."""

import math

import numpy as np
import pytest

from cluster.canary import Canary
from cluster.errors import ConfigError, CorruptVersionError, RegistryError
from cluster.events import Event
from cluster.log import EventLog
from cluster.manifest import VersionRef
from training.online.canary import (
    CanaryConfig,
    CanaryTest,
    CanaryWatch,
    Side,
    begin_canary,
    confidence_sequence,
)

HOUR_US = 3_600_000_000
TRIAL = Canary(ref=VersionRef(2), share=0.5, from_seq=0, started_us=0)


def test_a_user_takes_part_by_the_share_and_always_alike():
    trial = Canary(ref=VersionRef(2), share=0.1, from_seq=0, started_us=5)
    users = [f"u{n}" for n in range(20_000)]
    taking = [user for user in users if trial.takes(user)]
    assert len(taking) == pytest.approx(2_000, abs=150)
    assert all(trial.takes(user) for user in taking)
    another = Canary(ref=VersionRef(2), share=0.1, from_seq=0, started_us=6)
    assert 100 < sum(map(another.takes, taking)) < 300  # others take part in another trial


def test_a_sides_rate_is_of_its_impressions_and_varies_by_user():
    side = Side()
    side.add("a", impressions=4, interactions=0)
    side.add("a", impressions=0, interactions=2)
    side.add("b", impressions=4, interactions=0)
    side.add("endless", impressions=2, interactions=50)  # counts as 2
    side.add("never shown", impressions=0, interactions=9)  # not at all
    rate = 4 / 10
    spread = (2 - rate * 4) ** 2 + (0 - rate * 4) ** 2 + (2 - rate * 2) ** 2
    assert side.rate() == (3, rate, pytest.approx(spread / 10**2 * 3 / 2))


def test_the_interval_is_that_of_the_mixture_test():
    # The mixture likelihood ratio against each bound is exactly 1 / alpha there.
    low, high = confidence_sequence(0.3, 0.04, expected=0.1, alpha=0.05)
    for bound in (low, high):
        estimate, variance, prior = 0.3 - bound, 0.04, 0.01
        ratio = math.sqrt(variance / (variance + prior)) * math.exp(
            estimate**2 * prior / (2 * variance * (variance + prior))
        )
        assert ratio == pytest.approx(20)


def run_trials(rng, *, trials, users, trial_rate, other_rate, looks):
    """Return the verdicts of trials whose users differ in how much they see and like."""
    config = CanaryConfig(min_users=20, margin=0.1, effect=0.2)
    verdicts = []
    for _ in range(trials):
        test = CanaryTest(TRIAL, config)
        verdict = None
        for look in range(looks):
            for user in range(users):
                for side, rate in ((test.trial, trial_rate), (test.others, other_rate)):
                    seen = int(rng.geometric(0.2))
                    likes = rng.beta(2, 2 / rate - 2)  # of this user
                    side.add(f"{look}-{user}", impressions=seen, interactions=int(rng.binomial(seen, likes)))
            verdict = test.verdict(now_us=0)
            if verdict is not None:
                break
        verdicts.append(verdict)
    return verdicts


def test_a_version_just_as_good_is_rarely_ended_as_worse_however_often_one_looks():
    verdicts = run_trials(np.random.default_rng(0), trials=200, users=10, trial_rate=0.2, other_rate=0.2, looks=60)
    ended = sum(verdict is not None and not verdict.passed for verdict in verdicts)
    assert ended <= 0.05 * 200


def test_a_version_that_is_worse_by_half_is_soon_ended_and_never_promoted():
    verdicts = run_trials(np.random.default_rng(1), trials=50, users=20, trial_rate=0.1, other_rate=0.2, looks=60)
    assert sum(verdict is not None and not verdict.passed for verdict in verdicts) >= 49
    assert not any(verdict is not None and verdict.passed for verdict in verdicts)


def test_a_version_that_is_better_is_promoted():
    verdicts = run_trials(np.random.default_rng(2), trials=20, users=20, trial_rate=0.25, other_rate=0.2, looks=60)
    assert sum(verdict is not None and verdict.passed for verdict in verdicts) == 20


def test_a_trial_without_a_verdict_ends_in_time():
    test = CanaryTest(TRIAL, CanaryConfig(max_h=1))
    assert test.verdict(now_us=HOUR_US) is None
    verdict = test.verdict(now_us=HOUR_US + 1)
    assert verdict is not None
    assert not verdict.passed
    assert verdict.reason == "no verdict within 1 h: 0 users on trial and 0 others"


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"margin": 0.0}, {"alpha": 2.0}, {"min_users": 1}, {"max_h": 0.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CanaryConfig(**wrong)


def impressions_and_clicks(canary, liked, *, users=300):
    """Yield what users see and choose: those of the side that likes its slates click on every second item."""
    for user in range(users):
        user_id = f"c{user}"
        side = "trial" if canary.takes(user_id) else "others"
        for n in range(6):
            yield Event(user_id=user_id, item_id=f"i{n}", kind="impression", ts_us=user * 100 + n)
            if (user + n) % (2 if side == liked else 5) == 0:
                yield Event(user_id=user_id, item_id=f"i{n}", kind="click", ts_us=user * 100 + n)


@pytest.fixture
def on_trial(build_home):
    """A home whose second version is on trial for half of the users, from the fifth event on."""
    tiny = build_home("canary.share=0.5")
    tiny.publish_version(seed=1)
    tiny.registry.promote(VersionRef(1), "back")
    with EventLog(tiny.home.log) as log:
        log.append(tiny.live_events(5))
        canary = begin_canary(tiny.registry, tiny.recipe, tiny.home, VersionRef(2), None)
        yield tiny, log, canary, CanaryWatch(tiny.registry, log, CanaryConfig())


def test_a_trial_that_passes_is_promoted_with_the_reason_on_record(on_trial):
    tiny, log, canary, watch = on_trial
    assert (canary.share, canary.from_seq) == (0.5, 5)
    assert watch.look(now_us=canary.started_us) is None
    log.append(list(impressions_and_clicks(canary, "trial")))
    assert watch.look(now_us=canary.started_us).passed
    assert (tiny.registry.current(), tiny.registry.canary()) == (VersionRef(2), None)
    assert tiny.registry.history()[-1].reason.startswith("canary: not worse: 0.5000 interactions an impression against")
    assert [line["outcome"] for line in tiny.registry.canaries()] == ["started", "promoted"]


def test_a_trial_that_fails_leaves_the_pointer_alone_and_a_new_watch_sees_the_same(on_trial):
    tiny, log, canary, watch = on_trial
    log.append(list(impressions_and_clicks(canary, "others")))
    fresh = CanaryWatch(tiny.registry, log, CanaryConfig())
    verdict = fresh.look(now_us=canary.started_us)
    assert not verdict.passed
    assert verdict.reason.startswith("worse: ")
    assert (tiny.registry.current(), tiny.registry.canary()) == (VersionRef(1), None)
    assert tiny.registry.canaries()[-1]["reason"] == verdict.reason
    assert watch.look(now_us=canary.started_us) is None  # there is no trial any more


def test_one_trial_runs_at_a_time_and_not_of_what_is_promoted(on_trial):
    tiny, _, _, _ = on_trial
    with pytest.raises(RegistryError, match=r"version 2\.0 is on trial; end that"):
        tiny.registry.start_canary(VersionRef(2), 0.1, 0)
    with pytest.raises(RegistryError, match="is promoted"):
        tiny.registry.start_canary(VersionRef(1), 0.1, 0)
    assert tiny.registry.end_canary(None, "stopped")
    with pytest.raises(RegistryError, match="above 0 and below 1"):
        tiny.registry.start_canary(VersionRef(2), 1.5, 0)
    with pytest.raises(RegistryError, match=r"9\.0 is not published"):
        tiny.registry.start_canary(VersionRef(9), 0.5, 0)


def test_a_damaged_trial_is_nobodys_and_can_be_stopped(on_trial):
    tiny, _, canary, watch = on_trial
    (tiny.home.registry / "canary.json").write_text("{")
    with pytest.raises(CorruptVersionError, match=r"canary\.json: not a trial"):
        tiny.registry.canary()
    assert watch.look(now_us=canary.started_us) is None
    assert tiny.registry.end_canary(None, "damaged")
    assert tiny.registry.canary() is None
    assert tiny.registry.canaries()[-1]["outcome"] == "ended"
