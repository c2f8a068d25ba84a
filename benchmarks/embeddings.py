"""How fast are vectors of texts over HTTP, against a plain torch loop on the same model, and against infinity-emb?

    python -m benchmarks.embeddings [--infinity PATH/infinity_emb] [--home DIR] [--alone] [--quick]

In:  requests of 32 distinct texts of 6 to 60 words, none of them asked before, four at a time, base64 as OpenAI's
client asks; the packaged MiniLM, one torch thread everywhere.
Out: texts a second, and for one text at a time p50, p95 and p99, in turns: the app behind Ray Serve and HAProxy (with
`--alone` a replica without Ray), the loop (tokenizer, forward, mean, normalise, batches of 32 as they come) in this
process, and the same requests to infinity-emb, where its program is given (a virtual environment of its own).
Bound by the forward pass on one core. The loop pays no HTTP, no JSON and no other process, and pads each batch to its
longest text, which the app does not: its batches are of like length, across requests.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.harness import build_check, build_parser, interleave, percentiles, print_result
from cluster.config import load_recipe
from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.home import Home
from cluster.ray_session import find_free_port, ray_session
from embeddings.text_encoder import EncoderConfig, TextEncoder

MODEL = "all-MiniLM-L6-v2"
BATCH = 32
CLIENTS = 4
HOST = "127.0.0.1"
START_S = 300.0
WORDS = [
    "a",
    "the",
    "of",
    "in",
    "and",
    "with",
    "quiet",
    "village",
    "detective",
    "murder",
    "winter",
    "ocean",
    "captain",
    "love",
    "war",
    "train",
    "night",
    "city",
    "stranger",
    "daughter",
    "brother",
    "secret",
    "letter",
    "journey",
    "mountain",
    "island",
    "king",
    "soldier",
    "doctor",
    "teacher",
    "music",
    "dance",
    "jazz",
    "robbery",
    "bank",
    "desert",
    "horse",
    "sheriff",
    "robot",
    "future",
    "planet",
    "ghost",
    "house",
    "forest",
    "child",
    "summer",
    "school",
    "friend",
    "betrayal",
    "trial",
    "jury",
    "lawyer",
    "chef",
    "kitchen",
    "river",
    "bridge",
    "storm",
    "ship",
    "whale",
    "island",
    "spy",
    "embassy",
    "code",
    "mathematician",
    "painter",
    "museum",
    "theft",
    "comedy",
    "tender",
    "brutal",
    "slow",
    "hopeful",
    "bleak",
    "funny",
    "strange",
    "luminous",
    "directed",
    "starring",
    "from",
    "years",
    "later",
]


def main() -> None:
    """Serve, measure in turns, print."""
    parser = build_parser(__doc__)
    parser.add_argument("--infinity", metavar="PROGRAM", help="infinity_emb of another virtual environment")
    parser.add_argument("--alone", action="store_true", help="a replica without Ray")
    parser.add_argument("--home", type=Path, help="a home with a published version; else one is made")
    parser.add_argument("--serve", nargs=2, metavar=("HOME", "PORT"), help=argparse.SUPPRESS)  # how it starts a replica
    args = parser.parse_args()
    if args.serve:
        _serve_alone(Home(Path(args.serve[0])), int(args.serve[1]))
        return
    requests, singles = (4, 5) if args.quick else (16, 60)
    texts = Texts()
    loop = PlainLoop()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))  # Ray's socket paths must be short
        url = stack.enter_context(_served(folder, args.home, alone=args.alone))
        urls = {"recloop": (f"{url}/v1/embeddings", MODEL)}
        if args.infinity:
            urls["infinity"] = (stack.enter_context(_infinity(args.infinity, loop.location)), MODEL)
        differs = _differs(urls["recloop"], loop, texts)
        variants = {name: _throughput(at, texts, requests) for name, at in urls.items()}
        variants["plain loop"] = lambda: loop.throughput(texts.draw(BATCH) for _ in range(requests))
        turns = interleave(variants, args.repeats)
        latency = {name: _latency(at, texts, singles) for name, at in urls.items()}
    results = {
        "texts_per_s": turns.summary(),
        "single_text_ms": latency,
        "largest_difference_to_loop": differs,
        "vs_plain_loop": turns.ratio("recloop", "plain loop"),
    }
    checks = [
        build_check("recloop_vs_plain_loop", turns.ratio("recloop", "plain loop"), ">=0.9"),
        build_check("largest_difference_to_loop", differs, "<=0.0001"),
    ]
    if args.infinity:
        checks.append(build_check("recloop_vs_infinity", turns.ratio("recloop", "infinity"), ">=1.0"))
    for check in checks:
        print(f"{check.name:32} {check.value:>10.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"batch": BATCH, "clients": CLIENTS, "requests": requests, "alone": args.alone, "quick": args.quick}
    print_result(results=results, config=config, checks=checks)


class Texts:
    """Draws texts nobody has asked before."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._drawn = 0

    def draw(self, count: int) -> list[str]:
        """Return so many; each has a number, so that no two are alike."""
        lengths = self._rng.integers(6, 61, count)
        self._drawn += count
        first = self._drawn - count
        return [f"{' '.join(self._rng.choice(WORDS, n))} {first + place}" for place, n in enumerate(lengths)]


