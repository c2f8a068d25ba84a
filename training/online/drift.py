"""Notice that what comes in, or what is made of it, has changed.

In:  figures of events, in order.  Out: a `Drift` for each figure whose mean has changed, with both means.
Knows nothing of models or of what follows from a drift: it is told with the next delta, and nothing is undone by it.
Detected by ADWIN: Bifet and Gavaldà, Learning from time-changing data with adaptive windowing, SDM 2007.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from river.drift import ADWIN

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """When a change is called a drift."""

    delta: float = 0.0005
    """Probability of calling one where there is none, at any one look."""

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ConfigError(f"drift.delta={self.delta}: must be between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One figure's change."""

    figure: str
    before: float
    after: float
    events: int
    """How many the figure had been recorded of."""


class DriftDetector:
    """Watches the means of several figures, each by itself."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._windows: dict[str, ADWIN] = {}
        self._recorded: dict[str, int] = {}
        self._found: list[Drift] = []

    def record(self, figures: Mapping[str, np.ndarray]) -> None:
        """Add figures of events in order; what is not finite is left out."""
        for figure, values in figures.items():
            window = self._windows.setdefault(figure, ADWIN(delta=self._config.delta))
            for value in values[np.isfinite(values)].tolist():
                before = window.estimation
                window.update(value)
                self._recorded[figure] = self._recorded.get(figure, 0) + 1
                if window.drift_detected:
                    self._found.append(
                        Drift(figure=figure, before=before, after=window.estimation, events=self._recorded[figure])
                    )

    def take(self) -> list[Drift]:
        """Return what was found since the last time, oldest first."""
        found, self._found = self._found, []
        return found
