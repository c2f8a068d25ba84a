"""What people choose among what they are shown is learned apart from where and how often it was shown.

In:  logged events in order; what the model makes of users and items.  Out: weights of a correction to the click head.
Knows nothing of logs or models. What is seen and passed over must not move what everyone shares: retrieval learns from
choices alone, and of the seen a linear correction is learned (training/models/seen.py), in one pass:

    logit of a choice = click head + weights · features + bias of the position           (the bias is not served)

by logistic regression with a normal posterior, whose mean and precision each batch of examples updates by Laplace's
approximation (Chapelle and Li, NIPS 2011), with a memory. A position's bias is a weight like the others (Craswell et
al., WSDM 2008); what the policy was unlikely to show counts for more, up to a bound (Bottou et al., JMLR 2013); a
choice that comes late takes back the negative before it (Ktena et al., RecSys 2019).

The posterior is part of the optimiser's state, and published with the deltas that it changed in; the join's open
impressions are published with versions, and after a restart the events of the deltas are joined again. Learning that is
undone or set aside forgets what was open, since feedback on it may be in what is left out. A correction that predicts
the newest examples worse than none is forgotten. That a slate was served as it is reported is not checked.

Shapes: K examples, D dimension, F = 2D + positions + 1 weights.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from typing import Any

import numpy as np
import torch

from cluster.errors import ConfigError
from cluster.log import EventLog, LoggedEvent
from cluster.registry import Registry
from training.models.seen import seen_features
from training.models.version import Change, Draft, VersionState, find_set_aside
from training.online.join import READ_EVENTS, Join, JoinConfig, Joined
from training.online.predictions import ShownPairs

logger = logging.getLogger(__name__)

OPEN = "shown"
"""File of a version, and metric of a delta: the open impressions; what is told of those that were learned."""
MEAN, PRECISION, UNIT = "seen.mean", "seen.precision", "seen.unit"
"""The posterior among the optimiser's tensors."""
_ITERATIONS = 8
_TOLERANCE = 0.01
"""Nats by which the correction may predict worse than nothing before it is forgotten."""
_LEAST_ROOM = 0.1
"""Of a choice that comes late: its weight, which is the inverse of the chance left to learn, has this bound."""
_REACH = 2.0
"""By how much a Newton step may move an example's logit."""


