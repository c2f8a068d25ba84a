"""The unmodified OpenAI client against the app, over HTTP."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator

import numpy as np
import openai
import pytest

from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.config import ServeConfig
from serving.embeddings import EmbeddingsApi, public_name

MODEL = "all-MiniLM-L6-v2"
TEXTS = ["A romance aboard an ocean liner", "Lovers on a ship that sinks", "Tax law for limited companies"]


@pytest.fixture(scope="module")
def client(alone) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{alone.url}/v1", api_key="none is needed", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return TextEncoder(EncoderConfig()).encode(TEXTS)


def test_vectors_are_those_by_which_items_are_placed(client, expected):
    found = client.embeddings.create(model=MODEL, input=TEXTS)  # the client asks for base64
    np.testing.assert_allclose([entry.embedding for entry in found.data], expected, atol=1e-5)
    assert [entry.index for entry in found.data] == [0, 1, 2]
    tokens = sum(len(tokens.ids) for tokens in TextEncoder(EncoderConfig()).tokenize(TEXTS))
    assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
    assert found.model == MODEL


def test_numbers_and_base64_say_the_same(alone, client, expected):
    numbers = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float").data[0].embedding
    body = {"model": MODEL, "input": TEXTS[0], "encoding_format": "base64", "user": "somebody"}
    answer = alone.request("POST", "/v1/embeddings", body).body
    raw = base64.b64decode(answer["data"][0]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), np.array(numbers, np.float32))
    np.testing.assert_allclose(numbers, expected[0], atol=1e-5)
    assert answer["encoder"] == TextEncoder(EncoderConfig()).fingerprint


def test_fewer_dimensions_have_length_1_again(client, expected):
    found = np.array(client.embeddings.create(model=MODEL, input=TEXTS, dimensions=96).data[0].embedding)
    np.testing.assert_allclose(found, expected[0, :96] / np.linalg.norm(expected[0, :96]), atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="384") as raised:
        client.embeddings.create(model=MODEL, input=TEXTS, dimensions=385)
    assert raised.value.param == "dimensions"


def test_token_ids_are_taken_alone_and_in_lists(client, expected):
    ids = [list(tokens.ids)[1:-1] for tokens in TextEncoder(EncoderConfig()).tokenize(TEXTS)]
    many = client.embeddings.create(model=MODEL, input=ids).data
    np.testing.assert_allclose([entry.embedding for entry in many], expected, atol=1e-5)
    one = client.embeddings.create(model=MODEL, input=ids[0]).data
    np.testing.assert_allclose(one[0].embedding, expected[0], atol=1e-5)


def test_models_can_be_listed_and_looked_up(client):
    assert [(model.id, model.object) for model in client.models.list()] == [(MODEL, "model")]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/4")


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.embeddings.create(model="text-embedding-3-small", input="text")
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


@pytest.mark.parametrize(
    "value",
    [
        *("", [], ["sound", ""], [[]], [-1], [[1], ["x"]], 7, None, [10**9], ["x", 1], {"text": "x"}, [True]),
        *([[1], [2.0]], [[1], [2, False]], [1, "x"], [[1], "x"], ["x", [1]], [2**31], [[1], [[2]]], [None], [{}], True),
    ],
)
def test_an_unsound_input_is_a_bad_request(client, value):
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model=MODEL, input=value, encoding_format="float")
    assert (raised.value.param, raised.value.type) == ("input", "invalid_request_error")


def test_unsound_settings_name_the_parameter(client):
    for name, value in (("dimensions", 0), ("encoding_format", "hex"), ("colour", "red")):
        with pytest.raises(openai.BadRequestError) as raised:
            client.post("/embeddings", body={"model": MODEL, "input": "x", name: value}, cast_to=object)
        assert raised.value.param == name


@pytest.mark.parametrize("raw", [b"", b"{", b'{"model": "x", "input": "\\ud800"}', b"\xff", b"[" * 50_000])
def test_malformed_json_is_a_bad_request_in_openai_s_form(alone, raw):
    answer = alone.request("POST", "/v1/embeddings", raw=raw)
    assert (answer.status, answer.body["error"]["type"]) == (400, "invalid_request_error")
    assert "not JSON" in answer.body["error"]["message"]


@pytest.mark.parametrize(
    "text", [" \n", "😀🧑🏽‍🚀" * 40, "\x00\x07\x1b[31m", "word " * 4_000, "a" * 20_000, "\u202eabc"]
)
def test_whatever_can_be_read_has_a_vector(alone, text):
    answer = alone.request("POST", "/v1/embeddings", {"model": MODEL, "input": text})
    assert answer.status == 200, answer
    entry = answer.body["data"][0]
    np.testing.assert_allclose(np.linalg.norm(entry["embedding"]), 1, atol=1e-5)
    assert entry.get("truncated", False) == text.startswith("word")


def test_too_many_or_too_long_texts_are_refused_with_the_limit(alone):
    answer = alone.request("POST", "/v1/embeddings", {"model": MODEL, "input": ["x"] * 2_049})
    assert (answer.status, answer.body["error"]["param"]) == (400, "input")
    assert "2,049 entries; at most 2,048" in answer.body["error"]["message"]
    answer = alone.request("POST", "/v1/embeddings", {"model": MODEL, "input": "x" * 25_000})
    assert (answer.status, answer.body["error"]["code"]) == (400, "string_above_max_length")
    answer = alone.request("POST", "/v1/embeddings", {"model": MODEL, "input": "x" * 150_000})
    assert (answer.status, "at most 100,000" in answer.body["error"]["message"]) == (413, True)


@pytest.fixture
def api() -> EmbeddingsApi:
    """The routes with room for 8 MiB, of which no test gets as far as the encoder."""
    return EmbeddingsApi(ServeConfig(), None, EncoderConfig(), lambda: 384)


class WholeBody:
    """A request of which the routes read the body alone."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def stream(self) -> AsyncIterator[bytes]:
        yield self.body


