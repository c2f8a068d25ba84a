"""Do stated interests beat the popular list for a user of whom nothing else is known?

    python -m benchmarks.interests --data DIR [--home DIR] [--quick]

In:  a prepared dataset whose items have categories and text. A third of the users is held out of training.
Out: NDCG@10 and Hit@10 on the second half of each held-out user's interactions, all items ranked, of
- the popular list;
- interests, with no history: the three categories that stand out among what the user liked in the first half, in plain
  words, in each of the forms tried: `as one item, and popular` is what serving does, `as history` has the popular ones
  among matching items stand for a history, `by text` ranks by likeness to the text, `text and popular` adds up the two;
- the newest 1, 5 and all interactions of the first half as a history, without interests, with, and `as history`;
and, with a category that the user never had stated as disliked, how many of the ten items shown have it.
Bound by what three words tell of a person: the last rows say how far a history is from there. `--home` keeps what was
trained for another run.
"""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import load_recipe
from cluster.dataset import Dataset, load_dataset, write_dataset
from cluster.home import Home
from cluster.log import Interaction
from cluster.ray_session import ray_session
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.interests import split_clauses
from training.evaluation.metrics import difference_interval
from training.models.interests import Interests, match_items
from training.models.served import ServedModel
from training.publish import publish_run
from training.trainer import train_on_ray

SHOWN = 10
HELD_OUT = 3
"""One of so many users."""
HISTORIES = (1, 5, 100)
SAID = 3
"""Categories that a user states."""
SMOOTHING = 0.02
LIKED_STARS = 4
PLAIN_WORDS = {"Sci-Fi": "science fiction", "Children's": "children's films", "Film-Noir": "film noir"}

Json = dict[str, Any]  # Any: whatever JSON holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A held-out user."""

    said: str
    unsaid: str
    """A category that none of the first half has."""
    history: list[Interaction]
    wanted: frozenset[str]
    """Items of the second half."""


def main() -> None:
    """Train, ask, compare."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--home", type=Path, help="where a trained version is kept, or is already")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    dataset = load_dataset(args.data)
    with contextlib.ExitStack() as stack:
        folder = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        model = _train(Home(folder.resolve()).ensure(), dataset, 1 if args.quick else args.epochs)
        people = _people(dataset)
        encoder = TextEncoder(EncoderConfig(), Home(folder.resolve()).cache)
        interests = [_read(person.said, encoder) for person in people]
        gains = {
            name: np.array([_gain(form(person, told), person) for person, told in zip(people, interests, strict=True)])
            for name, form in _forms(model).items()
        }
        avoided = _avoided(model, dataset, people, encoder)
    results: Json = {"people": len(people), "avoided": avoided, "ndcg_at_10": {}}
    for name, gain_N in gains.items():
        base = name.partition(",")[0] if name.startswith("history") else "popular"
        better = difference_interval(gain_N, gains[base], seed=0, groups_N=np.arange(len(gain_N)))
        told = {"mean": float(gain_N.mean()), "over": base, "gain": better.mean, "ci95": [better.low, better.high]}
        results["ndcg_at_10"][name] = told
        print(f"{name:32} {told['mean']:.4f}  over {base}: {better.mean:+.4f} [{better.low:+.4f}, {better.high:+.4f}]")
    served = results["ndcg_at_10"]["as one item, and popular"]
    checks = [
        build_check("interests over popular, ndcg_at_10", served["mean"] / gains["popular"].mean(), ">1"),
        build_check("its 95% interval's lower end", served["ci95"][0], ">0"),
        build_check("share of the disliked, against not stated", avoided["stated"] / avoided["not_stated"], "<=0.5"),
    ]
    for check in checks:
        print(f"{check.name:44} {check.value:>8.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    print_result(
        results=results, config={"data": args.data.name, "epochs": args.epochs, "quick": args.quick}, checks=checks
    )


def _train(home: Home, dataset: Dataset, epochs: int) -> ServedModel:
    """Return the model of a version trained without the held-out users; the home's, where it has one."""
    registry = Registry(home.registry)
    if not registry.versions():
        events = dataset.events()
        held_out = _held_out(events)
        kept = events.filter(pa.array([user_id not in held_out for user_id in events["user_id"].to_pylist()]))
        others = write_dataset(
            home.path / "without-held-out",
            name=dataset.info.name,
            events=kept,
            items=dataset.items(),
            users=dataset.users(),
            label=dataset.info.label,
            sources=dataset.info.sources,
            rejected=dataset.info.rejected,
        )
        overrides = ["train.workers=1", f"train.epochs={epochs}", f"train.patience={epochs}"]
        with ray_session("local"):
            publish_run(train_on_ray(load_recipe("movielens", overrides), others, home), registry)
    return ServedModel.load(registry, registry.current())


def _held_out(events: pa.Table) -> frozenset[str]:
    return frozenset(sorted(set(events["user_id"].to_pylist()))[::HELD_OUT])


