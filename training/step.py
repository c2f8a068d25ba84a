"""One train step, the same for batch training, online training and benchmarks.

In:  a sharded model, a batch of its kind, the optimisers.  Out: the batch's losses; rows and dense weights are updated.
Knows nothing of epochs, events or files.

Table rows are updated inside backward by TorchRec's fused row-wise Adagrad, dense weights by AdamW here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from cluster.errors import ConfigError
from training.hypergradient import HypergradientRate

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """What one step does beside the model."""

    learning_rate: float
    """Of AdamW on the dense weights."""
    weight_decay: float
    clip_norm: float
    """Largest norm of the dense gradient."""
    rate_strength: float = 0.0
    """How strongly the dense rate follows its hypergradient; 0 leaves it where it is."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: must be above 0")
        if self.clip_norm <= 0:
            raise ConfigError(f"clip_norm={self.clip_norm}: must be above 0")


class Optimizers:
    """The fused optimiser of the tables and AdamW of the dense part, under one learning-rate factor."""

    def __init__(self, model: "DistributedModelParallel", config: StepConfig) -> None:
        """Start from the tables' own learning rate and the one of `config` for the dense part."""
        self.fused = model.fused_optimizer
        self.dense_parameters = dict(dense_parameters(model))
        self.dense = torch.optim.AdamW(
            self.dense_parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.clip_norm = config.clip_norm
        self.followed = HypergradientRate(self.dense, config.rate_strength) if config.rate_strength else None
        """Sets the dense rate, where one is followed; `scale_learning_rate` would be overruled."""
        self._base_rates = [group["lr"] for group in self._groups()]

    def scale_learning_rate(self, factor: float) -> None:
        """Set every learning rate to `factor` times the recipe's, from the next backward on."""
        for group, base in zip(self._groups(), self._base_rates, strict=True):
            group["lr"] = base * factor
        self.fused.step()  # hands the rate to the kernel; rows move in backward only

    def scale_table_rate(self, factor: float) -> None:
        """Set the tables' learning rate alone to `factor` times the recipe's."""
        for group in cast("list[dict[str, Any]]", self.fused.param_groups):
            group["lr"] *= factor
        self.fused.step()

    def _groups(self) -> list[dict[str, Any]]:  # Any: torch's own type of a group
        return [*cast("list[dict[str, Any]]", self.fused.param_groups), *self.dense.param_groups]


def dense_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the replicated parameters by their name within the model's dense part."""
    return [
        (name.split("dense.", 1)[1], parameter)
        for name, parameter in model.named_parameters()
        if "dense." in name and parameter.requires_grad
    ]


def train_step(  # noqa: ANN201  (the model's own named tuple)
    model: Callable[[Any], Any], batch: object, optimizers: Optimizers, loss_scale: float = 1.0
):
    """Collective. Learn one batch and return what the model returned for it, detached.

    A model returns a named tuple of tensors of its own, whose `total` is descended: a mean over the batch's targets;
    `loss_scale` keeps one target's weight when batches are of unlike size.
    """
    optimizers.dense.zero_grad()
    losses = model(batch)
    # Rows are updated in here; DDP averages the dense gradient over the workers (collective).
    (loss_scale * losses.total).backward()
    nn.utils.clip_grad_norm_(optimizers.dense_parameters.values(), optimizers.clip_norm)
    (optimizers.followed or optimizers.dense).step()
    return type(losses)(*(loss.detach() for loss in losses))
