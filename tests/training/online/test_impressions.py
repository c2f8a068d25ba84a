"""What was shown teaches the click head and nothing else, each impression once, after whatever restart."""

import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from cluster.events import Event
from cluster.log import EventLog, LoggedEvent
from cluster.manifest import VersionRef
from embeddings.vocabulary import Vocabulary
from training.models.served import ServedModel
from training.online.impressions import Impressions, ImpressionsConfig
from training.online.join import Join, JoinConfig, Joined
from training.online.learner import OnlineLearner

JOIN = JoinConfig(attribution_h=1.0, wait_s=10.0, lateness_s=0.0)
ITEMS = Vocabulary([f"i{row}" for row in range(30)], 30)
QUICK = ("join.wait_s=10", "join.lateness_s=0", "join.attribution_h=1", "online.learning_rate=0.002")


def example(**given) -> Joined:
    stated = {"user_id": "u", "item_id": "i1", "label": 0.0, "kind": "impression", "value": None, "ts_us": 0}
    stated |= {"delay_us": 0, "request_id": "r", "position": 0, "propensity": None, "version": None, "seq": 1}
    return Joined(**stated | given)


def build(**given) -> Impressions:
    return Impressions(ImpressionsConfig(**given), JOIN)


class TestWeights:
    def test_what_is_unlikely_to_be_shown_weighs_more_up_to_a_bound(self):
        shown = build(max_inverse_propensity=10.0).lay_out(
            [[example(propensity=p) for p in (1.0, 0.5, 0.001)], [example(user_id="v")]], ITEMS
        )
        assert shown.sequence_K.tolist() == [0, 0, 0, 1]
        assert shown.weight_K * (1 + 2 + 10 + 1) / 4 == pytest.approx([1.0, 2.0, 10.0, 1.0])

    def test_propensities_may_be_left_out(self):
        shown = build(max_inverse_propensity=1.0).lay_out([[example(propensity=p) for p in (1.0, 0.01)]], ITEMS)
        assert shown.weight_K.tolist() == [1.0, 1.0]

    def test_a_user_with_too_many_of_the_newest_weighs_less(self):
        impressions = build(newest=100, max_user_share=0.1)
        slates = [[example(user_id="bot") for _ in range(40)], *([example(user_id=f"u{n}")] for n in range(10))]
        weight_K = impressions.lay_out(slates, ITEMS).weight_K
        assert weight_K[:10].tolist() == [1.0] * 10
        assert weight_K[39] == pytest.approx(10 / 40)
        assert weight_K[40:].tolist() == [1.0] * 10

    def test_a_correction_takes_the_negative_back(self):
        shown = build().lay_out([[example(label=1.0, kind="click", correction=True), example()]], ITEMS)
        assert (shown.label_K.tolist(), shown.counted_K.tolist()) == ([1.0, 0.0], [0.0, 1.0])

    def test_settings_out_of_range_are_refused(self):
        for given in ({"positions": 0}, {"max_inverse_propensity": 0.5}, {"max_user_share": 0.0}, {"newest": 0}):
            with pytest.raises(ConfigError, match=next(iter(given))):
                ImpressionsConfig(**given)


class TestBias:
    CHANCES = (0.6, 0.3, 0.1, 0.03)

    def follow(self, impressions: Impressions, rounds: int, *, delayed: bool = False) -> None:
        """Show four positions to everyone, whose clicks follow the chances of these positions alone."""
        rng = np.random.default_rng(0)
        for number in range(rounds):
            chosen = rng.random(4) < self.CHANCES
            shown = [
                example(user_id=f"u{number}", position=p, label=float(c and not delayed)) for p, c in enumerate(chosen)
            ]
            if delayed:
                shown += [replace(shown[p], label=1.0, correction=True) for p in np.flatnonzero(chosen)]
            impressions.record([shown], impressions.lay_out([shown], ITEMS), np.zeros(len(shown)))

    @pytest.mark.parametrize("delayed", [False, True])
    def test_a_position_explains_its_clicks(self, delayed):
        impressions = build()
        self.follow(impressions, 4_000, delayed=delayed)
        found = 1 / (1 + np.exp(-np.array(impressions.running.bias[:4])))
        assert found == pytest.approx(self.CHANCES, abs=0.05)
        assert impressions.running.bias[4:] == [0.0] * 47

    def test_what_is_told_is_of_the_newest(self):
        impressions = build(newest=1_000)
        self.follow(impressions, 2_000)
        assert impressions.running.examples == 8_000
        assert impressions.running.chosen == pytest.approx(np.mean(self.CHANCES), abs=0.05)
        assert impressions.running.predicted == pytest.approx(impressions.running.chosen, abs=0.05)
        entropy = -np.mean([p * np.log(p) + (1 - p) * np.log(1 - p) for p in self.CHANCES])
        assert impressions.running.log_loss == pytest.approx(entropy, abs=0.05)

    def test_positions_beyond_the_last_share_it_and_none_has_its_own(self):
        impressions = build(positions=2)
        impressions.running.bias[:] = [1.0, 2.0, 3.0]
        shown = impressions.lay_out([[example(position=p) for p in (0, 1, 7, None)]], ITEMS)
        assert shown.shift_K.tolist() == [1.0, 2.0, 2.0, 3.0]


