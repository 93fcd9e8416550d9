"""Tokenizers: their ids are those of the files beside the weights, whatever class transformers makes of them."""

import json

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from hyclora.utils.args import LoraArguments, ModelArguments
from hyclora.utils.data.gsm8k import examples_of, prompt_of, target_of
from hyclora.utils.data.tokens import Example, tokenize_rows
from hyclora.utils.errors import UserError
from hyclora.utils.loading import find_base, load_tokenizer
from hyclora.utils.tokenizer import PROBES
from tests.helpers.small_roberta import POSITIONS, write_roberta
from tests.helpers.small_tokenizers import ROWS, folder_of, write_byte_level, write_sentencepiece

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMES}
SETTINGS = {
    "bare": None,
    "named": LLAMA,
    "named fast": {**LLAMA, "tokenizer_class": "LlamaTokenizerFast"},
    "not legacy, with eos": {**LLAMA, "legacy": False, "add_bos_token": True, "add_eos_token": True},
    "legacy, padding left": {**LLAMA, "legacy": True, "add_bos_token": True, "padding_side": "left"},
}
FAMILIES = [LlamaConfig, MistralConfig]
MORE = [" Ana  has   two ", "▁x", "a\n\n\n b", "<<3*4=12>>12\t$1,000.50", "", "  ", "\u3000é\u0301ﬁ"]


