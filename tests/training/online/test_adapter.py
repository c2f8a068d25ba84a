"""A better encoder is proposed from the log and adopted in one switch; what online learning did meanwhile stays."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.catalogue import Item
from cluster.config import load_recipe
from cluster.errors import EngineError
from cluster.events import Event, events_table
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.adapter import Adapter
from embeddings.text_encoder import EncoderConfig, TextEncoder
from embeddings.vocabulary import Vocabulary
from training.models.served import ServedModel
from training.models.two_stage import ModelConfig, TwoStage
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    VersionState,
    read_version,
    write_version,
)
from training.online.actor import AdapterSchedule, running_trainer
from training.online.adapter import AdapterConfig, Proposal, hottest, propose, read_bridged, read_interactions
from training.online.exclusions import Exclusions
from training.online.learner import OnlineLearner
from training.online.regrow import publish_before, publish_whole
from training.stream import build_history

pytestmark = pytest.mark.usefixtures("process_group")

LAYER = "encoder.layer.1.output.dense"
DIM = 16


class StoryHome:
    """A tiny home whose items are told by a tiny encoder; even users have ghost stories, odd ones romances."""

    def __init__(self, tiny, model: Path, texts: list[str]) -> None:
        self.tiny, self.registry, self.texts = tiny, tiny.registry, texts
        self.recipe = load_recipe(
            "movielens",
            [
                *tiny.RECIPE,
                f'encoder.model="{model}"',
                "finetune.layers=1",
                "finetune.rank=2",
                "finetune.dim=8",
                "finetune.max_history=4",
                "finetune.head_epochs=3",
                "finetune.epochs=2",
                "finetune.batch_items=8",
                "finetune.hard_negatives=0",
                "finetune.validation_fraction=0.3",
                "finetune.cold_items=0.2",
                "adapter.min_targets=10",
                "online.rehearsal_length=10",
            ],
        )
        self.encoder = TextEncoder(self.recipe.section(EncoderConfig), tiny.home.cache)
        state = read_version(tiny.registry, VersionRef(1), with_optimizer=True)
        torch.manual_seed(0)
        dense = TwoStage(self.recipe.section(ModelConfig), 8, DIM)
        optimizer = {
            name: torch.zeros(8, DIM) if name.startswith("project") and tensor.dim() else tensor
            for name, tensor in state.optimizer.items()
        }
        self.state = replace(
            state,
            recipe=self.recipe,
            item_texts=texts,
            rows={**state.rows, TEXT_ROWS: torch.from_numpy(self.encoder.encode(texts))},
            dense=dense.state_dict(),
            optimizer=optimizer,
            encoder=self.encoder.fingerprint,
        )
        draft = tiny.registry.draft_version()
        write_version(draft, self.state, events_table(self.stories(240)))
        self.ref = draft.publish(offset=0, metrics={})

    def stories(self, count: int, first: int = 0, prefix: str = "s") -> list[Event]:
        rng = np.random.default_rng(first)
        return [
            Event(
                event_id=f"{prefix}{n}",
                user_id=f"u{n % 6}",
                item_id=f"i{rng.integers(0, 15) + 15 * (n % 2)}",
                kind="click",
                ts_us=1_000_000 * n,
            )
            for n in range(first, first + count)
        ]

    def adapter(self) -> Adapter:
        drawn = torch.Generator().manual_seed(3)
        tensors = {
            f"{LAYER}.lora_A": torch.randn(2, 32, generator=drawn),
            f"{LAYER}.lora_B": torch.randn(DIM, 2, generator=drawn) / 4,
        }
        return Adapter(kind="lora", base=self.encoder.fingerprint, rank=2, alpha=2.0, tensors=tensors)

    def proposal(self, *, encoded: int | None = None) -> Proposal:
        adapter = self.adapter()
        tuned = TextEncoder(self.encoder.config, adapter=adapter)
        vectors = tuned.encode(self.texts)
        return Proposal(
            before=self.encoder.fingerprint,
            fingerprint=tuned.fingerprint,
            item_ids=self.state.item_ids,
            item_texts=self.texts,
            vector_NE=vectors if encoded is None else np.where(np.arange(30)[:, None] < encoded, vectors, 0.25),
            is_encoded_N=np.arange(30) < (30 if encoded is None else encoded),
            adapter=adapter,
            refused=None,
            metrics={"ndcg_at_10": 0.5},
        )


@pytest.fixture
def stories(build_home, tiny_model: Path, story_texts: list[str]) -> StoryHome:
    return StoryHome(build_home(), tiny_model, story_texts)


@pytest.fixture
def log(stories: StoryHome):
    with contextlib.closing(EventLog(stories.tiny.home.log)) as log:
        log.seed_history("training-history", stories.registry.open_version(stories.ref.version).table("history"))
        yield log


@pytest.fixture
def learner(stories: StoryHome, log: EventLog) -> OnlineLearner:
    return OnlineLearner(stories.registry, log, stories.recipe, stories.tiny.home.cache, torch.device("cpu"))


def learn(log: EventLog, learner: OnlineLearner, events: list[Event]) -> None:
    log.append(events)
    while fresh := learner.read():
        learner.learn(fresh)


def test_the_switch_is_one_version_with_adapter_vectors_and_all_that_was_learned(
    stories: StoryHome, log: EventLog, learner: OnlineLearner
) -> None:
    proposal = stories.proposal()
    learn(log, learner, stories.stories(12, first=240))  # after the proposal was made, and not yet published
    rows = learner.live.tensors()[0]
    ref = learner.adopt(proposal)
    assert ref is not None
    assert ref == stories.registry.current() == learner.ref
    assert ref.delta == 0
    found = read_version(stories.registry, ref)
    assert (found.encoder, found.learned_seq) == (proposal.fingerprint, log.head_seq())
    assert found.adapter is not None
    assert found.adapter.digest == stories.adapter().digest
    np.testing.assert_allclose(found.rows[TEXT_ROWS].numpy(), proposal.vector_NE, atol=1e-6)
    for name in (ITEM_ROWS, USER_ROWS, COUNT_ROWS):
        assert torch.equal(found.rows[name], rows[name])
    metrics = stories.registry.manifest(ref).metrics
    assert metrics["encoder"] == proposal.fingerprint
    assert metrics["adapter"]["coverage"] == 1.0
    assert learner.encoder.fingerprint == proposal.fingerprint


def test_items_stay_where_they_were(stories: StoryHome, learner: OnlineLearner) -> None:
    before = ServedModel.load(stories.registry, stories.registry.current())
    ref = learner.adopt(stories.proposal())
    assert ref is not None
    after = ServedModel.load(stories.registry, ref)
    moved = float((after.item_ID - before.item_ID).norm() / before.item_ID.norm())
    assert moved < 0.1
    told = stories.registry.manifest(ref).metrics["adapter"]["items_moved"]
    assert told < 0.7  # of what text adds, on a random encoder of 16 dimensions


def test_learning_goes_on_after_the_switch_without_a_gap(
    stories: StoryHome, log: EventLog, learner: OnlineLearner
) -> None:
    learn(log, learner, stories.stories(6, first=240))
    learner.adopt(stories.proposal())
    learn(log, learner, stories.stories(6, first=246))
    ref = learner.publish()
    assert ref is not None
    manifest = stories.registry.manifest(ref)
    assert (manifest.first_seq, manifest.last_seq) == (7, 12)
    assert manifest.metrics["events_total"] == 12
    again = OnlineLearner(stories.registry, log, stories.recipe, stories.tiny.home.cache, torch.device("cpu"))
    assert again.encoder.fingerprint == learner.encoder.fingerprint


def test_rolled_back_the_old_version_is_read_by_its_own_encoder(stories: StoryHome, learner: OnlineLearner) -> None:
    learner.adopt(stories.proposal())
    stories.registry.promote(stories.ref)
    learner.publish()
    assert learner.encoder.fingerprint == stories.encoder.fingerprint
    found = read_version(stories.registry, stories.registry.current())
    assert found.encoder == stories.encoder.fingerprint
    assert torch.equal(found.rows[TEXT_ROWS], stories.state.rows[TEXT_ROWS])


def test_what_is_bridged_is_encoded_between_steps(stories: StoryHome, log: EventLog, learner: OnlineLearner) -> None:
    ref = learner.adopt(stories.proposal(encoded=20))
    assert ref is not None
    assert stories.registry.manifest(ref).metrics["adapter"]["coverage"] == pytest.approx(2 / 3)
    assert learner.encode_bridged(4) == 6
    learner.publish()
    learner = OnlineLearner(stories.registry, log, stories.recipe, stories.tiny.home.cache, torch.device("cpu"))
    assert [learner.encode_bridged(4) for _ in range(3)] == [2, 0, 0]  # started anew, it knows what is left
    delta = learner.publish()  # without a single event
    assert delta is not None
    found = read_version(stories.registry, delta)
    expected = TextEncoder(stories.encoder.config, adapter=stories.adapter()).encode(stories.texts)
    np.testing.assert_allclose(found.rows[TEXT_ROWS].numpy(), expected, atol=1e-5)
    assert learner.publish() is None


class Choking(TextEncoder):
    """Cannot encode one of the texts."""

    def encode(self, texts: Sequence[str], on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        if "bad" in texts:
            raise EngineError("its vector of 'bad' is no number")
        return super().encode(texts, on_progress)


def test_a_text_that_cannot_be_encoded_stays_bridged_and_holds_up_no_others(
    stories: StoryHome, learner: OnlineLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.online.actor.ENCODE_PAUSE_S", 0.0)
    learner.adopt(stories.proposal(encoded=20))
    learner.live.item_texts[25] = "bad"
    learner.encoder = Choking(learner.encoder.config, adapter=learner.encoder.adapter)
    schedule = AdapterSchedule(stories.recipe, stories.tiny.home)
    for _ in range(12):
        schedule.look(learner)
    delta = learner.publish()
    assert delta is not None
    assert read_bridged(stories.registry, delta) == [25]


def test_what_is_bridged_stays_known_in_a_version_grown_anew(
    stories: StoryHome, log: EventLog, learner: OnlineLearner
) -> None:
    learner.adopt(stories.proposal(encoded=20))
    assert learner.encode_bridged(4) == 6
    whole = learner.publish()
    assert whole is not None
    for ref in (
        publish_before(stories.registry, 1, Exclusions(), "a broken client"),
        publish_whole(stories.registry, whole, "a bit has flipped"),
    ):
        assert len(read_bridged(stories.registry, ref)) == 6
        assert stories.registry.manifest(ref).metrics["encoder"] == learner.encoder.fingerprint
    learner = OnlineLearner(stories.registry, log, stories.recipe, stories.tiny.home.cache, torch.device("cpu"))
    assert learner.encode_bridged(10) == 0
    delta = learner.publish()
    assert delta is not None
    expected = TextEncoder(stories.encoder.config, adapter=stories.adapter()).encode(stories.texts)
    np.testing.assert_allclose(read_version(stories.registry, delta).rows[TEXT_ROWS].numpy(), expected, atol=1e-5)


def test_an_item_put_since_the_proposal_is_told_by_the_new_encoder(
    stories: StoryHome, log: EventLog, learner: OnlineLearner
) -> None:
    proposal = stories.proposal()
    log.put_items([Item(item_id="new", text="haunted castle w3")])
    learn(log, learner, stories.stories(6, first=240))
    ref = learner.adopt(proposal)
    assert ref is not None
    found = read_version(stories.registry, ref)
    tuned = TextEncoder(stories.encoder.config, adapter=stories.adapter())
    row = found.item_ids.index("new")
    np.testing.assert_allclose(found.rows[TEXT_ROWS][row].numpy(), tuned.encode(["haunted castle w3"])[0], atol=1e-5)


def test_what_is_refused_or_of_another_encoder_is_not_adopted(stories: StoryHome, learner: OnlineLearner) -> None:
    for proposal in (
        replace(stories.proposal(), refused="no better"),
        replace(stories.proposal(), before="0123456789abcdef"),
    ):
        assert learner.adopt(proposal) is None
    assert stories.registry.current() == stories.ref


def test_over_a_version_that_someone_moved_the_pointer_to_nothing_is_adopted(
    stories: StoryHome, log: EventLog, learner: OnlineLearner
) -> None:
    learn(log, learner, stories.stories(6, first=240))
    learner.publish()
    stories.registry.promote(stories.ref)
    assert learner.adopt(stories.proposal()) is None
    assert stories.registry.current() == stories.ref
    assert [manifest.ref for manifest in stories.registry.versions()] == [VersionRef(1), stories.ref]


class Overtaken(OnlineLearner):
    """Somebody moves the pointer just before it publishes."""

    def publish(self) -> VersionRef | None:
        self.registry.promote(VersionRef(2))
        return super().publish()


def test_nor_is_it_where_the_pointer_moves_while_the_rest_is_published(stories: StoryHome, log: EventLog) -> None:
    learner = Overtaken(stories.registry, log, stories.recipe, stories.tiny.home.cache, torch.device("cpu"))
    learn(log, learner, stories.stories(6, first=240))
    OnlineLearner.publish(learner)
    assert learner.ref == VersionRef(2, 1)
    assert learner.adopt(stories.proposal()) is None
    assert read_version(stories.registry, stories.registry.current()).encoder == stories.encoder.fingerprint


def test_a_proposal_is_read_as_it_was_written(stories: StoryHome, tmp_path: Path) -> None:
    proposal = stories.proposal(encoded=20)
    proposal.save(tmp_path / "p")
    found = Proposal.load(tmp_path / "p")
    assert found.adapter is not None
    assert found.adapter.digest == stories.adapter().digest
    np.testing.assert_array_equal(found.vector_NE, proposal.vector_NE)
    np.testing.assert_array_equal(found.is_encoded_N, proposal.is_encoded_N)
    assert (found.before, found.fingerprint, found.item_ids) == (
        proposal.before,
        proposal.fingerprint,
        proposal.item_ids,
    )


def test_a_proposal_is_judged_on_later_choices_of_items_held_out(stories: StoryHome, log: EventLog) -> None:
    log.append(stories.stories(240, first=240))
    found = propose(stories.registry, log, stories.recipe, stories.tiny.home.cache)
    assert found.metrics["events"] == 480
    assert isinstance(found.metrics["gain"], dict)
    assert (found.adapter is None) == (found.refused is not None)
    if found.refused is None:
        assert found.fingerprint != found.before


def test_an_adopted_proposal_holds_what_it_needs(stories: StoryHome, log: EventLog, learner: OnlineLearner) -> None:
    log.append(stories.stories(240, first=240))
    recipe = stories.recipe.with_overrides(["adapter.min_gain=-1.0", "adapter.encode_items=20"])
    found = propose(stories.registry, log, recipe, stories.tiny.home.cache)
    if found.adapter is None:
        pytest.fail(str(found.refused))
    assert found.metrics["coverage"] == pytest.approx(2 / 3)
    assert learner.adopt(found) == stories.registry.current()


def test_too_few_later_choices_change_nothing(stories: StoryHome, log: EventLog) -> None:
    recipe = stories.recipe.with_overrides(["adapter.min_targets=1000"])
    found = propose(stories.registry, log, recipe, stories.tiny.home.cache)
    assert found.refused is not None
    assert "fewer than 1000" in found.refused


def test_the_hottest_are_those_met_lately(stories: StoryHome) -> None:
    state = stories.state
    lately = [("u0", "i7"), ("u1", "i7")] * 5  # by time; the newest tenth by user is of i3, too
    met = [("u0", "i0"), ("u1", "i3")] * 45 + lately
    events = [
        Event(event_id=f"{n}", user_id=user_id, item_id=item_id, kind="click", ts_us=1_000_000 * n)
        for n, (user_id, item_id) in enumerate(met)
    ]
    history = build_history(events_table(events), Vocabulary(state.item_ids, 30), Vocabulary(["u0", "u1"], 2))
    counts = torch.arange(30).flip(0)
    state = replace(state, rows={**state.rows, COUNT_ROWS: counts})
    assert np.flatnonzero(hottest(history, state, 1)).tolist() == [7]
    assert np.flatnonzero(hottest(history, state, 2)).tolist() == [0, 7]  # i7 lately, then i0 of most counts
    assert hottest(history, state, 0).all()


def test_a_proposal_is_due_by_time_or_by_events() -> None:
    never, hourly = AdapterConfig(), AdapterConfig(every_s=3600, events=1000)
    assert not never.is_due(1e9, 10**9)
    assert [hourly.is_due(10, 10), hourly.is_due(3600, 0), hourly.is_due(0, 1000)] == [False, True, True]


def test_what_is_learned_from_is_history_and_log_less_what_is_left_out(stories: StoryHome, log: EventLog) -> None:
    log.append(
        [*stories.stories(6, first=240), Event(event_id="x", user_id="u0", item_id="nowhere", kind="click", ts_us=1)]
    )
    state: VersionState = read_version(stories.registry, stories.ref)
    registry: Registry = stories.registry
    assert len(read_interactions(registry, log, state)) == 246


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_trainer_has_one_proposed_beside_learning_and_adopts_it(ray_cluster, stories: StoryHome) -> None:
    recipe = stories.recipe.with_overrides(
        ["adapter.events=60", "adapter.min_gain=-1.0", "finetune.epochs=1", "online.publish_interval_ms=20"]
    )
    history = stories.registry.open_version(stories.ref.version).table("history")
    with contextlib.closing(EventLog(stories.tiny.home.log)) as log:
        log.seed_history("training-history", history)
        with running_trainer(recipe, stories.tiny.home):
            deadline_s, sent, adopted = time.monotonic() + 240, 0, None
            while adopted is None and time.monotonic() < deadline_s:
                if sent < 600:
                    log.append(stories.stories(6, first=240 + sent))
                    sent += 6
                time.sleep(0.2)
                told = [m for m in stories.registry.versions() if "adapter" in m.metrics]
                adopted = told[0] if told else None
        assert adopted is not None
        current = stories.registry.manifest(stories.registry.current())
        assert current.last_seq == log.head_seq()  # what came meanwhile is learned, too
        assert current.metrics.get("events_total") == log.head_seq()
        assert read_version(stories.registry, stories.registry.current()).encoder == adopted.metrics["encoder"]
