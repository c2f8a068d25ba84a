"""`recloop prepare`: a dataset from a known source or from anyone's files.

In:  the command line.  Out: a dataset folder and what it holds.
Knows nothing of how sources are read.
"""

import argparse
from pathlib import Path
from typing import Any

from cluster.dataset import Dataset
from cluster.errors import ConfigError
from training.prepare.columns import prepare_columns
from training.prepare.movielens import prepare_movielens
from training.prepare.packaged import prepare_complete_journey, prepare_movielens_years

SOURCES = {
    "movielens": prepare_movielens,
    "movielens-1995-2016": prepare_movielens_years,
    "complete-journey": prepare_complete_journey,
}
"""Known sources by the name that the command line gives them."""


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Prepare a dataset and say what came of it."""
    if args.source is None and not args.columns:
        raise ConfigError("--columns: is not given; say which column is which: --columns user=…,item=…,time=…")
    name = args.source or Path(args.events).name.split(".")[0]
    out = Path(args.out) if args.out else args.home.datasets / name
    if args.source is not None:
        return describe(SOURCES[args.source](out))
    return describe(
        prepare_columns(
            Path(args.events),
            args.columns,
            out=out,
            items=Path(args.items) if args.items else None,
            item_columns={"item_id" if role == "item" else role: column for role, column in args.item_columns.items()}
            or None,
        )
    )


def describe(dataset: Dataset) -> dict[str, Any]:  # Any: JSON
    """Return the counts and facts of a dataset, and where its rejected rows are."""
    info = dataset.info
    rejected = dataset.path / "rejected.parquet"
    return {
        "dataset": str(dataset.path),
        "events": info.events,
        "items": info.items,
        "users": info.users,
        "rejected": dict(info.rejected),
        "rejected_rows": str(rejected) if rejected.exists() else None,
        **info.facts,
    }