def _people(dataset: Dataset) -> list[Person]:
    """Return the held-out users with what they say."""
    events, items = dataset.events(), dataset.items()
    categories = dict(zip(items["item_id"].to_pylist(), items["categories"].to_pylist(), strict=True))
    share = Counter(name for item_id in events["item_id"].to_pylist() for name in categories[item_id])
    held_out = _held_out(events)
    told: dict[str, list[Json]] = {}
    for event in events.select(["user_id", "item_id", "kind", "value", "ts_us"]).to_pylist():
        if event["user_id"] in held_out:
            told.setdefault(event["user_id"], []).append(event)
    people = []
    for of_user in told.values():
        first, second = of_user[: len(of_user) // 2], of_user[len(of_user) // 2 :]
        liked = [event for event in first if (event["value"] or 0) >= LIKED_STARS] or first
        had = Counter(name for event in liked for name in categories[event["item_id"]])
        common = {name: count / len(events) for name, count in share.items()}
        stands_out = {
            name: (count / len(liked)) * np.log((count / len(liked) + SMOOTHING) / (common[name] + SMOOTHING))
            for name, count in had.items()
        }
        said = sorted(stands_out, key=lambda name: -stands_out[name])[:SAID]
        seen = {name for event in first for name in categories[event["item_id"]]}
        people.append(
            Person(
                said=f"I like {_listed([_word(name) for name in said])}",
                unsaid=max((name for name in common if name not in had), key=lambda name: common[name], default=""),
                history=[Interaction(e["item_id"], e["kind"], e["value"], e["ts_us"], -1) for e in first],
                wanted=frozenset(event["item_id"] for event in second),
            )
        )
        assert seen, "half of a user's interactions is one at least"
    return people


def _word(category: str) -> str:
    return PLAIN_WORDS.get(category, category.lower())


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _read(said: str, encoder: TextEncoder) -> Interests:
    liked, disliked = split_clauses(said)
    vectors_NE = encoder.encode([liked, *disliked])
    return Interests(liked_E=vectors_NE[0] if liked else None, disliked_NE=vectors_NE[1:])


Form = Callable[[Person, Interests], list[str]]
"""Returns the items shown."""


def _forms(model: ServedModel) -> dict[str, Form]:
    def told(interests: Interests | None, after: Sequence[Interaction] = ()) -> list[str]:
        return model.recommend("", after, SHOWN, frozenset(e.item_id for e in after), interests).item_ids

    def as_history(interests: Interests, after: Sequence[Interaction] = ()) -> list[str]:
        rows = match_items(interests, model.text_IE.numpy(), model.popularity_I)
        had = [Interaction(model.item_ids[row], "like", None, after[0].ts_us if after else 0, 0) for row in rows]
        newest = after[max(len(after) + len(had) - model.max_history, 0) :]
        return model.recommend("", [*had, *newest], SHOWN, frozenset(e.item_id for e in after)).item_ids

    def by_text(interests: Interests, popular: float) -> list[str]:
        fit_I = model.text_IE.numpy() @ np.array(interests.liked_E)
        score_I = fit_I / fit_I.std() + popular * model.popularity_I / model.popularity_I.std()
        return [model.item_ids[row] for row in np.argsort(-score_I, kind="stable")[:SHOWN]]

    forms: dict[str, Form] = {
        "popular": lambda person, said: told(None),
        "as one item, and popular": lambda person, said: told(said),
        "as history": lambda person, said: as_history(said),
        "by text": lambda person, said: by_text(said, 0.0),
        "text and popular": lambda person, said: by_text(said, 5.0),
    }
    for count in HISTORIES:
        forms |= {
            f"history of {count}": lambda person, said, n=count: told(None, person.history[-n:]),
            f"history of {count}, interests": lambda person, said, n=count: told(said, person.history[-n:]),
            f"history of {count}, as history": lambda person, said, n=count: as_history(said, person.history[-n:]),
        }
    return forms


def _gain(shown: Sequence[str], person: Person) -> float:
    """Return NDCG of a list, every item of the second half being as good."""
    gain = sum(1 / np.log2(place + 2) for place, item_id in enumerate(shown) if item_id in person.wanted)
    return float(gain / sum(1 / np.log2(place + 2) for place in range(min(SHOWN, len(person.wanted)))))


def _avoided(model: ServedModel, dataset: Dataset, people: Sequence[Person], encoder: TextEncoder) -> dict[str, float]:
    """Return how many of the ten shown have a category, where people say they do not like it and where they do not."""
    items = dataset.items()
    categories = dict(zip(items["item_id"].to_pylist(), items["categories"].to_pylist(), strict=True))
    having: dict[str, list[float]] = {"stated": [], "not_stated": []}
    for person in people:
        if not person.unsaid:
            continue
        for name, said in (("stated", f"{person.said}, no {_word(person.unsaid)}"), ("not_stated", person.said)):
            interests = _read(said, encoder)
            shown = model.bury(model.recommend("", (), 100, frozenset(), interests), interests).item_ids[:SHOWN]
            having[name].append(float(np.mean([person.unsaid in categories[item_id] for item_id in shown])))
    return {name: float(np.mean(values)) for name, values in having.items()}


if __name__ == "__main__":
    main()
