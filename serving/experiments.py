"""Arms: which weights and which user state a request is answered from.

In:  an arm's name.  Out: what it may see.
Knows nothing of who is assigned to an arm: a request names its own. What the shop knows is the same in every arm: its
catalogue, and which items the user already has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What answers a request."""

    name: str
    follows_promotions: bool
    """Weights are the promoted version's with its deltas; else those of the pinned version as it was published."""
    sees_live_state: bool
    """History goes up to the newest event; else it ends where training's did."""


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (
            Arm(name="live", follows_promotions=True, sees_live_state=True),
            Arm(name="state", follows_promotions=False, sees_live_state=True),
            Arm(name="frozen", follows_promotions=False, sees_live_state=False),
        )
    }
)
"""Every arm a recipe may switch on, by name."""
