"""Write click examples whose true click probability is known: the data of the training benchmarks.

    python -m benchmarks.planted --rows 1e9 --users 1e7 --items 1e6 --out DIR

In:  how many rows, users and items, a mean history length and a seed.
Out: an examples folder (`examples.json`, `part-*.parquet`) and `heldout.parquet`, drawn alike but never trained on.
Knows nothing of models; what is drawn is world.py's.

A part's bytes follow from the seed and the part's number alone, so parts are written in any order, by any number of
processes, and an interrupted folder is finished by the same command.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.world import HELDOUT, LABEL_RATE, World, build_world
from cluster.errors import ConfigError
from cluster.examples import HELDOUT_FILE, INFO_FILE, SCHEMA_VERSION, ExamplesInfo
from training.evaluation.predictions import auc

PART_ROWS = 10_000_000
GROUP_ROWS = 131_072
HELDOUT_ROWS = 1_000_000

ENCODING: dict[str, Any] = {  # of pyarrow's ParquetWriter, which takes more than its annotations say
    "compression": "lz4",
    "use_dictionary": ["label"],
    "column_encoding": dict.fromkeys(("user_id", "item_id", "history.list.element"), "BYTE_STREAM_SPLIT"),
    "write_statistics": False,
}
"""Measured on one thread: 19 bytes a row, decoded at 38 M rows/s. Plain values take 25 bytes and decode at 39, deltas
17.5 and 30; columns that may be null decode a third slower."""

_ODD = 0x5851F42D4C957F2D
_INVERSE = pow(_ODD, -1, 2**63)
_MASK = 2**63 - 1


def scatter(row_N: np.ndarray) -> np.ndarray:
    """Map table rows to ids all over [0, 2^63), one to one."""
    spread_N = (row_N.astype(np.uint64) * np.uint64(_ODD) + np.uint64(_ODD)) & np.uint64(_MASK)
    return (spread_N ^ (spread_N >> np.uint64(32))).astype(np.int64)


def gather(id_N: np.ndarray) -> np.ndarray:
    """Map scattered ids back to their table rows."""
    spread_N = id_N.astype(np.uint64)
    spread_N ^= spread_N >> np.uint64(32)
    return (((spread_N - np.uint64(_ODD)) * np.uint64(_INVERSE)) & np.uint64(_MASK)).astype(np.int64)


def planted_logit(folder: Path, user_B: np.ndarray, item_B: np.ndarray) -> np.ndarray:
    """Return the true log-odds of a click for the ids of an examples folder that this module wrote."""
    info = json.loads((folder / INFO_FILE).read_text("utf-8"))
    world = build_world(**{key: info["facts"][key] for key in ("seed", "users", "items", "history")})
    if info["ids"] == "any":
        user_B, item_B = gather(user_B), gather(item_B)
    return world.logit(user_B, item_B)


def optimum_auc(folder: Path) -> float:
    """Return the held-out AUC of the true probabilities: no model that sees user and item alone can do better."""
    heldout = pq.read_table(folder / HELDOUT_FILE, columns=["user_id", "item_id", "label"])
    user_B, item_B, label_B = (heldout[name].to_numpy() for name in ("user_id", "item_id", "label"))
    return auc(planted_logit(folder, user_B, item_B), label_B)


def write_examples(
    folder: Path,
    rows: int,
    users: int,
    items: int,
    *,
    seed: int,
    history: int = 4,
    processes: int = 1,
    ids: str = "rows",
    part_rows: int = PART_ROWS,
    heldout_rows: int = HELDOUT_ROWS,
) -> Path:
    """Write an examples folder, or finish one that an interrupted call left; return the folder.

    With `ids="any"` the same interactions carry int64 ids scattered over [0, 2^63). A folder that has `examples.json`
    is complete. Raises ConfigError where the folder was begun with other arguments.
    """
    if not (0 < users < 2**31 and 0 < items < 2**31 and history >= 0):
        raise ConfigError(f"users={users}, items={items}, history={history}: table rows are int32; try fewer than 2^31")
    world = build_world(seed=seed, users=users, items=items, history=history)
    facts = {"seed": seed, "users": users, "items": items, "history": history, "part_rows": part_rows}
    facts |= {"heldout_rows": heldout_rows, "label_rate": LABEL_RATE, "offset": world.offset}
    sizes = {"users": users, "items": items} if ids == "rows" else {}
    info = ExamplesInfo(schema_version=SCHEMA_VERSION, name="planted", rows=rows, ids=ids, facts=facts, **sizes)
    finished, unfinished = folder / INFO_FILE, folder / f"{INFO_FILE}.unfinished"
    _claim(folder, asdict(info), (finished, unfinished))
    wanted = [(folder / HELDOUT_FILE, HELDOUT, heldout_rows)] + [
        (folder / f"part-{part:05}.parquet", part, min(part_rows, rows - first))
        for part, first in enumerate(range(0, rows, part_rows))
    ]
    missing = [(world, path, part, count, ids) for path, part, count in wanted if not path.exists()]
    for done, report in enumerate(_written(missing, processes), 1):
        print(f"{done}/{len(missing)} {report}", flush=True)
    if unfinished.exists():
        unfinished.replace(finished)
    return folder


def _claim(folder: Path, info: dict[str, Any], paths: Sequence[Path]) -> None:
    """Note what is going to be written, or raise ConfigError where something else was."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [path for path in paths if path.exists()]
    for path in found:
        if json.loads(path.read_text("utf-8")) != info:
            raise ConfigError(f"{path} was written with other arguments: repeat those or name a new folder")
    if not found:
        paths[-1].write_text(json.dumps(info, indent=2) + "\n", "utf-8")


