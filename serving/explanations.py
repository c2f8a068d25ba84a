"""Why an item stands where it does for a user, by ablation: what its score is without each thing the user did.

In:  a model, a user's history, an item.  Out: the interactions without which the score falls most, and the rest of it.
Knows nothing of HTTP. It holds for any model that ranks; what two interactions say together is counted with neither.
"""

from collections.abc import Sequence
from typing import Any

from cluster.log import Interaction
from training.models.resident import Resident

SHOWN = 5
"""Most interactions that are named."""


def explain(model: Resident, user_id: str, history: Sequence[Interaction], item_id: str) -> dict[str, Any]:  # Any: JSON
    """Return the item's score for the user, the score without any history, and what each interaction adds to it."""

    def score(past: Sequence[Interaction]) -> float:
        return float(model.rank(user_id, past, [item_id]).scores[0])

    known = [entry for entry in history if model.knows(entry.item_id)]
    whole = score(known)
    added = (
        [whole - score([*known[:place], *known[place + 1 :]]) for place in range(len(known))] if len(known) > 1 else []
    )
    most = sorted(range(len(added)), key=lambda place: -abs(added[place]))[:SHOWN]
    reasons = [
        {
            "item_id": known[place].item_id,
            "kind": known[place].kind,
            "text": model.text_of(known[place].item_id),
            "adds": added[place],
        }
        for place in most
    ]
    return {
        "score": whole,
        "cold_start": not known,
        "interactions": len(known),
        "user_has_row": user_id in model.user_row,
        "item_is_new": item_id not in model.item_row,
        "text": model.text_of(item_id),
        "because": reasons,
    }
