"""What fine-tuning has changed in a pre-trained encoder: a few tensors, apart from the model they belong to.

In:  the tensors, what kind they are, the encoder they were trained on.  Out: files, and a loaded model changed by them.
Knows nothing of training, versions or of how an encoder reads text.

    adapter.safetensors   lora: NAME.lora_A [r, in] and NAME.lora_B [out, r] of a linear layer NAME (Hu et al., 2021)
                          weights: whole parameters by their name, such as those of the topmost layers
    adapter.json          kind, base, rank, alpha

The digest names content, not files: encoders of different digests make vectors that never mix. Inference pays nothing:
B·A is added to the layer's own weight.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "adapter"
ADAPTER_FILE, SETTINGS_FILE = f"{ADAPTER}.safetensors", f"{ADAPTER}.json"
KINDS = ("lora", "weights")
LORA_A, LORA_B = ".lora_A", ".lora_B"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One fine-tuning of one encoder."""

    kind: str
    """lora or weights."""
    base: str
    """Fingerprint of the encoder, without any adapter, that it was trained on."""
    tensors: Mapping[str, torch.Tensor]
    rank: int = 0
    """Of lora."""
    alpha: float = 0.0
    """Of lora: B·A counts alpha / rank."""
    digest: str = field(init=False)
    """Sixteen hexadecimal digits of all of it."""

    def __post_init__(self) -> None:
        """Raises `DataError` for a kind it does not know, and tensors that do not go with it."""
        if self.kind not in KINDS:
            raise DataError(f"adapter kind={self.kind!r}: is none of {', '.join(KINDS)}; train it with this build")
        if self.kind == "lora" and (self.rank < 1 or _layers(self.tensors) is None):
            raise DataError("adapter: of kind lora has a rank and, of each layer, lora_A and lora_B; train it again")
        digest = hashlib.sha256(self.settings().encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        object.__setattr__(self, "digest", digest.hexdigest()[:16])

    def settings(self) -> str:
        """Return the text of adapter.json."""
        said = {"format": FORMAT, "kind": self.kind, "base": self.base, "rank": self.rank, "alpha": self.alpha}
        return json.dumps(said, indent=1)

    @classmethod
    def from_files(cls, settings: str, tensors: Mapping[str, torch.Tensor], where: str) -> "Adapter":
        """Return the adapter of both files' contents. Raises `DataError` naming `where` they are."""
        try:
            said = json.loads(settings)
            if said["format"] != FORMAT:
                raise DataError(
                    f"{where}: adapter of format {said['format']}, this build reads {FORMAT}; train it again"
                )
            return cls(
                kind=said["kind"], base=said["base"], rank=said["rank"], alpha=said["alpha"], tensors=dict(tensors)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: {SETTINGS_FILE} is not an adapter's ({error!r:.200})") from error

    def save(self, folder: Path) -> None:
        """Write both files."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / ADAPTER_FILE)
        (folder / SETTINGS_FILE).write_text(self.settings())

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read what `save` wrote. Raises `DataError` where there is none that holds."""
        try:
            return cls.from_files((folder / SETTINGS_FILE).read_text(), load_file(folder / ADAPTER_FILE), str(folder))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder}: holds no adapter ({error}); `recloop finetune` makes one") from error

    def check_base(self, fingerprint: str, model: str) -> None:
        """Raises `ConfigError` unless it was trained on the encoder of this fingerprint."""
        if self.base != fingerprint:
            raise ConfigError(
                f"encoder.model={model!r}: is encoder {fingerprint}, the adapter {self.digest} was trained on encoder "
                f"{self.base}; name that model and its settings, or fine-tune this one"
            )

    @torch.no_grad()
    def apply(self, model: "nn.Module") -> None:
        """Change the weights of a loaded model to the fine-tuned ones. Raises `ConfigError` where they do not fit."""
        changes = self.tensors if self.kind == "weights" else self._products()
        weights = dict(model.named_parameters())
        for name, change in changes.items():
            weight = weights.get(name)
            if weight is None or weight.shape != change.shape:
                has = "no such weight" if weight is None else f"shape {list(weight.shape)}"
                raise ConfigError(
                    f"adapter {self.digest}: {name} has shape {list(change.shape)}, the model {has}; "
                    "was it trained on another model?"
                )
        for name, change in changes.items():
            weight = weights[name]
            weight.copy_(change if self.kind == "weights" else weight.float() + change)

    def _products(self) -> dict[str, torch.Tensor]:
        """Return what is added to each layer's weight."""
        scale = self.alpha / self.rank
        return {
            f"{layer}.weight": scale * (self.tensors[layer + LORA_B].float() @ self.tensors[layer + LORA_A].float())
            for layer in _layers(self.tensors) or ()
        }


def _layers(tensors: Mapping[str, torch.Tensor]) -> list[str] | None:
    """Return the layers that have both of lora's tensors; none if some tensor is not one of such a pair."""
    layers = sorted(name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A))
    pairs = {layer + part for layer in layers for part in (LORA_A, LORA_B)}
    return layers if layers and pairs == set(tensors) else None
