"""The script that pre-trains a RoBERTa: its tokenizers and rows, what is masked, a short training, and mistakes."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from ckpt import pretrain_roberta
from ckpt.make_tiny_llama import held_out_loss, read_documents
from ckpt.pretrain_roberta import ROW_LENGTH, MaskedLoss, build_model, pack, read_tokenizer, train_tokenizer
from hyclora.utils.data.pretrain_text import pretrain_documents
from hyclora.utils.tokenizer import load_as_trained

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


@pytest.fixture(scope="module")
def documents():
    return pretrain_documents(900, seed=1)


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 600)


def test_a_short_training_saves_a_checkpoint_that_loads(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_roberta, "SHAPES", {"small": SHAPE})
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    options = ["--text", tmp_path / "text.jsonl", "--minutes", "0.1", "--batch-tokens", 4 * ROW_LENGTH]
    options += ["--vocabulary", 700]
    pretrain_roberta.main([str(o) for o in [*options, "--lr", "1e-2", "--output", tmp_path / "made"]])
    model, config = (auto.from_pretrained(tmp_path / "made") for auto in (AutoModelForMaskedLM, AutoConfig))
    assert (config.layer_norm_eps, config.max_position_embeddings, config.pad_token_id) == (1e-5, 514, 1)
    assert config.vocab_size == 700
    tokenizer, said = load_as_trained(str(tmp_path / "made"), config)
    assert tokenizer.model_max_length == ROW_LENGTH and "ids equal to those written in tokenizer.json" in said[0]
    tokens = tokenizer("the <mask> was").tokens()
    assert " <mask>" in tokens and "\u0120" not in tokens
    rows, loss_of = pack(documents, tokenizer)[:8], MaskedLoss(tokenizer)
    trained, untrained = (held_out_loss(m, rows, loss_of) for m in (model, build_model(SHAPE, tokenizer)))
    assert trained < untrained - 0.2 and "held-out loss" in capsys.readouterr().out


def test_the_vocabulary_is_of_robertas_kind(tokenizer, documents, tmp_path):
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in IDS} == IDS
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert tokenizer.decode(tokenizer(documents[0]).input_ids, skip_special_tokens=True) == documents[0]
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    again = read_tokenizer(tmp_path)
    assert again(documents[0], documents[1]).input_ids == tokenizer(documents[0], documents[1]).input_ids


def test_rows_are_framed_and_documents_stay_in_their_order(tokenizer, documents):
    rows, short = pack(documents, tokenizer), pack(documents, tokenizer, 128)
    assert short.shape[1] == 128 and torch.equal(short[:5, 1:-1].flatten()[:510], rows[0, 1:-1])
    assert rows.shape[1] == ROW_LENGTH and set(rows[:, 0].tolist()) == {0} and set(rows[:, -1].tolist()) == {2}
    inner = rows[:, 1:-1].flatten()
    first = tokenizer(documents[0], add_special_tokens=False).input_ids
    assert inner[: len(first) + 1].tolist() == [*first, 2]


def test_other_tokens_are_masked_each_time_and_never_the_frame(tokenizer, documents):
    rows, loss_of = pack(documents, tokenizer).long(), MaskedLoss(tokenizer)
    seen = []

    class Model:
        device = rows.device

        def roberta(self, inputs):
            seen.append(inputs)
            return type("Output", (), {"last_hidden_state": torch.zeros(*inputs.shape, 1)})

        def lm_head(self, hidden):
            counts.append(len(hidden))
            return torch.zeros(len(hidden), len(tokenizer))

    counts = []
    for _ in range(2):
        loss_of(Model(), rows)
    ordinary = (rows > 2).sum().item()
    assert all(0.14 < count / ordinary < 0.16 for count in counts)
    first, second = ((inputs == tokenizer.mask_token_id) for inputs in seen)
    assert not torch.equal(first, second) and 0.11 < first.sum() / ordinary < 0.13
    assert not first[rows <= 2].any() and not second[rows <= 2].any()
    changed = (seen[0] != rows) & ~first
    assert 0.01 < changed.sum() / ordinary < 0.02


def test_a_book_is_read_without_its_licence(tmp_path):
    text = "licence\r\n*** START OF THE EBOOK ***\r\nCall me Ishmael.\r\n*** END OF THE EBOOK ***\r\nlicence\r\n"
    (tmp_path / "book.txt").write_bytes(text.encode())
    assert read_documents(tmp_path / "book.txt") == ["Call me Ishmael.\n"]


def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain_roberta, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "short.txt").write_text("Too short.\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "vocab.json").write_text('{"a": 0}')
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    (incomplete / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3}')
    (incomplete / "merges.txt").write_text("#version: 0.2\n")
    for options, named in (
        (["--text", tmp_path / "none.txt"], "none.txt does not exist"),
        (["--text", tmp_path / "short.txt"], "at least 33150 are needed"),
        (["--text", tmp_path / "short.txt", "--row-tokens", 513], "a row has 3 to 512 tokens"),
        (["--text", tmp_path / "short.txt", "--batch-tokens", 511], "--batch-tokens 511: fewer than a row"),
        (["--text", tmp_path / "short.txt", "--vocabulary", 260], "bytes and special tokens are 261 already"),
        (
            ["--text", tmp_path / "short.txt", "--vocabulary", 900, "--tokenizer", bare],
            "--vocabulary 900: that of --tokenizer",
        ),
        (["--text", tmp_path / "short.txt", "--minutes", "-1"], "--minutes -1.0: it has to be positive"),
        (["--text", tmp_path / "short.txt", "--minutes", "nan"], "--minutes nan: it has to be positive"),
        (["--text", tmp_path / "short.txt", "--tokenizer", bare], "merges.txt does not exist"),
        (["--text", tmp_path / "short.txt", "--tokenizer", incomplete], "incomplete has no token <unk>"),
    ):
        with pytest.raises(SystemExit) as exit:
            pretrain_roberta.main([*map(str, options), "--output", str(tmp_path / "made")])
        assert exit.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain_roberta, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "text.txt").write_text("\n".join(documents))
    with pytest.raises(SystemExit) as exit:
        pretrain_roberta.main(["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "text.txt" / "made")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "made cannot be written" in said and "set --output" in said
