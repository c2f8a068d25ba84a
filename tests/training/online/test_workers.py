"""Several workers learn one version: what one would learn, each holding a part, none of them needed to read it again.

The equality that holds, with nothing drawn at random but the negatives, which the leader draws for all: every table
row, accumulator and moment is that of a single worker up to the order of sums.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.events import Event
from cluster.log import EventLog, Interaction
from cluster.manifest import VersionRef
from embeddings.batch import PAD, build_batch
from training.models.version import ITEM_ROWS, USER_ROWS, VersionState, read_version
from training.online.learner import OnlineLearner
from training.online.model import LiveModel
from training.online.sequences import LiveHistory, build_live_sequences
from training.online.workers import worker_of
from training.step import StepConfig

pytestmark = pytest.mark.timeout(300)  # each group's processes start anew
STEP = StepConfig(learning_rate=0.01, weight_decay=0.0, clip_norm=0.1, rate_strength=0.1)
NOTHING_AT_RANDOM = ("model.dropout=0.0", "model.user_row_dropout=0.0", "online.ranked_positions=1000")
ALONE, FEWER, MORE = 1, 2, 3


@pytest.fixture
def state(build_home) -> VersionState:
    """A version as if trained, of which every part has a say; users u0 … u5 are in the first worker's half."""
    state = read_version(build_home(*NOTHING_AT_RANDOM).registry, VersionRef(1), with_optimizer=True)
    generator = torch.Generator().manual_seed(5)

    def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(like.shape, generator=generator)

    dense = {name: value + noise(value, 0.1) for name, value in state.dense.items()}
    momentum = {name: torch.rand(len(state.rows[name.split(".")[0]]), generator=generator) for name in MOMENTUMS}
    return replace(
        state,
        rows={**state.rows, USER_ROWS: noise(state.rows[USER_ROWS], 0.3)},
        dense=dense,
        optimizer={**state.optimizer, **momentum},
    )


MOMENTUMS = ("item.momentum", "user.momentum")


def take_up(state: VersionState, workers, ranked_positions: int = 1_000) -> LiveModel:
    cpu = torch.device("cpu")
    return LiveModel(state, STEP, 1.0, cpu, 0, ranked_positions=ranked_positions, workers=workers)


def interactions_of(live: LiveModel, *users: tuple[str, str], first_new_seq: int = 3):
    """Sequences of users' interactions, each an item and the kind of feedback: `3c` is a click on i3."""
    histories = [
        LiveHistory(
            live.users.row(user_id),
            [
                Interaction(f"i{one[:-1]}", "rating" if one[-1] == "r" else "click", 4.0, 60_000_000 * seq, seq)
                for seq, one in enumerate(done.split(), 1)
            ],
            first_new_seq,
        )
        for user_id, done in users
    ]
    return build_live_sequences(histories, live.items, {3: 0.5})


# Of two workers u0 and u2 are the first one's; of three, none is the second one's.
UNEVEN = (("u0", "1c 2c 3c 4r 20c 21c"), ("u4", "29c 5c 6c"), ("u2", "7c 8r 9r"), ("nobody", "1c 15c 25r 2c"))


def learn(live: LiveModel, *users: tuple[str, str], negatives=range(4, 30, 3)) -> None:
    sequences = interactions_of(live, *users)
    live.learn_users(sequences, 0.3)
    log_q = np.log(np.linspace(1, 3, len(live.items), dtype=np.float32) / 60)
    targets = (sequences.target_row_BL != PAD).sum()
    live.learn(build_batch(sequences, np.array(list(negatives)), live.text, log_q), loss_scale=float(targets) / 8)


