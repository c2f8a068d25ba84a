import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bare_torchrec import build_bare, free_port, ready_batch
from benchmarks.plain_torch import Columns, build_plain
from benchmarks.planted import write_examples
from benchmarks.segments import Segments

ROOT = Path(__file__).parents[2]


def test_a_ready_batch_holds_each_feature_s_ids() -> None:
    columns = Columns(
        user_B=torch.tensor([1, 2], dtype=torch.int32),
        item_B=torch.tensor([10, 20], dtype=torch.int32),
        history_N=torch.tensor([5, 6, 7], dtype=torch.int32),
        start_B=torch.tensor([0, 0], dtype=torch.int32),
        label_B=torch.tensor([0.0, 1.0]),
    )
    lookup = ready_batch(columns, torch.int64).lookup
    lists = {
        name: (lookup[name].values().tolist(), lookup[name].lengths().tolist()) for name in ("user", "item", "history")
    }
    assert lists == {"user": ([1, 2], [1, 1]), "item": ([10, 20], [1, 1]), "history": ([5, 6, 7], [0, 3])}


@pytest.mark.slow
def test_two_processes_of_torchrec_learn_what_plain_torch_learns(tmp_path: Path) -> None:
    folder = str(write_examples(tmp_path, 1_048_576, 2000, 1000, seed=3, heldout_rows=1))
    with Segments(build_bare, workers=2, folder=folder, port=free_port(), batch=4096) as bare:
        start, end = bare.measure(1), bare.measure(60)
    assert (start.examples, end.examples) == (2 * 4096, 2 * 60 * 4096)
    assert start.loss > 0.65
    plain = build_plain(0, folder=folder, batch=8192, threads=1)(61)
    # Row-wise and element-wise Adagrad differ a little; both leave log 2 far behind.
    assert abs(end.loss - plain.loss) < 0.03
    assert end.loss < 0.6


@pytest.mark.slow
def test_the_quick_benchmark_ends_in_a_result_line() -> None:
    command = [sys.executable, "-m", "benchmarks.bare_torchrec", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert results["bare_over_plain"] > 0
    assert [len(results[name]["values"]) for name in ("plain_spinning", "plain_yielding", "bare_torchrec")] == [2, 2, 2]
