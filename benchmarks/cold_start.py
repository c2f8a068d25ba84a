"""How soon after `PUT /v1/items` is a new item recommended, by its text alone?

    python -m benchmarks.cold_start --home DIR [--alone] [--quick]

In:  a home with a published version (`recloop train`, `recloop publish`), served by Ray Serve (with `--alone`, by a
replica without Ray); 100 new items, one a request, each with a text that nobody has sent before, and one request of
1,000; a user without history who asks for all there is.
Out: p50, p95 and p99 of the time from the request's first byte until an answer of `POST /v1/recommend` holds the item,
the PUT's own time, and both for the thousand; how many were there in the first answer after the PUT's.
Bound by the encoder: some 40 tokens each, on one core. The model is loaded before (`serve.warm_encoder`), as it is a
few seconds after any start.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.embeddings import HOST, Texts, call, running_process
from benchmarks.harness import build_check, build_parser, percentiles, print_result
from cluster.config import load_recipe
from cluster.home import Home
from cluster.ray_session import find_free_port, ray_session

ITEMS = 100
BULK = 1_000
PATIENCE_S = 60.0


def main() -> None:
    """Serve, put, ask."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--alone", action="store_true", help="a replica without Ray")
    args = parser.parse_args()
    items, bulk = (10, 50) if args.quick else (ITEMS, BULK)
    home, texts = Home(args.home.resolve()), Texts(seed=time.time_ns())
    with _served(home, alone=args.alone) as url:
        _put(url, [("warm-up", texts.draw(1)[0])])
        _wait(url, {"warm-up"})
        singles = []
        for number in range(items):
            singles.append(_put_and_find(url, [(f"new-{time.time_ns()}-{number}", texts.draw(1)[0])]))
        many = _put_and_find(url, [(f"many-{time.time_ns()}-{n}", text) for n, text in enumerate(texts.draw(bulk))])
    until_ms = percentiles(single["until_shown_ms"] for single in singles)
    results = {
        "until_shown_ms": until_ms,
        "put_ms": percentiles(single["put_ms"] for single in singles),
        "bulk": many,
        "bulk_items_per_s": bulk / many["until_shown_ms"] * 1e3,
        "in_first_answer": sum(single["answers"] == 1 for single in singles) / items,
    }
    checks = [
        build_check("until_shown_p99_ms", until_ms["p99"], "<=1000"),
        build_check("in_first_answer", results["in_first_answer"], "==1"),
        build_check("bulk_in_first_answer", float(many["answers"] == 1), "==1"),
    ]
    for check in checks:
        print(f"{check.name:32} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    print_result(results=results, config={"items": items, "bulk": bulk, "alone": args.alone}, checks=checks)


def _put_and_find(url: str, items: list[tuple[str, str]]) -> dict[str, float]:
    began_s = time.perf_counter()
    _put(url, items)
    put_s = time.perf_counter()
    answers = _wait(url, {item_id for item_id, _ in items})
    return {
        "put_ms": (put_s - began_s) * 1e3,
        "until_shown_ms": (time.perf_counter() - began_s) * 1e3,
        "answers": answers,
    }


def _put(url: str, items: list[tuple[str, str]]) -> None:
    body = {"items": [{"item_id": item_id, "text": text} for item_id, text in items]}
    accepted = call("PUT", f"{url}/v1/items", body)["accepted"]
    assert accepted == len(items), f"{accepted} of {len(items)} are accepted"


def _wait(url: str, item_ids: set[str]) -> int:
    """Return how many answers it took until one held all the items."""
    until_s = time.monotonic() + PATIENCE_S
    for answers in range(1, 1_000_000):
        shown = call("POST", f"{url}/v1/recommend", {"user_id": "a stranger", "k": 10_000})["items"]
        if item_ids <= {item["item_id"] for item in shown}:
            return answers
        if time.monotonic() > until_s:
            break
    raise RuntimeError(f"{len(item_ids)} items are not shown after {PATIENCE_S:.0f} s")


@contextlib.contextmanager
def _served(home: Home, *, alone: bool) -> Iterator[str]:
    port = find_free_port()
    if alone:
        command = [sys.executable, "-m", "benchmarks.embeddings", "--serve", str(home.path), str(port)]
        with running_process(command, f"http://{HOST}:{port}/readyz"):
            yield f"http://{HOST}:{port}"
    else:
        from serving.app import running_app

        with ray_session("local"), running_app(load_recipe("movielens"), home, HOST, port) as url:
            yield url


if __name__ == "__main__":
    main()
