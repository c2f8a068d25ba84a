"""One worker of a gloo group that maps ids through their owners.

    exchange_program.py RANK WORKERS FOLDER

Two of these groups run beside each other, of one and of two workers, on the same stream; half-way each goes on from
the other's state. What a worker got is written to FOLDER/WORKERS/RANK.npz.
"""

import os
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch.distributed as dist

from embeddings.ids.config import IdsConfig
from embeddings.ids.exchange import ShardedIds

CONFIG = IdsConfig(user_rows=600, item_rows=240, halve_every=11)
STEPS = 40
PATIENCE_S = 90.0


def ids_of_step(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a step's user and item ids, of all workers."""
    rng = np.random.default_rng(step)
    return rng.zipf(1.2, 500) % 4000, rng.integers(0, 2**62, 40)[rng.integers(0, 40, 700)] >> rng.integers(0, 55)


def mine(ids: np.ndarray, step: int, rank: int, workers: int) -> np.ndarray:
    """Return a worker's ids: every second one of two, all or none in some steps."""
    if step % 8 == 7:
        return ids if rank == 0 else ids[:0]
    return ids[rank::workers]


class Worker:
    def __init__(self, rank: int, workers: int, folder: Path) -> None:
        self.rank, self.workers, self.folder = rank, workers, folder
        self.group: dist.ProcessGroup | None = None
        if workers > 1:
            self.group = cast("dist.ProcessGroup", dist.new_group(list(range(workers)), backend="gloo"))
        self.written: dict[str, np.ndarray] = {}

    def run(self) -> None:
        sharded = ShardedIds(CONFIG, self.group)
        self.follow(sharded, range(STEPS // 2))
        self.save("middle", self.whole_state(sharded))
        sharded = ShardedIds(CONFIG, self.group)
        sharded.load_state(self.others_state())
        self.follow(sharded, range(STEPS // 2, STEPS))
        self.save("end", self.whole_state(sharded))
        users, items = (mine(ids, 0, self.rank, self.workers) for ids in ids_of_step(STEPS - 1))
        found = sharded.lookup(users, items)
        self.written |= {f"lookup.{name}": rows for name, rows in found._asdict().items()}
        np.savez(self.folder / str(self.workers) / f"{self.rank}.npz", allow_pickle=False, **self.written)

    def follow(self, sharded: ShardedIds, steps: range) -> None:
        for step in steps:
            users, items = (mine(ids, step, self.rank, self.workers) for ids in ids_of_step(step))
            mapped = sharded.map(users, items, step)
            for table in sharded.tables.values():
                table.verify()
            self.written |= {f"{step}.{name}": rows for name, rows in mapped._asdict().items()}

    def whole_state(self, sharded: ShardedIds) -> dict[str, np.ndarray]:
        """Collective. Return the parts of all workers, joined."""
        parts: list[dict[str, np.ndarray]] = [{} for _ in range(self.workers)]
        dist.all_gather_object(parts, sharded.state())
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def save(self, name: str, state: dict[str, np.ndarray]) -> None:
        if self.rank == 0:
            draft = self.folder / str(self.workers) / f"{name}.draft.npz"
            np.savez(draft, allow_pickle=False, **state)
            draft.rename(draft.with_name(f"{name}.npz"))

    def others_state(self) -> dict[str, np.ndarray]:
        path = self.folder / str(3 - self.workers) / "middle.npz"
        deadline_s = time.monotonic() + PATIENCE_S
        while not path.exists():
            assert time.monotonic() < deadline_s, f"{path}: the other group has not written it"
            time.sleep(0.05)
        return dict(np.load(path))


def main() -> None:
    rank, workers, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting_point = f"file://{folder}/{workers}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=workers)
    try:
        Worker(rank, workers, folder).run()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
