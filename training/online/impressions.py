"""What was shown and what came of it teaches the click head, without the bias of where and how often it was shown.

In:  logged events in order.  Out: joined examples that teach something; `Shown` of them; the running state as metrics.
Knows nothing of models: whoever asks has the logits. What a history says of its user is left to retrieval, which learns
from what was chosen alone; from here the click head learns what of the seen is chosen.

Where an item stood (Craswell et al., WSDM 2008) is taken out by a bias a position, added to the logit in learning and
left out in serving; how likely the policy was to show it by inverse propensity, clipped (Bottou et al., JMLR 2013). A
bias follows its clicks by Newton's steps on the logistic loss, with the curvature of the newest examples.

The join's open impressions are saved with a version; a delta leaves them to the log, from which they are joined again.
Learning that is undone or set aside forgets them, since feedback on them may be in what is left out.

Shapes: K items shown.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from cluster.log import EventLog, LoggedEvent
from cluster.registry import Registry, VersionRef
from embeddings.batch import Shown
from embeddings.vocabulary import Vocabulary
from training.models.version import Draft, find_set_aside
from training.online.join import READ_EVENTS, Join, JoinConfig, Joined

TABLE = "shown"
METRIC = "shown"
_CAUTION = 4.0
"""Curvature that a bias starts with: how many clicks it takes to move."""
_NEWEST_CURVATURE = 250.0
"""Curvature kept at most, that of a thousand coin flips: older examples are forgotten."""
_MOST_STEP = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImpressionsConfig:
    """How much what was shown teaches."""

    enabled: bool = True
    positions: int = 50
    """Positions with a bias of their own; what stands further down shares the last. 1 is one bias for all."""
    max_inverse_propensity: float = 10.0
    """Weight at most of what the policy was unlikely to show; 1 leaves propensities out."""
    newest: int = 2_000
    """Examples over which what is told of them is averaged, and a user's share is counted."""
    max_user_share: float = 0.1
    """Share of these that one user may have; more weigh less."""

    def __post_init__(self) -> None:
        for name in ("positions", "newest", "max_inverse_propensity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"impressions.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.max_user_share <= 1:
            raise ConfigError(f"impressions.max_user_share={self.max_user_share}: must be in (0, 1]")


@dataclass(slots=True)
class Running:
    """What follows the examples, and is published with what they taught."""

    bias: list[float]
    """By position; the last is of what has none."""
    curvature: list[float]
    mean_inverse_propensity: float = 1.0
    examples: int = 0
    log_loss: float = 0.0
    """Of the click head before it learned, in nats; and so the next two, over the newest examples."""
    predicted: float = 0.0
    chosen: float = 0.0


@dataclass(slots=True)
class Impressions:
    """Joins one stream and weighs what comes of it."""

    config: ImpressionsConfig
    join_config: JoinConfig
    running: Running = field(init=False)
    _join: Join = field(init=False)
    _users: deque[str] = field(init=False)
    _user_counts: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.clear()
        self._users, self._user_counts = deque(), Counter()
        size = self.config.positions + 1
        self.running = Running([0.0] * size, [_CAUTION] * size)

    def clear(self) -> None:
        """Forget the open impressions: feedback on them may be left out of what follows."""
        self._join = Join(self.join_config)

    def take_up(
        self, registry: Registry, ref: VersionRef, log: EventLog, counts: Callable[[LoggedEvent], bool]
    ) -> None:
        """Go on from a version: its own open impressions, and the events of its deltas that count."""
        self._reset()
        if not self.config.enabled:
            return
        stated = registry.manifest(ref).metrics.get(METRIC)
        if stated is not None and len(stated["bias"]) == len(self.running.bias):
            self.running = Running(**stated)
        version = registry.open_version(ref.version)
        if f"{TABLE}.parquet" in version.manifest.files:
            self._join = Join.restored(self.join_config, version.table(TABLE))
        for manifest in registry.deltas(ref.version)[: ref.delta]:
            if find_set_aside(manifest) is not None or manifest.first_seq is None:
                self.clear()
                continue
            after_seq = manifest.first_seq - 1
            while events := log.read(after_seq, min(READ_EVENTS, manifest.last_seq - after_seq)):
                after_seq = events[-1].seq
                self._join.add([logged for logged in events if counts(logged)])

    def add(self, events: Sequence[LoggedEvent]) -> list[Joined]:
        """Return what has become certain of impressions, each label of one once."""
        if not self.config.enabled:
            return []
        return [example for example in self._join.add(events) if not (example.organic or example.repeated)]

    def lay_out(self, slates: Sequence[Sequence[Joined]], items: Vocabulary) -> Shown[np.ndarray]:
        """Return the examples of each slate, whose sequence has the slate's number; every item must have a row."""
        examples = [example for slate in slates for example in slate]
        most = self.config.max_inverse_propensity
        inverse_K = np.array([min(1 / (example.propensity or 1.0), most) for example in examples])
        self._follow("mean_inverse_propensity", inverse_K)
        weight_K = inverse_K / self.running.mean_inverse_propensity
        weight_K *= [self._influence(example.user_id) for example in examples]
        return Shown(
            sequence_K=np.repeat(np.arange(len(slates)), [len(slate) for slate in slates]),
            item_K=np.array([items.row(example.item_id) for example in examples], np.int64),
            label_K=np.array([example.label for example in examples], np.float32),
            counted_K=np.array([not example.correction for example in examples], np.float32),
            weight_K=weight_K.astype(np.float32),
            shift_K=np.array(self.running.bias, np.float32)[self._positions(examples)],
        )

    def record(self, slates: Sequence[Sequence[Joined]], shown: Shown[np.ndarray], logit_K: np.ndarray) -> None:
        """Note how well examples were predicted before they are learned, and let the biases follow them."""
        position_K = self._positions([example for slate in slates for example in slate])
        logit_K = logit_K + shown.shift_K
        chance_K = 1 / (1 + np.exp(-logit_K.clip(-30, 30)))
        slope_K = shown.weight_K * (shown.label_K - shown.counted_K * chance_K)
        curvature_K = shown.weight_K * shown.counted_K * chance_K * (1 - chance_K)
        for position in np.unique(position_K):
            here_K = position_K == position
            curvature = min(self.running.curvature[position] + float(curvature_K[here_K].sum()), _NEWEST_CURVATURE)
            step = float(slope_K[here_K].sum()) / curvature
            self.running.curvature[position] = curvature
            self.running.bias[position] += min(max(step, -_MOST_STEP), _MOST_STEP)
        first_K = shown.counted_K == 1
        loss_K = np.logaddexp(0, logit_K) - shown.label_K * logit_K
        self._follow("log_loss", loss_K[first_K])
        self._follow("predicted", chance_K[first_K])
        self._follow("chosen", shown.label_K[first_K])
        self.running.examples += len(logit_K)

    def metrics(self) -> dict[str, Any]:  # Any: JSON
        """Return the running state as a delta's metric; nothing before there was an example."""
        return {METRIC: asdict(self.running)} if self.running.examples else {}

    def write(self, draft: Draft) -> None:
        """Add the open impressions to a version."""
        if self.config.enabled:
            draft.add_table(TABLE, self._join.state())

    def _positions(self, examples: Sequence[Joined]) -> np.ndarray:
        none, last = self.config.positions, self.config.positions - 1
        return np.array([none if e.position is None else min(e.position, last) for e in examples], np.int64)

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

    def _follow(self, name: str, value_K: np.ndarray) -> None:
        """Let an average follow the newest examples."""
        if not len(value_K):
            return
        share = len(value_K) / min(self.running.examples + len(value_K), self.config.newest)
        before = getattr(self.running, name)
        setattr(self.running, name, before + min(share, 1.0) * (float(value_K.mean()) - before))
