"""Who is held in quarantine, and who weighs how much: people, farms, clocks."""

import random

import pytest

from cluster.errors import ConfigError
from cluster.events import Event
from cluster.log import LoggedEvent
from training.online.intake import BURST, CLOCKWORK, DWELL, REPEATS, TOO_FAST, IntakeConfig, IntakeGuard

ITEMS = 500


def guard(**settings) -> IntakeGuard:
    return IntakeGuard(IntakeConfig(**settings), lambda _: 1 / ITEMS)


def logged(events) -> list[LoggedEvent]:
    return [LoggedEvent(seq, event, 0) for seq, event in enumerate(events, 1)]


def people(count: int, users: int = 40, seed: int = 0) -> list[Event]:
    """People who choose this and that, some time apart."""
    rng = random.Random(seed)
    now_s = 0.0
    events = []
    for _ in range(count):
        now_s += rng.expovariate(1.0)
        user_id, item_id = f"person-{rng.randrange(users)}", f"i{rng.randrange(ITEMS)}"
        events.append(Event(user_id=user_id, item_id=item_id, kind="click", ts_us=int(now_s * 1e6)))
    return events


def click(user_id: str, item_id: str, at_s: float) -> Event:
    return Event(user_id=user_id, item_id=item_id, kind="click", ts_us=int(at_s * 1e6))


def test_people_pass_and_weigh_about_1():
    verdicts = guard().judge(logged(people(3_000)))
    assert sum(bool(verdict.reasons) for verdict in verdicts) <= 3
    assert sum(verdict.weight for verdict in verdicts) / 3_000 > 0.9


def test_many_accounts_that_push_one_item_are_a_burst_and_the_people_around_them_are_not():
    events = people(2_000)
    for number in range(100):
        events.insert(500 + number * 12, click(f"bot-{number}", "pushed", 500.0 + number))
    verdicts = guard().judge(logged(events))
    bots = [verdict for verdict, event in zip(verdicts, events, strict=True) if event.user_id.startswith("bot")]
    others = [verdict for verdict, event in zip(verdicts, events, strict=True) if not event.user_id.startswith("bot")]
    assert sum(BURST in verdict.reasons for verdict in bots) >= 90
    assert sum(bool(verdict.reasons) for verdict in others) <= 20


def test_an_item_that_was_always_popular_is_no_burst():
    popular = IntakeGuard(IntakeConfig(), lambda item_id: 0.5 if item_id == "hit" else 0.5 / ITEMS)
    events = [
        event
        for pair in zip(people(500), (click(f"p{n}", "hit", n) for n in range(500)), strict=True)
        for event in pair
    ]
    assert not any(verdict.reasons for verdict in popular.judge(logged(events)))


def test_one_user_who_chooses_one_item_again_and_again_repeats():
    verdicts = guard(max_repeats=3, burst_events=1_000).judge(logged([click("u", "i1", 60.0 * n) for n in range(5)]))
    assert [verdict.reasons for verdict in verdicts] == [(), (), (), (REPEATS,), (REPEATS,)]


def test_more_actions_a_second_than_a_hand_can_do_are_too_fast_and_a_basket_is_one_action():
    fast = guard().judge(logged([click("u", f"i{n}", n / 100) for n in range(40)]))
    assert TOO_FAST in fast[-1].reasons
    basket = guard().judge(logged([click("u", f"i{n}", 1.0) for n in range(40)]))
    assert not any(verdict.reasons for verdict in basket)


def test_a_clock_is_told_from_a_person():
    verdicts = guard().judge(logged([click("u", f"i{n}", 10.0 * n) for n in range(40)]))
    assert CLOCKWORK in verdicts[-1].reasons
    rng = random.Random(0)
    verdicts = guard().judge(logged([click("u", f"i{n}", 10.0 * n + rng.random() * 5) for n in range(40)]))
    assert not any(verdict.reasons for verdict in verdicts)


def test_nobody_dwells_longer_than_has_passed():
    before = click("u", "i1", 100.0)
    possible, impossible = (
        Event(user_id="u", item_id="i2", kind="dwell", value=value, ts_us=130_000_000) for value in (29.0, 60.0)
    )
    assert guard().judge(logged([before, possible]))[1].reasons == ()
    assert guard().judge(logged([before, impossible]))[1].reasons == (DWELL,)


def test_a_user_who_fills_the_window_weighs_no_more_than_their_share():
    rng = random.Random(0)
    events = [click("u", f"i{n}", 10.0 * n + rng.random() * 9) for n in range(ITEMS)]
    verdicts = guard(window_events=100, max_user_share=0.2).judge(logged(events))
    assert sum(verdict.weight for verdict in verdicts[-100:]) <= 20


def test_impressions_are_not_judged_and_a_guard_turned_off_judges_nobody():
    impressions = [Event(user_id="u", item_id="i1", kind="impression", ts_us=n) for n in range(50)]
    assert all(verdict.weight == 1 for verdict in guard().judge(logged(impressions)))
    clicks = [click("u", "i1", 0.001 * n) for n in range(100)]
    assert all(verdict.weight == 1 for verdict in guard(enabled=False).judge(logged(clicks)))


def test_it_remembers_so_many_users_and_no_more():
    judge = guard(max_users=10, window_events=20)
    judge.judge(logged([click(f"u{n}", f"i{n % 7}", n) for n in range(1_000)]))
    assert len(judge._users) == 10
    assert len(judge._window) == 20
    assert sum(judge._item_counts.values()) == sum(judge._user_counts.values()) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_events": 0}, "intake.window_events=0: must be at least 1"),
        ({"burst_sigmas": -1.0}, "intake.burst_sigmas=-1.0: must be 0 or more"),
        ({"max_user_share": 0.0}, r"intake.max_user_share=0.0: must be in \(0, 1\]"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        guard(**settings)
