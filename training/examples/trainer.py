"""Train the click model on an examples folder with Ray Train, from the driver.

In:  a recipe, an examples folder or its URI.  Out: a run folder: checkpoints, metrics.jsonl, run.json.
Knows nothing of what a worker does (worker.py). The run folder must be on storage that all workers share.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from cluster.config import Recipe
from cluster.errors import DataError
from cluster.examples import load_examples
from cluster.home import Home
from cluster.progress import progress
from training.examples.checkpoints import newest_checkpoint
from training.fit import fit_on_workers
from training.run import CHECKPOINTS_FOLDER, RECIPE_FILE, RUN_FILE, SCORES_FILE, TrainConfig, read_recipe

EXAMPLES_FILE = "examples.txt"
"""The folder or URI that a run trains on."""


def train_on_examples(
    recipe: Recipe, uri: str, home: Home, *, resume: str | None = None, workers: tuple[int, int] | None = None
) -> dict[str, Any]:  # Any: JSON
    """Train within an open Ray session.

    With `resume`, go on with the run of that folder: its recipe and its data, but for the number of `workers` (fewest,
    most), the one thing that may change.

    Raises `DataError` or `ConfigError` as the workers do, `EngineError` when they failed for good.
    """
    if resume is None:
        folder = home.runs / f"clicks-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}"
        folder.mkdir(parents=True)
        (folder / RECIPE_FILE).write_text(recipe.to_toml())
        (folder / EXAMPLES_FILE).write_text(uri if "://" in uri else str(Path(uri).resolve()))
    else:
        folder = Path(resume)
        if not (folder / EXAMPLES_FILE).exists():
            raise DataError(f"{folder}: is no run over examples; name one that `recloop train` began")
        recipe = read_recipe(folder) if workers is None else _with_workers(read_recipe(folder), *workers)
    uri = (folder / EXAMPLES_FILE).read_text()
    config = recipe.section(TrainConfig)
    examples = load_examples(uri)  # or it says what is wrong, before any worker starts
    job = {"recipe": recipe.to_toml(), "examples": uri, "folder": str(folder.resolve())}
    with progress(examples.info.rows * config.epochs, "training", unit="example") as bar:
        fit_on_workers(
            "training.examples.worker:train_examples_worker",
            job,
            config,
            folder,
            bar,
            done=lambda lines: json.loads(lines[-1])["examples"],
        )
    checkpoint, _ = newest_checkpoint(folder / CHECKPOINTS_FOLDER)
    scores = json.loads((folder / SCORES_FILE).read_text())
    trained = {"folder": str(folder), "examples": uri, "checkpoint": str(checkpoint), **scores}
    (folder / RUN_FILE).write_text(json.dumps(trained, indent=1))
    return trained


def _with_workers(recipe: Recipe, fewest: int, most: int) -> Recipe:
    values = {section: dict(entries) for section, entries in recipe.values.items()}
    values["train"] |= {"workers": most, "min_workers": fewest if fewest < most else None}
    return Recipe(recipe.name, values, recipe.sections)
