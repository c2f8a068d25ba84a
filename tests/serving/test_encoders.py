"""Each version's texts are read by its own encoder, before, during and after another one takes its place."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.catalogue import Item
from cluster.errors import EngineError
from cluster.events import Event
from cluster.home import Home
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.adapter import Adapter
from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.catalogue import LiveCatalogue
from serving.config import ServeConfig
from serving.encoders import LocalEncoder, VersionEncoders
from serving.interests import InterestReader, Stated
from serving.metrics import Metrics
from serving.refresh import Refresher
from training.models.resident import Resident
from training.models.version import TEXT_ROWS, read_version, write_version

LAYER = "encoder.layer.5.output.dense"


@pytest.fixture
def log(home: Home) -> Iterator[EventLog]:
    with EventLog(home.log) as log:
        yield log


def republish(
    registry: Registry,
    *,
    encoder: str,
    adapter: Adapter | None = None,
    promote: bool = True,
    metrics: dict[str, object] | None = None,
) -> VersionRef:
    """Publish version 1 again, as another encoder tells its items."""
    state = read_version(registry, VersionRef(1))
    rows = {**state.rows, TEXT_ROWS: state.rows[TEXT_ROWS].flip(1).contiguous()}
    draft = registry.draft_version()
    history = registry.open_version(1).table("history")
    write_version(draft, replace(state, rows=rows, encoder=encoder, adapter=adapter), history)
    return draft.publish(offset=0, metrics=metrics or {}, promote=promote)


def random_adapter(seed: int) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    tensors = {
        f"{LAYER}.lora_A": torch.randn(2, 1536, generator=drawn),
        f"{LAYER}.lora_B": torch.randn(384, 2, generator=drawn) / 20,
    }
    base = TextEncoder(EncoderConfig()).fingerprint
    return Adapter(kind="lora", base=base, rank=2, alpha=2.0, tensors=tensors)


def test_each_version_is_read_by_the_encoder_that_it_holds(versions, tmp_path: Path) -> None:
    adapter = random_adapter(1)
    tuned = TextEncoder(EncoderConfig(), adapter=adapter)
    ref = republish(versions.registry, encoder=tuned.fingerprint, adapter=adapter, promote=False)
    again = republish(versions.registry, encoder=tuned.fingerprint, adapter=adapter, promote=False)
    encoders = VersionEncoders(tmp_path, ServeConfig(warm_encoder=False), versions.registry)
    local = LocalEncoder(encoders, timeout_s=30)
    text = ["A slow-burn Nordic crime novel"]
    np.testing.assert_allclose(local.encode(text, ref.version), tuned.encode(text), atol=1e-5)
    np.testing.assert_allclose(local.encode(text, 1), TextEncoder(EncoderConfig()).encode(text), atol=1e-5)
    np.testing.assert_array_equal(local.encode(text), local.encode(text, 1))  # the promoted one
    assert encoders.of(ref.version) is encoders.of(again.version)
    encoders.stop()


def test_a_version_of_other_settings_is_read_by_these_and_one_of_an_encoder_that_is_not_here_by_none(
    versions, tmp_path: Path
) -> None:
    state = read_version(versions.registry, VersionRef(1))
    recipe = state.recipe.with_overrides(["encoder.max_tokens=8"])
    draft = versions.registry.draft_version()
    few = TextEncoder(recipe.section(EncoderConfig))
    write_version(
        draft,
        replace(state, recipe=recipe, encoder=few.fingerprint),
        versions.registry.open_version(1).table("history"),
    )
    ref = draft.publish(offset=0, metrics={}, promote=False)
    elsewhere = republish(versions.registry, encoder="0123456789abcdef", promote=False)
    encoders = VersionEncoders(tmp_path, ServeConfig(warm_encoder=False), versions.registry)
    local = LocalEncoder(encoders, timeout_s=30)
    text = ["A slow-burn Nordic crime novel in which nobody is what they seem to be"]
    np.testing.assert_allclose(local.encode(text, ref.version), few.encode(text), atol=1e-5)
    with pytest.raises(EngineError, match="is of encoder 0123456789abcdef"):
        local.encode(text, elsewhere.version)
    encoders.stop()


def test_whoever_asks_an_encoder_that_has_ended_hears_so_at_once(versions, tmp_path: Path) -> None:
    encoders = VersionEncoders(tmp_path, ServeConfig(warm_encoder=False), versions.registry)
    ended = encoders.of(1)
    encoders.stop()
    for answer in (ended.embed(["too late"]), ended.encode_items(["too late"])):
        with pytest.raises(EngineError, match="has ended"):
            answer.result(1)


def test_interests_are_read_for_the_version_that_answers(run_alone, tmp_path: Path, monkeypatch) -> None:
    read_for: list[tuple[int | None, str]] = []

    async def note(self, text: str, timeout_s: float, version: int | None = None, encoder: str = "") -> Stated:
        read_for.append((version, encoder))
        return Stated(interests=None, liked=text, disliked=(), config=EncoderConfig(), fallback="unreadable")

    monkeypatch.setattr(InterestReader, "read", note)
    with run_alone(Home(tmp_path)) as served:

        def answer(user_id: str, arm: str) -> tuple[str, tuple[int | None, str]]:
            return served.recommend(user_id, arm=arm, interests="whales", k=1)["version"], read_for[-1]

        ref = republish(served.registry, encoder="tuned", promote=False)
        canary = served.registry.start_canary(ref, 0.5, 0)
        on_trial = next(user for user in (f"t{n}" for n in range(100)) if canary.takes(user))
        other = next(user for user in (f"t{n}" for n in range(100)) if not canary.takes(user))
        served.wait_for(lambda: answer(on_trial, "live") == ("2.0", (2, "tuned")))
        assert answer(other, "live") == ("1.0", (1, ""))
        served.registry.end_canary(canary, "no worse", promote=True)
        served.wait_for(lambda: answer(other, "live") == ("2.0", (2, "tuned")))
        assert answer(on_trial, "state") == answer(other, "frozen") == ("1.0", (1, ""))


class SpaceEncoder:
    """Answers with a vector that says for which version it was asked, and counts."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def __call__(self, texts, version=None):
        assert version is not None
        self.asked += [version] * len(texts)
        return np.eye(384, dtype=np.float32)[[version] * len(texts)]


