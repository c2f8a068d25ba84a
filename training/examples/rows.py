"""Ids become table rows, and a share of a step becomes an `ExampleBatch`.

In:  `ExampleRows` of host arrays.  Out: `ExampleBatch`.
Knows nothing of files. With ids that are rows already there is nothing to look up.
"""

import numpy as np
import torch

from embeddings.examples import ExampleBatch, build_lookup_of_examples
from training.examples.stream import ExampleRows


def batch_of_rows(share: ExampleRows) -> ExampleBatch:
    """Return the batch of a share whose ids are table rows."""
    examples = len(share.label_B)
    lengths = np.ones(3 * examples, np.int32)
    lengths[2 * examples :] = share.history_length_B
    return ExampleBatch(
        lookup=build_lookup_of_examples(torch.from_numpy(share.ids), torch.from_numpy(lengths)),
        label_B=torch.from_numpy(share.label_B),
        global_examples=share.global_examples,
    )
