"""The loop as a whole: no arm sees what it is asked, each event is learned once, nothing is left behind."""

import csv
import dataclasses
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from cluster.catalogue import Item
from cluster.events import Event, events_table
from cluster.log import EventLog
from cluster.ray_session import find_free_port
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.catalogue import LiveCatalogue
from serving.metrics import Metrics
from serving.recommender import Query, Recommender
from serving.refresh import Refresher
from training.evaluation.replay import Client, known_users, replay
from training.models.placing import PLACINGS
from training.online.learner import OnlineLearner
from training.policies import PolicyConfig

ARMS = ("frozen", "state", "live")
K = 10


class Stack:
    """Everything that answers and learns, without HTTP and clocks between: every step is taken when it is asked for."""

    def __init__(self, tiny, log: EventLog) -> None:
        self.log = log
        encoder = TextEncoder(tiny.recipe.section(EncoderConfig), tiny.home.cache)
        log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
        self.refresher = Refresher(
            tiny.registry,
            log,
            LiveCatalogue(log, lambda texts, version=None: encoder.encode(texts)),
            Metrics(),
            poll_interval_s=3_600,
        )
        self.refresher.load(1)
        residents = self.refresher
        self.recommender = Recommender(log, lambda: residents.residents, PolicyConfig(), seed=0, candidates=tiny.ITEMS)
        self.learner = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))

    def ask(self, user_id: str, arm: str, k: int = K):
        return self.recommender.recommend(Query(user_id=user_id, k=k, arm=arm))

    def take(self, event: Event) -> None:
        self.log.append([event])
        self.learner.learn(self.learner.read())
        self.learner.publish()
        self.refresher.follow()
        assert not self.refresher.problems


def slates(tiny, events) -> list[dict]:
    """Replay the events; return what each arm showed before each, as ids and scores."""
    shown = []
    with EventLog(tiny.home.log) as log:
        stack = Stack(tiny, log)
        for event in events:
            shown.append({arm: stack.ask(event.user_id, arm).slate for arm in ARMS})
            stack.take(event)
    return shown


def other_item(tiny, event: Event, by: int) -> Event:
    row = (int(event.item_id[1:]) + by) % tiny.ITEMS
    return dataclasses.replace(event, item_id=f"i{row}")


@pytest.mark.usefixtures("process_group")
def test_no_recommendation_depends_on_the_event_it_is_asked_for_or_on_later_ones(build_home):
    at = 12
    one, other = build_home(name="one"), build_home(name="other")
    events = one.live_events(24)
    changed = [*events[:at], *(other_item(one, event, by=7) for event in events[at:])]
    shown, shown_otherwise = slates(one, events), slates(other, changed)
    assert shown[: at + 1] == shown_otherwise[: at + 1]
    for arm in ("state", "live"):  # and what follows does depend on it, or nothing would be learned
        assert [s[arm].item_ids for s in shown[at + 1 :]] != [s[arm].item_ids for s in shown_otherwise[at + 1 :]]


@pytest.mark.usefixtures("process_group")
def test_frozen_never_changes_by_feedback_but_for_what_the_user_has(build_home):
    tiny = build_home()
    with EventLog(tiny.home.log) as log:
        stack = Stack(tiny, log)
        before = stack.ask("u0", "frozen", k=tiny.ITEMS)
        of_before = dict(zip(before.slate.item_ids, before.slate.scores, strict=True))
        clicked = set()
        for event in tiny.live_events(40):
            stack.take(event)
            if event.user_id == "u0":
                clicked.add(event.item_id)
        after = stack.ask("u0", "frozen", k=tiny.ITEMS)
        live = stack.ask("u0", "live", k=tiny.ITEMS)
    assert (after.version, after.learned_seq, after.state_seq) == ("1.0", 0, 0)
    assert after.slate.item_ids == [item_id for item_id in before.slate.item_ids if item_id not in clicked]
    assert after.slate.scores == pytest.approx([of_before[item_id] for item_id in after.slate.item_ids], abs=1e-6)
    assert live.learned_seq == 40
    assert live.slate.scores != after.slate.scores


@pytest.mark.usefixtures("process_group")
def test_a_new_item_is_placed_by_its_text_at_once_and_learns_from_its_first_clicks(build_home):
    tiny = build_home()
    with EventLog(tiny.home.log) as log:
        stack = Stack(tiny, log)
        log.put_items([Item(item_id="whale", text="a sea captain hunts a white whale")])
        stack.refresher.follow()
        everything = tiny.ITEMS + 1
        assert "whale" in stack.ask("u0", "live", k=everything).slate.item_ids
        stack.take(Event(user_id="u1", item_id="whale", kind="like", ts_us=1))
        assert "whale" in stack.learner.live.items.ids
        assert "whale" in stack.ask("u0", "live", k=everything).slate.item_ids
        assert "whale" not in stack.ask("u1", "live", k=everything).slate.item_ids


# --- as processes -----------------------------------------------------------------------------------------------------


