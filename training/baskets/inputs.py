"""What the ranker of baskets reads of a dataset: purchases with what is told of them, promotions, kinds of products.

In:  a dataset, its events, rows for users and items.  Out: `Purchases`, `Promotions`, the kind of each item.
Knows nothing of features or models.

Shapes: N purchases, Q promotions, I items.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS
from embeddings.vocabulary import Vocabulary
from training.baselines.interface import IntArray
from training.baskets.promotions import Promotions
from training.baskets.purchases import PURCHASE, Purchases

COLUMNS = ("user_id", "item_id", "kind", "value", "ts_us", "context")
"""Of the events."""


def read_purchases(
    events: pa.Table, users: Vocabulary, items: Vocabulary, dataset: Dataset, *, besides: bool
) -> tuple[Purchases, dict[str, Promotions]]:
    """Return what was bought, and the promotions of each kind; with `besides`, what contexts and promotions tell of it.

    Raises `DataError` where what was saved is no number.
    """
    kept = events.filter(pc.is_in(events["kind"], pa.array(sorted(INTERACTION_KINDS))))
    told = {name: pc.map_lookup(kept["context"], name, "first") for name in ("place", "saved")}
    place_ids = told["place"].drop_null().unique().to_pylist()
    places = Vocabulary(place_ids, len(place_ids))
    promotions = {kind: _promotions(dataset.promotions(kind), items, places) for kind in dataset.promotion_kinds()}
    bought = Purchases(
        user_row=users.rows(kept["user_id"]),
        item_row=items.rows(kept["item_id"]),
        ts_s=kept["ts_us"].to_numpy() // 1_000_000,
        users=len(users),
        items=len(items),
        paid=np.where(pc.equal(kept["kind"], PURCHASE), kept["value"].to_numpy(zero_copy_only=False), np.nan),
        place=places.rows(told["place"].fill_null("")),
    )
    if not besides:
        return bought, promotions
    assert bought.place is not None
    told_besides = {name: on.at(bought.place, bought.item_row, bought.ts_s) * 1.0 for name, on in promotions.items()}
    if told["saved"].null_count == 0:
        try:
            told_besides["saved"] = told["saved"].cast(pa.float64()).to_numpy()
        except pa.ArrowInvalid as error:
            raise DataError(f"{dataset.path}: what was saved on a purchase is no number ({error})") from error
    return replace(bought, besides=told_besides), promotions


def _promotions(told: pa.Table, items: Vocabulary, places: Vocabulary) -> Promotions:
    place_N, item_N = _rows(told["place"], places), _rows(told["item_id"], items)
    is_known_N = (place_N >= 0) & (item_N >= 0)
    from_s_N, until_s_N = (told[name].to_numpy()[is_known_N] // 1_000_000 for name in ("from_us", "until_us"))
    return Promotions.of(
        place_N[is_known_N], item_N[is_known_N], from_s_N, until_s_N, places=len(places), items=len(items)
    )


def _rows(column: pa.ChunkedArray, vocabulary: Vocabulary) -> IntArray:
    """Return the row of each of millions of ids, of which few differ."""
    coded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    return vocabulary.rows(coded.dictionary.to_pylist())[coded.indices.to_numpy()]


def read_kinds(catalogue: pa.Table) -> IntArray:
    """Return what kind of product each item is, by row: what its text begins with, in its categories."""
    texts, categories = catalogue["text"].to_pylist(), catalogue["categories"].to_pylist()
    kinds = ["|".join([text.split(". ")[0], *listed]) for text, listed in zip(texts, categories, strict=True)]
    return np.unique(kinds, return_inverse=True)[1]
