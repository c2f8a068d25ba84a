"""Fine-tune: epochs of steps of the head alone, then of encoder and head, each validated, the best of each kept.

In:  a `TunedEncoder`, the interactions, the settings.  Out: figures with the encoder as it was and as tuned; weights.
Knows nothing of Ray, runs or versions. In several workers of one process group each learns batches of its own, and
gradients are averaged.

    memory_IE   every item's vector as last encoded; a user's history is read from it, so that a step encodes the items
                of its batch alone, whatever users looked back on (a memory bank: Wu et al., CVPR 2018)

Of a catalogue that is not too large, a step of the encoder learns from all of it, as the head alone does: every text's
vector, the loss's gradient on each, and each text again with that gradient (GradCache: Gao et al., RepL4NLP 2021).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training.encoder.config import NEXT_ITEM, RATING_OBJECTIVES, SEQUENCE, FinetuneConfig
from training.encoder.head import Candidates, TasteHead, expected_stars
from training.encoder.inputs import FinetuneInputs, StepDraw, Targets, TargetSampler, lay_out
from training.encoder.tuned import TunedEncoder
from training.evaluation.metrics import hit_at_k, ndcg_at_k

HEAD, TUNE, DONE = "head", "tune", "done"
FINAL_RATE = 0.1
"""Share of the learning rates left at the end of a phase, reached along a cosine."""
HARD_OF = 256
"""Users of a step among whose best items hard negatives are looked for."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far fine-tuning is; saved with every checkpoint."""

    phase: str = HEAD
    epoch: int = 0
    """Of the phase, done."""
    best_epoch: int = -1
    """Epochs done when it was best; of the encoder's 0 is the encoder as it was."""
    best: dict[str, float] = field(default_factory=dict)
    """Figures of the phase's best epoch."""
    frozen: dict[str, float] = field(default_factory=dict)
    """Figures of the head on the encoder as it was."""
    train_s: float = 0.0
    """Time that epochs of the encoder took."""


class EpochReport(NamedTuple):
    """What is told after each epoch."""

    progress: Progress
    figures: dict[str, float]


