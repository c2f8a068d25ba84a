"""Refuse figures that cannot be true: what was fitted on is scored, the future is known, lists name what they must not.

In:  what was fitted on and held out, lists, scores.  Out: nothing, or `DataError`, which says how much is wrong.
Knows nothing of models. Data leakage is the commonest flaw of offline evaluation (Ji et al., TOIS 2023).

Shapes: B lists, K places, I items.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from cluster.errors import DataError
from training.evaluation.lists import IntArray, contains


def check_not_fitted(fitted_ids: pa.ChunkedArray, heldout_ids: pa.ChunkedArray) -> None:
    """Refuse held-out events that are among those fitted on, by event id."""
    if shared := pc.sum(pc.is_in(heldout_ids, pa.array(fitted_ids.combine_chunks()))).as_py():
        raise DataError(f"{shared:,} of {len(heldout_ids):,} held-out events were fitted on; score on others")


def check_pairs_not_fitted(fitted_UI: sparse.csr_array, heldout_UI: sparse.csr_array) -> None:
    """Refuse held-out interactions of a user with an item that was fitted on, whichever event it came from."""
    if shared := (fitted_UI != 0).multiply(heldout_UI != 0).nnz:
        raise DataError(f"{shared:,} of {heldout_UI.nnz:,} held-out interactions were fitted on; hold out other items")


def check_time_order(fitted_ts_us: npt.ArrayLike, heldout_ts_us: npt.ArrayLike) -> None:
    """Refuse a split in time whose held-out events are not all at or after the last one fitted on."""
    fitted, heldout = np.asarray(fitted_ts_us), np.asarray(heldout_ts_us)
    if fitted.size and (early := int((heldout < fitted.max()).sum())):
        raise DataError(
            f"{early:,} of {heldout.size:,} held-out events are older than what was fitted on; sort by time"
        )


def check_excluded(top_BK: IntArray, exclude_BI: sparse.csr_array) -> None:
    """Refuse lists that name what was to be left out of them."""
    shown_BK = contains(exclude_BI, top_BK)
    if shown_BK.any():
        row = int(shown_BK.any(axis=1).argmax())
        raise DataError(
            f"{shown_BK.any(axis=1).sum():,} of {len(top_BK):,} lists name what was to be left out, such as list "
            f"{row:,} with item {top_BK[row][shown_BK[row]][0]:,}"
        )


def check_scores(scores: npt.NDArray[Any]) -> None:
    """Refuse scores that are NaN or ∞; −∞ stands for an item not to be shown."""
    if bad := int((np.isnan(scores) | np.isposinf(scores)).sum()):
        raise DataError(f"{bad:,} of {np.size(scores):,} scores are not finite, so nothing can be ranked")