class Loop:
    """A learner whose users are shown slates of four; they choose what has an even number."""

    def __init__(self, tiny, log: EventLog) -> None:
        self.tiny, self.log, self.registry = tiny, log, tiny.registry
        self.learner = self.open_learner()
        self.slates = 0

    def open_learner(self) -> OnlineLearner:
        return OnlineLearner(self.registry, self.log, self.tiny.recipe, self.tiny.home.cache, torch.device("cpu"))

    def show(self, count: int, *, users=("u0", "u1", "u2", "u3"), kind: str = "skip") -> None:
        """Log slates, one in twenty seconds, with a skip for each item that has an even number."""
        events = []
        for number in range(self.slates, self.slates + count):
            rng, at_us = random.Random(number), 10_000_000_000 + number * 20_000_000
            of_slate = {"user_id": users[number % len(users)], "request_id": f"r{number}"}
            for position, item in enumerate(rng.sample(range(30), 4)):
                common = {**of_slate, "item_id": f"i{item}", "event_id": f"{number}-{position}"}
                events.append(Event(kind="impression", ts_us=at_us, position=position, propensity=0.5, **common))
                if item % 2 == 0:
                    reply = {**common, "event_id": f"{number}-{position}-{kind}", "kind": kind}
                    events.append(Event(ts_us=at_us + 1_000_000, value=None, **reply))
        self.slates += count
        self.log.append(events)

    def follow(self, learner: OnlineLearner | None = None) -> None:
        learner = learner or self.learner
        while fresh := learner.read():
            learner.learn(fresh)
            learner.publish()


@pytest.fixture
def open_loop(build_home):
    with contextlib.ExitStack() as stack:

        def open_one(*overrides: str) -> Loop:
            tiny = build_home(*QUICK, *overrides)
            log = stack.enter_context(EventLog(tiny.home.log))
            log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
            return Loop(tiny, log)

        yield open_one


def open_events(impressions: Impressions) -> list[dict]:
    return impressions._join.state().to_pylist()


