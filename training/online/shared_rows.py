"""Rows that workers hold between them, a block each: read from anywhere, handed out and gathered whole.

In:  this worker's block, rows by their number in the whole table.  Out: those rows, or the whole.
Knows nothing of models. All workers call a function together, with the same rows.

    worker 0 │ rows 0 … r−1        collect [1 r 7]    0: v₁ 0 0
    worker 1 │ rows r … 2r−1                          1: 0 v_r 0        the sum is what everyone gets
    worker 2 │ rows 2r … 3r−1                         2: 0 0 v₇

The train step does not come here: TorchRec exchanges rows and their gradients itself.
"""

import torch
import torch.distributed as dist

from embeddings.tables import Piece


def collect_rows(piece: Piece, row_N: torch.Tensor) -> torch.Tensor:
    """Collective. Return rows of the whole table, [N, …], to every worker."""
    found = own_rows(piece, row_N)
    dist.all_reduce(found)  # collective
    return found


def own_rows(piece: Piece, row_N: torch.Tensor) -> torch.Tensor:
    """Return rows of the whole table, [N, …], with zeros for those that are not in this worker's block."""
    own_N = owns(piece, row_N)
    found = piece.values.new_zeros((len(row_N), *piece.values.shape[1:]))
    found[own_N] = piece.values[row_N[own_N] - piece.first_row]
    return found


def owns(piece: Piece, row_N: torch.Tensor) -> torch.Tensor:
    """Return which of the rows are in this worker's block."""
    return (row_N >= piece.first_row) & (row_N < piece.first_row + len(piece.values))


def hand_out(piece: Piece, whole: torch.Tensor | None, rows: int, group: dist.ProcessGroup | None) -> None:
    """Collective. Copy each worker's block out of the first worker's `whole` of so many rows, the others' being none.

    Rows beyond its end stay as they are.
    """
    blocks = _blocks(piece, rows, group)
    if whole is not None:
        for worker, (first, last) in enumerate(blocks[1:], 1):
            dist.send(whole[first:last].contiguous(), worker, group)
    first, last = blocks[dist.get_rank()]
    own = torch.empty((last - first, *piece.values.shape[1:]), dtype=piece.values.dtype)
    if whole is None:
        dist.recv(own, 0, group)
    else:
        own.copy_(whole[first:last])
    piece.values[: len(own)].copy_(own)


def gather_whole(piece: Piece, rows: int, group: dist.ProcessGroup | None) -> torch.Tensor | None:
    """Collective. Return the first rows of the table, on the CPU, to the first worker alone."""
    blocks = _blocks(piece, rows, group)
    first, last = blocks[dist.get_rank()]
    own = piece.values[: last - first].cpu()
    if dist.get_rank() > 0:
        dist.send(own.contiguous(), 0, group)
        return None
    whole = torch.empty((rows, *own.shape[1:]), dtype=own.dtype)
    whole[first:last] = own
    for worker, (first, last) in enumerate(blocks[1:], 1):
        dist.recv(whole[first:last], worker, group)
    return whole


def _blocks(piece: Piece, rows: int, group: dist.ProcessGroup | None) -> list[tuple[int, int]]:
    """Return which of the first `rows` each worker holds, as [first, last)."""
    blocks = [(0, 0)] * dist.get_world_size()
    dist.all_gather_object(blocks, (piece.first_row, piece.first_row + len(piece.values)), group)  # collective
    return [(min(first, rows), min(last, rows)) for first, last in blocks]
