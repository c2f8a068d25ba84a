"""How many item texts a second does the text encoder turn into vectors, beside sentence-transformers and a plain loop?

Bounded by the matrix products of the model: the plain loop (texts sorted by length, 32 a batch, nothing but tokenizer,
model and mean) is the ceiling in float32. sentence-transformers runs with the defaults of `encode`, in a process of its
own under another Python (`--sentence-transformers PYTHON`), on the same model folder, threads, texts and tokens read;
without the flag it is left out. All turns are interleaved. A rate is texts a second of processor time, so that
neighbours on a shared machine weigh less; rates by the clock are in the result too.

bfloat16 and int8 pay where the processor multiplies them: `fastest` in the result says what does here.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread is one thread

import numpy as np
import torch

from benchmarks.harness import build_check, build_parser, interleave, print_result
from cluster.dataset import load_dataset
from cluster.home import find_home
from embeddings.encoders.precision import DTYPES, fastest_dtype, measure_dtypes
from embeddings.encoders.pretrained import load_model, load_tokenizer, locate_model
from embeddings.text_encoder import EncoderConfig, TextEncoder

PEER = Path(__file__).with_name("encoding_peer.py")
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.99}


class Peer:
    """sentence-transformers in a process of its own."""

    def __init__(self, python: Path, location: str, options: argparse.Namespace, texts: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [python, PEER, location, str(options.max_tokens), str(options.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._ask(list(texts))["version"]

    def _ask(self, message: object) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def encode(self) -> tuple[float, float]:
        """Encode the texts; return processor seconds and seconds."""
        answer = self._ask("encode")
        return answer["cpu_s"], answer["wall_s"]

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor seconds and the seconds that work takes."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


def build_plain_loop(location: str, max_tokens: int, texts: Sequence[str]) -> Callable[[], np.ndarray]:
    tokenizer, model = load_tokenizer(location, location), load_model(location)
    ordered = sorted(texts, key=len)

    def run() -> np.ndarray:
        vectors = []
        with torch.inference_mode():
            for first in range(0, len(ordered), 32):
                tokens = tokenizer(
                    ordered[first : first + 32],
                    padding=True,
                    truncation=True,
                    max_length=max_tokens,
                    return_tensors="pt",
                )
                hidden_BLE = model(**tokens).last_hidden_state
                mask_BL1 = tokens["attention_mask"].unsqueeze(-1)
                mean_BE = (hidden_BLE * mask_BL1).sum(1) / mask_BL1.sum(1)
                vectors.append(torch.nn.functional.normalize(mean_BE, dim=-1).numpy())
        return np.concatenate(vectors)

    return run


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--dataset", type=Path, help="a prepared dataset; the home folder's movielens unless given")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, default=512, help="how many of its items' texts, %(default)s unless given")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="all unless given")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sentence-transformers", type=Path, metavar="PYTHON", help="of an environment that has it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    home = find_home()
    catalogue = load_dataset(options.dataset or home.default_dataset).items()["text"].to_pylist()
    texts = [text for text in catalogue if text]
    texts = texts[:: max(1, len(texts) // (64 if options.quick else options.texts))]
    location = locate_model(options.model, home.cache)
    base = EncoderConfig(model=location, max_tokens=options.max_tokens)
    encoders = {
        dtype: TextEncoder(replace(base, dtype=dtype))  # pyright: ignore[reportArgumentType]  # argparse has checked it
        for dtype in dict.fromkeys(["float32", *options.dtypes])
    }
    vectors = {dtype: encoder.encode(texts) for dtype, encoder in encoders.items()}
    cosine = {dtype: float((vectors[dtype] * vectors["float32"]).sum(1).min()) for dtype in encoders}
    wall_rates: dict[str, list[float]] = {}

    def rate(name: str, timing: tuple[float, float]) -> float:
        wall_rates.setdefault(name, []).append(len(texts) / timing[1])
        return len(texts) / timing[0]

    def turn(name: str, work: Callable[[], object]) -> Callable[[], float]:
        return lambda: rate(name, timed(work))

    variants = {dtype: turn(dtype, partial(encoder.encode, texts)) for dtype, encoder in encoders.items()}
    plain = build_plain_loop(location, options.max_tokens, texts)
    variants["plain_loop"] = turn("plain_loop", plain)
    peer = None
    if options.sentence_transformers:
        peer = Peer(options.sentence_transformers, location, options, texts)
        variants["sentence_transformers"] = lambda: rate("sentence_transformers", peer.encode())
    best_ms = measure_dtypes()
    fastest = {"any": fastest_dtype(best_ms), "exact": fastest_dtype(best_ms, exact=True)}
    if best_ms["bfloat16"] > 2 * best_ms["float32"]:
        variants.pop("bfloat16", None)  # no matrix unit for it: minutes for a foregone answer
    turns = interleave(variants, options.repeats, warm_ups=0 if options.quick else 1)
    checks = [build_check(f"cosine_{dtype}", cosine[dtype], f">={LEAST_COSINE[dtype]}") for dtype in encoders]
    checks.append(build_check("float32_vs_plain_loop", turns.ratio("float32", "plain_loop"), ">=1"))
    if peer is not None:
        peer.close()
        quickest = max((dtype for dtype in encoders if dtype in variants), key=turns.median)
        ratio = turns.ratio(quickest, "sentence_transformers")
        checks.append(build_check(f"{quickest}_vs_sentence_transformers", ratio, ">=2"))
    print_result(
        results={
            "texts_a_processor_second": turns.summary(),
            "texts_a_second_by_the_clock": {name: float(np.median(rates)) for name, rates in wall_rates.items()},
            "layer_ms": best_ms,
            "fastest": fastest,
        },
        config={
            **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            "texts": len(texts),
            "sentence_transformers_version": peer.version if peer else None,
        },
        checks=checks,
    )


if __name__ == "__main__":
    main()
