"""What people choose among what they see: a linear correction to the click head's logit.

In:  user and item vectors, weights.  Out: what to add to each item's logit; the features that weights are learned of.
Knows nothing of how they are learned (training/online/impressions.py). The wide part of a wide and deep model (Cheng et
al., DLRS 2016): the ranker says what its user would look for, this what of it is taken when it is seen.

    features = [item, direction of the user ⊙ item]

Shapes: leading dimensions are free (…); D dimension.
"""

import torch


def seen_features(user_D: torch.Tensor, item_D: torch.Tensor) -> torch.Tensor:
    """Return the features of users and items, […, 2D]; the user counts by direction, with root mean square 1."""
    return torch.cat([item_D, _direction(user_D) * item_D], dim=-1)


def seen_correction(weight: torch.Tensor, user_D: torch.Tensor, item_KD: torch.Tensor) -> torch.Tensor:
    """Return what the weights [2D] add to the logits of a user's K candidates, [K]: features times weights, cheaper."""
    of_item_D, of_pair_D = weight.chunk(2)
    return item_KD @ (of_item_D + _direction(user_D) * of_pair_D)


def _direction(user_D: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(user_D, dim=-1) * user_D.shape[-1] ** 0.5