class PlainLoop:
    """What one writes in a notebook."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(1)
        self.location = str(TextEncoder(EncoderConfig()).location)
        self._tokenizer = AutoTokenizer.from_pretrained(self.location)
        self._model = AutoModel.from_pretrained(self.location).eval()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return unit vectors of one batch."""
        import torch

        with torch.inference_mode():
            tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden_BLE = self._model(**tokens).last_hidden_state
            mask_BL1 = tokens["attention_mask"].unsqueeze(-1).float()
            mean_BE = (hidden_BLE * mask_BL1).sum(1) / mask_BL1.sum(1)
            return torch.nn.functional.normalize(mean_BE, dim=-1).numpy()

    def throughput(self, batches: Iterator[list[str]]) -> float:
        """Return texts a second."""
        drawn = list(batches)
        began_s = time.perf_counter()
        for batch in drawn:
            self.encode(batch)
        return sum(map(len, drawn)) / (time.perf_counter() - began_s)


Address = tuple[str, str]
"""A URL, and the model's name there."""


def _throughput(at: Address, texts: Texts, requests: int) -> Callable[[], float]:
    def measure() -> float:
        bodies = [_body(texts.draw(BATCH), at[1]) for _ in range(requests)]
        with ThreadPoolExecutor(CLIENTS) as clients:
            began_s = time.perf_counter()
            for answer in clients.map(lambda body: call("POST", at[0], body), bodies):
                assert len(answer["data"]) == BATCH, answer
            return requests * BATCH / (time.perf_counter() - began_s)

    return measure


def _latency(at: Address, texts: Texts, singles: int) -> dict[str, float]:
    took_ms = []
    for _ in range(singles):
        body = _body(texts.draw(1), at[1])
        began_s = time.perf_counter()
        call("POST", at[0], body)
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    return percentiles(took_ms)


def _differs(at: Address, loop: PlainLoop, texts: Texts) -> float:
    """Return the largest difference of a number between the app's vectors and the loop's."""
    drawn = texts.draw(BATCH)
    body = json.dumps({"model": at[1], "input": drawn, "encoding_format": "float"}).encode()
    served = np.array([entry["embedding"] for entry in call("POST", at[0], body)["data"]])
    return float(np.abs(served - loop.encode(drawn)).max())


def _body(texts: list[str], model: str) -> bytes:
    return json.dumps({"model": model, "input": texts, "encoding_format": "base64"}).encode()


def call(method: str, url: str, body: object) -> dict[str, Any]:
    """Send JSON, or bytes that are; return what is answered. Raises `RuntimeError` unless it is sound."""
    parts = urlsplit(url)
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(parts.netloc, timeout=120)
    try:
        connection.request(method, parts.path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{url}: {response.status} {text[:300]!r}")
        return json.loads(text)
    finally:
        connection.close()


@contextlib.contextmanager
def _served(folder: Path, given: Path | None, *, alone: bool) -> Iterator[str]:
    """Serve the home that is given, or a version of the popular list, which costs nothing beside the encoder."""
    from training.classical import fit_system
    from training.prepare.movielens import prepare_movielens
    from training.publish import publish_run

    home, recipe = Home((given or folder / "home").resolve()).ensure(), load_recipe("popularity")
    if given is None:
        prepare_movielens(home.default_dataset)
        publish_run(fit_system(recipe, load_dataset(home.default_dataset), home), open_registry(recipe, home))
    port = find_free_port()
    if alone:
        command = [sys.executable, "-m", "benchmarks.embeddings", "--serve", str(home.path), str(port)]
        with running_process(command, f"http://{HOST}:{port}/readyz"):
            yield f"http://{HOST}:{port}"
    else:
        from serving.app import running_app

        with ray_session("local"), running_app(recipe, home, HOST, port) as url:
            yield url


def _serve_alone(home: Home, port: int) -> None:
    """Answer without Ray until terminated."""
    from serving.past import seed_history
    from serving.replica import resolve_settings
    from serving.standby import Standby

    recipe = load_recipe("popularity")
    seed_history(open_registry(recipe, home), home.log)
    ports = {"stats_port": find_free_port(), "fallback_port": find_free_port()}
    with Standby(resolve_settings(recipe, home), HOST, port, **ports):
        signal.pause()


@contextlib.contextmanager
def _infinity(program: str, location: str) -> Iterator[str]:
    port = find_free_port()
    command = [program, "v2", "--model-id", location, "--served-model-name", MODEL, "--engine", "torch"]
    command += ["--device", "cpu", "--batch-size", str(BATCH), "--host", HOST, "--port", str(port)]
    command += ["--no-bettertransformer", "--no-model-warmup"]
    with running_process(command, f"http://{HOST}:{port}/health"):
        yield f"http://{HOST}:{port}/embeddings"


@contextlib.contextmanager
def running_process(command: list[str], ready_url: str) -> Iterator[None]:
    """Run a server with one thread while the block lasts; returns once it answers."""
    quiet = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + START_S
        while True:
            if server.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"{command[0]}: does not answer at {ready_url}")
            with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(ready_url, timeout=5):
                break
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    main()