def recloop(*words: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def last_json(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


@contextmanager
def running_recloop(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command as the leader of a process group of its own, as a shell would."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = subprocess.Popen([sys.executable, "-m", "cluster", *words], **pipes, text=True, start_new_session=True)
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def descendants(program: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(program.pid).children(recursive=True)


def survivors(processes: list[psutil.Process]) -> list[str]:
    return [f"{p.pid} {p.name()}" for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def find_trainer(program: subprocess.Popen[str]) -> psutil.Process:
    return next(p for p in descendants(program) if "OnlineTrainer" in " ".join(p.cmdline()))


def assert_whole(registry: Registry) -> None:
    """Every version and delta that can be seen can be read, and the pointer names one of them."""
    for manifest in registry.versions():
        chain = [registry.open_version(manifest.ref.version)]
        chain += [registry.open_delta(d.ref.version, d.ref.delta) for d in registry.deltas(manifest.ref.version)]
        for reader in chain:
            for name in reader.manifest.files:
                if name.endswith(".safetensors"):
                    reader.tensors(name.removesuffix(".safetensors"))
    if registry.versions():
        assert registry.manifest(registry.current())


def test_a_served_home_takes_a_replay_and_a_killed_trainer_and_learns_each_event_once(build_home):
    tiny = build_home()
    recipe = tiny.home.path / "tiny.toml"
    recipe.write_text(tiny.recipe.to_toml())
    port = find_free_port()
    flags = ("--home", str(tiny.home.path), "--port", str(port), "--recipe", str(recipe), "--json")
    with running_recloop("serve", *flags) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate()
        url = json.loads(line)["url"]

        first = tiny.live_events(60)
        record = replay(url, events_table(first), ARMS, known_users(tiny.registry.open_version(1).table("history")))
        assert record.acked_seqs.tolist() == list(range(1, 61))
        assert len(record.weights_ms) == 60
        assert {arm: len(ranks) for arm, ranks in record.ranks.items()} == dict.fromkeys(ARMS, 60)
        assert not record.cold.any()

        find_trainer(server).kill()
        client = Client(url)
        later = tiny.live_events(40, first=60)
        for event in [*first[50:], *later]:  # ten of them a second time
            body = {name: value for name, value in dataclasses.asdict(event).items() if value is not None}
            client.request("POST", "/v1/feedback", body)
        deadline_s = time.monotonic() + 40
        while client.request("GET", "/v1/versions")["learned_seq"] < 100:
            assert time.monotonic() < deadline_s, "the trainer has not come back"
            time.sleep(0.1)

        started = descendants(server)
        os.killpg(server.pid, signal.SIGINT)
        _, messages = server.communicate(timeout=60)
    assert (server.returncode, messages.splitlines()[-1]) == (130, "recloop: interrupted")
    assert survivors(started) == []
    assert_whole(tiny.registry)
    versions = tiny.registry.versions()
    deltas = [delta for manifest in versions for delta in tiny.registry.deltas(manifest.ref.version)]
    assert [m.first_seq for m in deltas] == [1, *(m.last_seq + 1 for m in deltas[:-1])]
    with EventLog(tiny.home.log) as log:
        assert log.verify().sound
        assert sum(m.metrics["events"] for m in deltas) == log.head_seq() == 100


# --- own data ---------------------------------------------------------------------------------------------------------

OWN_RECIPE = (
    "tables.dim=8",
    "tables.spare_rows=16",
    "model.max_history=8",
    "model.layers=1",
    "model.heads=1",
    "model.ranker_hidden=8",
    "data.batch_sequences=8",
    "data.negatives=16",
    "data.train_fraction=0.8",
    "data.validation_fraction=0.1",
    "train.final_epochs=1",
)


def write_own_events(path: Path) -> int:
    """Write a shop's clicks: semicolons, quotes, accents, a time nobody can read, a torn row. Return the sound ones."""
    rng = random.Random(0)
    rows = [
        [
            f"Käufer {n % 20}",
            f'artikel "{(n % 20 + rng.randrange(8)) % 24}", blau',
            f"2024-01-01T{n // 60:02}:{n % 60:02}:00Z",
        ]
        for n in range(600)
    ]
    sound = len(rows)
    rows += [["Käufer 1", "artikel x", "gestern"], ["", "artikel x", "2024-01-02T00:00:00Z"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Kunde", "Artikel Nr.", "am"])
        writer.writerows(rows)
    return sound


@pytest.mark.timeout(240)  # trains on Ray, with whatever else the cores do
def test_anyones_events_become_a_version_that_is_evaluated(tmp_path):
    events, home, data = tmp_path / "clicks.csv", tmp_path / "home", tmp_path / "shop"
    sound = write_own_events(events)
    items = tmp_path / "items.csv"
    named = [f'"artikel ""{n}"", blau",{("Hose", "Rock")[n % 2]}' for n in range(24)]
    items.write_text("\n".join(["nr,name", *named]))
    columns = ("--columns", "user=Kunde,item=Artikel Nr.,time=am")
    columns += ("--items", str(items), "--item-columns", "item=nr,text=name")
    common = ("--home", str(home), "--json", *(word for pair in OWN_RECIPE for word in ("--set", pair)))

    prepared = recloop("prepare", "--events", str(events), *columns, "--out", str(data), *common)
    assert prepared.returncode == 0, prepared.stderr
    counts = last_json(prepared.stdout)
    assert (counts["events"], counts["users"], counts["rejected"]) == (sound, 20, {"bad time": 1, "missing user": 1})

    data = Path(os.path.relpath(data))  # as a person names it: workers start elsewhere
    trained = recloop("train", "--data", str(data), "--workers", "1", "--epochs", "2", *common)
    assert trained.returncode == 0, trained.stderr
    run = last_json(trained.stdout)
    assert run["metrics"]["text_prior"] in {placing.prior for placing in PLACINGS}
    assert run["metrics"]["placed_ndcg_at_10"] >= run["metrics"]["best_ndcg_at_10"]  # of as many: all of them
    published = recloop("publish", *common)
    assert published.returncode == 0, published.stderr
    assert (last_json(published.stdout)["version"], last_json(published.stdout)["run"]) == ("1.0", run["folder"])

    evaluated = recloop("evaluate", "--data", str(data), *common)
    assert evaluated.returncode == 0, evaluated.stderr
    figures = last_json(evaluated.stdout)
    assert figures["version"] == "1.0"
    assert figures["scores"][0]["segment"] == "all"
    assert figures["scores"][0]["events"] == sound * 2 // 10
    assert 0 < figures["scores"][0]["hit_at_10"] <= 1
    assert 0 < figures["ease_refitted"]["hit_at_10"] <= 1
    assert last_json(recloop("versions", *common).stdout)["current"] == "1.0"


@pytest.mark.parametrize("rows", ["u1,i1,1700000000,click", "u1,i1,1700000000,impression\nu2,i1,1700000001,impression"])
def test_events_that_nothing_can_be_learned_from_are_an_error_in_one_line(tmp_path, rows):
    (tmp_path / "few.csv").write_text(f"user,item,time,kind\n{rows}\n")
    home = ("--home", str(tmp_path / "home"))
    columns = ("--columns", "user=user,item=item,time=time,kind=kind", "--out", str(tmp_path / "few"))
    assert recloop("prepare", "--events", str(tmp_path / "few.csv"), *columns, *home).returncode == 0
    trained = recloop("train", "--data", str(tmp_path / "few"), *home)
    assert trained.returncode == 3
    assert "no user has two interactions" in trained.stderr.splitlines()[-1]


# --- the demo ---------------------------------------------------------------------------------------------------------

DEMO = ("demo", "--events", "300", "--json", "--set", "train.epochs=2", "--set", "train.final_epochs=1")


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that keeps the dataset and the text vectors from one demo to the next."""
    return tmp_path_factory.mktemp("demo")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_the_whole_loop_and_reports_it(demo_home):
    done = recloop(*DEMO, "--home", str(demo_home), "--port", str(find_free_port()), timeout_s=800)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    summary = last_json(done.stdout)
    assert {"hit_at_10", "ndcg_at_10", "ci95", "freshness_ms", "events", "version", "seconds"} <= set(summary)
    assert set(summary["hit_at_10"]) == set(summary["ndcg_at_10"]) == set(ARMS)
    assert set(summary["freshness_ms"]) == {"state_p50", "state_p99", "weights_p50", "weights_p99"}
    assert (summary["events"], summary["lost"], summary["applied_twice"]) == (300, 0, 0)
    assert "live_minus_frozen" in summary["ci95"]["hit_at_10"]
    assert (demo_home / "reports" / "replay.png").stat().st_size > 10_000
    assert "arms:" in done.stderr
    assert_whole(Registry(demo_home / "demo" / "registry"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stage", "then_s"),
    [("", 1.5), ("training on", 0.5), ("training on", 12.0), ("published version", 2.0), ("serving at", 3.0)],
)
def test_ctrl_c_at_any_moment_of_the_demo_leaves_nothing_behind(demo_home, stage, then_s):
    port = find_free_port()
    before = set(Path("/tmp").glob("recloop-*"))
    with running_recloop(*DEMO, "--stay", "--home", str(demo_home), "--port", str(port)) as demo:
        assert demo.stderr is not None
        while stage and stage not in demo.stderr.readline():
            assert demo.poll() is None
        time.sleep(then_s)
        started = descendants(demo)
        os.killpg(demo.pid, signal.SIGINT)
        _, messages = demo.communicate(timeout=60)
    assert demo.returncode == 130, messages
    assert messages.splitlines()[-1] == "recloop: interrupted"
    assert "Traceback" not in messages
    assert survivors(started) == []
    assert set(Path("/tmp").glob("recloop-*")) <= before
    if (demo_home / "demo" / "registry").exists():
        assert_whole(Registry(demo_home / "demo" / "registry"))
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()
