"""Small PEFT models and batches that the block tests share."""

import pickle
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from hyclora.models.binding import BoundForward
from hyclora.models.blocks import projection
from hyclora.models.families import FAMILIES
from hyclora.models.outputs import Deferred
from hyclora.operators.linear.dropout import DropoutFunction, draw_seed, same_dropout
from hyclora.operators.linear.lora import ProjectionGroup
from hyclora.utils.args import LINEARS
from hyclora.utils.loading import quantize_linears
from tests.helpers.kernel_checks import DEVICE

STORAGE = {"nf4": torch.uint8, "nf4 as bfloat16": torch.bfloat16, "nf4 as float32": torch.float32}
SECOND_LAYER_SLIDES = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def llama(lora: dict | bool | None = None, base: str = "float32", **config) -> torch.nn.Module:
    """A two-layer LLaMA with grouped queries, odd widths, and LoRA whose B is not zero; alpha != r; base: STORAGE.

    Of the decoders lora=False is the base model alone.
    """
    return _small(LlamaForCausalLM, LlamaConfig, lora, base, config)


def mistral(lora: dict | bool | None = None, base: str = "float32", **config) -> torch.nn.Module:
    """The same as a Mistral whose queries see 8 keys."""
    return _small(MistralForCausalLM, MistralConfig, lora, base, {"sliding_window": 8} | config)


def qwen2(lora: dict | bool | None = None, base: str = "float32", **config) -> torch.nn.Module:
    """The same as a Qwen2, whose q, k, v have biases, and whose queries see 8 keys in the second layer alone."""
    return _small(Qwen2ForCausalLM, Qwen2Config, lora, base, SECOND_LAYER_SLIDES | config)


def qwen3(lora: dict | bool | None = None, base: str = "float32", **config) -> torch.nn.Module:
    """The same as a Qwen3 with such windows, whose heads are normalized and larger than hidden_size / heads."""
    return _small(Qwen3ForCausalLM, Qwen3Config, lora, base, {"head_dim": 24} | SECOND_LAYER_SLIDES | config)


def roberta(lora: dict | None = None, base: str = "float32", task="masked", **config) -> torch.nn.Module:
    """A RoBERTa of two layers for masked LM or three classes, of rows or (task="tokens") tokens; it drops nothing."""
    model_class, task_type = {
        "masked": (RobertaForMaskedLM, None),
        "classification": (RobertaForSequenceClassification, "SEQ_CLS"),
        "tokens": (RobertaForTokenClassification, "TOKEN_CLS"),
    }[task]
    lora = {"target_modules": "all-linear"} | (lora or {})
    if task_type:
        lora = {"task_type": task_type, "modules_to_save": ["classifier"]} | lora
    plain = {"layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return _small(model_class, RobertaConfig, lora, base, plain | config)


def _small(*wanted) -> torch.nn.Module:
    """A model of its own, as _built; a copy of one that has been built takes a quarter of the time."""
    torch.manual_seed(0)  # of a GPU too
    model, state = _kept(pickle.dumps(wanted))
    torch.set_rng_state(state)
    return pickle.loads(model)


@lru_cache(64)
def _kept(wanted: bytes) -> tuple[bytes, torch.Tensor]:
    """A model, and torch's random state behind it."""
    return pickle.dumps(_built(*pickle.loads(wanted))), torch.get_rng_state()


def _built(model_class, config_class, lora: dict | bool | None, base: str, config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 128, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    model = model_class(config_class(**shape | config)).to(DEVICE)
    if base in STORAGE:
        quantize_linears(model, torch.float32, STORAGE[base])
    if lora is not False:
        options = {"r": 8, "lora_alpha": 12, "target_modules": LINEARS} | (lora or {})
        model = get_peft_model(model, LoraConfig(**options))
    for name, p in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.05)
        elif "norm" in name.lower():
            torch.nn.init.normal_(p, 1.0, 0.2)
    return model.to(DEVICE).train()


def padded_batch(rows=3, width=21, vocab=128, seed=0) -> dict:
    """Right-padded rows of different lengths; the padding is not in the loss."""
    ids = torch.randint(0, vocab, (rows, width), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([max(1, width - 5 * i) for i in range(rows)])
    mask = (torch.arange(width) < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: t.to(DEVICE) for name, t in batch.items()}


def is_late(outputs) -> bool:
    """Whether logits of a training forward do not exist yet, as nobody has looked."""
    return isinstance(dict(outputs.items())["logits"], Deferred)


def our_dropout(model):
    """Stock attentions and MLPs inside drop what patched ones, which are left alone, do."""
    family, groups, drops = FAMILIES[model.config.model_type], [], []
    patched = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), BoundForward)]
    if family.post_norm:
        patched = [below for m in patched for below in m.modules()]
    for module in set(model.modules()) - set(patched):
        paths = {path for path, _ in module.named_modules()}
        for names in {family.qkv, (family.out,), family.gate_up, (family.down,)}:
            if paths.issuperset(names):
                groups.append(ProjectionGroup([projection(module, "", name) for name in names]))
        if family.dropout in paths:
            drops.append(module.get_submodule(family.dropout))
    return same_dropout(*groups, modules=[drop for drop in drops if isinstance(drop, torch.nn.Dropout)])


@contextmanager
def our_map_dropout(model):
    """our_dropout, and stock code that makes attention maps drops of them what attention=eager does."""
    stock = torch.nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if x.dim() == 4 and p and training:
            return DropoutFunction.apply(x, draw_seed(x.device), 0, p)
        return stock(x, p, training, inplace)

    with our_dropout(model), mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield


def gradients(model, batch, seed=1, dropping=our_dropout) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and all gradients of one batch, with a fixed dropout seed; dropping: around stock layers' dropout.

    But for those of RoBERTa's key biases: they move all scores of a query alike, so theirs are nothing but rounding.
    """
    model.zero_grad()
    torch.manual_seed(seed)
    with dropping(model):
        loss = model(**batch).loss
        loss.backward()
    told = {name: p for name, p in model.named_parameters() if ".self.key." not in name or not name.endswith("bias")}
    return loss.item(), {name: p.grad.clone() for name, p in told.items() if p.grad is not None}


def largest_error(ours: dict, theirs: dict) -> float:
    """Largest relative error over all gradients; both sides must have the same ones."""
    assert ours.keys() == theirs.keys()
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12)).item() for n in theirs)


def mean_cosine(ours: dict, theirs: dict) -> float:
    cosines = [torch.cosine_similarity(ours[n].flatten(), theirs[n].flatten(), dim=0).item() for n in theirs]
    return sum(cosines) / len(cosines)