def put(log: EventLog, *item_ids: str) -> None:
    log.put_items([Item(item_id=item_id, text=f"text of {item_id}") for item_id in item_ids])


def spaces(model: Resident, *item_ids: str) -> set[int]:
    """Return for which versions the vectors of these items were made."""
    return {int(model.put[item_id][1].argmax()) for item_id in item_ids}  # pyright: ignore[reportAttributeAccessIssue]


def test_under_requests_no_answer_mixes_the_vectors_of_two_encoders(versions, log: EventLog) -> None:
    encode = SpaceEncoder()
    second = republish(versions.registry, encoder="another", promote=False)
    refresher = Refresher(versions.registry, log, LiveCatalogue(log, encode), Metrics(), poll_interval_s=3600)
    put(log, "new1", "new2")
    refresher.load(None)
    stopping, seen, mixed = threading.Event(), set(), []

    def ask() -> None:
        while not stopping.is_set():
            model = refresher.residents.live  # what one request is answered from
            version = VersionRef.parse(model.name).version
            answer = model.recommend("u0", (), 40, frozenset())
            seen.add(version)
            items = [item for item in answer.item_ids if item.startswith("new")]
            if spaces(model, *items) != {version} or model.state.encoder != ("another" if version == 2 else ""):
                mixed.append((version, items))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        versions.registry.promote(second if turn % 2 == 0 else VersionRef(1))
        put(log, f"new{turn + 3}")
        refresher.follow()
        assert not refresher.problems
    stopping.set()
    for thread in threads:
        thread.join()
    assert seen == {1, 2}
    assert mixed == []


def test_what_one_encoder_has_read_it_is_not_asked_again(versions, log: EventLog) -> None:
    encode = SpaceEncoder()
    second = republish(versions.registry, encoder="another", promote=False)
    refresher = Refresher(versions.registry, log, LiveCatalogue(log, encode), Metrics(), poll_interval_s=3600)
    put(log, "new1")
    refresher.load(None)
    for ref in (second, VersionRef(1), second):
        versions.registry.promote(ref)
        refresher.follow()
    assert encode.asked == [1, 2]
    third = republish(versions.registry, encoder="another", promote=True)  # another version of the same encoder
    refresher.follow()
    assert refresher.residents.live.name == str(third)
    assert encode.asked == [1, 2]


def test_events_are_timed_until_an_encoder_that_was_tuned_with_them_is_served(versions, log: EventLog) -> None:
    metrics, encode = Metrics(), SpaceEncoder()
    log.append([Event(user_id="u0", item_id="i1", kind="like", ts_us=0)])  # before this replica
    refresher = Refresher(versions.registry, log, LiveCatalogue(log, encode), metrics, poll_interval_s=3600)
    refresher.load(None)
    kinds = ("like", "impression", "click", "like")
    log.append([Event(user_id="u0", item_id="i2", kind=kind, ts_us=0) for kind in kinds])

    def timed() -> float | int | None:
        refresher.follow()
        return metrics.recent_freshness("adapter")["events"]

    adapter = random_adapter(1)
    republish(versions.registry, encoder="tuned by hand", adapter=adapter)
    assert timed() == 0
    for _ in range(2):
        republish(versions.registry, encoder="tuned", adapter=adapter, metrics={"adapter": {"tuned_seq": 4}})
        assert timed() == 2  # the first like and the click; not what was passed over, nor the last one
        versions.registry.promote(VersionRef(1))  # back, and forth again: timed once
        assert timed() == 2
    republish(versions.registry, encoder="tuned again", adapter=adapter, metrics={"adapter": {"tuned_seq": 5}})
    assert timed() == 3