@pytest.mark.usefixtures("process_group")
class TestLearning:
    def test_the_click_head_learns_what_of_the_seen_is_chosen_and_nothing_else_moves(self, open_loop):
        loop = open_loop()
        before = ServedModel.load(loop.registry, VersionRef(1))
        loop.show(300)  # skips alone: nothing enters a history, so retrieval has nothing to learn
        loop.follow()
        after = ServedModel.load(loop.registry, loop.registry.current())
        for name, rows in before.state.rows.items():
            assert torch.equal(after.state.rows[name], rows), name
        moved = {
            name.split(".")[0]
            for name, t in before.dense.state_dict().items()
            if not torch.equal(t, after.dense.state_dict()[name])
        }
        assert moved == {"ranker"}
        told = loop.registry.manifest(loop.registry.current()).metrics["shown"]
        assert told["examples"] >= 1_190
        assert told["chosen"] == 0.0
        assert told["predicted"] < 0.1

    def test_what_is_chosen_when_seen_is_predicted_better_and_better(self, open_loop, monkeypatch):
        loop = open_loop("guard.enabled=false")
        gaps = []
        record = Impressions.record

        def note(self, slates, shown, logit_K):
            if 0 < shown.label_K.mean() < 1:
                gaps.append(logit_K[shown.label_K == 1].mean() - logit_K[shown.label_K == 0].mean())
            record(self, slates, shown, logit_K)

        monkeypatch.setattr(Impressions, "record", note)
        loop.show(300, kind="share")
        loop.follow()
        assert np.mean(gaps[-30:]) > np.mean(gaps[:30]) + 0.3
        told = loop.registry.manifest(loop.registry.current()).metrics["shown"]
        assert told["chosen"] == pytest.approx(0.5, abs=0.05)
        assert 0.3 < told["predicted"] < 0.6  # on average since the start, from 1 in 30

    def test_it_may_be_switched_off(self, open_loop):
        loop = open_loop("impressions.enabled=false", "online.compact_every=2")
        loop.show(20)
        loop.follow()
        current = loop.registry.current()
        assert "shown" not in loop.registry.manifest(current).metrics
        assert "shown.parquet" not in loop.registry.open_version(current.version).manifest.files

    def test_whoever_comes_next_has_the_same_open_impressions_and_biases(self, open_loop):
        loop = open_loop("online.compact_every=7")
        loop.show(30, kind="share")
        loop.follow()
        assert loop.registry.current().version >= 2
        assert loop.registry.current().delta > 0
        successor = loop.open_learner()
        assert open_events(successor.impressions) == open_events(loop.learner.impressions) != []
        assert successor.impressions.running == loop.learner.impressions.running
        loop.show(10, kind="share")
        loop.follow(successor)
        assert successor.impressions.running.examples == 4 * 39  # all but the last slate's, each once

    def test_after_a_rollback_nothing_is_made_of_what_was_open(self, open_loop):
        loop = open_loop()
        loop.show(30, kind="share")
        loop.follow()
        loop.registry.promote(VersionRef(1, 2), "test")
        assert loop.learner.publish() is None  # takes the pointer up
        assert open_events(loop.learner.impressions) == []
        before = loop.learner.impressions.running.examples
        loop.show(1)
        loop.follow()
        assert loop.learner.impressions.running.examples == before
        assert open_events(loop.open_learner().impressions) == open_events(loop.learner.impressions) != []

    def test_users_under_suspicion_teach_nothing(self, open_loop):
        lenient = ("intake.max_repeats=8", "intake.burst_events=1000", "intake.min_gap_variation=0")
        loop = open_loop("intake.enabled=true", *lenient)
        loop.show(20, users=("bot", "u1"), kind="share")
        repeats = [
            Event(user_id="bot", item_id="i3", kind="share", ts_us=10_400_000_000 + n, event_id=f"again-{n}")
            for n in range(12)
        ]
        loop.log.append(repeats)
        loop.follow()
        assert loop.learner.intake.holds_any_of("bot")
        assert not loop.learner.intake.holds_any_of("u1")
        known = loop.learner.impressions.running.examples
        loop.show(20, users=("bot", "u1"), kind="share")
        loop.follow()
        assert loop.learner.impressions.running.examples - known == pytest.approx(40, abs=4)  # u1's ten slates

    def test_a_slate_is_predicted_from_the_history_of_its_own_time(self, open_loop, monkeypatch):
        loop = open_loop()
        seen = []
        slates_of = OnlineLearner._slates

        def note(self, joined):
            found = slates_of(self, joined)
            seen.extend(found)
            return found

        monkeypatch.setattr(OnlineLearner, "_slates", note)
        loop.show(12, users=("u0",), kind="share")
        loop.follow()
        assert len(seen) == 12 - 1
        for slate in seen:
            first_seq = min(e.seq for e in slate.examples)
            assert all(entry.seq < first_seq for entry in slate.history.interactions)
        lengths = [len({entry.seq for entry in slate.history.interactions}) for slate in seen]
        assert lengths == sorted(lengths)
        assert lengths[-1] > lengths[0]


def test_what_the_join_makes_of_nothing_shown_or_said_again_teaches_nothing():
    impressions = Impressions(ImpressionsConfig(), JOIN)
    events = [
        Event(user_id="u", item_id="i1", kind="impression", ts_us=0, request_id="r"),
        Event(user_id="u", item_id="i1", kind="click", ts_us=1, request_id="r"),
        Event(user_id="u", item_id="i1", kind="purchase", ts_us=2, request_id="r"),
        Event(user_id="u", item_id="i2", kind="click", ts_us=3, request_id="r"),
        Event(user_id="u", item_id="i9", kind="click", ts_us=60_000_000, request_id="s"),
    ]
    logged = [LoggedEvent(seq, event, 0) for seq, event in enumerate(events, 1)]
    assert [(e.item_id, e.label) for e in impressions.add(logged)] == [("i1", 1.0)]
    assert len(Join(JOIN).add(logged)) == 3
