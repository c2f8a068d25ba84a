"""A language model with fewer layers, or with fewer neurons in each.

In:  a loaded model.  Out: the same model, changed in place, whose config says so.
Knows nothing of texts or training.

What is left has the weights that it had, so that vectors move: a student that is distilled starts from here.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def keep_layers(model: "PreTrainedModel", count: int) -> None:
    """Drop all but `count` of the model's layers, evenly spaced, the last among them.

    Raises `ConfigError` where the model has fewer.
    """
    name, stack = find_layers(model)
    if count > len(stack):
        raise ConfigError(f"encoder.layers={count}: the model has {len(stack)}")
    kept = [round((i + 1) * len(stack) / count) - 1 for i in range(count)]
    layers = nn.ModuleList(stack[i] for i in kept)
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # pyright: ignore[reportArgumentType]  # where its keys are kept
    model.set_submodule(name, layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = count


@torch.no_grad()
def keep_neurons(model: "PreTrainedModel", share: float) -> None:
    """Drop all but a share of the neurons of each layer's feed-forward part: those of smallest weights.

    How large a neuron is: the product of the norms of what leads into it and out of it. Raises `ConfigError` where the
    model does not say how many it has, or has none that can be told from others.
    """
    width, hidden = getattr(model.config, "intermediate_size", None), model.config.hidden_size
    if width is None or width == hidden:
        raise ConfigError(
            f"encoder.neurons={share}: {type(model).__name__} does not tell which of its layers have them"
        )
    kept = max(1, round(share * width))
    for layer in find_layers(model)[1]:
        linears = [(parent, name, child) for parent in layer.modules() for name, child in _linears(parent)]
        into = [found for found in linears if found[2].out_features == width]
        out = [found for found in linears if found[2].in_features == width]
        if not into or not out:
            raise ConfigError(
                f"encoder.neurons={share}: {type(model).__name__} has no linear layers of {width} neurons"
            )
        size_F = torch.ones(width)
        for _, _, linear in into:
            size_F *= linear.weight.norm(dim=1)
        for _, _, linear in out:
            size_F *= linear.weight.norm(dim=0)
        chosen = size_F.topk(kept).indices.sort().values
        for parent, name, linear in into:
            bias = None if linear.bias is None else linear.bias[chosen]
            setattr(parent, name, _linear(linear.weight[chosen], bias))
        for parent, name, linear in out:
            setattr(parent, name, _linear(linear.weight[:, chosen], linear.bias))
    model.config.intermediate_size = kept


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return a transformer's layers, its longest list of modules, and their name. Raises `ConfigError` without any."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    found = max(lists, key=lambda entry: len(entry[1]), default=None)
    if found is None:
        raise ConfigError("encoder.model: has no list of layers")
    return found


def _linears(parent: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, child) for name, child in parent.named_children() if isinstance(child, nn.Linear)]


def _linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> nn.Linear:
    outputs, inputs = weight_OI.shape
    linear = nn.Linear(inputs, outputs, bias=bias_O is not None)
    linear.weight.copy_(weight_OI)
    if bias_O is not None:
        linear.bias.copy_(bias_O)
    return linear
