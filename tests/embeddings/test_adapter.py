"""A fine-tuned encoder is its base model and an adapter; the model here is the packaged one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, DataError
from embeddings.adapter import ADAPTER_FILE, SETTINGS_FILE, Adapter
from embeddings.text_encoder import EncoderConfig, TextEncoder

TEXTS = ["A romance aboard an ocean liner", "Tax law for limited companies"]
LAYER = "encoder.layer.5.attention.self.query"


@pytest.fixture(scope="module")
def base() -> TextEncoder:
    return TextEncoder(EncoderConfig())


@pytest.fixture(scope="module")
def adapter(base: TextEncoder) -> Adapter:
    drawn = torch.Generator().manual_seed(0)
    tensors = {
        f"{LAYER}.lora_A": torch.randn(4, 384, generator=drawn),
        f"{LAYER}.lora_B": torch.randn(384, 4, generator=drawn) / 20,
    }
    return Adapter(kind="lora", base=base.fingerprint, rank=4, alpha=8.0, tensors=tensors)


def test_an_adapter_is_read_as_it_was_written(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path)
    read = Adapter.load(tmp_path)
    assert (read.digest, read.kind, read.base, read.rank, read.alpha) == (
        adapter.digest,
        "lora",
        adapter.base,
        4,
        8.0,
    )
    assert set(read.tensors) == set(adapter.tensors)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_one_changed_number_is_another_digest_and_another_fingerprint(base: TextEncoder, adapter: Adapter) -> None:
    tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    tensors[f"{LAYER}.lora_B"][3, 1] += 1e-6
    fingerprints = [
        TextEncoder(EncoderConfig(), adapter=given).fingerprint
        for given in (None, adapter, replace(adapter, tensors=tensors), replace(adapter, alpha=9.0))
    ]
    assert fingerprints[0] == base.fingerprint
    assert len(set(fingerprints)) == 4


def test_a_tuned_encoder_makes_other_vectors_and_caches_them_apart(
    base: TextEncoder, adapter: Adapter, tmp_path: Path
) -> None:
    before = TextEncoder(EncoderConfig(), tmp_path).encode(TEXTS)
    after = TextEncoder(EncoderConfig(), tmp_path, adapter).encode(TEXTS)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(TextEncoder(EncoderConfig(), tmp_path, adapter).encode(TEXTS), after)
    np.testing.assert_array_equal(TextEncoder(EncoderConfig(), tmp_path).encode(TEXTS), before)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, atol=1e-6)


def test_lora_merged_here_is_lora_as_peft_merges_it(adapter: Adapter) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    from embeddings.encoders.pretrained import locate_model

    ours, theirs = (AutoModel.from_pretrained(locate_model("all-MiniLM-L6-v2")) for _ in range(2))
    adapter.apply(ours)
    tuned = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=[LAYER]))
    layer = tuned.base_model.model.get_submodule(LAYER)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.tensors[f"{LAYER}.lora_A"])
        layer.lora_B["default"].weight.copy_(adapter.tensors[f"{LAYER}.lora_B"])
    merged = tuned.merge_and_unload().get_submodule(LAYER).weight
    torch.testing.assert_close(ours.get_submodule(LAYER).weight, merged)


def test_whole_weights_take_the_place_of_the_models_own(base: TextEncoder) -> None:
    from transformers import AutoModel

    from embeddings.encoders.pretrained import locate_model

    model = AutoModel.from_pretrained(locate_model("all-MiniLM-L6-v2"))
    tensors = {f"{LAYER}.bias": torch.arange(384.0)}
    Adapter(kind="weights", base=base.fingerprint, tensors=tensors).apply(model)
    assert torch.equal(model.get_submodule(LAYER).bias, torch.arange(384.0))


def test_an_adapter_of_another_model_is_refused_and_both_are_named(base: TextEncoder, adapter: Adapter) -> None:
    other = replace(adapter, base="0123456789abcdef")
    with pytest.raises(ConfigError, match=rf"is encoder {base.fingerprint}.*was trained on encoder 0123456789abcdef"):
        TextEncoder(EncoderConfig(), adapter=other)
    with pytest.raises(ConfigError, match=r"fine-tune this one"):  # the same model, read otherwise
        TextEncoder(EncoderConfig(max_tokens=8), adapter=replace(adapter, base=base.fingerprint))


def test_weights_that_do_not_fit_are_refused_before_any_is_changed(base: TextEncoder) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    before = model[0].weight.clone()
    tensors = {"0.weight": torch.zeros(2, 2), "1.weight": torch.zeros(2, 2)}
    with pytest.raises(ConfigError, match=r"1\.weight has shape \[2, 2\], the model no such weight"):
        Adapter(kind="weights", base=base.fingerprint, tensors=tensors).apply(model)
    assert torch.equal(model[0].weight, before)


def test_the_recipe_names_the_folder_of_an_adapter(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path)
    encoder = TextEncoder(EncoderConfig(adapter=str(tmp_path)))
    assert encoder.adapter is not None
    assert encoder.adapter.digest == adapter.digest


@pytest.mark.parametrize("damage", ["no file", "cut tensors", "no JSON", "half a pair"])
def test_what_is_no_adapter_is_told_with_its_folder(adapter: Adapter, tmp_path: Path, damage: str) -> None:
    adapter.save(tmp_path)
    if damage == "no file":
        (tmp_path / SETTINGS_FILE).unlink()
    elif damage == "cut tensors":
        (tmp_path / ADAPTER_FILE).write_bytes((tmp_path / ADAPTER_FILE).read_bytes()[:100])
    elif damage == "no JSON":
        (tmp_path / SETTINGS_FILE).write_text("{")
    else:
        with pytest.raises(DataError, match=r"lora_A and lora_B"):
            replace(adapter, tensors={f"{LAYER}.lora_A": torch.zeros(4, 384)})
        return
    with pytest.raises(DataError, match=tmp_path.name):
        Adapter.load(tmp_path)
