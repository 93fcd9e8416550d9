"""Folders with a configuration and a tokenizer, as checkpoints have them; SentencePiece models are trained here."""

import json
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PretrainedConfig

from hyclora.utils.data.gsm8k import prompt_of, target_of
from hyclora.utils.data.word_problems import word_problems

ROWS = word_problems(60, 0)
TEXTS = [prompt_of(row["question"]) + target_of(row["answer"]) for row in ROWS]


def folder_of(folder: Path, settings: dict | None = None, config: PretrainedConfig | None = None) -> Path:
    """A folder with config.json, and tokenizer_config.json if there are settings."""
    (config or LlamaConfig(vocab_size=700)).save_pretrained(folder)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_sentencepiece(folder: Path, **options) -> sentencepiece.SentencePieceProcessor:
    """Train a tokenizer.model like LLaMA's, with other options for SentencePiece if given."""
    settings = {
        "vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "split_digits": True, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False,
    } | options  # fmt: skip
    file, lines = folder / "tokenizer.model", iter("\n".join(TEXTS).split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), **settings
    )
    if settings["model_type"] == "bpe":
        _put_last_piece_first(file)
    return sentencepiece.SentencePieceProcessor(str(file))


def _put_last_piece_first(file: Path):
    """Two spaces as LLaMA's and Mistral's files have them: joined after all else, with an id before all else."""
    proto = ModelProto.FromString(file.read_bytes())
    kept = [piece for piece in proto.pieces if piece.piece != "▁▁"]
    first = next(i for i, piece in enumerate(kept) if piece.type == piece.NORMAL)
    spaces = proto.SentencePiece(piece="▁▁", score=-1e9)
    del proto.pieces[:]
    proto.pieces.extend([*kept[:first], spaces, *kept[first:]])
    file.write_bytes(proto.SerializeToString())


def write_byte_level(folder: Path, bos: bool = True) -> Tokenizer:
    """A tokenizer.json like Llama 3's or Qwen's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.save(str(folder / "tokenizer.json"))
    return raw
