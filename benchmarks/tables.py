"""Write README's tables of recommendation quality anew from `benchmarks/results/`.

    python -m benchmarks.tables

In:  results/quality_*.json and ratings_*.json, last lines of benchmarks.quality and benchmarks.ratings.
Out: README.md, whose text between the two marks is replaced; what was run apart on one dataset is one table. A figure
that is in the table has been measured.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- quality: written by benchmarks.tables -->", "<!-- quality: end -->"

NAMES = {"movielens": "MovieLens-100K", "movielens-1995-2016": "MovieLens 1995–2016"}
"""What the datasets' folders are called in print."""

Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Replace the tables."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{build_tables()}\n{END}{after}", "utf-8")


def build_tables() -> str:
    """Return the tables, in Markdown."""
    of_data: dict[str, Json] = {}
    for found in (_read(path) for path in sorted(RESULTS.glob("quality_*.json"))):
        of_data.setdefault(found["config"]["data"], found)["results"] |= found["results"]
    parts = [_lists(found) for found in of_data.values()]
    parts += [_ratings(_read(path)) for path in sorted(RESULTS.glob("ratings_*.json"))]
    return "\n\n".join(parts)


def _lists(found: Json) -> str:
    config = found["config"]
    lines = [
        f"{_name(config)}, {config['users']:,} users, {config['items']:,} items, each user's last item held out:",
        "",
        "| system | NDCG@10 | Hit@10 | |",
        "| --- | --- | --- | --- |",
    ]
    systems = sorted(found["results"].items(), key=lambda entry: entry[1]["test_ndcg_at_10"]["mean"])
    for name, figures in systems:
        told = [_interval(figures[f"test_{metric}"]) for metric in ("ndcg_at_10", "hit_at_10")]
        count = figures.get("seeds", 0)
        seeds = f"mean of {count} seeds" if count > 1 else "one seed" if count else ""
        lines.append(f"| {name} | {told[0]} | {told[1]} | {seeds} |")
    return "\n".join(lines)


def _ratings(found: Json) -> str:
    told = {name: f"{value['mean']:.4f}" for name, value in found["results"].items() if name != "seconds"}
    config = found["config"]
    return (
        f"{_name(config)}, will a rating be {config['liked_from']:g} or more, ratings split at random 80/10/10, "
        f"mean of {config['splits']} splits: AUC {told['auc']}, log loss {told['log_loss']}, normalised entropy "
        f"{told['ne']}; the stars: RMSE {told['rmse']}, MAE {told['mae']}."
    )


def _name(config: Json) -> str:
    folder = str(config["data"])
    return NAMES.get(folder, folder)


def _interval(figure: Json) -> str:
    low, high = figure["ci95"]
    return f"{figure['mean']:.4f} [{low:.4f}, {high:.4f}]"


def _read(path: Path) -> Json:
    return json.loads(path.read_text("utf-8"))


if __name__ == "__main__":
    main()
