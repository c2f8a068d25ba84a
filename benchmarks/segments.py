"""Keep processes at hand that run some steps when asked and say how long they took.

In:  a function that builds a worker's state and returns `run(steps) -> Segment`; how many processes run it together.
Out: `Segments.measure(steps)`: the examples and seconds of that segment over all processes.
Knows nothing of models. Between segments the processes block on a pipe and use no core, so that several such groups
can be measured in turns within one run.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from benchmarks.harness import percentiles
from cluster.errors import EngineError

START_TIMEOUT_S = 600.0
SEGMENT_TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Segment:
    """What one segment took."""

    examples: int
    """Of all processes."""
    seconds: float
    """Of the slowest process."""
    step_ms: tuple[float, ...]
    """Each step of the first process."""
    loss: float
    """Mean over the first process's last step: shows that it learned."""

    @property
    def examples_s(self) -> float:
        """Examples a second."""
        return self.examples / self.seconds

    def summary(self) -> dict[str, Any]:
        """Return throughput with the percentiles of a step's time."""
        return {"examples_s": self.examples_s, "step_ms": percentiles(self.step_ms), "loss": self.loss}


Run = Callable[[int], Segment]
Build = Callable[..., Run]


def time_steps(step: Callable[[], tuple[int, float]], steps: int) -> Segment:
    """Run a step, which returns its examples and its loss, some times in this process."""
    examples, loss, step_ms = 0, float("nan"), []
    begun_s = last_s = time.perf_counter()
    for _ in range(steps):
        count, loss = step()
        examples += count
        now_s = time.perf_counter()
        step_ms.append(1e3 * (now_s - last_s))
        last_s = now_s
    return Segment(examples, last_s - begun_s, tuple(step_ms), loss)


class Segments:
    """Processes that each called `build(rank, **arguments)` once and run segments together; close them with `with`.

    `environment` is added to theirs: some libraries read it when they load, before `build` is called.
    """

    def __init__(
        self,
        build: Build,
        *,
        workers: int = 1,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,  # noqa: ANN401 - build's own
    ) -> None:
        context = get_context("spawn")  # never fork: threads of torch and Ray
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, build, rank, arguments))
            with _added(environment or {}):
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._gather(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, steps: int) -> Segment:
        """Run `steps` steps in every process, all at once. Raises `EngineError` when one ended."""
        for pipe in self._pipes:
            pipe.send(steps)
        segments: list[Segment] = self._gather(SEGMENT_TIMEOUT_S)
        examples, seconds = sum(s.examples for s in segments), max(s.seconds for s in segments)
        return Segment(examples, seconds, segments[0].step_ms, segments[0].loss)

    def pids(self) -> list[int]:
        """Return the process ids, for `PeakMemory`."""
        return [process.pid for process in self._processes if process.pid]

    def close(self) -> None:
        """End the processes; what does not end by itself within some seconds is killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def _gather(self, timeout_s: float) -> list[Any]:
        """Wait for one answer a process; the first that ends ends the wait, since the others may wait for it."""
        deadline_s = time.monotonic() + timeout_s
        answers: dict[Connection, Any] = {}
        while pending := [pipe for pipe in self._pipes if pipe not in answers]:
            ready = wait(pending, max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise EngineError(f"benchmark process {self._pipes.index(pending[0])} silent for {timeout_s:.0f} s")
            for pipe in (pipe for pipe in pending if pipe in ready):
                try:
                    answers[pipe] = pipe.recv()
                except (EOFError, OSError) as error:
                    rank = self._pipes.index(pipe)
                    raise EngineError(f"benchmark process {rank} ended; its traceback is on stderr") from error
        return [answers[pipe] for pipe in self._pipes]


@contextmanager
def _added(environment: Mapping[str, str]) -> Iterator[None]:
    """Add to this process's environment, which a spawned process inherits, for the length of the block."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _serve(pipe: Connection, build: Build, rank: int, arguments: dict[str, Any]) -> None:
    run = build(rank, **arguments)
    pipe.send("built")
    while True:
        try:
            steps = pipe.recv()
        except EOFError:  # the parent is done, or gone
            return
        pipe.send(run(steps))
