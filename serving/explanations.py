"""Why an item stands where it does for a user, by ablation: what its score is without each item the user had.

In:  a model, a user's history, an item.  Out: what the score rests on, the most telling interactions first.
Knows nothing of HTTP. It holds for any model that ranks; what two interactions say together is counted with neither.

A score may say something among others only (a blend standardises over what it ranks), so the item is ranked among the
user's own candidates, the same ones each time. Without any history what is popular answers, on another scale: of a user
who had one item alone it is said that it is that one, not by how much.
"""

from collections.abc import Sequence
from typing import Any

from cluster.log import Interaction
from training.models.resident import Resident

SHOWN = 5
"""Most items of the history that are named."""
TRIED = 50
"""Newest distinct items of the history that are left out in turn."""
AMONG = 100
"""Best candidates that the item is ranked with."""


def explain(model: Resident, user_id: str, history: Sequence[Interaction], item_id: str) -> dict[str, Any]:  # Any: JSON
    """Return the item's score and place among the user's candidates, and what each item of the history adds to it."""
    known = [entry for entry in history if model.knows(entry.item_id)]
    among = list(dict.fromkeys([item_id, *model.recommend(user_id, known, AMONG).item_ids]))

    def rank(past: Sequence[Interaction]) -> tuple[float, int]:
        ranked = model.rank(user_id, past, among)
        place = ranked.item_ids.index(item_id)
        return float(ranked.scores[place]), place

    score, place = rank(known)
    newest = {
        entry.item_id: entry for entry in known
    }  # of several interactions with an item, the newest names its kind
    tried = list(dict.fromkeys(entry.item_id for entry in reversed(known)))[:TRIED]
    adds: dict[str, float | None] = dict.fromkeys(tried)
    if len(newest) > 1:
        adds |= {left: score - rank([entry for entry in known if entry.item_id != left])[0] for left in tried}
    most = sorted(adds, key=lambda left: -abs(adds[left] or 0))[:SHOWN]
    is_new = item_id not in model.item_row
    return {
        "score": score,
        "place": place + 1,
        "among": len(among),
        "cold_start": not known,
        "interactions": len(known),
        "user_has_row": user_id in model.user_row,
        "item_is_new": is_new,
        "uses_text": model.has_texts and bool(model.text_of(item_id)) and (is_new or bool(model.state.dense)),
        "text": model.text_of(item_id),
        "because": [
            {"item_id": left, "kind": newest[left].kind, "text": model.text_of(left), "adds": adds[left]}
            for left in most
        ],
    }
