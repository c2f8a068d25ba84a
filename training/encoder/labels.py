"""Fine-tune on labels of the texts themselves: stars, and a yes or no, as of reviews.

In:  a `TunedEncoder` over the texts, their labels, which of them train and validate.  Out: what the best epoch tells.
Knows nothing of users: a linear head stands on each text's vector alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from training.encoder.config import FinetuneConfig
from training.encoder.head import SCALE, STARS, expected_stars, rating_loss
from training.encoder.tuned import TunedEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What is known of each text; all [I]."""

    stars: np.ndarray
    chosen: np.ndarray
    """Whether it was recommended, bought, liked: 0 or 1."""


class LabelHead(nn.Module):
    """Stars, star classes and the logit of yes, each a line on the vector."""

    def __init__(self, text_dim: int, start: tuple[float, float]) -> None:
        """Start from the mean stars and the logit of the share of yes."""
        super().__init__()
        self.out = nn.Linear(text_dim, 2 + STARS)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.out.bias[:2] = torch.tensor(start)

    def forward(self, vector_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return stars [N], logits of the star classes [N, S] and of yes [N]."""
        out = SCALE * functional.linear(vector_NE, self.out.weight) + self.out.bias
        return out[:, 0], out[:, 2:], out[:, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the best epoch makes of every text, and how far it came; arrays [I]."""

    stars: np.ndarray
    chosen_logit: np.ndarray
    epochs: int
    validation_loss: float


def tune_on_labels(
    tuned: TunedEncoder,
    labels: Labels,
    train: np.ndarray,
    validation: np.ndarray,
    config: FinetuneConfig,
    start: LabelHead | None = None,
) -> tuple[Predicted, LabelHead]:
    """Learn stars by the recipe's rating objective, and yes or no by cross entropy, until validation gets no better.

    A head of an earlier call may be gone on from. `tuned="frozen"` trains the head alone.
    """
    torch.manual_seed(config.seed)
    frozen = config.tuned == "frozen"
    objective = config.objective if config.objective.startswith("rating") else "rating_mse"
    stars_I = torch.from_numpy(labels.stars.astype(np.float32))
    chosen_I = torch.from_numpy(labels.chosen.astype(np.float32))
    share = float(np.clip(labels.chosen[train].mean(), 0.01, 0.99))
    head = LabelHead(tuned.dim, (float(labels.stars[train].mean()), float(np.log(share / (1 - share)))))
    if start is not None:
        head.load_state_dict(start.state_dict())
    encoder = [p for p in tuned.model.parameters() if p.requires_grad]
    groups = [{"params": list(head.parameters()), "lr": config.head_learning_rate}]
    if encoder:
        groups.append({"params": encoder, "lr": config.learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    if not frozen:
        tuned.keep_frozen()
    memory_IE = tuned.encode_all()
    most = config.head_epochs if frozen else config.epochs
    rng, steps = np.random.default_rng(config.seed), -(-len(train) // config.batch_items)
    rates = [group["lr"] for group in optimizer.param_groups]

    def loss_of(vector_NE: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        stars_N, class_NS, logit_N = head(vector_NE)
        rated = rating_loss(objective, stars_N, class_NS, stars_I[rows_N])
        return rated + functional.binary_cross_entropy_with_logits(logit_N, chosen_I[rows_N])

    def judge() -> tuple[float, dict[str, torch.Tensor]]:
        with torch.no_grad():
            loss = float(loss_of(memory_IE[torch.from_numpy(validation)], torch.from_numpy(validation)))
        return loss, {name: tensor.clone() for name, tensor in head.state_dict().items()}

    best = (*judge(), memory_IE, 0)
    for epoch in range(most):
        tuned.train(not frozen)
        for step, rows in enumerate(np.array_split(rng.permutation(train), steps)):
            done = (epoch * steps + step) / (most * steps)
            warm = min(1.0, (epoch * steps + step + 1) / max(config.warmup_steps, 1))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * warm * (1 - 0.9 * done)
            place_N = torch.from_numpy(rows)
            optimizer.zero_grad()
            loss_of(memory_IE[place_N] if frozen else tuned(rows), place_N).backward()
            nn.utils.clip_grad_norm_(encoder, config.clip_norm)
            optimizer.step()
        tuned.eval()
        if not frozen:
            memory_IE = tuned.encode_all()
        loss, weights = judge()
        if loss < best[0]:
            best = (loss, weights, memory_IE, epoch + 1)
        elif epoch + 1 - best[3] >= config.patience * (10 if frozen else 1):
            break
    head.load_state_dict(best[1])
    with torch.no_grad():
        stars_N, class_NS, logit_N = head(best[2])
    predicted = expected_stars(class_NS) if objective == "rating_classes" else stars_N
    return (
        Predicted(
            stars=predicted.clamp(1, STARS).numpy(),
            chosen_logit=logit_N.numpy(),
            epochs=best[3],
            validation_loss=best[0],
        ),
        head,
    )
