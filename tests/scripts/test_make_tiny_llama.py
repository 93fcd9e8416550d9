"""The script that trains the shipped checkpoint: tokenizer, rows, and one short training."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ckpt.make_tiny_llama import ROW_LENGTH, build_model, pack, save, train, train_tokenizer
from hyclora.utils.args import ROOT
from hyclora.utils.data.pretrain_text import pretrain_documents
from tests.helpers.kernel_checks import DEVICE

SHAPE = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def test_a_short_training_saves_a_checkpoint_that_loads(tmp_path):
    documents = pretrain_documents(300, seed=1)
    tokenizer = train_tokenizer(documents, SHAPE["vocab_size"])
    rows = pack(documents, tokenizer)
    torch.manual_seed(0)
    model = build_model(SHAPE, tokenizer)
    minutes = 0.03 if DEVICE == "cpu" else 0.2  # a GPU's first step takes seconds
    assert train(model, rows, minutes=minutes, batch_tokens=4 * ROW_LENGTH, peak_lr=1e-2) >= 4 * ROW_LENGTH
    save(model, tokenizer, tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), rows[:4].long()
    untrained = build_model(SHAPE, tokenizer)
    assert loaded(input_ids=ids, labels=ids).loss < untrained(input_ids=ids, labels=ids).loss - 0.2


def test_the_shipped_tokenizer_is_exact_and_reads_digits_one_by_one():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "ckpt/tiny-llama")
    text = "Tom has 48/2 = <<48/2=24>>24 cards.\n#### 24 \u00e9"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("1234").input_ids[1:]] == list("1234")


def test_the_shipped_weights_are_small_safetensors():
    files = list((ROOT / "ckpt/tiny-llama").glob("*.safetensors"))
    assert len(files) == 1 and files[0].stat().st_size <= 8_000_000
