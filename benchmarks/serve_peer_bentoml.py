"""BentoML serving the ranker of serve_peers.py, started as that is; needs a Python with `bentoml` beside recloop's."""

import os
import subprocess
import sys
import time
import urllib.request
from typing import Any

HOME, OVERRIDES = "RECLOOP_PEER_HOME", "RECLOOP_PEER_SET"
WORKERS = "RECLOOP_PEER_WORKERS"
POLL_S = 0.2


def build_service() -> type:
    """Return the service: one route, JSON in and out."""
    from pathlib import Path

    import bentoml  # pyright: ignore[reportMissingImports]

    from benchmarks.serve_peers import load_ranker
    from cluster.home import Home

    @bentoml.service(workers=int(os.environ[WORKERS]), traffic={"timeout": 60}, logging={"access": {"enabled": False}})
    class Ranker:
        def __init__(self) -> None:
            overrides = [override for override in os.environ[OVERRIDES].split("\n") if override]
            self._rank = load_ranker(Home(Path(os.environ[HOME])), overrides)

        @bentoml.api(route="/v1/recommend")
        def recommend(self, user_id: str, k: int = 10) -> dict[str, Any]:
            return self._rank({"user_id": user_id, "k": k})

    return Ranker


def main() -> None:
    """Serve until standard input ends."""
    from benchmarks.serve_peers import parse_args, wait_for_end

    args = parse_args()
    told = {HOME: str(args.home.path), OVERRIDES: "\n".join(args.overrides), WORKERS: os.environ.get(WORKERS, "1")}
    quiet = {"BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.serve_peer_bentoml:service"]
    command += ["--host", "127.0.0.1", "--port", str(args.port)]
    process = subprocess.Popen(command, env=os.environ | told | quiet, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{args.port}/readyz", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, "bentoml has ended"
                time.sleep(POLL_S)
        wait_for_end()
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
elif HOME in os.environ:
    service = build_service()
