"""The scoreboard as one HTML page that needs nothing else: tables, and plots drawn into it.

In:  a scoreboard's rows.  Out: a file.
Knows nothing of how figures came about.
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

Row = Mapping[str, Any]  # Any: whatever JSON holds

SHOWN_BY_SEGMENT = ("hit_at_10", "ndcg_at_10")
MEANING = {
    "ndcg": "hits count less the later they come",
    "hit": "the item that came next is in the list",
    "recall": "share of the relevant items that is in the list",
    "precision": "share of the list that is relevant",
    "f1": "harmonic mean of precision and recall",
    "mrr": "1 / place of the first hit",
    "map": "mean precision at the hits",
    "novelty_bits": "self-information of the items: 1 more is half as many users",
    "popularity": "users who have an item of the list, on average",
    "diversity_text": "1 − cosine of two items of a list, by their texts",
    "diversity_categories": "1 − cosine of two items of a list, by their categories",
    "serendipity": "share of the list that is relevant and not what is popular anyway",
    "coverage": "share of the catalogue that is in any list",
    "gini": "how unequally lists name items: 0 all alike, 1 one of them alone",
    "rating_rmse": "root of the mean squared error of estimated ratings",
    "rating_mae": "mean absolute error of estimated ratings",
    "rating_gauc": "rating_auc of each user's own interactions, weighted by their number",
    "choice_log_loss": "−log of how likely retrieval held what came next, among all items, in nats",
    "choice_ne": "choice_log_loss over that of guessing by popularity: below 1 is better",
    "choice_calibration": "how often the likeliest item was expected to be chosen over how often it was: 1 is best",
    "choice_ece": "mean gap between the two, by how likely it was held",
    "rating_auc": "chance that what was rated 4 or more has a higher estimate than what was rated lower",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { color: #666; }
td.higher { background: #e3eefb; } td.lower { background: #fdf0dc; }
.wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; } p, li { max-width: 50rem; }
"""
SIGNIFICANT = 0.05


def write_page(
    path: Path, title: str, facts: Mapping[str, object], metrics: Sequence[Row], segments: Sequence[Row]
) -> None:
    """Write the page. `metrics` are of all events, `segments` of each. Raises `ConfigError` where that cannot be."""
    versions = list(dict.fromkeys(row["version"] for row in metrics))
    told = "".join(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in facts.items())
    parts = [
        f"<h1>{escape(title)}</h1><ul>{told}</ul>",
        "<h2>All events</h2>",
        _metrics_table(metrics, versions),
        "<p>In brackets: 95% bootstrap intervals over users. Differences are to the first version, over the same "
        "events; p is of a paired randomisation test by user, after Holm's correction for the number of versions. "
        f"Coloured where it is below {SIGNIFICANT}: blue where the metric is higher, yellow where it is lower.</p>",
        "<h2>Segments</h2>",
        _segments_plot(segments, versions),
        _segments_table(segments, versions),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, "utf-8")
    except OSError as error:
        raise ConfigError(f"--page {path}: cannot be written ({error}); name another file") from error


def _metrics_table(rows: Sequence[Row], versions: Sequence[str]) -> str:
    cells = {(row["metric"], row["version"]): row for row in rows}
    lines: list[list[str]] = []
    for name in dict.fromkeys(row["metric"] for row in rows):
        meaning = MEANING.get(name, MEANING.get(name.partition("_at_")[0], ""))
        found = [_metric_cell(cells.get((name, version))) for version in versions]
        lines.append([f'<td title="{escape(meaning)}">{escape(name)}<br><small>{escape(meaning)}</small></td>', *found])
    return _table(["metric", *(f"version {version}" for version in versions)], lines)


def _metric_cell(row: Row | None) -> str:
    if row is None:
        return "<td>–</td>"
    text = _number(row["value"])
    if row.get("low") is not None:
        text += f" <small>[{_number(row['low'])}, {_number(row['high'])}]</small>"
    if row.get("difference") is None:
        return f"<td>{text}</td>"
    interval = f"[{_number(row['difference_low'])}, {_number(row['difference_high'])}]"
    text += f"<br><small>{row['difference']:+.4g} {interval}, p {row['p_holm']:.3g}</small>"
    side = "higher" if row["difference"] > 0 else "lower"
    return f'<td class="{side}">{text}</td>' if row["p_holm"] < SIGNIFICANT else f"<td>{text}</td>"


def _segments_table(rows: Sequence[Row], versions: Sequence[str]) -> str:
    names = list(dict.fromkeys(row["metric"] for row in rows))
    cells = {(row["segment"], row["version"], row["metric"]): row for row in rows}
    events = {row["segment"]: row["events"] for row in rows}
    lines = [
        [
            f"<td>{escape(segment)}</td><td>{count:,}</td><td>{escape(version)}</td>",
            *(f"<td>{_number(cells[segment, version, name]['value'])}</td>" for name in names),
        ]
        for segment, count in events.items()
        for version in versions
    ]
    return _table(["segment", "events", "version", *names], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _segments_plot(rows: Sequence[Row], versions: Sequence[str]) -> str:
    """Return the drawing of some metrics by segment, with intervals, as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    segments = list(dict.fromkeys(row["segment"] for row in rows))
    figure, axes = plt.subplots(
        1, len(SHOWN_BY_SEGMENT), figsize=(11, 1.2 + 0.3 * len(segments)), sharey=True, constrained_layout=True
    )
    for axis, metric in zip(axes, SHOWN_BY_SEGMENT, strict=True):
        for place, version in enumerate(versions):
            chosen = [row for row in rows if row["version"] == version and row["metric"] == metric]
            offset = 0.6 * ((place + 0.5) / len(versions) - 0.5)
            values = [row["value"] for row in chosen]
            errors = [[row["value"] - row["low"] for row in chosen], [row["high"] - row["value"] for row in chosen]]
            places = [number + offset for number in range(len(chosen))]
            axis.errorbar(values, places, xerr=errors, fmt="o", markersize=4, capsize=2, label=f"version {version}")
        axis.set(title=f"{metric.replace('_at_', '@')}, 95% intervals", xlim=(0, None))
        axis.set_yticks(range(len(segments)), segments)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(versions), frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