def assert_same_up_to_rounding(found, expected) -> None:
    """Adam's averages are linear and square in the gradient; the dense weights divide by it and show its rounding."""
    for some, others, bound in zip(found, expected, (1e-5, STEP.learning_rate / 20, 1e-6), strict=True):
        assert set(some) == set(others)
        for name, tensor in others.items():
            torch.testing.assert_close(
                some[name], tensor, rtol=1e-4, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("count", [FEWER, MORE])
def test_steps_of_several_workers_are_those_of_one(together, state, count):
    learned = {}
    for workers_count in (ALONE, count):
        with together(workers_count) as workers:
            live = take_up(state, workers)
            before = live.tensors()
            for users in (UNEVEN, UNEVEN[:1], UNEVEN[1:3]):  # of one user alone, the others have nothing to learn
                learn(live, *users)
            learned[workers_count] = live.tensors(), live.change()
    (one, one_change), (several, several_change) = learned[ALONE], learned[count]
    assert_same_up_to_rounding(several, one)
    assert not torch.allclose(one[0][ITEM_ROWS], before[0][ITEM_ROWS], atol=1e-3)
    for name, (index, rows) in one_change.rows.items():
        assert torch.equal(several_change.rows[name][0], index)
        torch.testing.assert_close(several_change.rows[name][1].value, rows.value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [FEWER, MORE])
def test_several_workers_predict_what_one_predicts(together, state, count):
    said = {}
    for workers_count in (ALONE, count):
        with together(workers_count) as workers:
            live = take_up(state, workers)
            live.describe("new", "just in", np.full(live.text.shape[1], 0.05, np.float32))
            sequences = interactions_of(live, *UNEVEN)
            pairs = live.predict_shown(sequences, np.array([0, 0, 2, 3]), np.array([1, 30, 17, 29]))
            said[workers_count] = live.predict(sequences), live.predict_base(sequences), pairs, live.item_scale()
    one, several = said[ALONE], said[count]
    for found, expected in zip(several[:2], one[:2], strict=True):
        assert found.rank_P.tolist() == expected.rank_P.tolist()
        np.testing.assert_allclose(found.loss_P, expected.loss_P, rtol=1e-5)
        np.testing.assert_allclose(found.confidence_P, expected.confidence_P, rtol=1e-5)
    for found, expected in zip(several[2], one[2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert several[3] == pytest.approx(one[3], rel=1e-6)


def test_every_worker_holds_its_rows_and_a_version_comes_back_bit_for_bit(together, state):
    with together(MORE) as workers:
        live = take_up(state, workers)
        assert {name: len(piece.values) for name, piece in live.part.pieces.items()} == {
            "item": 13,  # of 30 + 8
            "item.momentum": 13,
            "user": 5,  # of 6 + 8
            "user.momentum": 5,
        }
        rows, dense, optimizer = live.tensors()
    assert all(torch.equal(rows[name], state.rows[name]) for name in rows)
    assert all(torch.equal(dense[name], state.dense[name]) for name in dense)
    assert all(torch.equal(optimizer[name], state.optimizer[name]) for name in state.optimizer)


def test_the_row_that_learned_least_is_found_and_cleared_wherever_it_is(together, state):
    full = replace(
        state, user_ids=[f"u{row}" for row in range(14)], rows=dict(state.rows), optimizer=dict(state.optimizer)
    )
    full.rows[USER_ROWS] = torch.ones(14, 8)
    full.optimizer["user.momentum"] = torch.tensor(
        [3.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.5, 9.0, 9.0, 1.0, 9.0]
    )
    spare = state.recipe
    with together(FEWER) as workers:
        live = take_up(replace(full, recipe=spare), workers)
        for number in range(8):
            live.count("i1", f"spare {number}")
        for newcomer in ("first", "second", "third"):
            live.count("i1", newcomer)
        assert [live.users.row(name) for name in ("first", "second", "third")] == [9, 12, 1]
        rows, _, optimizer = live.tensors()
    cleared = (rows[USER_ROWS] == 0).all(1).nonzero().flatten().tolist()
    assert cleared == [1, 9, 12, *range(14, 22)]
    assert optimizer["user.momentum"][[1, 9, 12]].tolist() == [0.0, 0.0, 0.0]


def learn_log(tiny, workers, events) -> OnlineLearner:
    with EventLog(tiny.home.log) as log:
        log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
        device = torch.device("cpu")
        learner = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, device, workers)
        log.append(events)
        while fresh := learner.read():
            learner.learn(fresh)
            learner.publish()
        return learner


def test_a_log_learned_by_two_workers_is_the_one_learned_by_one(build_home, together):
    settings = ("online.delta_rows=int8", "tables.spare_rows=2", "online.compact_every=5", "online.step_events=5")
    learned = {}
    for count in (ALONE, FEWER):
        tiny = build_home(*NOTHING_AT_RANDOM, *settings, name=f"home-{count}")
        events = tiny.live_events(70)
        events[20:20] = [
            Event(user_id=f"newcomer {n % 4}", item_id=f"i{n}", kind="rating", value=3.5, ts_us=10**12 + n)
            for n in range(12)
        ]
        with together(count) as workers:
            learner = learn_log(tiny, workers, events)
            learned[count] = learner.live.tensors(), learner.guard.metrics(), tiny
            assert {m.metrics["workers"] for m in tiny.registry.versions() if m.ref.version > 1} == {count}
        with together(MORE - count + 1) as workers:  # and another number of workers goes on from it
            again = learn_log(tiny, workers, [])
            for found, expected in zip(again.live.tensors(), learned[count][0], strict=True):
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same_up_to_rounding(learned[FEWER][0], learned[ALONE][0])
    assert learned[FEWER][1]["events"] == learned[ALONE][1]["events"]
    ranges = [
        [
            (m.first_seq, m.last_seq, m.metrics["events"])
            for v in tiny.registry.versions()
            for m in tiny.registry.deltas(v.ref.version)
        ]
        for _, _, tiny in learned.values()
    ]
    assert ranges[0] == ranges[1]


def test_a_user_is_always_the_same_workers_and_workers_have_about_as_many():
    users = [f"user {n}" for n in range(3_000)]
    shares = np.bincount([worker_of(user, 3) for user in users])
    assert [worker_of(user, 3) for user in ("user 0", "user 1", "Käufer 7")] == [0, 1, 1]
    assert shares.min() > 900
