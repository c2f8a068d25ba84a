"""Models with fewer neurons: which ones go, and that nothing moves where these did nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaModel

from cluster.errors import ConfigError
from embeddings.encoders.pretrained import load_model
from embeddings.encoders.smaller import keep_neurons
from embeddings.text_encoder import EncoderConfig, TextEncoder


@torch.no_grad()
def _silence(model, gone: list[int]) -> None:
    for layer in model.encoder.layer:
        layer.output.dense.weight[:, gone] = 0


def test_neurons_that_do_nothing_go_first_and_the_vectors_stay(tiny_model: Path) -> None:
    model, ids = load_model(str(tiny_model)), torch.tensor([[2, 4, 5, 9, 3]])
    width = model.config.intermediate_size
    _silence(model, list(range(width // 2)))
    with torch.inference_mode():
        before = model(input_ids=ids).last_hidden_state
        keep_neurons(model, 0.5)
        after = model(input_ids=ids).last_hidden_state
    assert model.encoder.layer[0].intermediate.dense.weight.shape[0] == width // 2
    torch.testing.assert_close(after, before)


def test_a_model_with_fewer_neurons_is_read_back_as_it_was_written(tiny_model: Path, tmp_path: Path) -> None:
    model, ids = load_model(str(tiny_model), layers=2, neurons=0.25), torch.tensor([[2, 4, 5, 3]])
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = model(input_ids=ids).last_hidden_state
        found = AutoModel.from_pretrained(tmp_path).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, wanted)


def test_the_recipe_asks_for_fewer_and_vectors_do_not_mix(tiny_model: Path) -> None:
    whole, half = (TextEncoder(EncoderConfig(model=str(tiny_model), neurons=share)) for share in (None, 0.5))
    assert whole.fingerprint != half.fingerprint
    assert (whole.encode(["ghost castle"]) != half.encode(["ghost castle"])).any()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.neurons="):
        EncoderConfig(neurons=share)


def test_a_model_that_does_not_tell_its_neurons_is_refused(tiny_model: Path) -> None:
    model = load_model(str(tiny_model))
    model.config.intermediate_size = model.config.hidden_size
    with pytest.raises(ConfigError, match="BertModel does not tell"):
        keep_neurons(model, 0.5)


def test_a_decoder_of_fewer_layers_answers_and_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaModel(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "whole")
    model, ids = load_model(str(tmp_path / "whole"), layers=2, neurons=0.5), torch.tensor([[2, 4, 5, 3]])
    model.save_pretrained(tmp_path / "half")
    with torch.inference_mode():
        wanted = model(input_ids=ids).last_hidden_state
        found = load_model(str(tmp_path / "half"))(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, wanted)
