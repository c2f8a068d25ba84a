"""A text encoder that learns: the same vectors as `TextEncoder`, with gradients, for a fixed list of texts.

In:  texts, a `TextEncoder`'s model, what of it is to learn.  Out: unit vectors of some of the texts; an `Adapter`.
Knows nothing of users, objectives or workers.

    tokens ─▶ embeddings ─▶ frozen layers ──kept in memory──▶ layers that learn ─▶ pooled ─▶ length 1

Most of what an encoder costs lies below the layers that learn, and is the same in every step: it is computed once.
LoRA is peft's (Hu et al., 2021). Shapes: N texts of a call, T tokens, E encoder dimension.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cluster.errors import ConfigError
from embeddings.adapter import Adapter
from embeddings.encoders.batching import pool
from embeddings.encoders.pretrained import load_model, load_tokenizer
from embeddings.encoders.smaller import find_layers
from embeddings.text_encoder import TextEncoder
from training.encoder.config import FinetuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 1 << 30
SAME = 1e-3
"""How far a component may be from `TextEncoder`'s before the model counts as one that this module reads otherwise."""
MASKED = -1e9


class TunedEncoder(nn.Module):
    """The encoder over one list of texts; `forward` takes their places in it."""

    def __init__(self, encoder: TextEncoder, config: FinetuneConfig, texts: Sequence[str]) -> None:
        """Load the model and freeze what does not learn. Raises `ConfigError` for a model that cannot be tuned so."""
        super().__init__()
        self._config = config
        self._base = encoder.base_fingerprint
        self._pooling, prefix = encoder.traits.pooling, encoder.traits.item_prefix
        tokenizer = load_tokenizer(encoder.config.model, encoder.location)
        self.model = cast(
            "PreTrainedModel", load_model(encoder.location, encoder.config.layers, encoder.config.neurons)
        )
        self.model.requires_grad_(False)
        self._before = encoder.adapter
        if self._before is not None and self._before.kind == "weights":
            if config.tuned == "lora":  # which would be read over the plain model
                raise ConfigError(
                    f"finetune.tuned={config.tuned!r}: encoder.adapter {self._before.digest} holds whole weights, "
                    "which lora cannot go on from; set finetune.tuned to top or full, or leave the adapter out"
                )
            self._before.apply(self.model)
        self._layers_name, layers = find_layers(self.model)
        if config.tuned in ("lora", "top") and config.layers > len(layers):
            raise ConfigError(f"finetune.layers={config.layers}: {encoder.config.model!r} has {len(layers)}")
        self._frozen_layers = {"full": 0, "frozen": len(layers)}.get(config.tuned, len(layers) - config.layers)
        self._by_layer = self._layers_name == "encoder.layer"
        """Whether layers can be run one by one, as those of BERT and its kin."""
        self._make_trainable()
        if self._before is not None and self._before.kind == "lora":
            self._go_on_from(self._before)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
        self._tokens = [
            torch.tensor(ids or [0], dtype=torch.int64)  # of an empty text, whose vector is zero
            for ids in tokenizer(
                [prefix + text for text in texts], truncation=True, max_length=encoder.config.max_tokens
            )["input_ids"]
        ]
        self._is_told = np.array([bool(text) for text in texts])
        self.lengths = np.array([len(tokens) for tokens in self._tokens])
        self._kept: list[torch.Tensor] | None = None
        self._check_against(encoder, texts)

    def _make_trainable(self) -> None:
        config, layers = self._config, self.model.get_submodule(self._layers_name)
        tuned = [f"{self._layers_name}.{i}" for i in range(self._frozen_layers, len(cast("nn.ModuleList", layers)))]
        if config.tuned == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            targets = [
                f"{layer}.{name}"
                for layer in tuned
                for name, module in self.model.get_submodule(layer).named_modules()
                if isinstance(module, nn.Linear)
            ]
            lora = LoraConfig(
                r=config.rank, lora_alpha=cast("int", config.alpha), lora_dropout=config.dropout, target_modules=targets
            )
            inject_adapter_in_model(lora, self.model)
        elif config.tuned == "full":
            self.model.requires_grad_(True)
        elif config.tuned == "top":
            for layer in tuned:
                self.model.get_submodule(layer).requires_grad_(True)
        pooler = getattr(self.model, "pooler", None)  # of a classifier that nobody asks
        if pooler is not None:
            pooler.requires_grad_(False)

    @torch.no_grad()
    def _go_on_from(self, before: Adapter) -> None:
        """Start from what an earlier lora of the same shape has learned, rather than from nothing."""
        own = {_plain(name): parameter for name, parameter in self.model.named_parameters() if ".lora_" in name}
        shapes = {name: parameter.shape for name, parameter in own.items()}
        if (
            shapes != {name: tensor.shape for name, tensor in before.tensors.items()}
            or before.alpha != self._config.alpha
        ):
            raise ConfigError(
                f"encoder.adapter: {before.digest} is lora of rank {before.rank}, alpha {before.alpha:g}, and goes on "
                "as such alone: set finetune.tuned, layers, rank and alpha as it was trained, or leave it out"
            )
        for name, parameter in own.items():
            parameter.copy_(before.tensors[name])

    @property
    def trained(self) -> int:
        """Return how many numbers learn."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def total(self) -> int:
        """Return how many numbers the encoder has, without what lora adds."""
        return sum(parameter.numel() for name, parameter in self.model.named_parameters() if ".lora_" not in name)

    def forward(self, rows: np.ndarray) -> torch.Tensor:
        """Return the vectors [N, E] of the texts in these places, in their order."""
        if not len(rows):
            return torch.empty(0, self.dim)
        by_length = np.argsort(self.lengths[rows], kind="stable")
        at_once = self._config.encode_texts
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training and self._config.bfloat16):
            parts = [self._encode(rows[by_length[first : first + at_once]]) for first in range(0, len(rows), at_once)]
        vector_NE = torch.cat(parts)[torch.from_numpy(np.argsort(by_length))]
        return vector_NE * torch.from_numpy(self._is_told[rows]).unsqueeze(1)

    @property
    def dim(self) -> int:
        """Return the length of a vector."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def encode_all(self, share: slice = slice(None)) -> torch.Tensor:
        """Return the vectors of a share of the texts as they are now, without dropout."""
        was_training = self.training
        self.eval()
        vectors = self(np.arange(len(self._tokens))[share])
        self.train(was_training)
        return vectors

    @torch.no_grad()
    def keep_frozen(self) -> bool:
        """Compute what lies below the layers that learn once and for all; return whether memory allowed it."""
        bytes_needed = 4 * int(self.lengths.sum()) * self.dim
        if not self._by_layer or self._config.tuned == "full" or bytes_needed > self._config.cache_gib * GIB:
            return False
        was_training = self.training
        self.eval()
        kept: list[torch.Tensor | None] = [None] * len(self._tokens)
        by_length = np.argsort(self.lengths, kind="stable")
        for first in range(0, len(by_length), self._config.encode_texts):
            rows = by_length[first : first + self._config.encode_texts]
            hidden_NTE, _ = self._lower(rows)
            for row, hidden_TE in zip(rows, hidden_NTE, strict=True):
                kept[row] = hidden_TE[: self.lengths[row]].clone()
        self._kept = cast("list[torch.Tensor]", kept)
        self.train(was_training)
        return True

    def adapter(self) -> Adapter | None:
        """Return what has been learned so far; none where nothing learns."""
        tensors = {
            _plain(name): parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        if not tensors:
            return self._before
        if self._config.tuned == "lora":
            return Adapter(
                kind="lora", base=self._base, tensors=tensors, rank=self._config.rank, alpha=self._config.alpha
            )
        before = self._before.tensors if self._before is not None else {}
        return Adapter(kind="weights", base=self._base, tensors={**before, **tensors})

    def _encode(self, rows: np.ndarray) -> torch.Tensor:
        if self._by_layer:
            hidden_NTE, mask_NT = self._kept_of(rows) if self._kept is not None else self._lower(rows)
            for layer in self._layers()[self._frozen_layers :]:
                hidden_NTE = self._run_layer(layer, hidden_NTE, mask_NT)
        else:
            tokens_NT, mask_NT = self._pad(rows)
            hidden_NTE = self.model(input_ids=tokens_NT, attention_mask=mask_NT.long()).last_hidden_state
        return pool(hidden_NTE, mask_NT.long(), self._pooling)

    def _lower(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the layers that do not learn make of the texts, and which tokens are there."""
        tokens_NT, mask_NT = self._pad(rows)
        hidden_NTE = cast("nn.Module", self.model.embeddings)(input_ids=tokens_NT)
        for layer in self._layers()[: self._frozen_layers]:
            hidden_NTE = self._run_layer(layer, hidden_NTE, mask_NT)
        return hidden_NTE, mask_NT

    def _run_layer(self, layer: nn.Module, hidden_NTE: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        bias_N11T = torch.where(mask_NT, 0.0, MASKED)[:, None, None, :]
        if self._config.checkpointing and torch.is_grad_enabled() and self.training:
            out = checkpoint(layer, hidden_NTE, bias_N11T, use_reentrant=False)
        else:
            out = layer(hidden_NTE, bias_N11T)
        return out[0] if isinstance(out, tuple) else cast("torch.Tensor", out)

    def _layers(self) -> list[nn.Module]:
        return list(cast("nn.ModuleList", self.model.get_submodule(self._layers_name)))

    def _kept_of(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._kept is not None
        return nn.utils.rnn.pad_sequence([self._kept[row] for row in rows], batch_first=True), self._mask(rows)

    def _pad(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.utils.rnn.pad_sequence([self._tokens[row] for row in rows], batch_first=True), self._mask(rows)

    def _mask(self, rows: np.ndarray) -> torch.Tensor:
        lengths_N1 = torch.from_numpy(self.lengths[rows]).unsqueeze(1)
        return torch.arange(int(lengths_N1.max())) < lengths_N1

    @torch.no_grad()
    def _check_against(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        """Raises `ConfigError` where the encoder reads text in another way, whose vectors would be tuned blindly."""
        some = [row for row in np.linspace(0, len(texts) - 1, 3).astype(int) if texts[row]] if len(texts) else []
        if not some:
            return
        self.eval()
        ours, theirs = self(np.array(some)).numpy(), encoder.encode([str(texts[row]) for row in some])
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > SAME:
            raise ConfigError(
                f"encoder.model={encoder.config.model!r}: fine-tuning does not read text as this encoder does, to "
                f"within {SAME:g}; tune it with encoder.dtype=float32, or another model"
            )


def _plain(name: str) -> str:
    """Return a parameter's name as adapters have it, without what peft adds."""
    return name.replace(".lora_A.default.weight", ".lora_A").replace(".lora_B.default.weight", ".lora_B")
