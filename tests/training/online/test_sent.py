"""What replicas have follows what is learned, however little of it is sent at a time."""

import contextlib

import pytest
import torch

from cluster.log import EventLog
from training.models.served import ServedModel
from training.models.version import read_version
from training.online.learner import OnlineLearner
from training.online.sent import SentRows


def send(sent: SentRows, trained: torch.Tensor, touched: set[int], replica: torch.Tensor) -> list[int]:
    index, rows = sent.choose("item", trained.__getitem__, touched, set())
    replica[index] = rows.applied_to(replica[index])
    sent.note({"item": (index, rows)})
    return index.tolist()


def test_small_steps_that_are_each_below_the_threshold_are_sent_once_they_add_up():
    trained, replica = torch.ones(3, 4), torch.ones(3, 4)
    sent = SentRows("float32", 0.1)
    sent.start({"item": (replica, trained)})
    found = []
    for _ in range(7):
        trained[1] *= 1.04
        found.append(send(sent, trained, {1}, replica))
    assert found == [[], [], [1], [], [], [1], []]  # 1.04³ = 1.12 is the first beyond a tenth
    assert send(sent, trained * 2, set(), replica) == [1]  # kept back, so it is looked at untouched


@pytest.mark.parametrize("row_format", ["float16", "int8"])
def test_rounding_does_not_add_up_over_many_deltas(row_format):
    generator = torch.Generator().manual_seed(0)
    trained = torch.randn(50, 16, generator=generator)
    replica = trained.clone()
    sent = SentRows(row_format, 0.0)
    sent.start({"item": (replica, trained)})
    for _ in range(200):
        trained += 0.001 * torch.randn(50, 16, generator=generator)
        send(sent, trained, set(range(50)), replica)
    step = trained.abs().amax(1) / (100_000 if row_format == "int8" else 1_000)  # int8 rounds the change alone
    assert ((replica - trained).abs().amax(1) <= step).all()


def test_a_row_that_rounds_to_what_replicas_have_is_not_sent():
    trained = torch.tensor([[128.0, 3.0], [128.0, 3.0]])
    replica = trained.clone()
    sent = SentRows("float16", 0.0)
    sent.start({"item": (replica, trained)})
    trained[0, 0], trained[1, 0] = 128.01, 128.2  # float16 has eighths there
    assert send(sent, trained, {0, 1}, replica) == [1]
    assert replica.tolist() == [[128.0, 3.0], [128.25, 3.0]]


def test_rows_named_are_sent_though_nothing_changed():
    trained = torch.zeros(3, 2)
    sent = SentRows("int8", 0.0)
    sent.start({"item": (trained, trained)})
    assert sent.choose("item", trained.__getitem__, {0, 2}, {2})[0].tolist() == [2]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("settings", [("int8", 0.0), ("float16", 0.02), ("float32", 0.05)])
def test_a_trainer_goes_on_from_its_own_rows_and_replicas_from_the_rounded_ones(build_home, settings):
    row_format, threshold = settings
    tiny = build_home(f"online.delta_rows={row_format}", f"online.delta_threshold={threshold}")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(EventLog(tiny.home.log))
        log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
        learner = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))
        served = ServedModel.load(tiny.registry, tiny.registry.current())
        log.append(tiny.live_events(96))
        while fresh := learner.read():
            learner.learn(fresh)
            ref = learner.publish()
            assert ref is not None
            served = served.with_delta(tiny.registry.open_delta(ref.version, ref.delta))
        successor = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))
    for one, other in zip(successor.live.tensors(), learner.live.tensors(), strict=True):
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor), name
    trained, held = learner.live.tensors()[0], served.state.rows
    replica = read_version(tiny.registry, tiny.registry.current()).rows
    for name in ("item", "user"):
        assert torch.equal(held[name], replica[name])
        apart = (held[name] - trained[name]).norm(dim=1)
        rounding = trained[name].abs().amax(1) * 8**0.5 / {"int8": 254, "float16": 1_000, "float32": 1e9}[row_format]
        assert (apart <= threshold * trained[name].norm(dim=1) * 1.1 + rounding * 1.1 + 1e-7).all(), name
        assert torch.equal(successor.live._sent._held[name][: len(held[name])], held[name])
    assert not torch.equal(held["item"], trained["item"])
    assert torch.equal(held["count"], trained["count"])