class Fate(Enum):
    """What becomes of an event; what is left out may be feedback on what is open."""

    JOINED = auto()
    LEFT_OUT = auto()
    """With all that its user did up to then."""
    USER_FORGOTTEN = auto()
    """It is in quarantine, or was: nothing is made of what its user was shown before."""
    ALL_FORGOTTEN = auto()
    """It is in a range that is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImpressionsConfig:
    """How what was shown is learned from."""

    enabled: bool = True
    positions: int = 50
    """Positions with a bias of their own; what stands further down shares the last. 1 is one bias for all."""
    max_inverse_propensity: float = 3.0
    """Weight at most of what the policy was unlikely to show; 1 leaves propensities out."""
    prior_precision: float = 50.0
    """Of each weight, around 0 at first and what is known later: the larger, the more it takes to move one."""
    memory: int = 200_000
    """Examples that count: older ones fade."""
    newest: int = 2_000
    """Examples over which what is told of them is averaged, and a user's share is counted."""
    max_user_share: float = 0.1
    """Share of these that one user may have; more weigh less."""

    def __post_init__(self) -> None:
        for name in ("positions", "newest", "memory", "max_inverse_propensity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"impressions.{name}={getattr(self, name)}: must be at least 1")
        if self.prior_precision <= 0:
            raise ConfigError(f"impressions.prior_precision={self.prior_precision}: must be above 0")
        if not 0 < self.max_user_share <= 1:
            raise ConfigError(f"impressions.max_user_share={self.max_user_share}: must be in (0, 1]")


@dataclass(slots=True)
class Told:
    """What is told of the newest examples, as it was before they were learned."""

    examples: int = 0
    log_loss: float = 0.0
    """In nats."""
    plain_log_loss: float = 0.0
    """Without the correction, by the click head and the biases alone."""
    predicted: float = 0.0
    chosen: float = 0.0
    inverse_propensity: float = 1.0
    """Mean, by which weights are divided."""

    def misleads(self, newest: int) -> bool:
        """Whether the newest examples would have been predicted better without the correction."""
        return self.examples >= newest and self.log_loss > self.plain_log_loss + _TOLERANCE

    def follow(self, name: str, value_K: np.ndarray, newest: int) -> None:
        """Let an average follow the newest examples."""
        share = len(value_K) / min(self.examples + len(value_K), newest)
        before = getattr(self, name)
        setattr(self, name, before + min(share, 1.0) * (float(value_K.mean()) - before))


@dataclass(slots=True)
class Posterior:
    """Normal distribution of the weights; features are divided by `scale`, so that they are about 1."""

    mean_F: np.ndarray
    precision_FF: np.ndarray
    scale: float

    def absorb(
        self,
        feature_KF: np.ndarray,
        offset_K: np.ndarray,
        label_K: np.ndarray,
        weight_K: np.ndarray,
        sure_K: np.ndarray,
    ) -> None:
        """Take examples in: Newton's steps towards the new mode, and the curvature of the sure ones at the last."""
        mode_F, curvature_K = self.mean_F, np.zeros_like(weight_K)
        for _ in range(_ITERATIONS):
            chance_K = _sigmoid(offset_K + feature_KF @ mode_F)
            slope_F = feature_KF.T @ (weight_K * (label_K - chance_K))
            slope_F -= self.precision_FF @ (mode_F - self.mean_F)
            curvature_K = weight_K * chance_K * (1 - chance_K)
            curvature_FF = (feature_KF * curvature_K[:, None]).T @ feature_KF
            step_F = np.linalg.solve(self.precision_FF + curvature_FF, slope_F)
            reach = float(np.abs(feature_KF @ step_F).max())
            mode_F = mode_F + step_F * min(1.0, _REACH / max(reach, 1e-9))
            if reach < 1e-3:
                break
        self.mean_F = mode_F
        self.precision_FF = self.precision_FF + (feature_KF * (curvature_K * sure_K)[:, None]).T @ feature_KF


class Impressions:
    """Joins one stream and learns what comes of it."""

    def __init__(self, config: ImpressionsConfig, join_config: JoinConfig) -> None:
        self.config, self._join_config = config, join_config
        self.clear()
        self._forget()

    def clear(self) -> None:
        """Forget the open impressions: feedback on them may be left out of what follows."""
        self._join = Join(self._join_config)

    def _forget(self) -> None:
        self.told = Told()
        self.posterior: Posterior | None = None
        self._weight: torch.Tensor | None = None
        self._is_changed = False
        self._users: deque[str] = deque()
        self._user_counts: Counter[str] = Counter()

    @property
    def weight(self) -> torch.Tensor | None:
        """Return the correction's weights [2D] as they are served; none before there was an example."""
        if self.posterior is None:
            return self._weight
        served_F = self.posterior.mean_F[: self._features(self.posterior)] / self.posterior.scale
        return torch.from_numpy(served_F).float()

    def take_up(
        self, registry: Registry, state: VersionState, log: EventLog, fate: Callable[[LoggedEvent], Fate]
    ) -> None:
        """Go on from a version: its posterior, its open impressions, and the events of its deltas."""
        self.clear()
        self._forget()
        self._weight = state.seen  # served on where learning is switched off
        if not self.config.enabled:
            return
        ref = state.ref
        self.told = Told(**registry.manifest(ref).metrics.get(OPEN, {}))
        if MEAN in state.optimizer and state.seen is not None:
            mean_F, precision_FF = state.optimizer[MEAN].numpy(), state.optimizer[PRECISION].numpy()
            if len(mean_F) == len(state.seen) + self.config.positions + 1:  # else it begins anew, from the weights
                self.posterior = Posterior(mean_F, precision_FF, float(state.optimizer[UNIT]))
        version, deltas = registry.open_version(ref.version), registry.deltas(ref.version)[: ref.delta]
        if f"{OPEN}.parquet" in version.manifest.files:
            self._join = Join.restored(self._join_config, version.table(OPEN))
        for manifest in deltas:
            if find_set_aside(manifest) is not None:
                self.clear()
                continue
            assert manifest.first_seq is not None  # a delta has one
            after_seq = manifest.first_seq - 1
            while events := log.read(after_seq, min(READ_EVENTS, manifest.last_seq - after_seq)):
                after_seq = events[-1].seq
                self._follow(events, fate)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the posterior as part of the optimiser's state; nothing before there was an example."""
        if self.posterior is None:
            return {}
        mean_F, precision_FF = (torch.from_numpy(a) for a in (self.posterior.mean_F, self.posterior.precision_FF))
        return {MEAN: mean_F, PRECISION: precision_FF, UNIT: torch.tensor(self.posterior.scale, dtype=torch.float64)}

    def added_to(self, change: Change) -> Change:
        """Return a delta's change with what has changed here since the one before."""
        if not self._is_changed:
            return change
        return replace(change, seen=self.weight, optimizer={**change.optimizer, **self.tensors()})

    def mark_published(self) -> None:
        """Count changes from here on."""
        self._is_changed = False

    def write_open(self, draft: Draft) -> None:
        """Add the open impressions to a version."""
        if self.config.enabled:
            draft.add_table(OPEN, self._join.state())

    def metrics(self) -> dict[str, Any]:  # Any: JSON
        """Return what is told of the examples as a delta's metric; nothing before there was one."""
        return {OPEN: asdict(self.told)} if self.told.examples else {}

    def add(self, events: Sequence[LoggedEvent], fate: Callable[[LoggedEvent], Fate]) -> list[Joined]:
        """Return what has become certain of impressions, each label of one once."""
        if not self.config.enabled:
            return []
        return [example for example in self._follow(events, fate) if not (example.organic or example.repeated)]

    def _follow(self, events: Sequence[LoggedEvent], fate: Callable[[LoggedEvent], Fate]) -> list[Joined]:
        """Join events, one by one, so that it does not matter how they are grouped."""
        found: list[Joined] = []
        for logged in events:
            match fate(logged):
                case Fate.JOINED:
                    found += self._join.add([logged])
                case Fate.USER_FORGOTTEN:
                    self._join.forget_user(logged.event.user_id, logged.seq)
                case Fate.ALL_FORGOTTEN:
                    self.clear()
                case Fate.LEFT_OUT:
                    pass
        return found

    def learn(self, examples: Sequence[Joined], pairs: ShownPairs, item_scale: Callable[[], float]) -> None:
        """Predict examples, then learn them; `item_scale` is asked for once, when the posterior begins."""
        posterior = self.posterior or self._begin(pairs.item_KD.shape[1], item_scale())
        feature_KF = np.concatenate(
            [
                seen_features(pairs.user_KD, pairs.item_KD).double().numpy() / posterior.scale,
                np.eye(self.config.positions + 1)[self._positions(examples)],
            ],
            axis=1,
        )
        offset_K = pairs.logit_K.double().numpy()
        label_K = np.array([example.label for example in examples])
        late_K = np.array([example.correction for example in examples])
        logit_K = offset_K + feature_KF @ posterior.mean_F
        plain_K = logit_K - feature_KF[:, : self._features(posterior)] @ posterior.mean_F[: self._features(posterior)]
        self._tell(logit_K[~late_K], plain_K[~late_K], label_K[~late_K])
        # A late choice takes its negative back: its slope is 1 at first, not 1 − chance; it is no second example.
        late_weight_K = 1 / np.maximum(1 - _sigmoid(logit_K), _LEAST_ROOM)
        weight_K = self._weights(examples) * np.where(late_K, late_weight_K, 1.0)
        self.told.examples += len(examples)
        fading = (1 - 1 / self.config.memory) ** len(examples)
        posterior.precision_FF = fading * posterior.precision_FF + (1 - fading) * self._prior(len(posterior.mean_F))
        posterior.absorb(feature_KF, offset_K, label_K, weight_K, sure_K=~late_K)
        self.posterior, self._is_changed = posterior, True
        if self.told.misleads(self.config.newest):
            logger.warning("what of the seen is chosen is forgotten: it predicts worse than without it (%s)", self.told)
            self._weight, self.told = None, Told()
            self.posterior = self._begin(pairs.item_KD.shape[1], posterior.scale)

    def _features(self, posterior: Posterior) -> int:
        """Return how many weights are served: all but the positions' biases."""
        return len(posterior.mean_F) - self.config.positions - 1

    def _begin(self, dim: int, scale: float) -> Posterior:
        size = 2 * dim + self.config.positions + 1
        mean_F = np.zeros(size)
        if self._weight is not None:
            mean_F[: 2 * dim] = self._weight.numpy() * scale
        return Posterior(mean_F, self._prior(size), scale)

    def _prior(self, size: int) -> np.ndarray:
        """Return the precision before any example: a position's bias is free to move."""
        positions = self.config.positions + 1
        return np.diag(np.r_[np.full(size - positions, self.config.prior_precision), np.ones(positions)])

    def _positions(self, examples: Sequence[Joined]) -> np.ndarray:
        none, last = self.config.positions, self.config.positions - 1
        return np.array([none if e.position is None else min(e.position, last) for e in examples], np.int64)

    def _tell(self, logit_K: np.ndarray, plain_K: np.ndarray, label_K: np.ndarray) -> None:
        if len(logit_K):
            for name, value_K in (("log_loss", logit_K), ("plain_log_loss", plain_K)):
                self.told.follow(name, np.logaddexp(0, value_K) - label_K * value_K, self.config.newest)
            self.told.follow("predicted", _sigmoid(logit_K), self.config.newest)
            self.told.follow("chosen", label_K, self.config.newest)

    def _weights(self, examples: Sequence[Joined]) -> np.ndarray:
        most = self.config.max_inverse_propensity
        inverse_K = np.array([min(1 / (example.propensity or 1.0), most) for example in examples])
        self.told.follow("inverse_propensity", inverse_K, self.config.newest)
        influence_K = np.array([self._influence(example.user_id) for example in examples])
        return inverse_K / self.told.inverse_propensity * influence_K

    def _influence(self, user_id: str) -> float:
        """Return what an example of a user weighs: less than 1 where they have many of the newest."""
        self._users.append(user_id)
        self._user_counts[user_id] += 1
        if len(self._users) > self.config.newest:
            gone = self._users.popleft()
            self._user_counts[gone] -= 1
            if not self._user_counts[gone]:
                del self._user_counts[gone]
        return min(1.0, self.config.max_user_share * self.config.newest / self._user_counts[user_id])


def _sigmoid(value_K: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value_K.clip(-30, 30)))
