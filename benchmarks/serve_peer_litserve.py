"""LitServe serving the ranker of serve_peers.py, started as that is; needs a Python that also has `litserve`."""

import os
import signal
import threading
import time
import urllib.request
from typing import Any

import litserve  # pyright: ignore[reportMissingImports]

from benchmarks.serve_peers import load_ranker, parse_args, wait_for_end
from cluster.home import Home

POLL_S = 0.2


class Ranker(litserve.LitAPI):
    """Answers one request at a time, as LitServe does unless told to batch."""

    def __init__(self, home: Home, overrides: list[str]) -> None:
        super().__init__(api_path="/v1/recommend")
        self._home, self._overrides = home, overrides

    def setup(self, device: str) -> None:
        """Load the model, in the worker's process."""
        self._rank = load_ranker(self._home, self._overrides)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what was asked."""
        return request

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """Return the answer."""
        return self._rank(x)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return what goes out."""
        return output


def announce(port: int) -> None:
    """Say when the server answers, and end it when it is to end."""
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
        except OSError:
            time.sleep(POLL_S)
    wait_for_end()
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    """Serve until standard input ends."""
    args = parse_args()
    threading.Thread(target=announce, args=(args.port,), daemon=True).start()
    server = litserve.LitServer(Ranker(args.home, args.overrides), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=args.port, log_level="error", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
