"""A program with a Ray session, run by test_ray_session.py in a process of its own.

Arguments: how it ends (`return` or `wait` for a signal), then a port to serve HTTP on, if any. Prints one JSON line
once all is up: the processes it started and the session's folder.
"""

import json
import os
import sys
import threading

import psutil
import ray
from fastapi import FastAPI
from ray import serve

from cluster.ray_session import ray_session, serve_http

api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Greeter:
    """Answers who it is."""

    @api.get("/")
    def greet(self) -> int:
        """Return the replica's process id."""
        return os.getpid()


@ray.remote
def read_auth_mode() -> str | None:
    """Return what a worker sees."""
    return os.environ.get("RAY_AUTH_MODE")


def main(ending: str, port: int | None) -> None:
    """Open a session, report, then end as told."""
    with ray_session() as session:
        auth_mode = ray.get(read_auth_mode.remote())
        if port:
            serve_http("127.0.0.1", port)
            serve.run(Greeter.bind(), name="greeter", route_prefix="/")
        started = [(p.pid, p.create_time(), p.name()) for p in psutil.Process().children(recursive=True)]
        report = {"started": started, "folder": str(session.folder), "auth_mode": auth_mode}
        print(json.dumps(report), flush=True)
        if ending == "wait":
            threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
    if sys.argv[1] == "return":
        main("return", None)  # a second session in one process
        print(json.dumps({"after": os.environ.get("RAY_AUTH_TOKEN")}))
