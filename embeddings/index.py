"""Approximate nearest neighbours by inner product: which items of a large catalogue are worth scoring for a user.

In:  item vectors, vectors of users to tune by.  Out: the rows with the highest scores, nearly always.
Knows nothing of versions, requests or what is excluded for whom.

An inverted file (Jégou et al., TPAMI 2011) of 8-bit codes, by faiss, finds a shortlist; the shortlist is scored by the
vectors as they are now. Vectors that have moved since the lists were made, and items that are new, are scored besides,
all of them. So what is learned a moment ago counts at once, and the lists are made anew only once much has moved.

Shapes: I items, D dimension, Q users, M items that have moved or are new.
"""

from dataclasses import dataclass, replace

import faiss
import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import ConfigError

Rows = npt.NDArray[np.int64]

TRAINED_ON = 50
"""Vectors a list that its centre is found from."""
TUNED_AT = 100
"""Recall is that of so many items."""
OVERFETCH = 2
"""Length of the shortlist, in lengths of what is wanted: 8 bits reorder what is close."""
MOVED = 0.05
"""By what share of its length a vector may have moved and still be found by its list."""
MOST_MOVED = 0.02
"""Share of items beyond which the lists are made anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """When candidates are found by an index, and how well."""

    exact_up_to: int = 20_000
    """Items up to which every one is scored for every request."""
    recall: float = 0.99
    """Share of the 100 best items that must be among those found, in the mean over users like those of the version."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.exact_up_to < 1:
            raise ConfigError(f"index.exact_up_to={self.exact_up_to}: must be at least 1")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"index.recall={self.recall}: must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, eq=False)
class ItemIndex:
    """Lists over item vectors, and what has changed since they were made. Immutable."""

    lists: faiss.IndexIVF
    probes: int
    made_of_ID: torch.Tensor
    """The vectors that the lists were made of."""
    moved_M: Rows
    """Rows that are scored whatever the lists say."""
    is_moved_I: npt.NDArray[np.bool_]

    @classmethod
    def build(cls, item_ID: torch.Tensor, user_QD: torch.Tensor, config: IndexConfig) -> "ItemIndex":
        """Make lists of the items, and look into as many of them as reach the recall for these users."""
        vectors, dim = item_ID.numpy(), item_ID.shape[1]
        faiss.omp_set_num_threads(1)
        count = max(1, int(len(vectors) ** 0.5))
        centres = faiss.IndexFlatIP(dim)
        code = faiss.ScalarQuantizer.QT_8bit
        lists = faiss.IndexIVFScalarQuantizer(centres, dim, count, code, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).permutation(len(vectors))[: TRAINED_ON * count]
        lists.train(np.ascontiguousarray(vectors[sample]))
        lists.add(vectors)
        index = cls(lists, count, item_ID, np.empty(0, np.int64), np.zeros(len(vectors), np.bool_))
        return replace(index, probes=index._tune(user_QD, config.recall))

    def over(self, item_ID: torch.Tensor) -> "ItemIndex | None":
        """Return the index over the vectors as they are now; none where too much has moved: it is to be made anew."""
        indexed = len(self.made_of_ID)
        if len(item_ID) < indexed:
            return None
        moved_I = (item_ID[:indexed] - self.made_of_ID).square().sum(1) > MOVED**2 * self.made_of_ID.square().sum(1)
        is_moved_I = np.ones(len(item_ID), np.bool_)
        is_moved_I[:indexed] = moved_I.numpy()
        moved_M = np.flatnonzero(is_moved_I)
        if len(moved_M) > MOST_MOVED * indexed:
            return None
        return replace(self, moved_M=moved_M, is_moved_I=is_moved_I)

    def search(self, user_D: torch.Tensor, item_ID: torch.Tensor, k: int, excluded: Rows) -> torch.Tensor | None:
        """Return the rows [k] of the best items that are not excluded, best first; none where too few are found."""
        found = self._shortlist(user_D, OVERFETCH * k + len(excluded))
        found = np.concatenate([found[~self.is_moved_I[found]], self.moved_M])
        found = found[~np.isin(found, excluded)]
        if len(found) < k:
            return None
        rows = torch.from_numpy(found)
        return rows[(item_ID[rows] @ user_D).topk(k).indices]

    def _shortlist(self, user_D: torch.Tensor, wanted: int) -> Rows:
        faiss.omp_set_num_threads(1)  # of this thread
        looked_into = faiss.SearchParametersIVF()
        looked_into.nprobe = self.probes
        _, found = self.lists.search(user_D.numpy()[None], min(wanted, self.lists.ntotal), params=looked_into)
        return found[0][found[0] >= 0]

    def _tune(self, user_QD: torch.Tensor, recall: float) -> int:
        """Return how many lists to look into."""
        k = min(TUNED_AT, len(self.made_of_ID))
        best = [(self.made_of_ID @ user_D).topk(k).indices.numpy() for user_D in user_QD]
        probes = 1
        while probes < self.lists.nlist:
            tried = replace(self, probes=probes)
            found = [tried._shortlist(user_D, OVERFETCH * k) for user_D in user_QD]
            if np.mean([np.isin(right, some).mean() for right, some in zip(best, found, strict=True)]) >= recall:
                return probes
            probes = -(-probes * 5 // 4) if probes > 3 else probes + 1
        return self.lists.nlist
