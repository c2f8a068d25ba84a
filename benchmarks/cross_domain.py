"""Does a rich domain help a poor one? Users new to the poor domain, with what they did in the rich one and without.

    python -m benchmarks.cross_domain --data DIR --poor "Children's" [--seeds 3] [--quick]

In:  a prepared dataset; its items of the category given are the poor domain, all others the rich one.
Out: NDCG@10 and Hit@10 of two models, one trained on the poor domain alone and one on both, with one encoder and one
row a user. Half of the users who were in both domains are new to the poor one: training sees nothing that they did
there, and each such interaction is looked for in the slate that is served in that domain after what they had done in
the rich one by then. The model of the poor domain alone knows nothing of them, and serves what is popular there.
What bounds it: the poor domain's items are chosen among themselves. Users are split, time is not: others' interactions
of the same days are known to both models.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import load_recipe
from cluster.dataset import Dataset, load_dataset, write_dataset
from cluster.events import INTERACTION_KINDS
from cluster.home import Home
from cluster.log import Interaction
from cluster.ray_session import ray_session
from cluster.registry import Registry
from training.evaluation.metrics import difference_interval, hit_at_k, mean_interval, ndcg_at_k
from training.models.served import ServedModel
from training.models.tags import PutTags
from training.publish import publish_run
from training.trainer import train_on_ray

K = 10
NOBODY = "a user without a row"
"""As whom new users are served: their rows have learned from what they did after the choice, too."""
RICH, POOR = "rich", "poor"
ARMS = ("poor alone", "both domains")
OVERRIDES = ("train.workers=1", "data.train_fraction=0.999")
"""Training has all that is given to it: what is tested is kept from it by user."""

Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Train both, and compare what they serve."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--poor", required=True, metavar="CATEGORY", help="items of it are the poor domain")
    parser.add_argument("--recipe", default="movielens")
    parser.add_argument("--seeds", type=int, default=1, help="draws of new users, and trainings of each model")
    args = parser.parse_args()
    domains = Domains(load_dataset(args.data), args.poor)
    values: dict[str, dict[str, list[np.ndarray]]] = {arm: {"ndcg_at_10": [], "hit_at_10": []} for arm in ARMS}
    interactions: list[int] = []
    with ray_session("local"), tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if args.quick else args.seeds):
            new = domains.draw_new_users(seed)
            overrides = [*OVERRIDES, f"train.seed={seed}", *(["train.epochs=1"] if args.quick else [])]
            for arm, trained in zip(ARMS, ([POOR], [POOR, RICH]), strict=True):
                known = domains.known(new, trained, Path(folder) / f"data {arm} {seed}")
                home = Home(Path(folder) / f"{arm} {seed}").ensure()
                registry = Registry(home.registry)
                ref = publish_run(train_on_ray(load_recipe(args.recipe, overrides), known, home), registry)
                found = _served(ServedModel.load(registry, ref), domains, new)
                for metric, value_of in (("ndcg_at_10", ndcg_at_k), ("hit_at_10", hit_at_k)):
                    values[arm][metric].append(np.array([value_of(ranks, K).mean() for ranks in found]))
                interactions.append(sum(map(len, found)))
                print(f"{arm}, seed {seed}: {values[arm]['ndcg_at_10'][-1].mean():.4f}", file=sys.stderr, flush=True)
    results: Json = {"interactions": interactions[:: len(ARMS)]}
    ndcg = {arm: np.concatenate(values[arm]["ndcg_at_10"]) for arm in ARMS}
    for arm in ARMS:
        results[arm] = {"seeds": [float(of_seed.mean()) for of_seed in values[arm]["ndcg_at_10"]]}
        for metric, of_seeds in values[arm].items():
            interval = mean_interval(np.concatenate(of_seeds), seed=0)
            results[arm][metric] = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
    gain = difference_interval(ndcg[ARMS[1]], ndcg[ARMS[0]], seed=0)
    results["gain"] = {"mean": gain.mean, "ci95": [gain.low, gain.high]}
    checks = [
        build_check(
            "new users: ndcg_at_10 with both domains over the poor alone, lower end of the gain", gain.low, ">0"
        )
    ]
    for check in checks:
        print(f"{check.name:80} {check.value:>8.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {name: getattr(args, name) for name in ("poor", "recipe", "seeds", "quick")} | {"data": args.data.name}
    print_result(results=results, config=config, checks=checks)


class Domains:
    """A dataset whose items of a category are one domain and all others another."""

    def __init__(self, dataset: Dataset, poor: str) -> None:
        items = dataset.items()
        is_poor = pa.array([poor in categories for categories in items["categories"].to_pylist()])
        self.items = _with_column(items, "domain", pc.if_else(is_poor, POOR, RICH))
        self.poor_ids = frozenset(items["item_id"].filter(is_poor).to_pylist())
        events = dataset.events()
        self.is_poor = pc.is_in(events["item_id"], pa.array(sorted(self.poor_ids)))
        self.events = _with_column(events, "domain", pc.if_else(self.is_poor, POOR, RICH).combine_chunks())
        self._dataset = dataset

    def draw_new_users(self, seed: int) -> list[str]:
        """Return half of those who were in both domains."""
        there, elsewhere = (set(self.events.filter(found)["user_id"].to_pylist()) for found in self._parts())
        both = sorted(there & elsewhere)
        return np.random.default_rng(seed).permutation(both)[: len(both) // 2].tolist()

    def known(self, new: list[str], domains: list[str], path: Path) -> Dataset:
        """Write what training is given: of some domains, and of new users nothing from the poor one."""
        is_new = pc.is_in(self.events["user_id"], pa.array(new))
        kept = pc.and_(pc.is_in(self.events["domain"], pa.array(domains)), pc.invert(pc.and_(is_new, self.is_poor)))
        events = self.events.filter(kept)
        users = self._dataset.users()
        return write_dataset(
            path,
            name=self._dataset.info.name,
            events=events,
            items=self.items.filter(pc.is_in(self.items["domain"], pa.array(domains))),
            users=users.filter(pc.is_in(users["user_id"], events["user_id"].unique())),
            label=self._dataset.info.label,
            sources=self._dataset.info.sources,
            rejected=self._dataset.info.rejected,
        )

    def _parts(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        return self.is_poor, pc.invert(self.is_poor)


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)


def _served(model: ServedModel, domains: Domains, new: list[str]) -> list[np.ndarray]:
    """Return, of each new user, the place in the slate served in the poor domain of each item that they chose there.

    K + 1 stands for what the slate does not have.
    """
    events = domains.events.filter(pc.is_in(domains.events["kind"], pa.array(sorted(INTERACTION_KINDS))))
    within_I, found = model.within([], POOR, PutTags()), []
    columns = [events[name] for name in ("user_id", "item_id", "kind", "value", "ts_us")]
    of_user: dict[str, list[Interaction]] = {user_id: [] for user_id in new}
    for user_id, item_id, kind, value, ts_us in zip(*(column.to_pylist() for column in columns), strict=True):
        if user_id in of_user:
            of_user[user_id].append(Interaction(item_id, kind, value, ts_us, -1))
    for interactions in of_user.values():
        ranks = []
        for n, chosen in enumerate(interactions):
            if chosen.item_id in domains.poor_ids:
                before = [entry for entry in interactions[:n] if entry.item_id not in domains.poor_ids]
                slate = model.recommend(NOBODY, before, K, within_I=within_I).item_ids
                ranks.append(slate.index(chosen.item_id) + 1 if chosen.item_id in slate else K + 1)
        if ranks:
            found.append(np.array(ranks))
    return found


if __name__ == "__main__":
    main()
