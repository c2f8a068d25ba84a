import json
import math
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.harness import (
    PeakMemory,
    Turns,
    build_check,
    build_parser,
    interleave,
    percentiles,
    print_result,
    tree_bytes,
)


@pytest.mark.parametrize(
    ("value", "bar", "holds"),
    [
        (0.93, ">=0.9", True),
        (0.9, ">=0.9", True),
        (0.89, ">=0.9", False),
        (0.9, ">0.9", False),
        (1.1, "<=1.05", False),
        (0, "==0", True),
        (math.nan, ">=0.9", False),
        (math.nan, "<=0.9", False),
    ],
)
def test_a_check_holds_when_its_value_reaches_the_bar(value: float, bar: str, holds: bool) -> None:
    assert build_check("figure", value, bar).holds is holds


def test_a_bar_without_a_sign_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.9' of figure"):
        build_check("figure", 1.0, "0.9")


def test_variants_take_turns_and_change_who_goes_first() -> None:
    order: list[str] = []

    def measured(name: str) -> float:
        order.append(name)
        return float(len(order))

    turns = interleave({"a": lambda: measured("a"), "b": lambda: measured("b")}, 3, warm_ups=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert turns.values == {"a": [3, 6, 7], "b": [4, 5, 8]}


def test_a_ratio_is_the_median_of_what_each_round_shared() -> None:
    # The machine slowed down by ten in the last round: the ratio does not see it.
    turns = Turns({"disk": [90, 95, 9], "memory": [100, 100, 10]})
    assert turns.ratio("disk", "memory") == 9 / 10
    assert turns.median("disk") == 90
    assert turns.spread("memory") == (100 - 10) / 100


def test_percentiles_are_those_of_a_hundred_and_one_steps() -> None:
    assert percentiles(range(101)) == {"p50": 50, "p95": 95, "p99": 99}


def test_peak_memory_includes_what_a_child_held_for_a_moment() -> None:
    code = "held = b'1' * 200_000_000; print('held', flush=True); input()"
    with PeakMemory(interval_s=0.05) as memory:
        before = memory.peak_bytes
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        # Of two more samples, the second began while the child held the memory.
        seen = memory.samples
        while memory.samples < seen + 2:
            time.sleep(0.01)
        child.communicate("\n")
    assert 200_000_000 < memory.peak_bytes - before < 300_000_000
    assert tree_bytes([psutil.Process()]) < memory.peak_bytes - 150_000_000


def test_memory_of_a_process_that_has_ended_counts_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(child.pid)
    child.kill()
    child.wait()
    time.sleep(0.01)
    assert tree_bytes([process]) == 0


def test_the_last_line_is_one_json_object_with_everything_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    check = build_check("disk_vs_memory", 0.93, ">=0.9")
    print_result(results={"rows_s": 1.5}, config={"batch": 4}, checks=[check])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["results"] == {"rows_s": 1.5}
    assert line["config"] == {"batch": 4}
    assert line["checks"] == [{"name": "disk_vs_memory", "value": 0.93, "bar": ">=0.9", "holds": True}]
    assert line["hardware"]["cores"] >= 1
    assert line["hardware"]["memory_gib"] > 0
    assert {"python", "torch", "torchrec", "ray", "pyarrow"} <= set(line["versions"])


def test_every_benchmark_takes_quick_and_repeats() -> None:
    flags = build_parser("How fast?\n\nVery.").parse_args(["--quick", "--repeats", "3"])
    assert (flags.quick, flags.repeats) == (True, 3)
