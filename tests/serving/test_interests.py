"""What users say they like, in their own words, has a part in what they are shown."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import EngineError
from cluster.log import EventLog
from cluster.manifest import VersionRef
from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.batching import Embedded, UnreadableTextError
from serving.interests import MOST_DISLIKED, InterestReader, Stated, split_clauses
from serving.recommender import Query, Recommender
from serving.refresh import Residents
from training.models.interests import Interests
from training.models.served import ServedModel
from training.policies import PolicyConfig

FILMS = {
    "noir 1": "A slow-burn Nordic crime drama about a detective in Reykjavik",
    "noir 2": "A murder in a Swedish village; the inspector takes her time",
    "sea": "A captain hunts a white whale across the ocean",
    "blood": "A gory slasher: blood and guts, a masked killer, a chainsaw",
    "love": "Two lovers meet again in Paris; a tender romance",
}


def item_ids(answer):
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.parametrize(
    ("text", "liked", "disliked"),
    [
        ("slow-burn Nordic crime, no gore", "slow-burn Nordic crime", ("gore",)),
        ("Westerns without violence", "Westerns", ("violence",)),
        ("no horror, not too long. Romance!", "Romance", ("horror", "too long")),
        ("jazz but no vocals and not live", "jazz", ("vocals", "live")),
        ("I don't like musicals; I like war films", "I like war films", ("musicals",)),
        ("everything except opera", "everything", ("opera",)),
        ("North by Northwest, nothing noisy", "North by Northwest", ("noisy",)),
        ("knights and notaries", "knights and notaries", ()),
        ("no gore", "", ("gore",)),
        (" ,;. ", "", ()),
        ("no", "", ()),
    ],
)
def test_clauses_that_begin_with_a_negation_are_disliked(text, liked, disliked):
    assert split_clauses(text) == (liked, disliked)


def test_of_many_things_disliked_each_counts_once_and_the_last_few_as_one():
    assert split_clauses("no a," * 400) == ("", ("a",))
    liked, disliked = split_clauses("songs, " + ",".join(f"no thing {number}" for number in range(100)))
    assert (liked, len(disliked)) == ("songs", MOST_DISLIKED)
    assert disliked[:2] == ("thing 0", "thing 1")
    assert disliked[-1].startswith("thing 7, thing 8")
    assert disliked[-1].endswith("thing 99")


@pytest.fixture(scope="module")
def told(alone):
    """The app, with films that have something to say."""
    items = [{"item_id": item_id, "text": text} for item_id, text in FILMS.items()]
    assert alone.request("PUT", "/v1/items", items).status == 200
    alone.recommend("warm", interests="anything", k=1)  # the model may take longer to load than a request waits
    return alone


def test_without_interests_an_answer_is_as_before(told):
    answer = told.recommend("a stranger")
    assert not {"interests", "encoder", "used"} & set(answer)
    assert answer["cold_start"]


def test_a_stranger_s_interests_replace_what_is_popular(told):
    answer = told.recommend("a stranger", interests="crime in the far north, no romance", k=40)
    assert answer["interests"] == {"liked": "crime in the far north", "disliked": ["romance"]}
    assert (answer["used"], answer["cold_start"]) == (["interests"], False)
    assert answer["encoder"] == TextEncoder(EncoderConfig()).fingerprint
    plain, sea = told.recommend("a stranger", k=40), told.recommend("a stranger", interests="whales", k=40)
    assert item_ids(answer) != item_ids(plain) != item_ids(sea) != item_ids(answer)
    assert set(item_ids(answer)) == set(item_ids(plain))  # nothing is left out, or taken in twice


def test_what_is_disliked_stands_behind_everything_else(told):
    shown = item_ids(told.recommend("a stranger", interests="no gory slasher films", k=100))
    assert len(shown) - shown.index("blood") <= len(shown) // 10 + 1
    assert told.recommend("a stranger", interests="no gory slasher films")["interests"]["liked"] == ""


def test_interests_join_a_history(told):
    told.post("u0", "i5")
    answer = told.recommend("u0", interests="tender romance", k=10)
    assert answer["used"] == ["interests", "history"]
    assert answer["items"] != told.recommend("u0", k=10)["items"]
    assert "i5" not in item_ids(answer)


@pytest.mark.parametrize("text", ["...", "no"])
def test_interests_that_say_nothing_are_not_used_and_that_is_said(told, text):
    answer = told.recommend("a stranger", interests=text)
    assert (answer["interests"]["fallback"], answer["encoder"], answer["used"]) == ("unreadable", None, [])
    assert item_ids(answer) == item_ids(told.recommend("a stranger"))


@pytest.mark.parametrize("text", ["", "x" * 2_001, 7, ["crime"]])
def test_unsound_interests_are_refused_by_field(told, text):
    answer = told.request("POST", "/v1/recommend", {"user_id": "u0", "interests": text})
    assert (answer.status, answer.body["errors"][0]["field"]) == (422, "interests")


class ScriptedEncoder:
    """Answers after a while, or fails, and counts how often it was asked."""

    def __init__(self, delay_s: float = 0.0, error: Exception | None = None) -> None:
        self.delay_s, self.error, self.asked = delay_s, error, 0

    def encode(self, texts, version=None):
        raise AssertionError("interests are no items")

    async def embed(self, texts, *, first, timeout_s, version=None):
        self.asked += 1
        assert first
        if self.delay_s > timeout_s:
            await asyncio.sleep(timeout_s)
            raise EngineError("too late")
        if self.error:
            raise self.error
        count = len(texts)
        return Embedded(
            vectors_NE=np.eye(count, 4, dtype=np.float32), tokens=[1] * count, cut=[False] * count, encoder="e"
        )


def read(reader, text, timeout_s=0.05):
    return asyncio.run(reader.read(text, timeout_s))


def test_an_encoder_that_does_not_answer_in_time_is_a_fallback_and_is_asked_again():
    encoder = ScriptedEncoder(delay_s=10)
    reader = InterestReader(encoder, EncoderConfig())
    began_s = time.monotonic()
    assert read(reader, "crime, no gore").fallback == "encoder_timeout"
    assert time.monotonic() - began_s < 1
    encoder.delay_s = 0
    assert read(reader, "crime, no gore").interests is not None


def test_what_was_said_before_is_known_without_the_encoder():
    encoder = ScriptedEncoder()
    reader = InterestReader(encoder, EncoderConfig())
    first, again = read(reader, "crime, no gore"), read(reader, "crime, no gore")
    assert again is first
    assert encoder.asked == 1
    assert first.interests.liked_E.tolist() == [1, 0, 0, 0]
    assert first.interests.disliked_NE.tolist() == [[0, 1, 0, 0]]
    only = read(reader, "no gore").interests
    assert (only.liked_E, only.disliked_NE.shape) == (None, (1, 4))


def test_what_was_said_is_kept_within_its_bytes_the_newest_of_it(monkeypatch):
    monkeypatch.setattr("serving.interests.KEPT_BYTES", 20_000)
    encoder = ScriptedEncoder()
    reader = InterestReader(encoder, EncoderConfig())
    for number in range(50):
        read(reader, f"{number} " + "a long text " * 100)  # 1.2 KB, and again in parts
    assert 5 <= len(reader._known) <= 10
    assert reader._kept_bytes == sum(size_bytes for _, size_bytes in reader._known.values()) <= 20_000
    read(reader, "49 " + "a long text " * 100)
    assert encoder.asked == 50
    read(reader, "0 " + "a long text " * 100)
    assert encoder.asked == 51


def test_a_text_that_the_encoder_cannot_read_is_said():
    reader = InterestReader(ScriptedEncoder(error=UnreadableTextError("?")), EncoderConfig())
    assert read(reader, "crime").fallback == "unreadable"


@pytest.mark.parametrize(("max_tokens", "fallback"), [(128, None), (64, "encoder_mismatch")])
def test_vectors_of_another_encoder_than_the_version_s_are_not_mixed_in(versions, home, max_tokens, fallback):
    model = ServedModel.load(versions.registry, VersionRef(1))
    interests = Interests(liked_E=model.text_IE[20].numpy(), disliked_NE=np.empty((0, 384), np.float32))
    config = EncoderConfig(max_tokens=max_tokens)
    stated = Stated(interests=interests, liked="film 20", disliked=(), config=config, encoder="e")
    with EventLog(home.log) as log:
        recommender = Recommender(
            log, lambda: Residents(live=model, pinned=None), PolicyConfig(), seed=0, candidates=30
        )
        found = recommender.recommend(Query(user_id="nobody", k=5, arm="live", stated=stated))
    assert found.stated is not None
    assert (found.stated.fallback, found.cold_start) == (fallback, fallback is not None)


def test_a_version_without_texts_cannot_use_interests(versions):
    model = ServedModel.load(versions.registry, VersionRef(1))
    silent = model.with_state(replace(model.state, rows={**model.state.rows, "text": model.text_IE * 0}))
    assert (model.has_texts, silent.has_texts) == (True, False)
