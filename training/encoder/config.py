"""Settings of fine-tuning and distillation: what of the encoder learns, from which objective, and for how long.

In:  the recipe's `[finetune]` and `[student]`.  Out: a checked `FinetuneConfig` and `StudentConfig`.
Knows nothing of models or data.
"""

from dataclasses import dataclass

from cluster.errors import ConfigError

TUNED = ("lora", "top", "full", "frozen")
NEXT_ITEM, SEQUENCE, CLICK = "next_item", "sequence", "click"
RATING_OBJECTIVES = ("rating_mse", "rating_mae", "rating_classes")
OBJECTIVES = (NEXT_ITEM, SEQUENCE, CLICK, *RATING_OBJECTIVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """How the encoder keeps learning what content means to these users."""

    tuned: str = "lora"
    """lora: low-rank additions to the topmost layers; top: all weights of these; full: all weights; frozen: none, only
    the head learns, which is what the others are compared with."""
    layers: int = 2
    """Topmost layers that lora and top change. What lies below is computed once and kept."""
    rank: int = 8
    """Of lora."""
    alpha: float = 16.0
    """Of lora: its additions count alpha / rank."""
    dropout: float = 0.1
    """In the layers that learn, and before lora's additions."""
    objective: str = "next_item"
    """next_item: history retrieves the next item among the batch's and hard negatives; sequence: the likelihood of
    each user's sequence, as estimated from the batch's items; click: chosen or drawn, by cross entropy; rating_mse,
    rating_mae, rating_classes: stars, as a number or as classes."""
    dim: int = 128
    """Of the head's user and item vectors."""
    max_history: int = 20
    """Interactions a user's vector is attended from."""
    head_epochs: int = 30
    """Epochs at most of the head alone, on the encoder as it is."""
    epochs: int = 6
    """Epochs at most of encoder and head together."""
    patience: int = 2
    """Epochs without a better validation figure before training stops; the best epoch's weights are kept."""
    learning_rate: float = 0.0005
    """Of AdamW on the encoder's weights."""
    head_learning_rate: float = 0.002
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    warmup_steps: int = 10
    """Over which the rates rise; a tenth of a phase's steps at most."""
    batch_items: int = 192
    """Distinct items a step and worker, each encoded once however many interactions have it."""
    item_power: float = 0.0
    """Items are drawn into a batch with probability ∝ count^power; logits are corrected by the logarithm of their odds
    of being in it."""
    batch_targets: int = 1024
    """Interactions with these items a step and worker."""
    whole_items: int = 8192
    """Catalogues of so many items are scored whole, a full softmax, and with the encoder each step encodes all of them.
    Of larger ones a step of the encoder scores only items that it encodes: others' vectors are older, and to tell old
    from new would be all that is learned."""
    whole_steps: int = 2
    """Steps of the encoder an epoch, where a step encodes the whole catalogue."""
    whole_targets: int = 8192
    """Interactions of such a step and worker."""
    bfloat16: bool = False
    """Learn with products in bfloat16: several times as fast where the processor multiplies it (AMX)."""
    hard_negatives: int = 32
    """Items a step that score high and were not chosen, encoded beside the batch's."""
    accumulate: int = 1
    """Batches whose gradients one step adds up."""
    checkpointing: bool = False
    """Compute each layer again in backward instead of keeping its activations: less memory, more time."""
    encode_texts: int = 32
    """Texts that pass the encoder together."""
    cache_gib: float = 2.0
    """Memory for what lies below the layers that learn; where it needs more, it is computed anew each time."""
    validation_fraction: float = 0.1
    """Share of the training events, the newest, that training does not see."""
    cold_items: float = 0.15
    """Share of items held out: training sees no interaction with them, and how well they are told decides which epoch
    is kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.tuned not in TUNED:
            raise ConfigError(f"finetune.tuned={self.tuned!r}: is none of {', '.join(TUNED)}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"finetune.objective={self.objective!r}: is none of {', '.join(OBJECTIVES)}")
        for name in ("layers", "rank", "dim", "max_history", "head_epochs", "epochs", "patience", "encode_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name}={getattr(self, name)}: must be at least 1")
        for name in ("batch_items", "batch_targets", "accumulate", "whole_steps", "whole_targets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name}={getattr(self, name)}: must be at least 1")
        for name in ("alpha", "learning_rate", "head_learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"finetune.{name}={getattr(self, name)}: must be above 0")
        for name in (
            "whole_items",
            "hard_negatives",
            "warmup_steps",
            "weight_decay",
            "cache_gib",
            "seed",
            "item_power",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"finetune.{name}={getattr(self, name)}: must be 0 or more")
        for name in ("validation_fraction", "cold_items"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name}={getattr(self, name)}: must be between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"finetune.dropout={self.dropout}: must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """How small the student is, and how it learns."""

    layers: int = 1
    """Of the teacher's, evenly spaced."""
    neurons: float = 1.0
    """Share of each layer's feed-forward neurons, those of largest weights."""
    epochs: int = 20
    fragments: int = 4
    """Texts made of each text's own pieces, drawn and ordered at random, that are learned beside it."""
    learning_rate: float = 0.001
    """Of AdamW; it rises over a twentieth of the steps and falls as a cosine."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    bfloat16: bool = False
    """Learn with products in bfloat16: several times as fast where the processor multiplies it (AMX)."""
    batch_tokens: int = 2048
    """Tokens learned together, padding included."""
    batch_texts: int = 64
    validation_fraction: float = 0.1
    """Share of the texts that are held out and decide which epoch is kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("layers", "epochs", "batch_tokens", "batch_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"student.{name}={getattr(self, name)}: must be at least 1")
        for name in ("fragments", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"student.{name}={getattr(self, name)}: must be 0 or more")
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"student.{name}={getattr(self, name)}: must be above 0")
        if not 0 < self.neurons <= 1:
            raise ConfigError(f"student.neurons={self.neurons}: must be above 0 and at most 1")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"student.validation_fraction={self.validation_fraction}: must be between 0 and 1")