class EncoderLearner:
    """The encoder and its head, learning."""

    def __init__(
        self,
        tuned: TunedEncoder,
        inputs: FinetuneInputs,
        config: FinetuneConfig,
        vector_IE: np.ndarray | None = None,
    ) -> None:
        """Collective. Keep what will not change; every text is encoded once unless its vectors are given."""
        torch.manual_seed(config.seed)  # the same head in every worker
        self.tuned, self.inputs, self.config = tuned, inputs, config
        self.head = TasteHead(tuned.dim, config)
        is_several = dist.is_available() and dist.is_initialized()
        self.rank, self.workers = (dist.get_rank(), dist.get_world_size()) if is_several else (0, 1)
        self.sampler = TargetSampler(inputs.train, inputs.train_targets(), config)
        self.learns_whole = config.objective in (NEXT_ITEM, SEQUENCE) and len(self.sampler.items) <= config.whole_items
        self.validation = lay_out(inputs.full, inputs.validation, config.max_history)
        if config.tuned != "frozen":
            tuned.keep_frozen()
        self.memory_IE = self._encode_all() if vector_IE is None else torch.tensor(vector_IE)
        self.progress = Progress()
        self.best = self.tensors()
        """What was learned by the best epoch so far."""
        self._start_phase()

    def run(self, report: Callable[[EpochReport], object] = lambda _: None) -> Progress:
        """Collective. Learn to the end; the best epoch's weights are left in place."""
        progress = self.progress
        while progress.phase != DONE:
            started_s = time.monotonic()
            loss = self._epoch(tune=progress.phase == TUNE)
            if progress.phase == TUNE:
                self.memory_IE = self._encode_all()
                progress.train_s += time.monotonic() - started_s
            figures = {"loss_total": loss, **self.validate()}
            progress.epoch += 1
            if progress.best_epoch < 0 or self._is_better(figures, progress.best):
                progress.best_epoch, progress.best, self.best = progress.epoch, figures, self.tensors()
            report(EpochReport(progress, figures))
            most = self.config.head_epochs if progress.phase == HEAD else self.config.epochs
            patience = self.config.patience * (3 if progress.phase == HEAD else 1)  # its epochs cost next to nothing
            if progress.epoch >= most or progress.epoch - progress.best_epoch >= patience:
                self._end_phase()
        return progress

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return a copy of all that learns."""
        learned = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        learned |= {f"encoder.{n}": p for n, p in self.tuned.model.named_parameters() if p.requires_grad}
        return {name: tensor.detach().clone() for name, tensor in learned.items()}

    def resume(self, tensors: Tensors, best: Tensors, progress: Progress) -> None:
        """Collective. Go on from what another has learned so far; AdamW's moments start anew."""
        self.progress, self.best = progress, dict(best)
        self._load(tensors)
        self.memory_IE = self._encode_all()
        self._start_phase()

    @torch.no_grad()
    def _load(self, tensors: Tensors) -> None:
        self.head.load_state_dict({n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")})
        parameters = dict(self.tuned.model.named_parameters())
        for name, tensor in tensors.items():
            if name.startswith("encoder."):
                parameters[name.removeprefix("encoder.")].copy_(tensor)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the figures of choices of items held out; of ratings, the error of their stars."""
        return evaluate_choices(self.head, self.memory_IE, self.validation, self.inputs.cold)

    def _end_phase(self) -> None:
        self._load(self.best)
        progress = self.progress
        if progress.phase == TUNE:
            self.memory_IE = self._encode_all()
        else:
            progress.frozen = dict(progress.best)
            if self.config.tuned != "frozen":
                progress.phase, progress.epoch, progress.best_epoch = TUNE, 0, 0
                self._start_phase()
                return
        progress.phase = DONE

    def _start_phase(self) -> None:
        config = self.config
        encoder = [p for p in self.tuned.model.parameters() if p.requires_grad] if self.progress.phase == TUNE else []
        groups = [{"params": list(self.head.parameters()), "lr": config.head_learning_rate}]
        if encoder:
            groups.append({"params": encoder, "lr": config.learning_rate})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._groups = [list(self.head.parameters()), encoder]
        self._step = self.progress.epoch * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch of the present phase."""
        if self.learns_whole and self.progress.phase == TUNE:
            return self.config.whole_steps
        return self.sampler.steps_per_epoch(self.workers)

    def _epoch(self, *, tune: bool) -> float:
        """Collective. Take an epoch's steps; return the mean loss."""
        progress, config = self.progress, self.config
        most = config.epochs if tune else config.head_epochs
        self.tuned.train(tune)
        self.head.train()
        losses = []
        for step in range(self.steps_per_epoch):
            warm = min(1.0, (self._step + 1) / max(min(config.warmup_steps, most * self.steps_per_epoch // 10), 1))
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self._step / (most * self.steps_per_epoch))))
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)
            self._optimizer.zero_grad()
            for part in range(config.accumulate):
                seed = (config.seed, int(tune), progress.epoch, step, part, self.rank)
                rng = np.random.default_rng(seed)
                losses.append(
                    self._backward_whole(rng) if tune and self.learns_whole else self._backward(rng, tune=tune)
                )
            self._average_gradients()
            for parameters in self._groups:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            self._optimizer.step()
            self._step += 1
        self.tuned.eval()
        self.head.eval()
        return float(np.mean(losses))

    def _backward(self, rng: np.random.Generator, *, tune: bool) -> float:
        """Add up the gradients of a draw; return its loss."""
        loss = self._loss(self.sampler.draw(rng), tune=tune)
        (loss / self.config.accumulate).backward()
        return float(loss.detach())

    def _backward_whole(self, rng: np.random.Generator) -> float:
        """Collective. Add up the gradients of many interactions, each a choice among all items; return their loss."""
        config, met_M = self.config, torch.from_numpy(self.sampler.items)
        shares = self._shares()
        memory_IE, states = self.memory_IE.clone(), []
        mine = torch.zeros_like(memory_IE)
        with torch.no_grad():
            for rows in shares:
                states.append(torch.get_rng_state())
                mine[torch.from_numpy(rows)] = self.tuned(rows)
        if self.workers > 1:
            dist.all_reduce(mine)  # collective
        memory_IE[met_M] = mine[met_M]
        self.memory_IE = memory_IE.clone()
        memory_IE.requires_grad_()
        targets = self.sampler.draw_targets(rng, config.whole_targets)
        count, loss = len(targets.item_P), 0.0
        for first in range(0, count, config.batch_targets):
            part = targets.part(first, first + config.batch_targets)
            user_PD = self.head.users(memory_IE, torch.from_numpy(part.history_PL))
            target_P = torch.searchsorted(met_M, torch.from_numpy(part.item_P))
            among = Candidates(memory_IE[met_M], torch.zeros(len(met_M)))
            of_part = (
                self.head.loss(user_PD, target_P, torch.from_numpy(part.stars_P), among) * len(part.item_P) / count
            )
            (of_part / config.accumulate).backward()
            loss += float(of_part.detach())
        assert memory_IE.grad is not None, "the loss is of vectors"
        if self.workers > 1:  # added up: each worker has its share of the texts, and what these give is averaged
            dist.all_reduce(memory_IE.grad)  # collective
        after = torch.get_rng_state()
        for rows, state in zip(shares, states, strict=True):
            torch.set_rng_state(state)  # dropout leaves out what it left out before
            self.tuned(rows).backward(memory_IE.grad[torch.from_numpy(rows)])
        torch.set_rng_state(after)
        return loss

    def _shares(self) -> list[np.ndarray]:
        """Return the items that this worker encodes of the whole catalogue, those that pass the encoder together."""
        mine = self.sampler.items[self.rank :: self.workers]
        ordered = mine[np.argsort(self.tuned.lengths[mine], kind="stable")]
        at_once = self.config.encode_texts
        return [ordered[first : first + at_once] for first in range(0, len(ordered), at_once)]

    def _loss(self, draw: StepDraw, *, tune: bool) -> torch.Tensor:
        """Return a draw's loss: its items are encoded, once each; all others are as the memory has them."""
        history_PL = torch.from_numpy(draw.targets.history_PL)
        objective, met = self.config.objective, self.sampler.items
        # While the encoder learns, what is chosen must not differ from all else by having been encoded just now.
        whole = not tune and objective in (NEXT_ITEM, SEQUENCE) and len(met) <= self.config.whole_items
        hard_H = np.empty(0, np.int64)
        if not whole and self.config.hard_negatives and objective not in RATING_OBJECTIVES:
            hard_H = self._hard_negatives(draw, history_PL)
        place_N = torch.from_numpy(np.concatenate([draw.rows_N, hard_H]))
        vector_NE = self.tuned(place_N.numpy()) if tune else self.memory_IE[place_N]
        memory_IE = self.memory_IE.index_copy(0, place_N, vector_NE)
        self.memory_IE = memory_IE.detach()
        target_P = torch.from_numpy(draw.targets.item_P)
        # A hard negative is there for certain: log 1.
        log_q_N = torch.from_numpy(np.concatenate([draw.log_q_N, np.zeros(len(hard_H), np.float32)]))
        if whole:
            met_M = torch.from_numpy(met)
            target_P = torch.searchsorted(met_M, place_N[target_P])
            vector_NE, log_q_N = memory_IE[met_M], torch.zeros(len(met))
        user_PD = self.head.users(memory_IE, history_PL)
        stars_P = torch.from_numpy(draw.targets.stars_P)
        return self.head.loss(user_PD, target_P, stars_P, Candidates(vector_NE, log_q_N))

    @torch.no_grad()
    def _hard_negatives(self, draw: StepDraw, history_PL: torch.Tensor) -> np.ndarray:
        """Return items outside the draw that its users are thought most likely to choose; none that is held out."""
        others = np.setdiff1d(self.sampler.items, draw.rows_N)
        user_PD = self.head.users(self.memory_IE, history_PL[:HARD_OF])
        share_N = self.head.scores(user_PD, self.memory_IE[torch.from_numpy(others)]).softmax(1).sum(0)
        return others[share_N.topk(min(self.config.hard_negatives, len(others))).indices.numpy()]

    def _average_gradients(self) -> None:
        """Collective. Make every worker's gradients their mean."""
        if self.workers == 1:
            return
        parameters = [p for group in self._groups for p in group]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        dist.all_reduce(flat)  # collective
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = (part / self.workers).view_as(parameter)

    def _encode_all(self) -> torch.Tensor:
        """Collective. Return every text's vector as the encoder is now, each worker encoding its share."""
        mine = self.tuned.encode_all(slice(self.rank, None, self.workers))
        if self.workers == 1:
            return mine
        memory_IE = torch.zeros(len(self.inputs.texts), self.tuned.dim)
        memory_IE[self.rank :: self.workers] = mine
        dist.all_reduce(memory_IE)  # collective
        return memory_IE

    def _is_better(self, figures: Mapping[str, float], than: Mapping[str, float]) -> bool:
        if self.config.objective in RATING_OBJECTIVES:
            return figures["rmse"] < than["rmse"]
        return figures["cold_ndcg_at_10"] > than["cold_ndcg_at_10"]


@torch.no_grad()
def evaluate_choices(head: TasteHead, vector_IE: torch.Tensor, choices: Targets, cold: np.ndarray) -> dict[str, float]:
    """Return NDCG@10 and Hit@10 of choices among the cold items and among all; of stars, errors."""
    head.eval()
    if head.config.objective in RATING_OBJECTIVES:
        told_P = torch.from_numpy(choices.stars_P)
        user_PD = head.users(vector_IE, torch.from_numpy(choices.history_PL))
        stars_P, class_PS = head.stars(user_PD, vector_IE[torch.from_numpy(choices.item_P)])
        if head.config.objective == "rating_classes":
            stars_P = expected_stars(class_PS)
        error_P = (stars_P - told_P)[told_P.isfinite()]
        if not len(error_P):
            return {"rmse": math.inf, "mae": math.inf}
        return {"rmse": float(error_P.square().mean().sqrt()), "mae": float(error_P.abs().mean())}
    ranks_P = choice_ranks(head, vector_IE, choices)
    is_cold_I = torch.zeros(len(vector_IE), dtype=torch.bool)
    is_cold_I[torch.from_numpy(cold)] = True
    cold_ranks_P = choice_ranks(head, vector_IE, choices, is_cold_I)
    return {
        "cold_ndcg_at_10": _mean(ndcg_at_k(cold_ranks_P, 10)),
        "cold_hit_at_10": _mean(hit_at_k(cold_ranks_P, 10)),
        "ndcg_at_10": _mean(ndcg_at_k(ranks_P, 10)),
    }


@torch.no_grad()
def choice_ranks(
    head: TasteHead, vector_IE: torch.Tensor, choices: Targets, among_I: torch.Tensor | None = None
) -> np.ndarray:
    """Return each choice's rank among the items that its user has not chosen lately, or of those only `among_I`."""
    ranks = [np.empty(0, np.int64)]
    for first in range(0, len(choices.item_P), 1_024):
        part = slice(first, first + 1_024)
        history_PL, item_P1 = (
            torch.from_numpy(choices.history_PL[part]),
            torch.from_numpy(choices.item_P[part])[:, None],
        )
        score_PI = head.scores(head.users(vector_IE, history_PL), vector_IE)
        told_P1 = score_PI.gather(1, item_P1)
        if among_I is not None:
            score_PI[:, ~among_I] = -math.inf
        else:
            place_PL = torch.where(history_PL >= 0, history_PL, item_P1)
            score_PI.scatter_(1, place_PL, -math.inf)
        ranks.append((score_PI > told_P1).sum(1).numpy() + 1)
    return np.concatenate(ranks)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