def _written(jobs: Sequence[tuple[World, Path, int, int, str]], processes: int) -> Iterator[str]:
    if processes == 1 or not jobs:
        yield from (write_part(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(write_part, *zip(*jobs, strict=True))


def write_part(world: World, path: Path, part: int, rows: int, ids: str) -> str:
    """Write one file under a temporary name, rename it, and say how fast that went."""
    begun_s = time.perf_counter()
    integer = pa.int32() if ids == "rows" else pa.int64()
    history_type = pa.list_(pa.field("element", integer, nullable=False))
    columns = {"user_id": integer, "item_id": integer, "history": history_type, "label": pa.int8()}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
    temporary = path.with_name(f"{path.name}.unfinished")
    with pq.ParquetWriter(temporary, schema, **ENCODING) as writer:
        for group, first in enumerate(range(0, rows, GROUP_ROWS)):
            user_B, item_B, label_B, end_B, history_N = world.draw(part, group, min(GROUP_ROWS, rows - first))
            if ids == "any":
                user_B, item_B, history_N = scatter(user_B), scatter(item_B), scatter(history_N)
            history = pa.ListArray.from_arrays(pa.array(end_B), pa.array(history_N), type=history_type)
            arrays = [pa.array(user_B), pa.array(item_B), history, pa.array(label_B)]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=GROUP_ROWS)
    temporary.replace(path)
    return f"{path.name}: {rows:,} rows, {rows / (time.perf_counter() - begun_s):,.0f} rows/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("rows", "users", "items"):
        parser.add_argument(f"--{name}", type=_count, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=int, default=4, help="mean length")
    parser.add_argument("--ids", choices=("rows", "any"), default="rows")
    parser.add_argument("--processes", type=int, default=1)
    flags = vars(parser.parse_args())
    folder = write_examples(flags.pop("out"), **flags)
    print(f"{folder}: held-out AUC of the true probabilities {optimum_auc(folder):.4f}")


def _count(text: str) -> int:
    """Read a whole number the way people write a billion, 1e9."""
    return int(float(text))


if __name__ == "__main__":
    main()
