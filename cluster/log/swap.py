"""Put a repaired log in the place of the damaged one, whole, whenever the power fails.

In:  the log's path and the finished file beside it.  Out: the finished file under the log's name; the old ones kept.
Knows nothing of what is in either.

A database and its write-ahead log are two files, and one rename cannot replace both. So the intent is written down
first; whoever opens the log next carries it out to the end.
"""

import json
import os
import time
from pathlib import Path

COMPANIONS = ("", "-wal", "-shm")


def swap(path: Path, finished: Path) -> Path:
    """Put `finished` in the place of `path`; return the folder that keeps the files there were."""
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}")
    sync(finished)
    marker, draft = _marker(path), path.with_name(f"{path.name}.swap-draft")
    draft.write_text(json.dumps({"finished": finished.name, "kept": kept.name}), encoding="utf-8")
    sync(draft)
    draft.replace(marker)
    sync(path.parent)
    finish_swap(path)
    return kept


def finish_swap(path: Path) -> None:
    """Carry out a swap that was begun; nothing where there is none. Each step may be done again."""
    marker = _marker(path)
    if not marker.exists():
        return
    intent = json.loads(marker.read_text("utf-8"))
    finished, kept = (path.with_name(intent[key]) for key in ("finished", "kept"))
    kept.mkdir(exist_ok=True)
    if finished.exists():
        for companion in COMPANIONS:
            old = path.with_name(f"{path.name}{companion}")
            if old.exists():
                old.replace(kept / old.name)
        sync(kept)
        sync(path.parent)
        finished.replace(path)
        sync(path.parent)
    marker.unlink()
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.swap")
