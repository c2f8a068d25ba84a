"""What was shown teaches what of it is chosen and nothing else, each impression once, after whatever restart."""

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
from training.models.seen import seen_correction, seen_features
from training.models.served import ServedModel
from training.online.impressions import Fate, Impressions, ImpressionsConfig
from training.online.join import Join, JoinConfig, Joined
from training.online.learner import OnlineLearner
from training.online.predictions import ShownPairs
from training.online.undo import publish_without

JOIN = JoinConfig(attribution_h=1.0, wait_s=10.0, lateness_s=0.0)
QUICK = ("join.wait_s=10", "join.lateness_s=0", "join.attribution_h=1", "guard.enabled=false")


def example(**given) -> Joined:
    stated = {"user_id": "u", "item_id": "i1", "label": 0.0, "kind": "impression", "value": None, "ts_us": 0}
    stated |= {"delay_us": 0, "request_id": "r", "position": 0, "propensity": None, "version": None, "seq": 1}
    return Joined(**stated | given)


def build(**given) -> Impressions:
    return Impressions(ImpressionsConfig(**given), JOIN)


def pairs(count: int, dim: int = 4, seed: int = 0, logit: float = 0.0) -> ShownPairs:
    generator = torch.Generator().manual_seed(seed)
    user_KD, item_KD = (torch.randn(count, dim, generator=generator) for _ in range(2))
    return ShownPairs(user_KD, item_KD, torch.full((count,), logit))


class TestWeights:
    def test_what_is_unlikely_to_be_shown_weighs_more_up_to_a_bound(self):
        weights = build(max_inverse_propensity=10.0)._weights([example(propensity=p) for p in (1.0, 0.5, 0.001, None)])
        assert weights * (1 + 2 + 10 + 1) / 4 == pytest.approx([1.0, 2.0, 10.0, 1.0])

    def test_propensities_may_be_left_out(self):
        weights = build(max_inverse_propensity=1.0)._weights([example(propensity=p) for p in (1.0, 0.01)])
        assert weights.tolist() == [1.0, 1.0]

    def test_a_user_with_too_many_of_the_newest_weighs_less(self):
        impressions = build(newest=100, max_user_share=0.1)
        shown = [example(user_id="bot") for _ in range(40)] + [example(user_id=f"u{n}") for n in range(10)]
        weights = impressions._weights(shown)
        assert weights[:10].tolist() == [1.0] * 10
        assert weights[39] == pytest.approx(10 / 40)
        assert weights[40:].tolist() == [1.0] * 10

    def test_settings_out_of_range_are_refused(self):
        for given in (
            {"positions": 0},
            {"max_inverse_propensity": 0.5},
            {"max_user_share": 0.0},
            {"newest": 0},
            {"memory": 0},
            {"prior_precision": 0.0},
        ):
            with pytest.raises(ConfigError, match=next(iter(given))):
                ImpressionsConfig(**given)


