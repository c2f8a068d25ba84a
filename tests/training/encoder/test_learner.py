"""Fine-tuning on a tiny encoder of random weights, over a catalogue whose words say what goes with what."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.errors import ConfigError, DataError
from cluster.events import Event, events_table
from embeddings.text_encoder import EncoderConfig, TextEncoder
from embeddings.vocabulary import Vocabulary
from training.encoder.config import OBJECTIVES, RATING_OBJECTIVES, FinetuneConfig
from training.encoder.head import Candidates, TasteHead
from training.encoder.inputs import FinetuneInputs, TargetSampler, lay_out, split_cold
from training.encoder.learner import DONE, EncoderLearner, Progress
from training.encoder.tuned import TunedEncoder
from training.stream import History, build_history

CONFIG = FinetuneConfig(
    layers=1,
    rank=2,
    dim=8,
    max_history=4,
    head_epochs=4,
    epochs=3,
    patience=3,
    batch_items=8,
    batch_targets=64,
    hard_negatives=2,
    learning_rate=0.01,
    warmup_steps=1,
    whole_items=0,
    validation_fraction=0.3,
    cold_items=0.2,
)


@pytest.fixture(scope="session")
def texts(story_texts: list[str]) -> list[str]:
    return story_texts


@pytest.fixture(scope="session")
def history() -> History:
    """Forty users, each of whom has one kind of story alone."""
    rng = np.random.default_rng(1)
    events = [
        Event(
            event_id=f"{user}-{step}",
            user_id=f"u{user}",
            item_id=str(rng.integers(0, 15) + 15 * (user % 2)),
            kind="rating",
            value=float(1 + (user + step) % 5),
            ts_us=(step * 40 + user) * 1_000_000,
        )
        for step in range(12)
        for user in range(40)
    ]
    table = events_table(events)
    assert isinstance(table, pa.Table)
    return build_history(
        table, Vocabulary([str(n) for n in range(30)], 30), Vocabulary([f"u{n}" for n in range(40)], 40)
    )


@pytest.fixture(scope="session")
def inputs(texts: list[str], history: History) -> FinetuneInputs:
    return split_cold(texts, history, CONFIG, where="here")


@pytest.fixture
def encoder(tiny_model: Path) -> TextEncoder:
    return TextEncoder(EncoderConfig(model=str(tiny_model)))


def test_untrained_it_reads_text_as_the_encoder_does(encoder: TextEncoder, texts: list[str]) -> None:
    given = [*texts, ""]
    for tuned in ("lora", "top", "full", "frozen"):
        module = TunedEncoder(encoder, replace(CONFIG, tuned=tuned), given)
        for _ in range(2):  # computed anew, then from what is kept
            np.testing.assert_allclose(module.encode_all().numpy(), encoder.encode(given), atol=1e-5)
            assert module.keep_frozen() == (tuned != "full")


def test_what_learns_is_what_was_asked_for(encoder: TextEncoder, texts: list[str]) -> None:
    trained = {
        tuned: TunedEncoder(encoder, replace(CONFIG, tuned=tuned), texts).trained
        for tuned in ("frozen", "lora", "top", "full")
    }
    attention, feed_forward = 4 * (16 + 16) * 2, 2 * (16 + 32) * 2  # of rank 2: r · (in + out) a linear layer
    assert trained["frozen"] == 0
    assert trained["lora"] == attention + feed_forward
    assert trained["lora"] < trained["top"] < trained["full"]


@pytest.mark.parametrize("tuned", ["lora", "top", "full"])
def test_the_encoder_with_the_adapter_makes_the_vectors_that_were_tuned(
    encoder: TextEncoder, inputs: FinetuneInputs, tmp_path: Path, tuned: str
) -> None:
    config = replace(CONFIG, tuned=tuned)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    before = learner.memory_IE.clone()
    learner.progress.phase = "tune"
    learner._start_phase()
    learner._epoch(tune=True)
    after = learner.tuned.encode_all()
    assert (after - before).abs().max() > 1e-3
    adapter = learner.tuned.adapter()
    assert adapter is not None
    adapter.save(tmp_path)
    read = TextEncoder(EncoderConfig(model=encoder.config.model, adapter=str(tmp_path)))
    np.testing.assert_allclose(read.encode(inputs.texts), after.numpy(), atol=1e-5)


def test_fine_tuning_goes_on_from_an_adapter_and_from_no_other_shape(
    encoder: TextEncoder, inputs: FinetuneInputs
) -> None:
    learner = EncoderLearner(TunedEncoder(encoder, CONFIG, inputs.texts), inputs, CONFIG)
    learner.run()
    adapter = learner.tuned.adapter()
    further = TextEncoder(encoder.config, adapter=adapter)
    np.testing.assert_allclose(
        TunedEncoder(further, CONFIG, inputs.texts).encode_all().numpy(), learner.memory_IE.numpy(), atol=1e-5
    )
    with pytest.raises(ConfigError, match=r"lora of rank 2.*goes on as such alone"):
        TunedEncoder(further, replace(CONFIG, rank=3), inputs.texts)


def test_over_whole_weights_that_were_tuned_no_lora_is_trained_which_would_lose_them(
    encoder: TextEncoder, texts: list[str]
) -> None:
    adapter = TunedEncoder(encoder, replace(CONFIG, tuned="top"), texts).adapter()
    further = TextEncoder(encoder.config, adapter=adapter)
    for tuned in ("top", "full", "frozen"):
        TunedEncoder(further, replace(CONFIG, tuned=tuned), texts)
    with pytest.raises(ConfigError, match=r"finetune\.tuned='lora'.*holds whole weights.*top or full"):
        TunedEncoder(further, CONFIG, texts)


def test_a_small_catalogue_is_scored_whole_and_large_ones_come_near_it(
    encoder: TextEncoder, inputs: FinetuneInputs
) -> None:
    losses = {}
    for whole_items, hard in ((100, 0), (0, 2)):
        config = replace(CONFIG, whole_items=whole_items, hard_negatives=hard, batch_items=12)
        learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
        draws = [learner.sampler.draw(np.random.default_rng(n)) for n in range(20)]
        losses[whole_items] = np.mean([float(learner._loss(draw, tune=False).detach()) for draw in draws])
    assert losses[100] == pytest.approx(np.log(24), rel=0.05)  # of 24 items that nothing tells apart yet
    # The odds make good for what was not drawn; the chosen one's, a half here, are taken off as well.
    assert losses[0] + np.log(2) == pytest.approx(losses[100], rel=0.05)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns(encoder: TextEncoder, inputs: FinetuneInputs, objective: str) -> None:
    config = replace(CONFIG, objective=objective)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    losses = [learner._epoch(tune=False) for _ in range(8)]
    assert losses[-1] < losses[0]
    figures = learner.validate()
    assert set(figures) == ({"rmse", "mae"} if objective in RATING_OBJECTIVES else set(figures) - {"rmse"})
    assert all(np.isfinite(value) for value in figures.values())


def test_tuned_it_finds_items_that_nobody_has_met_better_than_frozen(
    encoder: TextEncoder, inputs: FinetuneInputs
) -> None:
    config = replace(CONFIG, tuned="top", layers=2, epochs=8, patience=8)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    told: list[str] = []
    progress = learner.run(lambda epoch: told.append(epoch.progress.phase))
    assert progress.phase == DONE
    assert told[0] == "head"
    assert told[-1] == "tune"
    assert progress.best["cold_ndcg_at_10"] >= progress.frozen["cold_ndcg_at_10"]
    assert learner.validate()["cold_ndcg_at_10"] == pytest.approx(progress.best["cold_ndcg_at_10"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_over_the_whole_catalogue_has_the_gradient_of_its_loss(
    encoder: TextEncoder, inputs: FinetuneInputs, accumulate: int
) -> None:
    config = replace(CONFIG, tuned="top", whole_items=100, whole_targets=50, batch_targets=16, dropout=0.0)
    config = replace(config, encode_texts=5, accumulate=accumulate)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    learner.tuned.train()
    learned = [p for p in (*learner.head.parameters(), *learner.tuned.model.parameters()) if p.requires_grad]
    loss = learner._backward_whole(np.random.default_rng(0))
    found = [p.grad.clone() for p in learned if p.grad is not None]
    for parameter in learned:
        parameter.grad = None
    targets, met_M = learner.sampler.draw_targets(np.random.default_rng(0), 50), torch.from_numpy(learner.sampler.items)
    memory_IE = learner.memory_IE.index_copy(0, met_M, learner.tuned(learner.sampler.items))
    user_PD = learner.head.users(memory_IE, torch.from_numpy(targets.history_PL))
    place_P = torch.searchsorted(met_M, torch.from_numpy(targets.item_P))
    wanted = torch.nn.functional.cross_entropy(learner.head.scores(user_PD, memory_IE[met_M]), place_P)
    (wanted / accumulate).backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    directly = [p.grad for p in learned if p.grad is not None]
    assert len(found) == len(directly) > 10
    for one, other in zip(found, directly, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_dropout_leaves_out_the_same_when_texts_are_encoded_again(encoder: TextEncoder, inputs: FinetuneInputs) -> None:
    config = replace(CONFIG, tuned="top", whole_items=100, dropout=0.5)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    learner.tuned.train()
    encoded: list[torch.Tensor] = []
    learner.tuned.register_forward_hook(lambda _, __, vectors: encoded.append(vectors.detach().clone()))
    learner._backward_whole(np.random.default_rng(0))
    half = len(encoded) // 2
    assert half > 0
    for once, again in zip(encoded[:half], encoded[half:], strict=True):
        torch.testing.assert_close(once, again)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_over_the_whole_catalogue_it_learns_and_keeps_the_best(
    encoder: TextEncoder, inputs: FinetuneInputs, *, bfloat16: bool
) -> None:
    config = replace(CONFIG, whole_items=100, epochs=6, patience=6, bfloat16=bfloat16)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    losses: list[float] = []
    learner.run(lambda epoch: losses.append(epoch.figures["loss_total"]) if epoch.progress.phase == "tune" else None)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert learner.validate()["cold_ndcg_at_10"] == pytest.approx(learner.progress.best["cold_ndcg_at_10"])


def test_frozen_leaves_the_encoder_as_it_is(encoder: TextEncoder, inputs: FinetuneInputs) -> None:
    config = replace(CONFIG, tuned="frozen")
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    assert learner.run().best == learner.progress.frozen
    assert learner.tuned.adapter() is None


def test_training_meets_no_item_that_is_held_out_and_nothing_of_later(inputs: FinetuneInputs, history: History) -> None:
    assert len(inputs.cold) == 6
    assert not np.isin(inputs.train.item_row, inputs.cold).any()
    order_V = inputs.full.order[inputs.validation]
    assert inputs.train.order.max() < order_V[inputs.is_later].min()
    assert order_V[~inputs.is_later].max() < order_V[inputs.is_later].min()
    assert inputs.is_later.any()
    assert not inputs.is_later.all()
    assert np.isin(inputs.full.item_row[inputs.validation], inputs.cold).all()
    assert not np.isin(inputs.validation, history.starts).any()


def test_what_was_before_a_choice_is_laid_out_oldest_first(inputs: FinetuneInputs) -> None:
    first = inputs.full.starts[0]
    laid_out = lay_out(inputs.full, np.array([first + 2]), 4)
    assert laid_out.history_PL[0].tolist() == inputs.full.item_row[first : first + 2].tolist()
    assert laid_out.item_P[0] == inputs.full.item_row[first + 2]


def test_a_draw_has_each_item_once_and_only_targets_among_them(inputs: FinetuneInputs) -> None:
    sampler = TargetSampler(inputs.train, inputs.train_targets(), replace(CONFIG, item_power=1.0))
    draw = sampler.draw(np.random.default_rng(0))
    assert len(set(draw.rows_N.tolist())) == len(draw.rows_N) == 8
    assert draw.targets.item_P.max() < 8
    counts = np.bincount(inputs.train.item_row[inputs.train_targets()], minlength=30)
    odds = np.minimum(8 * counts[draw.rows_N] / counts.sum(), 1)
    np.testing.assert_allclose(np.exp(draw.log_q_N), odds, rtol=1e-5)


def test_an_items_odds_of_being_drawn_are_taken_off_its_logit() -> None:
    torch.manual_seed(0)
    head = TasteHead(4, replace(CONFIG, dim=4))
    user_PD, vector_NE = torch.randn(3, 4), torch.randn(5, 4)
    log_q_N = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]).log()
    target_P = torch.tensor([0, 3, 4])
    loss = head.loss(user_PD, target_P, torch.full((3,), torch.nan), Candidates(vector_NE, log_q_N))
    logit_PN = head.scores(user_PD, vector_NE) - log_q_N
    by_hand = -(logit_PN.softmax(1)[torch.arange(3), target_P]).log().mean()
    torch.testing.assert_close(loss, by_hand)


def test_hard_negatives_are_items_of_training_outside_the_draw(encoder: TextEncoder, inputs: FinetuneInputs) -> None:
    learner = EncoderLearner(TunedEncoder(encoder, CONFIG, inputs.texts), inputs, CONFIG)
    draw = learner.sampler.draw(np.random.default_rng(0))
    hard = learner._hard_negatives(draw, torch.from_numpy(draw.targets.history_PL))
    assert len(hard) == 2
    assert not np.isin(hard, np.concatenate([draw.rows_N, inputs.cold])).any()


def test_computing_layers_again_in_backward_changes_no_gradient(encoder: TextEncoder, inputs: FinetuneInputs) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = replace(CONFIG, tuned="top", dropout=0.0, checkpointing=checkpointing)
        tuned = TunedEncoder(encoder, config, inputs.texts).train()
        tuned(np.arange(5)).square()[:, :3].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tuned.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_accumulated_batches_are_one_step(encoder: TextEncoder, inputs: FinetuneInputs) -> None:
    config = replace(CONFIG, accumulate=3, batch_items=100)
    learner = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config)
    steps: list[int] = []
    real = learner._optimizer.step
    learner._optimizer.step = lambda: steps.append(1) or real()  # pyright: ignore[reportAttributeAccessIssue]
    learner._epoch(tune=False)
    assert len(steps) == learner.steps_per_epoch == 1


def test_resumed_it_has_what_was_learned_and_what_was_best(encoder: TextEncoder, inputs: FinetuneInputs) -> None:
    one, other = (EncoderLearner(TunedEncoder(encoder, CONFIG, inputs.texts), inputs, CONFIG) for _ in range(2))
    one.run()
    progress = Progress(**json.loads(json.dumps({"phase": "tune", "epoch": 1, "best_epoch": 1, "best": {}})))
    other.resume(one.tensors(), one.best, progress)
    torch.testing.assert_close(other.memory_IE, one.memory_IE)
    assert all(torch.equal(other.best[name], tensor) for name, tensor in one.best.items())


def test_too_little_to_learn_from_is_told(texts: list[str], history: History) -> None:
    with pytest.raises(DataError, match="no user has two interactions left"):
        split_cold(texts, history, replace(CONFIG, validation_fraction=0.999), where="here")
