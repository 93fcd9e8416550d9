"""A RoBERTa with random weights as a checkpoint folder, its tokenizer as vocab.json and merges.txt alone."""

from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from ckpt.pretrain_roberta import train_tokenizer
from hyclora.utils.data.reviews import reviews

POSITIONS = 40


def write_roberta(folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([text for text, _ in reviews(200, "train", 1)], 500)
    tokenizer.backend_tokenizer.model.save(str(folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"max_position_embeddings": POSITIONS + 2, "layer_norm_eps": 1e-5} | config
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **sizes, **settings))
    model.save_pretrained(folder)
    return folder
