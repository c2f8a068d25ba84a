"""`recloop plan --serve`: how many replicas, and how much memory, a catalogue and a rate take, before anything starts.

In:  a recipe, a published version to time where there is one, what is to be served.  Out: bytes by part, replicas.
Knows nothing of Ray. What a request costs is timed here on the version itself, for users who have not asked before, in
one process and one thread: a replica gives requests one core, whatever else it has.
"""

import argparse
import statistics
import time

import torch

from cluster.config import Recipe, load_recipe
from cluster.engine import open_registry
from cluster.errors import NoVersionError
from cluster.log import Interaction
from cluster.output import Result, print_result
from embeddings.index import IndexConfig
from embeddings.tables import TablesConfig
from serving.config import ServeConfig
from training.models.classical import build_resident
from training.models.resident import Resident
from training.models.version import TEXT_ROWS, read_version

PROCESS_BYTES = 600 << 20
"""Of a replica before it holds a version: Python, torch, Ray's worker; 490 MiB were seen with MovieLens-100K in it."""
ENCODER_BYTES = 900 << 20
"""Of the text encoder's own process with the packaged model; 410 MiB were seen without it. An estimate."""
ID_BYTES = 180
"""Of an id of some ten characters with its place in an index, as Python holds it."""
TEXT_BYTES = 350
"""Of an item's text of some 250 characters, likewise."""
FLOAT_BYTES = 4
KEPT_BYTES = 3_000
"""Of one user's candidates that are kept."""
OVERHEAD_MS = 1.3
"""Of HTTP, keys and JSON, a request (`benchmarks.serve_load --parts delay`: 1.3 ms on two slow cores)."""
PART_BUSY = 0.5
"""Share of a replica's time that may be used for p99 to stay within 50 ms: what is left takes up bursts and swaps."""
TIMED_USERS = 100
HISTORY = 50


def run(args: argparse.Namespace) -> Result | None:
    """Size the servers of a catalogue and a rate."""
    recipe = load_recipe(args.recipe, args.overrides)
    try:
        registry = open_registry(recipe, args.home)
        model = build_resident(read_version(registry, registry.current()), {}, None)
    except NoVersionError:
        model = None
    items = args.items or (model.item_count if model else 0)
    users = args.users or (len(model.user_row) if model else 0)
    report = size_servers(recipe, model, items=items, users=users, rate=args.rate)
    print_result(report, as_json=args.json)
    return None


def size_servers(recipe: Recipe, model: Resident | None, *, items: int, users: int, rate: float) -> Result:
    """Return bytes a replica by part, what a request costs, and how many replicas a rate takes."""
    config, dim = recipe.section(ServeConfig), recipe.section(TablesConfig).dim
    text_dim = model.state.rows[TEXT_ROWS].shape[1] if model else 384
    has_index = items > recipe.section(IndexConfig).exact_up_to
    parts = {
        "process": PROCESS_BYTES,
        "item rows and vectors": 2 * items * dim * FLOAT_BYTES,
        "item texts' vectors": items * text_dim * FLOAT_BYTES,
        "user rows": users * dim * FLOAT_BYTES,
        "ids": (items + users) * ID_BYTES,
        "texts": items * TEXT_BYTES,
        "index": items * dim * (1 + FLOAT_BYTES) if has_index else 0,
        "candidates kept": min(config.kept_users, max(users, 1)) * KEPT_BYTES,
        "a second version while swapping": 2 * items * dim * FLOAT_BYTES + users * dim * FLOAT_BYTES,
    }
    call_ms = time_call(model) if model else None
    result: dict[str, object] = {"items": items, "users": users, "rate_per_s": rate}
    result |= {"replica_mib": round(sum(parts.values()) / 2**20), "encoder_mib": round(ENCODER_BYTES / 2**20)}
    if call_ms is not None:
        per_replica = PART_BUSY * 1e3 / (call_ms + OVERHEAD_MS)
        replicas = max(1, -(-rate // per_replica))
        result |= {"ranker_ms": round(call_ms, 3), "requests_a_replica_per_s": round(per_replica)}
        result |= {"replicas": int(replicas), "cores": int(replicas) + 1}
        result |= {"memory_mib": round((replicas * sum(parts.values()) + ENCODER_BYTES) / 2**20)}
    else:
        result["replicas"] = "unknown: publish a version, and it is timed"
    result["parts"] = [{"part": name, "mib": round(size / 2**20, 1)} for name, size in parts.items()]
    return result


def time_call(model: Resident) -> float:
    """Return the median of the version's own answers, in milliseconds, to users with long histories."""
    torch.set_num_threads(1)
    known = [item_id for item_id, _ in zip(model.index_of, range(TIMED_USERS + HISTORY), strict=False)]
    took_ms = []
    for first in range(min(TIMED_USERS, max(len(known) - HISTORY, 1))):
        history = [Interaction(item_id, "click", None, 0, 0) for item_id in known[first : first + HISTORY]]
        began_s = time.perf_counter()
        model.recommend("", history, 100)
        took_ms.append(1e3 * (time.perf_counter() - began_s))
    return statistics.median(took_ms)
