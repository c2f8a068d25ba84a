import os

import pytest

from benchmarks.segments import Run, Segment, Segments, time_steps
from cluster.errors import EngineError


def build_counter(rank: int, *, examples: int) -> Run:
    """A worker whose steps have `examples` examples, and whose loss is how many steps it ran in all."""
    steps_done = 0

    def step() -> tuple[int, float]:
        nonlocal steps_done
        steps_done += 1
        return examples * (rank + 1), float(steps_done)

    return lambda steps: time_steps(step, steps)


def build_mortal(rank: int) -> Run:
    def run(steps: int) -> Segment:
        if rank == 1:
            os._exit(3)
        return time_steps(lambda: (1, 0.0), steps)

    return run


def build_reader(rank: int) -> Run:
    """A worker whose examples a step are the number that its environment names."""
    examples = int(os.environ["EXAMPLES_A_STEP"])
    return lambda steps: time_steps(lambda: (examples, 0.0), steps)


def build_nothing(rank: int) -> Run:
    raise SystemExit(4)


def test_processes_keep_their_state_between_segments_and_add_up_their_examples() -> None:
    with Segments(build_counter, workers=2, examples=10) as counters:
        assert len(set(counters.pids())) == 2
        first, second = counters.measure(3), counters.measure(2)
    assert (first.examples, second.examples) == (3 * 10 + 3 * 20, 2 * 10 + 2 * 20)
    assert (first.loss, second.loss) == (3.0, 5.0)
    assert len(second.step_ms) == 2
    assert first.examples_s == first.examples / first.seconds


def test_a_process_that_ends_is_an_error_and_the_others_are_ended() -> None:
    with Segments(build_mortal, workers=2) as mortals:
        pids = mortals.pids()
        with pytest.raises(EngineError, match="process 1 ended"):
            mortals.measure(1)
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []


def test_a_process_that_cannot_be_built_is_an_error() -> None:
    with pytest.raises(EngineError, match="process 0 ended"):
        Segments(build_nothing)


def test_an_environment_is_the_processes_alone() -> None:
    with Segments(build_reader, environment={"EXAMPLES_A_STEP": "7"}) as readers:
        assert "EXAMPLES_A_STEP" not in os.environ
        assert readers.measure(2).examples == 14