def unframed(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def check(tokenizer, encode, before):
    """Texts, and rows of GSM8K, have the ids of encode, the ids `before` once in front, and a row one eos behind."""
    for text in [*PROBES, *MORE]:
        assert tokenizer(text).input_ids == before + encode(text), text
    texts = [prompt_of(row["question"]) + target_of(row["answer"]) for row in ROWS]
    rows = tokenize_rows(examples_of(ROWS), tokenizer, seq_len=4096).rows
    assert [row["input_ids"] for row in rows] == [[*before, *encode(t), tokenizer.eos_token_id] for t in texts]
    assert tokenizer.padding_side == "right" and tokenizer.pad_token is not None


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_sentencepiece_file_decides(config, settings, tmp_path):
    folder = folder_of(tmp_path / "model", SETTINGS[settings], config(vocab_size=700))
    pieces = write_sentencepiece(folder)
    check(load_tokenizer(str(folder)), pieces.encode, [pieces.bos_id()])


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("settings", [None, LLAMA])
def test_it_decides_over_a_saved_tokenizer_too(config, settings, tmp_path):
    """Transformers saves a LLaMA tokenizer without bos and with its own rules for spaces."""
    folder = folder_of(tmp_path / "model", settings, config(vocab_size=700))
    pieces = write_sentencepiece(folder)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.json").rename(folder / "tokenizer.json")
    check(load_tokenizer(str(folder)), pieces.encode, [pieces.bos_id()])


OTHERS = {
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "own symbols": {"user_defined_symbols": ["<gap>", "$$"]},
    "unigram": {"model_type": "unigram", "byte_fallback": False},
    "suffixes": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("settings", [None, LLAMA], ids=["bare", "named"])
@pytest.mark.parametrize("options", OTHERS)
def test_other_sentencepiece_models_are_right_or_refused(options, settings, tmp_path):
    folder = folder_of(tmp_path / "model", settings)
    pieces = write_sentencepiece(folder, **OTHERS[options])
    try:
        tokenizer = load_tokenizer(str(folder))
    except UserError as error:
        assert options in ("unigram", "suffixes") and str(folder) in str(error) and "for the text '" in str(error)
    else:
        check(tokenizer, pieces.encode, [pieces.bos_id()])


def test_what_a_run_saves_loads_with_the_same_ids(tmp_path):
    for name, settings in SETTINGS.items():
        folder = folder_of(tmp_path / name, settings)
        write_sentencepiece(folder)
        tokenizer = load_tokenizer(str(folder))
        tokenizer.save_pretrained(folder / "run")
        again = AutoTokenizer.from_pretrained(folder / "run")
        assert [again(text).input_ids for text in PROBES] == [tokenizer(text).input_ids for text in PROBES], name
        assert [again.decode(unframed(again, text)) for text in PROBES] == list(PROBES), name
        assert (again.padding_side, again.pad_token, again.eos_token) == ("right", "<unk>", "</s>"), name


BOS = {
    "bare": (None, {}, True, "tokenizer.model and config.json name it"),
    "stated": ({**LLAMA, "add_bos_token": True}, {}, True, "add_bos_token in tokenizer_config.json"),
    "denied": ({**LLAMA, "add_bos_token": False}, {}, False, "add_bos_token in tokenizer_config.json"),
    "model has none": (LLAMA, {"bos_token_id": None}, False, "do not name the same"),
    "model has another": (LLAMA, {"bos_token_id": 7}, False, "do not name the same"),
    "tokenizer has none": ({**LLAMA, "bos_token": None}, {}, False, "has none"),
}


@pytest.mark.parametrize("case", BOS)
def test_bos_is_where_the_files_say_so(case, tmp_path):
    settings, config, wanted, why = BOS[case]
    folder = folder_of(tmp_path / "model", settings, LlamaConfig(vocab_size=700, **config))
    pieces = write_sentencepiece(folder)
    said = []
    check(load_tokenizer(str(folder), said.append), pieces.encode, [pieces.bos_id()] * wanted)
    assert why in said[1] and ("no bos" in said[1]) != wanted


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", None])
def test_a_byte_level_tokenizer_json_is_taken_as_written(named, bos, tmp_path):
    """Some transformers make a LLaMA tokenizer of it, which drops all spaces."""
    folder = folder_of(tmp_path / "model", NAMES | ({"tokenizer_class": named} if named else {}))
    raw = write_byte_level(folder, bos)
    check(load_tokenizer(str(folder)), lambda text: raw.encode(text, add_special_tokens=False).ids, [1] * bos)


def test_a_tokenizer_json_of_llama_is_taken_as_written(tmp_path):
    """The published one puts a space before each text, also before one that begins with a space."""
    folder = folder_of(tmp_path / "model", {**LLAMA, "add_bos_token": True})
    pieces = write_sentencepiece(folder)
    load_tokenizer(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    said = []
    check(load_tokenizer(str(folder), said.append), pieces.encode, [pieces.bos_id()])
    assert "those written in tokenizer.json" in said[0] and "' Tom starts with a space'" in said[0]


def test_qwen_has_no_bos(tmp_path):
    config = Qwen2Config(vocab_size=700, bos_token_id=2, eos_token_id=2)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "</s>", "pad_token": "</s>"}
    folder = folder_of(tmp_path / "model", {**settings, "add_bos_token": False}, config)
    raw = write_byte_level(folder, bos=False)

    def encode(text):
        return raw.encode(text).ids

    rows = tokenize_rows(examples_of(ROWS), load_tokenizer(str(folder)), seq_len=4096).rows
    texts = [prompt_of(row["question"]) + target_of(row["answer"]) for row in ROWS]
    assert [row["input_ids"] for row in rows] == [[*encode(text), 2] for text in texts]

    model = json.loads(raw.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    said = []
    tokenizer = load_tokenizer(str(folder), said.append)
    assert "compared with nothing" in said[0] and "no bos" in said[1]
    assert tokenizer("Tom has pens").input_ids == encode("Tom has pens")


def test_turns_of_a_chat_have_one_bos_and_an_eos_each(tmp_path):
    folder = folder_of(tmp_path / "model")
    pieces = write_sentencepiece(folder)
    example = Example([("How many?", " 7 pens"), ("And now?", "8")])
    (row,) = tokenize_rows([example], load_tokenizer(str(folder)), seq_len=512).rows
    bos, eos = pieces.bos_id(), pieces.eos_id()
    assert row["input_ids"] == [bos, *pieces.encode("How many? 7 pens"), eos, *pieces.encode("And now?8"), eos]


def test_files_that_disagree_are_refused(tmp_path):
    folder = folder_of(tmp_path / "model", LLAMA)
    write_sentencepiece(folder)
    write_byte_level(folder)
    with pytest.raises(UserError, match=r"for the text 'Tom .*': remove whichever of tokenizer.json and") as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)


def test_an_eos_that_the_tokenizer_writes_is_not_a_second_one(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "model", NAMES)
    raw = write_byte_level(folder)
    special = [("<s>", 1), ("</s>", 2)]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    raw.save(str(folder / "tokenizer.json"))
    check(load_tokenizer(str(folder)), lambda text: raw.encode(text, add_special_tokens=False).ids, [1])

    monkeypatch.setattr(PreTrainedTokenizerFast, "update_post_processor", lambda self: None)
    with pytest.raises(UserError, match="puts other tokens around a text than bos"):
        load_tokenizer(str(folder))


def test_a_tokenizer_model_of_another_kind_is_left_aside(tmp_path):
    """Llama 3's is a list of bytes and ranks."""
    folder = folder_of(tmp_path / "model", NAMES)
    raw = write_byte_level(folder)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    said = []
    check(load_tokenizer(str(folder), said.append), lambda text: raw.encode(text, add_special_tokens=False).ids, [1])
    assert "those written in tokenizer.json" in said[0]


@pytest.mark.parametrize("text", ["{", "[]", "version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_files_that_cannot_be_read_are_named(name, text, tmp_path):
    folder = folder_of(tmp_path / "model", LLAMA)
    (write_sentencepiece if name == "tokenizer.model" else write_byte_level)(folder)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"cannot be read .*: copy .*{name}.* again") as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)


def test_without_an_eos_the_tokenizer_is_refused(tmp_path):
    folder = folder_of(tmp_path / "model")
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="no eos token"):
        load_tokenizer(str(folder))


def test_what_was_decided_is_said(tmp_path, capsys):
    folder = folder_of(tmp_path / "model", LLAMA)
    write_sentencepiece(folder)
    load_tokenizer(str(folder))
    ids, frame = capsys.readouterr().out.splitlines()
    assert "ids equal to SentencePiece's for tokenizer.model" in ids and "LlamaTokenizer" in ids
    assert frame.startswith("tokenizer: bos <s> before a text (") and "padding with <unk> on the right" in frame


@pytest.fixture
def roberta(tmp_path):
    return write_roberta(tmp_path / "roberta")


def test_an_encoders_tokenizer_keeps_its_frame_and_knows_the_models_positions(roberta):
    tokenizer = load_tokenizer(str(roberta))
    inner = unframed(tokenizer, "a lamp")
    assert tokenizer("a lamp").input_ids == [0, *inner, 2]
    assert tokenizer("a lamp", "a lamp").input_ids == [0, *inner, 2, 2, *inner, 2]
    # two of RoBERTa's positions are for nothing but padding
    assert tokenizer.model_max_length == POSITIONS == AutoConfig.from_pretrained(roberta).max_position_embeddings - 2
    assert AutoTokenizer.from_pretrained(roberta).model_max_length > 1e29


def test_a_mask_takes_the_space_before_it_along(roberta):
    """As in pre-training; of vocab.json and merges.txt alone transformers makes a token of the space."""
    tokens = load_tokenizer(str(roberta))("the <mask> was").tokens()
    assert len(tokens) == len(AutoTokenizer.from_pretrained(roberta)("the <mask> was").tokens()) - 1
    assert tokens[tokens.index(next(t for t in tokens if "<mask>" in t)) - 1] != "\u0120"


def test_a_vocabulary_without_its_merges_is_no_tokenizer(roberta):
    (roberta / "merges.txt").unlink()
    arguments = ModelArguments(model_name=roberta.name, model_dir=str(roberta.parent))
    with pytest.raises(UserError, match="has no tokenizer: it needs .* vocab.json with merges.txt"):
        find_base(arguments, LoraArguments())