class TestPosterior:
    CHANCES = (0.6, 0.3, 0.1, 0.03)

    def follow(self, impressions: Impressions, rounds: int, *, delayed: bool = False, size: int = 4) -> None:
        """Show four positions to everyone, whose clicks follow the chances of these positions alone."""
        rng = np.random.default_rng(0)
        for number in range(rounds):
            chosen = rng.random(4) < self.CHANCES
            shown = [
                example(user_id=f"u{number}", position=p, label=float(c and not delayed)) for p, c in enumerate(chosen)
            ]
            if delayed:
                shown += [replace(shown[p], label=1.0, correction=True) for p in np.flatnonzero(chosen)]
            impressions.learn(shown, pairs(len(shown), seed=number, logit=-3.0), lambda: 1.0)

    @pytest.mark.parametrize("delayed", [False, True])
    def test_a_position_explains_its_clicks_and_nothing_else_does(self, delayed):
        impressions = build()
        self.follow(impressions, 1_500, delayed=delayed)
        bias = impressions.posterior.mean_F[8:]
        assert 1 / (1 + np.exp(3.0 - bias[:4])) == pytest.approx(self.CHANCES, abs=0.05)
        assert bias[4:] == pytest.approx(0.0, abs=1e-9)
        assert impressions.weight.numpy() == pytest.approx(0.0, abs=0.15)

    def test_what_is_told_is_of_the_newest_and_calibrated(self):
        impressions = build(newest=1_000)
        self.follow(impressions, 1_000)
        assert impressions.told.examples == 4_000
        assert impressions.told.chosen == pytest.approx(np.mean(self.CHANCES), abs=0.05)
        assert impressions.told.predicted == pytest.approx(impressions.told.chosen, abs=0.05)
        entropy = -np.mean([p * np.log(p) + (1 - p) * np.log(1 - p) for p in self.CHANCES])
        assert impressions.told.log_loss == pytest.approx(entropy, abs=0.05)

    @pytest.mark.parametrize("delayed", [False, True])
    def test_one_pass_finds_the_weights_that_all_examples_at_once_have(self, delayed):
        rng, count = np.random.default_rng(1), 3_000
        given = pairs(count, logit=-2.0)
        planted = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 0.8, 0.0, -0.6])
        logit_K = seen_features(given.user_KD, given.item_KD) @ planted - 2.0
        chosen_K = rng.random(count) < torch.sigmoid(logit_K).numpy()
        impressions = build(prior_precision=1.0, memory=10**9)
        for first in range(0, count, 20):
            part = range(first, first + 20)
            shown = [example(position=0, user_id=f"u{k}", label=float(chosen_K[k] and not delayed)) for k in part]
            late = [k for k in part if chosen_K[k]] if delayed else []
            shown += [example(position=0, user_id=f"u{k}", label=1.0, correction=True) for k in late]
            at = [*part, *late]
            impressions.learn(shown, ShownPairs(*(tensor[at] for tensor in given)), lambda: 1.0)
        at_once = build(prior_precision=1.0, memory=10**9, max_user_share=1.0)
        at_once.learn([example(position=0, label=float(c)) for c in chosen_K], given, lambda: 1.0)
        assert impressions.weight.numpy() == pytest.approx(at_once.weight.numpy(), abs=0.2 if delayed else 0.05)
        assert impressions.weight.numpy() == pytest.approx(planted.numpy(), abs=0.25)

    def test_many_late_choices_after_many_negatives_do_not_overshoot(self):
        impressions = build()
        shown = [example(user_id=f"u{n}") for n in range(200)]
        impressions.learn(shown, pairs(200, logit=-12.0), lambda: 1.0)
        late = [replace(one, label=1.0, correction=True) for one in shown[:40]]
        impressions.learn(late, pairs(40, logit=-12.0), lambda: 1.0)
        assert -12.0 + impressions.posterior.mean_F[8] < 3.0  # 40 of 200 are -1.4; all are infinity

    def test_the_old_fades(self):
        impressions = build(memory=200, prior_precision=1.0)
        for turn in (1.0, -1.0):
            for number in range(300):
                given = pairs(10, seed=number)
                chosen = (turn * given.item_KD[:, 0] > 0).tolist()
                shown = [example(user_id=f"u{number}", label=float(c)) for c in chosen]
                impressions.learn(shown, given, lambda: 1.0)
            assert turn * impressions.weight[0] > 0.5

    def test_a_correction_that_misleads_is_forgotten(self, caplog):
        impressions = build(newest=200, prior_precision=1.0)

        def learn(rounds: range, turn: float) -> None:
            for number in rounds:
                given = pairs(10, seed=number)
                chosen = (turn * given.item_KD[:, 0] > 0).tolist()
                shown = [example(user_id=f"u{number}", label=float(c)) for c in chosen]
                impressions.learn(shown, given, lambda: 1.0)

        learn(range(100), 1.0)
        assert impressions.weight[0] > 1.0
        assert impressions.told.log_loss < impressions.told.plain_log_loss
        assert not caplog.records
        before = impressions.told.examples
        learn(range(100, 130), -1.0)
        assert "forgotten" in caplog.text
        assert impressions.told.examples < before

    def test_positions_beyond_the_last_share_it_and_none_has_its_own(self):
        assert build(positions=2)._positions([example(position=p) for p in (0, 1, 7, None)]).tolist() == [0, 1, 1, 2]