@pytest.mark.parametrize("entry", ["{}", "1.5", "[]", '""', "[1]", "true", "[[]]"])
@pytest.mark.parametrize("first", ["", "1,", '"x",', "[1],"])
def test_millions_of_entries_are_refused_at_the_first_that_is_unsound(api, first, entry):
    room = 8 * 1024**2 - 100
    body = f'{{"model": "{MODEL}", "input": [{first}{",".join([entry] * (room // (len(entry) + 1)))}]}}'.encode()
    began_s = time.process_time()
    answer = asyncio.run(api.embed(WholeBody(body)))
    assert time.process_time() - began_s < 2
    assert answer.status_code == 400
    problem = json.loads(answer.body)["error"]
    assert (problem["param"], problem["type"], len(problem["message"]) < 300) == (
        "input",
        "invalid_request_error",
        True,
    )


def test_a_million_unknown_parameters_are_refused_at_the_first(api):
    body = json.dumps({"model": MODEL, "input": "x", **{f"p{number}": 0 for number in range(500_000)}}).encode()
    began_s = time.process_time()
    answer = asyncio.run(api.embed(WholeBody(body)))
    assert time.process_time() - began_s < 2
    assert (answer.status_code, json.loads(answer.body)["error"]["param"]) == (400, "p0")


def test_a_folder_s_name_does_not_say_where_it_lies():
    assert [public_name(name) for name in ("/srv/models/e5", "intfloat/e5-small", MODEL)] == [
        "e5",
        "intfloat/e5-small",
        MODEL,
    ]


def test_the_deployment_answers_as_a_replica_of_its_own(served, expected):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is needed", max_retries=0, timeout=60)
    found = client.embeddings.create(model=MODEL, input=TEXTS)
    np.testing.assert_allclose([entry.embedding for entry in found.data], expected, atol=1e-5)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input=[[10**9]])
