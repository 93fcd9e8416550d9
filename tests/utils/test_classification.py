"""Texts told apart: their tokens for an encoder and for decoders, the outputs of a model, the official metrics."""

import math
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hyclora.utils.classification import METRICS, collator, encode_rows, metric, outputs_of
from hyclora.utils.errors import UserError
from hyclora.utils.loading import load_tokenizer
from tests.helpers.small_roberta import POSITIONS, write_roberta
from tests.helpers.small_tokenizers import folder_of, write_byte_level

PAIR = {"texts": ["Tom said that the lamp was good.", "Was it?"], "label": 1}


@pytest.fixture
def roberta(tmp_path):
    return write_roberta(tmp_path / "roberta")


def bare(folder, bos):
    """A decoder's tokenizer that says of a pair nothing."""
    folder = folder_of(folder / "bare", {"eos_token": "</s>", "bos_token": "<s>"})
    write_byte_level(folder, bos)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "name, labels, predictions, value",
    [
        ("accuracy", [0, 1, 1, 2], [0, 1, 0, 2], 0.75),
        ("F1", [1, 1, 0, 0], [1, 0, 1, 0], 0.5),
        ("Matthews correlation", [1, 1, 0, 0], [1, 1, 0, 1], 1 / math.sqrt(3)),
        ("Pearson correlation", [0.0, 1.0, 2.0], [1.0, 3.0, 5.0], 1.0),
        ("Spearman correlation", [0.0, 1.0, 2.0], [1.0, 2.0, 100.0], 1.0),
        ("Matthews correlation", [1, 1, 0, 0], [1, 1, 1, 1], 0.0),
        ("Pearson correlation", [0.0, 1.0, 2.0], [3.0, 3.0, 3.0], 0.0),
        ("Spearman correlation", [0.0, 1.0, 2.0], [3.0, 3.0, 3.0], 0.0),
    ],
)
def test_metrics(name, labels, predictions, value):
    assert metric(name)(labels, predictions) == pytest.approx(value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match="pip install scikit-learn scipy"):
        metric("accuracy")
    assert set(METRICS) >= {"accuracy", "F1"}


def test_an_encoder_gets_its_own_frame_and_no_more_than_its_positions(roberta):
    said = []
    tokenizer = load_tokenizer(str(roberta), said.append)
    assert said[1] == "tokenizer: <s> before a text, </s> behind it and between two, padding with <pad> on the right"
    first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in PAIR["texts"])
    encoded = encode_rows([PAIR], tokenizer, 512)
    assert encoded.rows == [{"input_ids": [0, *first, 2, 2, *second, 2], "label": 1}]
    assert str(encoded) == f"0 cut at {POSITIONS} tokens"
    long = {"texts": [PAIR["texts"][0] * 10, PAIR["texts"][1]], "label": 0}
    encoded = encode_rows([PAIR, long], tokenizer, 512)
    assert (encoded.cut, [len(row["input_ids"]) for row in encoded.rows][1]) == (1, POSITIONS)
    assert encoded.rows[1]["input_ids"][-len(second) - 1 : -1] == second  # the longer text is cut
    model = AutoModelForSequenceClassification.from_pretrained(roberta)
    assert outputs_of(model, encoded.rows, collator(tokenizer), 2).isfinite().all()


@pytest.mark.parametrize("bos", [True, False])
def test_a_decoder_reads_two_texts_as_lines(bos, tmp_path):
    """Its tokenizer knows how one text begins, and often nothing of a second one."""
    tokenizer = bare(tmp_path, bos)
    (row,) = encode_rows([PAIR], tokenizer, 512).rows
    assert tokenizer.decode(row["input_ids"]) == "<s>" * bos + "\n".join(PAIR["texts"])
    short = encode_rows([PAIR], tokenizer, 20)
    assert (short.cut, len(short.rows[0]["input_ids"])) == (1, 20)
    assert tokenizer.decode(short.rows[0]["input_ids"]).endswith("\nWas it?")


def test_what_has_no_room_or_no_text_is_refused(roberta, tmp_path):
    with pytest.raises(UserError, match="seq_len 4 has no room for a text"):
        encode_rows([PAIR], load_tokenizer(str(roberta)), 4)
    with pytest.raises(UserError, match="row 2 has no text"):
        encode_rows([PAIR, {"texts": [""], "label": 0}], bare(tmp_path, bos=False), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_in_the_order_of_the_rows_whatever_the_batches(tiny_llama_folder, dtype):
    """Padding changes nothing: a decoder is read at the last token of each row."""
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama_folder, num_labels=3, pad_token_id=tokenizer.pad_token_id, dtype=dtype
    ).train()
    model.score.float()
    texts = ["A lamp.", "Tom said that it was good, and then that it was not.", "No.", "On Monday it was late."]
    rows = encode_rows([{"texts": [text], "label": 0} for text in texts], tokenizer, 64).rows
    found = [outputs_of(model, rows, collator(tokenizer), size) for size in (1, 3, 4)]
    assert found[0].shape == (4, 3) and found[0].dtype == torch.float32 and model.training
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert all(torch.allclose(found[0], other, atol=tolerance) for other in found[1:])
    assert len({tuple(row.tolist()) for row in found[0]}) == 4
