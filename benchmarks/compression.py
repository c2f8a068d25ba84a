"""What do smaller encoders cost? Speed, size and cold-item NDCG@10 of formats, pruned models and distilled students.

    python -m benchmarks.compression --data DIR [--seeds 4] [--epochs 8] [--further 10000] [--quick]

In:  a prepared dataset of films (MovieLens-100K).
Out: of each variant of the encoder, its texts a second of processor time, its bytes, its vectors' cosine to the
teacher's and its neighbours, and the NDCG@10 of later choices among items that no head has met, as in
`benchmarks.finetune films`: a head is trained on each variant's vectors. Students are distilled once, from the texts of
items that no draw holds out and of films of the packaged table that the dataset does not have.
What bounds it: what can be known of an item from its text. Rates are of one thread, in turns.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cold_choices import ColdChoices, held_out_items
from benchmarks.harness import build_check, build_parser, interleave, print_result
from cluster.config import load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.home import Home
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.encoder.config import FinetuneConfig
from training.encoder.learner import EncoderLearner
from training.encoder.student import distill
from training.encoder.tuned import TunedEncoder
from training.evaluation.metrics import difference_interval, ndcg_at_k
from training.prepare.films import FilmTable, title_keys
from training.prepare.movielens import item_text, parse_title

TEACHER, STUDENT = "float32", "student of 1 layer"
UNTAUGHT: dict[str, tuple[str, ...]] = {
    TEACHER: (),
    "bfloat16": ('encoder.dtype="bfloat16"',),
    "int8": ('encoder.dtype="int8"',),
    "3 of 6 layers": ("encoder.layers=3",),
    "half of the neurons": ("encoder.neurons=0.5",),
}
TAUGHT: dict[str, tuple[str, ...]] = {
    STUDENT: ("student.layers=1",),
    "student of 2 layers, half of the neurons": ("student.layers=2", "student.neurons=0.5"),
}
TITLE = re.compile(r"(.*?\(\d{4}\))")
TIMED = 256
"""Texts of a turn."""

Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Make the variants, time them, and train a head on each."""
    parser = build_parser(__doc__, repeats=5)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4, help="draws of items held out")
    parser.add_argument("--epochs", type=int, default=8, help="of distillation")
    parser.add_argument("--bfloat16", action="store_true", help="distil in bfloat16, from vectors in bfloat16")
    parser.add_argument("--further", type=int, default=10_000, help="films beside the dataset's that students learn")
    parser.add_argument("--students", nargs="*", choices=list(TAUGHT), default=list(TAUGHT))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(args.data)
    texts, seeds = dataset.items()["text"].to_pylist(), range(1 if args.quick else args.seeds)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("movielens")
        recipes = {name: recipe.with_overrides(settings) for name, settings in UNTAUGHT.items()}
        runs: Json = {}
        learned = _learned_texts(texts, seeds, 100 if args.quick else args.further)
        for name in args.students:
            settings = [f"student.epochs={1 if args.quick else args.epochs}", "student.fragments=0", *TAUGHT[name]]
            settings += ["student.bfloat16=true", 'encoder.dtype="bfloat16"'] if args.bfloat16 else []
            run = distill(recipe.with_overrides(settings), learned, Home(Path(folder) / "home").ensure())
            print(f"{name}: {json.dumps(run.metrics)}", file=sys.stderr, flush=True)
            recipes[name], runs[name] = recipe.with_overrides([f'encoder.model="{run.model}"']), run.metrics
        encoders = {name: TextEncoder(found.section(EncoderConfig)) for name, found in recipes.items()}
        vectors = {name: encoder.encode(texts) for name, encoder in encoders.items()}
        timed = [text for text in texts if text][: 16 if args.quick else TIMED]
        turns = interleave({name: _timer(encoder, timed) for name, encoder in encoders.items()}, args.repeats)
        ndcg = {name: _cold_ndcg(dataset, found, encoders[TEACHER], seeds) for name, found in vectors.items()}
        sizes = {name: _bytes(encoder) for name, encoder in encoders.items()}
    users = ndcg[TEACHER][1]
    results: Json = {"learned_texts": len(learned), "distillation": runs}
    for name, (value_P, _, by_seed) in ndcg.items():
        gain = difference_interval(value_P, ndcg[TEACHER][0], seed=0, groups_N=users)
        results[name] = {
            "texts_a_processor_second": turns.median(name),
            "times_as_fast": turns.ratio(name, TEACHER),
            "bytes": sizes[name],
            "cosine": float((vectors[name] * vectors[TEACHER]).sum(1).mean()),
            "cold_ndcg_at_10": float(value_P.mean()),
            "cold_ndcg_at_10_by_seed": by_seed,
            "over_the_teacher": float(value_P.mean() / ndcg[TEACHER][0].mean()),
            "gain": {"mean": gain.mean, "ci95": [gain.low, gain.high]},
        }
        print(f"{name:42} {results[name]}", file=sys.stderr, flush=True)
    checks = [
        build_check(f"{STUDENT}: times as fast", results[STUDENT]["times_as_fast"], ">=4"),
        build_check(f"{STUDENT}: cold NDCG@10 over the teacher's", results[STUDENT]["over_the_teacher"], ">=0.97"),
    ]
    for check in checks:
        print(f"{check.name:60} {check.value:>8.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    names = ("seeds", "epochs", "further", "students", "bfloat16", "quick", "repeats")
    print_result(
        results=results, config={name: getattr(args, name) for name in names} | {"data": args.data.name}, checks=checks
    )


def _learned_texts(texts: Sequence[str], seeds: Sequence[int], further: int) -> list[str]:
    """Return the texts of items that no draw holds out, and of other films."""
    held_out = {item for seed in seeds for item in held_out_items(len(texts), seed).tolist()}
    titles = [found[1] if (found := TITLE.match(text)) else text.partition(". ")[0] for text in texts]
    own = {key for title in titles for key in title_keys(parse_title(title)[0])}
    others = [
        item_text(film.title, film.year, (), film)
        for film in FilmTable.from_package().films()
        if own.isdisjoint(title_keys(film.title))
    ]
    chosen = np.random.default_rng(0).permutation(len(others))[:further]
    return [*(text for n, text in enumerate(texts) if n not in held_out), *(others[n] for n in chosen)]


def _timer(encoder: TextEncoder, texts: Sequence[str]) -> Callable[[], float]:
    def rate() -> float:
        began_s = time.process_time()
        encoder.encode(texts)
        return len(texts) / (time.process_time() - began_s)

    return rate


def _bytes(encoder: TextEncoder) -> int:
    """Return what the weights take in memory, in the format that they are kept in."""
    encoder.load()
    model = encoder._loaded.model
    packed = [module for module in model.modules() if hasattr(module, "_packed")]
    eight_bit = sum(module._packed.unpack()[0].numel() for module in packed)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return eight_bit + sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _cold_ndcg(
    dataset: Dataset, vector_IE: np.ndarray, teacher: TextEncoder, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Return NDCG@10 of each choice of an item held out, its user, and each draw's mean, given items' vectors."""
    values, users = [], []
    for seed in seeds:
        config = FinetuneConfig(seed=seed, tuned="frozen")
        choices = ColdChoices(dataset, seed, config)
        tuned = TunedEncoder(teacher, config, choices.inputs.texts)
        learner = EncoderLearner(tuned, choices.inputs, config, vector_IE)
        learner.run(lambda _: None)
        values.append(ndcg_at_k(choices.cold_ranks(learner), 10))
        users.append(choices.user_P + seed * 1_000_000)
    return np.concatenate(values), np.concatenate(users), [float(value.mean()) for value in values]


if __name__ == "__main__":
    main()
