"""Impressions and feedback joined: by hand, and against joining the whole stream at once."""

import random
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError
from cluster.events import Event
from cluster.log import EventLog, LoggedEvent
from training.online.join import Join, JoinConfig, Joined, write_joined

CONFIG = JoinConfig(attribution_h=1.0, wait_s=60.0, lateness_s=10.0)


def event(kind: str, at_s: float, user: str = "u", item: str = "i", request: str | None = "r", **more) -> Event:
    return Event(user_id=user, item_id=item, kind=kind, ts_us=int(at_s * 1e6), request_id=request, **more)


def join(*events: Event, config: JoinConfig = CONFIG) -> list[Joined]:
    stream = Join(config)
    return stream.add([LoggedEvent(n, e, 0) for n, e in enumerate(events, 1)]) + stream.flush()


def told(examples) -> list[tuple]:
    return [(e.label, e.kind, e.correction, e.organic) for e in examples]


def test_what_was_shown_and_not_chosen_is_a_negative_with_its_position_and_propensity():
    (found,) = join(event("impression", 0, position=3, propensity=0.25, version="1.2"))
    assert told([found]) == [(0.0, "impression", False, False)]
    assert (found.position, found.propensity, found.version) == (3, 0.25, "1.2")


def test_a_reward_in_time_is_a_positive_and_no_negative_before_it():
    (found,) = join(event("impression", 0, position=2), event("click", 59))
    assert told([found]) == [(1.0, "click", False, False)]
    assert (found.position, found.delay_us) == (2, 59_000_000)


def test_a_reward_after_the_wait_corrects_the_negative_once():
    found = join(event("impression", 0), event("click", 100), event("purchase", 200, value=9.5))
    assert told(found) == [
        (0.0, "impression", False, False),
        (1.0, "click", True, False),
        (1.0, "purchase", False, False),
    ]
    assert found[2].value == 9.5


def test_without_a_request_the_last_impression_within_the_window_counts():
    found = join(
        event("impression", 0, position=1, request=None),
        event("impression", 30, position=2, request=None),
        event("click", 40, request=None),
    )
    assert sorted((e.label, e.position) for e in found) == [(0.0, 1), (1.0, 2)]


def test_feedback_beyond_the_window_or_on_nothing_shown_is_organic():
    found = join(event("impression", 0, request=None), event("click", 3_700, request=None), event("like", 1, user="v"))
    assert Counter(told(found)) == Counter(
        {(0.0, "impression", False, False): 1, (1.0, "click", False, True): 1, (1.0, "like", False, True): 1}
    )


def test_a_skip_is_a_negative_at_once():
    assert told(join(event("impression", 0), event("skip", 5))) == [(0.0, "skip", False, False)]


def test_a_skip_takes_nothing_back_and_a_choice_after_it_does():
    assert told(join(event("impression", 0), event("skip", 100), event("click", 200))) == [
        (0.0, "impression", False, False),
        (0.0, "skip", False, False),
        (1.0, "click", True, False),
    ]


def test_an_impression_that_is_reported_twice_counts_once():
    stream = Join(CONFIG)
    found = stream.add([LoggedEvent(n, event("impression", 0), 0) for n in (1, 2)]) + stream.flush()
    assert len(found) == stream.counts.repeated_impressions == 1


def test_beyond_its_memory_the_oldest_are_negatives_early():
    stream = Join(JoinConfig(attribution_h=1.0, wait_s=60.0, lateness_s=0.0, max_open=2))
    found = stream.add([LoggedEvent(n, event("impression", n, item=f"i{n}"), 0) for n in range(1, 5)])
    assert [e.item_id for e in found] == ["i1"]
    assert stream.counts.closed_early == 1
    assert len(found + stream.flush()) == 4


def test_what_comes_later_than_allowed_is_counted_and_still_joined():
    stream = Join(CONFIG)
    events = [event("impression", 0), event("impression", 50, request="s"), event("click", 20)]
    found = stream.add([LoggedEvent(n, e, 0) for n, e in enumerate(events, 1)]) + stream.flush()
    assert stream.counts.late == 1
    assert (1.0, "click", False, False) in told(found)


def test_an_impression_from_before_anything_could_be_due_to_it_says_nothing():
    stream = Join(CONFIG)
    stream.add([LoggedEvent(1, event("impression", 10_000, request="now"), 0)])
    old = [LoggedEvent(n, event("impression", 0, event_id=f"e{n}"), 0) for n in range(2, 50)]
    assert stream.add(old) == []
    assert len(stream.flush()) == 1


def test_of_a_user_who_is_forgotten_nothing_is_made():
    stream = Join(CONFIG)
    shown = [event("impression", 20 * n, user=user, item=f"i{n}") for n, user in enumerate(["u", "v", "u"])]
    stream.add([LoggedEvent(n, e, 0) for n, e in enumerate(shown, 1)])  # one is open, two are held back
    stream.forget_user("u", 3)
    assert {row["user_id"] for row in stream.state().to_pylist()} == {"v"}
    assert {e.user_id for e in stream.flush()} == {"v"}


def random_stream(seed: int, count: int = 400) -> list[Event]:
    rng = random.Random(seed)
    now_s, events = 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(0.2)
        pair = {"user": f"u{rng.randrange(5)}", "item": f"i{rng.randrange(6)}"}
        kind = rng.choice(["impression", "impression", "impression", "click", "purchase", "skip"])
        request = f"r{rng.randrange(12)}" if rng.random() < 0.5 else None
        events.append(event(kind, now_s, **pair, request=request))
    return events


