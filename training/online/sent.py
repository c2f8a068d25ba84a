"""What replicas have of each row, so that only what has changed is sent, and nothing that is not sent is lost.

In:  the trainer's rows, which of them it has touched.  Out: the rows to send, rounded.
Knows nothing of deltas or files. A row is compared with what replicas hold of it, not with what it was at the last
delta: what rounding or the threshold keeps back adds up until it is sent.

Without rounding or threshold replicas have what the trainer has, and nothing is kept here.
"""

from collections.abc import Callable, Mapping

import torch

from embeddings.quantized import QuantizedRows, quantize


class SentRows:
    """Tables as replicas hold them."""

    def __init__(self, row_format: str, threshold: float) -> None:
        self._format = row_format
        self._threshold = threshold
        self._held: dict[str, torch.Tensor] = {}
        self._kept_back: dict[str, set[int]] = {}
        self._looked_at: dict[str, set[int]] = {}

    @property
    def is_lossy(self) -> bool:
        """Whether replicas may have other rows than the trainer."""
        return self._format != "float32" or self._threshold > 0

    def start(self, tables: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin with rows as replicas hold them and as the trainer has them; the trainer's table may be longer."""
        if not self.is_lossy:
            return
        for name, (held, trained) in tables.items():
            self._held[name] = torch.zeros_like(trained)
            self._held[name][: len(held)] = held
            differs = (self._held[name][: len(held)] != trained[: len(held)]).any(1)
            self._kept_back[name] = set(differs.nonzero().squeeze(1).tolist()) if self._threshold else set()

    def choose(
        self, name: str, trained: Callable[[torch.Tensor], torch.Tensor], touched: set[int], anyway: set[int]
    ) -> tuple[torch.Tensor, QuantizedRows]:
        """Return the index and the rounded rows to send: those touched that replicas would see change enough.

        `trained` returns the trainer's rows of an index. Rows of `anyway` are sent whether they have changed or not.
        """
        if not self.is_lossy:
            index = torch.tensor(sorted(touched), dtype=torch.int64)
            return index, QuantizedRows(trained(index))
        looked_at = touched | self._kept_back[name]
        self._looked_at[name] = looked_at
        index = torch.tensor(sorted(looked_at), dtype=torch.int64)
        held, own = self._held[name][index], trained(index)
        rounded = quantize(own, held, self._format)
        change = (own - held).norm(dim=1)
        chosen = (rounded.applied_to(held) != held).any(1) & ~(change <= self._threshold * held.norm(dim=1))
        chosen |= torch.isin(index, torch.tensor(sorted(anyway), dtype=torch.int64))
        return index[chosen], rounded.take(chosen)

    def note(self, sent: Mapping[str, tuple[torch.Tensor, QuantizedRows]]) -> None:
        """Note that replicas have what `choose` returned."""
        if not self.is_lossy:
            return
        for name, (index, rows) in sent.items():
            self._held[name][index] = rows.applied_to(self._held[name][index])
            self._kept_back[name] = self._looked_at[name] - set(index.tolist()) if self._threshold else set()
