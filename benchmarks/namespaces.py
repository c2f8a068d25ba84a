"""Does training survive the death of a machine, where each has a network of its own?

    python -m benchmarks.namespaces [--quick]        as root, on Linux: it makes network namespaces and removes them

In:  a folder of planted examples; a head and three nodes of one CPU, each in its own namespace with its own address and
     its own loopback, on one bridge; `recloop train` connects from the head's.
Out: whether the run ends with every example counted once after all processes of a busy node were killed (SIGKILL) and
     its link was taken away, the steps that were lost, and the seconds from the kill to the end.
What `resume` shows on one network is shown here over several: workers find each other by address, over gloo and Ray.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.harness import build_check, build_parser, print_result
from benchmarks.planted import write_examples
from benchmarks.resume import CHECKPOINT_STEPS, RAY_ENVIRONMENT, SMALL, steps_done, wait_for
from cluster.errors import EngineError
from training.examples.checkpoints import MANIFEST, SavedCheckpoint
from training.run import CHECKPOINTS_FOLDER

BRIDGE = "recloop-br"
NODES = 4
"""A head without CPUs and three nodes: two busy ones, and one to go to."""
WORKERS = 2
PORT = 6379
LIMIT_S = 400.0


def main() -> None:
    """Build the networks, train, kill a node, print."""
    args = build_parser(__doc__).parse_args()
    if os.geteuid() != 0:
        raise EngineError("network namespaces need root; `python -m benchmarks.resume` kills a node on one network")
    rows = 60_000 if args.quick else 400_000
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        folder = write_examples(
            Path(scratch) / "rows", rows, 20_000, 2_000, seed=1, part_rows=rows // 4, heldout_rows=1
        )
        result = train_and_kill(folder, Path(scratch))
    checks = [
        build_check("examples", result["examples"], f"=={rows}"),
        build_check("a_busy_node_was_killed", result["killed_workers"], ">=1"),
        build_check("steps_lost", result["steps_lost"], f"<={CHECKPOINT_STEPS}"),
    ]
    for check in checks:
        print(f"{check.name:28} {check.value:>12,.6g}  bar {check.bar:10} {'holds' if check.holds else 'MISSED'}")
    print_result(results=result, config={"rows": rows, "nodes": NODES, "quick": args.quick}, checks=checks)


def train_and_kill(folder: Path, scratch: Path) -> dict[str, float]:
    """Train over the nodes, kill a busy one after the second checkpoint, and wait for the end."""
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | RAY_ENVIRONMENT | token
    home = scratch / "home"
    with contextlib.ExitStack() as stack:
        spaces = [stack.enter_context(namespace(number)) for number in range(NODES)]
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        head = [*ray, "--head", f"--port={PORT}", f"--node-ip-address={address(0)}", f"--temp-dir={scratch}/ray"]
        nodes = [stack.enter_context(running(spaces[0], [*head, "--num-cpus=0"], environment))]
        for number in range(1, NODES):
            # One file system: nodes that start together would pick the same names for their sockets.
            wait_for(lambda: len([*scratch.glob("ray/session_2*/sockets/raylet*")]) == number)  # noqa: B023  (at once)
            join = [*ray, f"--address={address(0)}:{PORT}", f"--node-ip-address={address(number)}", "--num-cpus=1"]
            nodes.append(stack.enter_context(running(spaces[number], join, environment)))
        settings = [*SMALL, f"train.workers={WORKERS}", f"engine.ray_address={address(0)}:{PORT}"]
        flags = [word for setting in settings for word in ("--set", setting)]
        recloop = [str(Path(sys.executable).with_name("recloop")), "train", "--recipe", "clicks", "--json"]
        command = [*recloop, "--data", str(folder), "--home", str(home), *flags]
        time.sleep(5)
        driver = stack.enter_context(running(spaces[0], command, environment, stdout=subprocess.PIPE))
        metrics = wait_for(lambda: next(iter(home.glob("runs/clicks-*/metrics.jsonl")), None) or ended(driver))
        saved = f"{CHECKPOINTS_FOLDER}/step-*/{MANIFEST}"
        whole = wait_for(lambda: found if len(found := sorted(metrics.parent.glob(saved))) > 1 else ended(driver))
        victim = next(number for number in range(1, NODES) if train_workers(nodes[number]))
        killed = len(train_workers(nodes[victim]))
        kill_all(nodes[victim])
        _ip("-n", spaces[victim], "link", "delete", "eth0")
        struck_s = time.monotonic()
        lost = steps_done(metrics) - SavedCheckpoint.read(whole[-1].parent).position.steps
        output, _ = driver.communicate(timeout=LIMIT_S)
        if driver.returncode != 0:
            raise EngineError(f"recloop train ended with {driver.returncode} after a node was killed")
    trained = json.loads(output.splitlines()[-1])
    return {
        "examples": trained["examples"],
        "steps": trained["steps"],
        "steps_lost": lost,
        "killed_workers": killed,
        "seconds_after_the_kill": time.monotonic() - struck_s,
    }


def address(number: int) -> str:
    """Return a node's address on the bridge."""
    return f"10.77.0.{number + 1}"


@contextlib.contextmanager
def namespace(number: int) -> Iterator[str]:
    """Make a namespace whose one link is plugged into the bridge, which lives in the first one."""
    name, first = f"recloop-{os.getpid()}-{number}", f"recloop-{os.getpid()}-0"
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        if number == 0:
            _ip("-n", name, "link", "add", BRIDGE, "type", "bridge")
            _ip("-n", name, "link", "set", BRIDGE, "up")
            _ip("-n", name, "address", "add", f"{address(0)}/24", "dev", BRIDGE)
        else:
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", first)
            _ip("-n", first, "link", "set", f"port{number}", "master", BRIDGE, "up")
            _ip("-n", name, "address", "add", f"{address(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield name
    finally:
        _ip("netns", "delete", name)


@contextlib.contextmanager
def running(
    space: str, command: list[str], environment: dict[str, str], stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a namespace while the block lasts; all that it started ends with it."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", space, *command], env=environment, stdout=stdout, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_all(process)


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a process and all its descendants, at once."""
    root = psutil.Process(process.pid)
    for one in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()


def train_workers(node: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the train workers of a node."""
    children = psutil.Process(node.pid).children(recursive=True)
    return [one for one in children if one.is_running() and "RayTrainWorker" in " ".join(one.cmdline())]


def ended(driver: subprocess.Popen[str]) -> None:
    """Raise where the run has ended before anything was killed."""
    if driver.poll() is not None:
        raise EngineError(f"recloop train ended with {driver.returncode} before a node was killed")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    main()
