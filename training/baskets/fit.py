"""Fit the ranker of baskets as other systems are: on the training share less its end, validated there, then on all.

In:  a dataset and a recipe whose `[system]` names it.  Out: a run folder: what was learned, its figures, run.json.
Knows nothing of versions or serving. One process, without Ray.

It is validated on users' first visits after the start of the validation share. What a purchase's context tells of it
(what was saved) is not in users' histories, so that what serves is fitted without.

Shapes: U users, B of them who come again.
"""

import time
from collections.abc import Callable

import numpy as np
from safetensors.numpy import save_file
from scipy import sparse

from cluster.config import Recipe
from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.home import Home
from embeddings.tables import TablesConfig
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.baselines.config import SystemConfig
from training.baselines.interface import IntArray, Scores
from training.baskets.inputs import COLUMNS, read_kinds, read_purchases
from training.baskets.purchases import Visits
from training.baskets.ranker import USER_PLACE, BasketConfig, BasketRanker, load_lightgbm
from training.evaluation.lists import find_hits, ndcg
from training.evaluation.metrics import FloatArray
from training.evaluation.topk import top_of_scores
from training.inputs import build_item_vocabulary, build_user_vocabulary, training_events, write_text_vectors
from training.run import SYSTEM_FILE, TrainedRun, new_run
from training.stream import DataConfig

K = 10
BATCH = 128


def fit_baskets(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Fit the ranker. Raises `DataError` for too little data, `ConfigError` where LightGBM is not installed."""
    load_lightgbm()  # before anything is read
    folder, data, tables = new_run(home, recipe), recipe.section(DataConfig), recipe.section(TablesConfig)
    encoder = TextEncoder(recipe.section(EncoderConfig), home.cache)
    write_text_vectors(encoder, dataset, folder)
    events = training_events(dataset, data, list(COLUMNS))
    users, items = build_user_vocabulary(events, tables), build_item_vocabulary(dataset, tables)
    bought, promotions = read_purchases(events, users, items, dataset, besides=False)
    if not len(bought.ts_s):
        raise DataError(f"{dataset.path}: nobody did anything with an item in the training share")
    kind_I = read_kinds(dataset.items())
    config, newest = recipe.section(BasketConfig), recipe.section(SystemConfig).max_history

    started_s = time.monotonic()
    cut_s = int(bought.ts_s[min(int(len(bought.ts_s) * (1 - data.validation_fraction)), len(bought.ts_s) - 1)])
    visits = Visits.after(bought, cut_s, np.iinfo(np.int64).max)
    if not len(visits.users):
        raise DataError(f"{dataset.path}: nobody comes again in the validation share, so there is nothing to validate")
    ranker = BasketRanker(kind_I, config, promotions, newest=newest).fit(visits.known)
    found_B = ndcg_of_visits(visits, lambda user_row_B: ranker.scores(user_row_B, visits.at_s_of(user_row_B)))
    whole = BasketRanker(kind_I, config, promotions, newest=newest).fit(bought)
    arrays = whole.arrays() | {USER_PLACE: bought.usual_places()}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / SYSTEM_FILE)
    return TrainedRun.write(
        folder,
        dataset,
        checkpoint=str(folder / SYSTEM_FILE),
        encoder_fingerprint=encoder.fingerprint,
        metrics={
            "best_ndcg_at_10": float(found_B.mean()),
            "validated_visits": float(len(found_B)),
            "fit_s": time.monotonic() - started_s,
        },
    )


def ndcg_of_visits(visits: Visits, scores: Callable[[IntArray], Scores]) -> FloatArray:
    """Return NDCG@10 of each visit, [B], given what scores every item for some of the visits' users."""
    rows = np.searchsorted(visits.users, visits.user_row)
    shape = (len(visits.users), visits.known.items)
    basket_BI = sparse.csr_array(sparse.coo_array((np.ones(len(rows)), (rows, visits.item_row)), shape=shape))
    basket_BI.sum_duplicates()
    values = []
    for start in range(0, len(visits.users), BATCH):
        batch = visits.users[start : start + BATCH]
        nothing = sparse.csr_array((len(batch), visits.known.items))
        values.append(ndcg(find_hits(top_of_scores(scores(batch), nothing, K), basket_BI[start : start + BATCH]), K))
    return np.concatenate(values)
