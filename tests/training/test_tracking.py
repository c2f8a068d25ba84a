"""A run's figures reach every board that the recipe names, and a run that is started again goes on in its record."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config import load_recipe
from cluster.errors import ConfigError
from training.run import METRICS_FILE, RECIPE_FILE
from training.tracking import MLFLOW_FILE, Scalars, closing, open_boards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "train-1"
    folder.mkdir()
    (folder / RECIPE_FILE).write_text("[train]\n")
    return folder


def record(folder: Path, epochs: range, *overrides: str, rank: int = 0) -> None:
    with Scalars(folder, load_recipe("movielens", overrides), rank) as scalars:
        for epoch in epochs:
            scalars.write({"ndcg_at_10": epoch / 10}, epoch)


def test_tensorboard_and_the_lines_have_every_epoch(folder):
    record(folder, range(1, 4))
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert lines == [{"epoch": n, "ndcg_at_10": n / 10} for n in (1, 2, 3)]
    scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/ndcg_at_10")
    assert [(s.step, s.value) for s in scalars] == [(n, pytest.approx(n / 10)) for n in (1, 2, 3)]


def test_the_other_workers_are_silent(folder):
    record(folder, range(1, 4), rank=1)
    assert [path.name for path in folder.iterdir()] == [RECIPE_FILE]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own
def test_mlflow_has_the_figures_and_the_recipe_in_one_run_also_after_a_new_start(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # beside a database, MLflow keeps files where it is run
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for epochs in (range(1, 3), range(3, 4)):
        record(folder, epochs, f"tracking.mlflow_uri={uri}", "tracking.mlflow_experiment=films")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("films")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/ndcg_at_10")
    assert [(m.step, m.value) for m in history] == [(n, n / 10) for n in (1, 2, 3)]
    assert run.info.run_name == "train-1"
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == [RECIPE_FILE]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own
def test_a_run_that_crashes_has_failed_and_runs_again_when_started_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe = load_recipe("movielens", [f"tracking.mlflow_uri={uri}"])
    client = MlflowClient(tracking_uri=uri)

    def status() -> str:
        return client.get_run(json.loads((folder / MLFLOW_FILE).read_text())["run_id"]).info.status

    with pytest.raises(RuntimeError), Scalars(folder, recipe, 0):
        raise RuntimeError
    assert status() == "FAILED"
    with Scalars(folder, recipe, 0):
        assert status() == "RUNNING"
    assert status() == "FINISHED"
    with pytest.raises(RuntimeError), closing(open_boards(folder, recipe)):
        raise RuntimeError
    assert status() == "FAILED"


@pytest.mark.slow
def test_weights_and_biases_has_the_figures(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(folder, range(1, 3), "tracking.wandb_project=films")
    (written,) = folder.glob("wandb/offline-run-*/run-train-1.wandb")
    assert written.read_bytes().count(b"train/ndcg_at_10") >= 2


@pytest.mark.parametrize(("key", "package"), [("wandb_project", "wandb"), ("mlflow_uri", "mlflow-skinny")])
def test_a_board_whose_package_is_missing_is_refused_before_anything_starts(key, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"tracking\.{key}='x'.*pip install {package}"):
        load_recipe("movielens", [f"tracking.{key}=x"])