class Loop:
    """A learner whose users are shown slates of four; they choose half of the items."""

    def __init__(self, tiny, log: EventLog) -> None:
        self.tiny, self.log, self.registry = tiny, log, tiny.registry
        self.learner = self.open_learner()
        self.slates = 0
        first = ServedModel.load(self.registry, VersionRef(1))
        self.liked = {f"i{row}" for row in first.item_ID[:, 0].argsort()[15:].tolist()}

    def open_learner(self) -> OnlineLearner:
        return OnlineLearner(self.registry, self.log, self.tiny.recipe, self.tiny.home.cache, torch.device("cpu"))

    def show(self, count: int, *, users=("u0", "u1", "u2", "u3"), kind: str = "skip") -> None:
        """Log slates, one in twenty seconds, with a reply of that kind for each item that is liked."""
        events = []
        for number in range(self.slates, self.slates + count):
            rng, at_us = random.Random(number), 10_000_000_000 + number * 20_000_000
            of_slate = {"user_id": users[number % len(users)], "request_id": f"r{number}"}
            for position, item in enumerate(rng.sample(range(30), 4)):
                common = {**of_slate, "item_id": f"i{item}", "event_id": f"{number}-{position}"}
                events.append(Event(kind="impression", ts_us=at_us, position=position, propensity=0.5, **common))
                if f"i{item}" in self.liked:
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
    def test_what_of_the_seen_is_chosen_moves_nothing_that_everyone_shares(self, open_loop):
        loop = open_loop()
        before = ServedModel.load(loop.registry, VersionRef(1))
        loop.show(60)  # skips alone: nothing enters a history, so retrieval has nothing to learn
        loop.follow()
        after = ServedModel.load(loop.registry, loop.registry.current())
        for name, rows in before.state.rows.items():
            assert torch.equal(after.state.rows[name], rows), name
        for name, weight in before.state.dense.items():
            assert torch.equal(after.state.dense[name], weight), name
        assert before.state.seen is None
        assert after.state.seen.abs().sum() > 0
        told = loop.registry.manifest(loop.registry.current()).metrics["shown"]
        assert told["examples"] == 4 * 59
        assert told["chosen"] == 0.0
        assert told["predicted"] < 0.1

    def test_what_is_chosen_when_seen_is_predicted_better_and_better_and_served_first(self, open_loop, monkeypatch):
        loop = open_loop("impressions.prior_precision=1")
        gaps = []
        tell = Impressions._tell

        def note(self, logit_K, plain_K, label_K):
            if 0 < label_K.sum() < len(label_K):
                gaps.append(logit_K[label_K == 1].mean() - logit_K[label_K == 0].mean())
            tell(self, logit_K, plain_K, label_K)

        monkeypatch.setattr(Impressions, "_tell", note)
        loop.show(100, kind="share")
        loop.follow()
        assert np.mean(gaps[-20:]) > np.mean(gaps[:20]) + 0.5
        told = loop.registry.manifest(loop.registry.current()).metrics["shown"]
        assert told["chosen"] == pytest.approx(0.5, abs=0.06)
        assert told["predicted"] == pytest.approx(0.5, abs=0.15)
        served = ServedModel.load(loop.registry, loop.registry.current())
        user_D = served.user_vector("u0", loop.log.user_state("u0", 16).history)
        correction_I = seen_correction(served.state.seen, user_D, served.item_ID)
        assert torch.allclose(
            correction_I, seen_features(user_D.expand_as(served.item_ID), served.item_ID) @ served.state.seen
        )
        assert torch.allclose(
            served.order(user_D, served.item_ID), served.dense.order(user_D, served.item_ID) + correction_I
        )
        is_liked_I = torch.tensor([item_id in loop.liked for item_id in served.item_ids])
        assert (correction_I[is_liked_I].unsqueeze(1) > correction_I[~is_liked_I]).float().mean() > 0.9

    def test_it_may_be_switched_off(self, open_loop):
        loop = open_loop("impressions.enabled=false", "online.compact_every=2")
        loop.show(20)
        loop.follow()
        current = loop.registry.current()
        assert ServedModel.load(loop.registry, current).state.seen is None
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
        assert successor.impressions.told == loop.learner.impressions.told
        for name in ("mean_F", "precision_FF", "scale"):
            found = (getattr(learner.impressions.posterior, name) for learner in (successor, loop.learner))
            assert np.array_equal(*found), name
        loop.show(10, kind="share")
        loop.follow(successor)
        assert successor.impressions.told.examples == 4 * 39  # all but the last slate's, each once

    def test_after_a_rollback_nothing_is_made_of_what_was_open(self, open_loop):
        loop = open_loop()
        loop.show(30, kind="share")
        loop.follow()
        loop.registry.promote(VersionRef(1, 2), "test")
        assert loop.learner.publish() is None  # takes the pointer up
        assert open_events(loop.learner.impressions) == []
        before = loop.learner.impressions.told.examples
        loop.show(1)
        loop.follow()
        assert loop.learner.impressions.told.examples == before
        assert open_events(loop.open_learner().impressions) == open_events(loop.learner.impressions) != []

    def test_undoing_some_learning_keeps_the_posterior_of_the_rest(self, open_loop):
        loop = open_loop()
        loop.show(40, kind="share")
        loop.follow()
        newest = loop.learner.applied_seq
        publish_without(loop.registry, loop.log, [(newest - 8, newest)], [])
        successor = loop.open_learner()
        assert successor.applied_seq < newest - 8
        assert successor.impressions.posterior is not None
        assert np.abs(successor.impressions.posterior.mean_F[16:20]).min() > 1.0  # biases, not begun anew

    def test_ranges_left_out_are_forgotten_alike_by_who_restarts(self, open_loop):
        loop = open_loop("join.wait_s=3000")
        loop.show(40, kind="share")
        loop.follow()
        seq = loop.learner.applied_seq
        publish_without(loop.registry, loop.log, [(seq // 3, seq // 3 + 3), (2 * seq // 3, 2 * seq // 3 + 3)], [])
        live = loop.open_learner()
        loop.follow(live)
        restarted = loop.open_learner()
        assert live.applied_seq == restarted.applied_seq == seq
        assert open_events(restarted.impressions) == open_events(live.impressions) != []
        assert min(entry["seq"] for entry in open_events(live.impressions)) > 2 * seq // 3

    def test_what_was_held_and_released_is_joined_by_nobody(self, open_loop):
        lenient = ("intake.max_repeats=3", "intake.burst_events=1000", "intake.min_gap_variation=0")
        loop = open_loop("intake.enabled=true", *lenient)
        at_us = 10_000_000_000
        shown = {"user_id": "u0", "item_id": "i3", "request_id": "r"}
        loop.log.append([Event(kind="impression", ts_us=at_us, event_id="shown", **shown)])
        again = [Event(kind="share", ts_us=at_us + n * 700_000, event_id=f"s{n}", **shown) for n in range(1, 6)]
        loop.log.append(again)
        loop.follow()
        assert loop.learner.intake.holds_any_of("u0")
        held = loop.learner.intake.quarantine.find(states=["held"])
        loop.learner.intake.quarantine.release(entry.seq for entry in held)
        loop.learner.publish()
        for learner in (loop.learner, loop.open_learner()):
            assert not learner.intake.holds_any_of("u0")
            assert open_events(learner.impressions) == []

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
        known = loop.learner.impressions.told.examples
        loop.show(20, users=("bot", "u1"), kind="share")
        loop.follow()
        assert loop.learner.impressions.told.examples - known == pytest.approx(40, abs=4)  # u1's ten slates

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
    assert [(e.item_id, e.label) for e in impressions.add(logged, lambda _: Fate.JOINED)] == [("i1", 1.0)]
    assert len(Join(JOIN).add(logged)) == 3
