"""A RoBERTa with random weights as a checkpoint folder, its tokenizer as vocab.json and merges.txt alone."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import RobertaConfig, RobertaForMaskedLM

from hyclora.utils.data.reviews import reviews

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
POSITIONS = 40


def write_roberta(folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    raw.train_from_iterator([text for text, _ in reviews(200, "train", 1)], trainer)
    raw.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<mask>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"max_position_embeddings": POSITIONS + 2, "layer_norm_eps": 1e-5} | config
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(vocabulary), **sizes, **settings))
    model.save_pretrained(folder)
    return folder
