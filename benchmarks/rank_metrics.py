"""How long does a full ranking of a large catalogue take, with every metric of its lists, and in how much memory?

    python -m benchmarks.rank_metrics [--quick]

In:  nothing; a world is made up: 100,000 users and items of dimension 64. A user's vector is the mean of those of 25
     items that it has, drawn by popularity, and noise; 20 of them are to be left out, 5 are to be found.
Out: seconds for the lists and for all metrics, and the memory they take beyond the data; on some of the users, in
     turns, our selection beside torch's topk over whole rows, and beside the matrix product alone.
Bound by the product, 2 · users · items · 64 operations: the ceiling is how fast the same blocks are multiplied and not
looked at. Each way runs one product a core side by side, so that its processor seconds tell what it costs whatever
else the machine is doing; turns are measured in these.

Shapes: U users, B of a block, I items, D dimension, K places.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from scipy import sparse

from benchmarks.harness import PeakMemory, build_check, build_parser, interleave, print_result, tree_bytes
from training.baselines.interface import seen_matrix
from training.evaluation import beyond_accuracy
from training.evaluation.leakage import check_excluded, check_pairs_not_fitted
from training.evaluation.lists import NO_ITEM, IntArray, find_hits, list_values
from training.evaluation.topk import ITEMS_AT_ONCE, USERS_AT_ONCE, popular_items, top_items

DIM, K = 64, 10
SEEN, RELEVANT = 20, 5
CATEGORIES = 20
ROWS_AT_ONCE = 64
"""Users whose whole rows torch is given: 26 MB of scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is ranked, and what is right."""

    user_UD: np.ndarray
    item_ID: np.ndarray
    seen_UI: sparse.csr_array
    relevant_UI: sparse.csr_array
    category_IC: sparse.csr_array

    @property
    def size_bytes(self) -> int:
        """Return what it takes in memory."""
        matrices = (self.seen_UI, self.relevant_UI, self.category_IC)
        parts = [part for matrix in matrices for part in (matrix.data, matrix.indices, matrix.indptr)]
        return sum(part.nbytes for part in (self.user_UD, self.item_ID, *parts))


def main() -> None:
    """Measure in turns on some users, then all of it on all."""
    args = build_parser(__doc__).parse_args()
    users, items, some = (4_000, 10_000, 1_024) if args.quick else (100_000, 100_000, 2_048)
    one = np.ones((1, DIM), np.float32)
    top_items(one, one, sparse.csr_array((1, 1), dtype=np.float32), 1)  # compiles
    bare_bytes = tree_bytes([psutil.Process()])
    world = build_world(users, items, seed=0)
    part = World(**{name: getattr(world, name) for name in ("item_ID", "relevant_UI", "category_IC")},
                 user_UD=world.user_UD[:some], seen_UI=world.seen_UI[:some])  # fmt: skip
    ways: dict[str, Callable[[World], Any]] = {"ours": our_lists, "torch rows": torch_rows, "product alone": products}
    turns = interleave(
        {name: lambda way=way: _processor_seconds(way, part) for name, way in ways.items()}, args.repeats
    )
    alike = float((our_lists(part) == torch_rows(part)).all(axis=1).mean())
    with PeakMemory() as memory:
        begun_s, begun_cpu_s = time.monotonic(), time.process_time()
        top_UK = our_lists(world)
        lists_s = time.monotonic() - begun_s
        figures = all_metrics(world, top_UK)
        total_s, total_cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    over_gib = (memory.peak_bytes - bare_bytes - world.size_bytes) / 2**30
    checks = [
        build_check("lists and all metrics, seconds", total_s, "<=180"),
        build_check("lists and all metrics, processor seconds", total_cpu_s, "<=120"),
        build_check("memory beyond the data, GiB", over_gib, "<2"),
        build_check("lists: time over torch's topk of whole rows", turns.ratio("ours", "torch rows"), "<=0.8"),
        build_check("lists: time over the product alone", turns.ratio("ours", "product alone"), "<=1.5"),
        build_check("share of lists that are torch's, to the item", alike, ">=0.999"),
    ]
    for check in checks:
        print(f"{check.name:48} {check.value:>9.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    results = {
        "lists_s": lists_s,
        "metrics_s": total_s - lists_s,
        "processor_s": total_cpu_s,
        "data_gib": world.size_bytes / 2**30,
        "turns_processor_s": turns.summary(),
        "metrics": figures,
    }
    config = {"users": users, "items": items, "dim": DIM, "k": K, "users_in_turns": some, "quick": args.quick}
    print_result(results=results, config=config, checks=checks)


def build_world(users: int, items: int, *, seed: int) -> World:
    """Make users and items up."""
    rng = np.random.default_rng(seed)
    item_ID = rng.standard_normal((items, DIM), np.float32)
    cumulative = np.cumsum(1 / np.arange(1, items + 1) ** 0.7)
    drawn_UN = np.searchsorted(cumulative, rng.random((users, SEEN + RELEVANT)) * cumulative[-1])
    user_UD = 0.1 * rng.standard_normal((users, DIM), np.float32)
    for drawn_U in drawn_UN.T:
        user_UD += item_ID[drawn_U] / drawn_UN.shape[1]
    user_N = np.arange(users)
    seen_UI, relevant_UI = (
        seen_matrix(np.repeat(user_N, drawn.shape[1]), drawn.ravel(), users, items)
        for drawn in np.split(drawn_UN, [SEEN], axis=1)
    )
    relevant_UI = sparse.csr_array(relevant_UI - relevant_UI.multiply(seen_UI))
    relevant_UI.eliminate_zeros()
    # Someone whose five were all drawn before has the rarest item to find.
    lost = np.flatnonzero(np.diff(relevant_UI.indptr) == 0)
    relevant_UI = sparse.csr_array(relevant_UI + seen_matrix(lost, np.full(len(lost), items - 1), users, items))
    category_N = rng.integers(0, CATEGORIES, (items, 2))
    category_IC = beyond_accuracy.category_vectors([[str(c) for c in row] for row in category_N.tolist()])
    return World(user_UD=user_UD, item_ID=item_ID, seen_UI=seen_UI, relevant_UI=relevant_UI, category_IC=category_IC)


def our_lists(world: World) -> IntArray:
    """Return the lists as evaluation makes them."""
    return top_items(world.user_UD, world.item_ID, world.seen_UI, K)[0]


def torch_rows(world: World) -> IntArray:
    """Return the lists as torch makes them of whole rows of scores."""
    item_ID, seen_UI = torch.from_numpy(world.item_ID), world.seen_UI

    def rows(start: int) -> np.ndarray:
        score_BI = torch.from_numpy(world.user_UD[start : start + ROWS_AT_ONCE]) @ item_ID.T
        ends = seen_UI.indptr[start : start + len(score_BI) + 1]
        row_N = np.repeat(np.arange(len(score_BI)), np.diff(ends))
        score_BI[row_N, seen_UI.indices[ends[0] : ends[-1]]] = -torch.inf
        return score_BI.topk(K).indices.numpy()

    return np.concatenate(_side_by_side(rows, len(world.user_UD), ROWS_AT_ONCE))


def products(world: World) -> None:
    """Multiply the blocks of `our_lists` and do nothing with them."""
    item_ID = torch.from_numpy(world.item_ID)

    def multiply(start: int) -> None:
        user_BD = torch.from_numpy(world.user_UD[start : start + USERS_AT_ONCE])
        for first in range(0, len(item_ID), ITEMS_AT_ONCE):
            torch.mm(user_BD, item_ID[first : first + ITEMS_AT_ONCE].T)

    _side_by_side(multiply, len(world.user_UD), USERS_AT_ONCE)


def all_metrics(world: World, top_UK: IntArray) -> dict[str, float]:
    """Check the lists and return the mean of every metric over users, and the figures of all lists together."""
    check_pairs_not_fitted(world.seen_UI, world.relevant_UI)
    check_excluded(top_UK, world.seen_UI)
    users, items = len(world.user_UD), len(world.item_ID)
    count_I = np.bincount(world.seen_UI.indices, minlength=items)
    hits = find_hits(top_UK, world.relevant_UI)
    exposure_I = beyond_accuracy.exposure(top_UK, items)
    popular_UK = popular_items(count_I, world.seen_UI, K)
    values = list_values(hits, K) | {
        "novelty_bits": beyond_accuracy.novelty(top_UK, count_I, users),
        "popularity": beyond_accuracy.popularity(top_UK, count_I),
        "diversity": beyond_accuracy.diversity(top_UK, beyond_accuracy.unit_vectors(world.item_ID)),
        "diversity_categories": beyond_accuracy.diversity(top_UK, world.category_IC),
        "serendipity": beyond_accuracy.serendipity(hits, top_UK, popular_UK, K),
    }
    figures = {name: float(value_U.mean()) for name, value_U in values.items()}
    return figures | {
        "coverage": beyond_accuracy.coverage(exposure_I),
        "gini": beyond_accuracy.gini(exposure_I),
        "empty_places": float((top_UK == NO_ITEM).mean()),
    }


def _side_by_side(work: Callable[[int], Any], users: int, at_once: int) -> list[Any]:
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, range(0, users, at_once)))
    finally:
        torch.set_num_threads(before)


def _processor_seconds(way: Callable[[World], Any], world: World) -> float:
    begun_s = time.process_time()
    way(world)
    return time.process_time() - begun_s


if __name__ == "__main__":
    main()
