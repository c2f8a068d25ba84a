"""Token ids become batches of like length; states become one vector a text."""

import numpy as np
import pytest
import torch

from embeddings.encoders.batching import POOLINGS, batches_by_length, pad, pool


def test_a_batch_costs_its_texts_times_its_longest() -> None:
    lengths = [3, 61, 9, 4, 9, 3]
    assert list(batches_by_length(lengths, max_tokens=20, max_texts=9)) == [[1], [2, 4], [3, 0, 5]]


def test_every_text_is_in_one_batch_and_next_to_nothing_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 3_000).tolist()
    batches = list(batches_by_length(lengths, max_tokens=2_048, max_texts=256))
    assert sorted(i for batch in batches for i in batch) == list(range(3_000))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.02 * sum(lengths)


def test_a_batch_has_no_more_texts_than_allowed() -> None:
    assert [len(batch) for batch in batches_by_length([1] * 7, max_tokens=100, max_texts=3)] == [3, 3, 1]
    assert list(batches_by_length([], max_tokens=100, max_texts=3)) == []


def test_padding_is_on_the_right_and_masked() -> None:
    ids_BL, mask_BL = pad([[5, 6, 7], [8]], pad_id=2)
    assert ids_BL.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert mask_BL.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("pooling", "expected"), [("mean", [0.6, 0.8]), ("cls", [0.0, 1.0]), ("last", [1.0, 0.0])])
def test_each_pooling_by_hand(pooling: str, expected: list[float]) -> None:
    hidden_BLE = torch.tensor([[[0.0, 4.0], [3.0, 0.0], [9.0, 9.0]]])
    pooled = pool(hidden_BLE, torch.tensor([[1, 1, 0]]), pooling)
    torch.testing.assert_close(pooled, torch.tensor([expected]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_does_not_count(pooling: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_BLE = torch.randn(2, 5, 4, generator=generator)
    mask_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    torch.testing.assert_close(
        pool(hidden_BLE, mask_BL, pooling)[1:], pool(hidden_BLE[1:, :2], mask_BL[1:, :2], pooling)
    )