def join_at_once(events: list[Event], config: JoinConfig) -> Counter:
    """The same by looking through the whole list for every event."""
    window_us, wait_us = int(config.attribution_h * 3_600e6), int(config.wait_s * 1e6)
    shown: list[dict] = []
    found: Counter = Counter()
    for n, e in enumerate(sorted(events, key=lambda e: e.ts_us)):
        alive = [s for s in shown if e.ts_us <= s["event"].ts_us + window_us]
        if e.kind == "impression":
            same = (e.user_id, e.item_id, e.request_id)
            if e.request_id is None or all(s["key"] != same for s in alive):
                shown.append({"key": same, "event": e, "rewards": [], "n": n})
            continue
        mine = [s for s in alive if s["key"][:2] == (e.user_id, e.item_id)]
        by_request = [s for s in mine if e.request_id is not None and s["key"][2] == e.request_id]
        if by_request or mine:
            max(by_request or mine, key=lambda s: s["event"].ts_us)["rewards"].append(e)
        else:
            found[(e.user_id, e.item_id, float(e.kind != "skip"), e.kind, e.ts_us, False, True)] += 1
    for s in shown:
        e, rewards = s["event"], s["rewards"]
        negative = not rewards or rewards[0].ts_us > e.ts_us + wait_us
        if negative:
            found[(e.user_id, e.item_id, 0.0, "impression", e.ts_us, False, False)] += 1
        chosen = False
        for r in rewards:
            is_choice = r.kind != "skip"
            correction = is_choice and negative and not chosen
            negative, chosen = negative or not is_choice, chosen or is_choice
            found[(e.user_id, e.item_id, float(is_choice), r.kind, e.ts_us, correction, False)] += 1
    return found


def as_counter(examples: list[Joined]) -> Counter:
    return Counter((e.user_id, e.item_id, e.label, e.kind, e.ts_us, e.correction, e.organic) for e in examples)


@pytest.mark.parametrize("seed", range(10))
def test_an_impression_teaches_at_most_one_negative_and_one_choice(seed):
    taught: dict[int, list[tuple[float, bool]]] = {}
    for example in join(*random_stream(seed)):
        if not (example.organic or example.repeated):
            taught.setdefault(example.seq, []).append((example.label, example.correction))
    assert len(taught) > 100
    assert {tuple(labels) for labels in taught.values()} <= {
        ((0.0, False),),
        ((1.0, False),),
        ((0.0, False), (1.0, True)),
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_restored_join_goes_on_as_if_it_had_never_stopped(seed):
    events = [LoggedEvent(n, e, 0) for n, e in enumerate(random_stream(seed), 1)]
    whole, first = Join(CONFIG), Join(CONFIG)
    cut = random.Random(seed).randrange(len(events))
    assert whole.add(events[:cut]) == first.add(events[:cut])
    expected = whole.add(events[cut:]) + whole.flush()
    restored = Join.restored(CONFIG, first.state())
    assert sorted(map(repr, restored.add(events[cut:]) + restored.flush())) == sorted(map(repr, expected))


@pytest.mark.parametrize("seed", range(20))
def test_in_any_chunks_it_is_what_joining_at_once_gives(seed):
    events = random_stream(seed)
    rng, stream, found = random.Random(seed), Join(CONFIG), []
    numbered = [LoggedEvent(n, e, 0) for n, e in enumerate(events, 1)]
    while numbered:
        size = rng.randrange(1, 30)
        found += stream.add(numbered[:size])
        numbered = numbered[size:]
    assert as_counter(found + stream.flush()) == join_at_once(events, CONFIG)


@pytest.mark.parametrize("seed", range(10))
def test_any_order_within_the_lateness_gives_the_same(seed):
    events = random_stream(seed)
    rng = random.Random(seed)
    shuffled = sorted(events, key=lambda e: e.ts_us + rng.uniform(0, CONFIG.lateness_s * 1e6 - 1))
    assert as_counter(join(*shuffled)) == as_counter(join(*events))


def test_it_forgets_what_is_past():
    stream = Join(CONFIG)
    for n in range(2_000):
        stream.add([LoggedEvent(n + 1, event("impression", 60.0 * n, request=f"r{n}"), 0)])
    assert len(stream._shown) < 70
    assert len(stream._due) < 140
    assert sum(len(keys) for of_item in stream._of_user.values() for keys in of_item.values()) == len(stream._shown)


def test_a_hundred_thousand_events_take_seconds_at_most():
    events = [LoggedEvent(n, e, 0) for n, e in enumerate(random_stream(0, 20_000), 1)]
    began_s = time.perf_counter()
    stream = Join(JoinConfig())
    stream.add(events)
    assert time.perf_counter() - began_s < 4.0


def test_a_log_becomes_a_parquet_file(tmp_path):
    with EventLog(tmp_path / "events.sqlite") as log:
        log.append([event("impression", 1, position=0), event("click", 2), event("impression", 3, item="j")])
        told = write_joined(log, tmp_path / "joined.parquet", CONFIG)
    table = pq.read_table(tmp_path / "joined.parquet")
    assert table["label"].to_pylist() == [1.0, 0.0]
    assert (told["events"], told["examples"], told["late"]) == (3, 2, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"wait_s": 1e9}, "join.wait_s=1000000000.0: must be from 0"), ({"max_open": 0}, "max_open at least 1")],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        JoinConfig(**settings)
