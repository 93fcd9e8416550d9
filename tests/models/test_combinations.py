"""What people combine with LoRA: gradients are stock PEFT's, and nothing that goes on beside the training changes it.

Elsewhere: checkpointing of both kinds, families, packed rows (test_families, test_masks), accumulation, tied heads,
modules_to_save, compute_metrics (test_head, test_whole_modules), torch.compile (test_watch), copies, two adapters,
merging after remove_hyclora (test_copies), logits of any loss, Trainer and checkpoints (test_outputs, test_callback).
"""

from contextlib import contextmanager
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn.functional import cross_entropy, logsigmoid
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForSequenceClassification

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, batches, graphed
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch, qwen3

EXACT = HycloraConfig(layer_type="baseline")
IDS = padded_batch(rows=2)["input_ids"]


def resized(**config):
    """Vocabulary, and head, with more tokens than the model came with."""
    model = llama(False, **config)
    model.resize_token_embeddings(150)
    whole = ["embed_tokens"] if config else None
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=whole)).train()


ADAPTERS = {
    "single tokens": lambda: llama({"trainable_token_indices": [3, 5, 17]}),
    "single tokens, tied": lambda: llama({"trainable_token_indices": [3, 5]}, tie_word_embeddings=True),
    "ranks and alphas": lambda: llama({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5, "up_proj": 40}}),
    "more tokens": resized,
    "more tokens, tied and trained": partial(resized, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_all_kinds(name):
    model = ADAPTERS[name]()
    exact = gradients(model, padded_batch())[1]
    apply_hyclora(model, EXACT)
    assert largest_error(gradients(model, padded_batch())[1], exact) < 1e-5


def test_tokens_that_are_added_to_a_patched_model():
    model = llama()
    apply_hyclora(model, EXACT)
    gradients(model, padded_batch())
    model.get_base_model().resize_token_embeddings(150)
    ours = gradients(model, padded_batch(vocab=150))[1]
    remove_hyclora(model)
    assert largest_error(ours, gradients(model, padded_batch(vocab=150))[1]) < 1e-5


def reward_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 6}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=128, num_labels=1, pad_token_id=0, **shape))
    lora = LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])
    return get_peft_model(model, lora).to(DEVICE).train()


def pair():
    """A batch that is preferred, and one that is not; no token is the reward model's padding."""
    found = [padded_batch(seed=seed) for seed in (1, 2)]
    return [batch | {"input_ids": batch["input_ids"].clamp(min=1)} for batch in found]


def log_likelihoods(logits, labels):
    targets = labels[:, 1:]
    found = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets != -100)).sum(-1)


def likelihoods(model, batch):
    return log_likelihoods(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])


def beside_a_copy():
    """As TRL has adapters that were trained before: beside a copy of them, as the reference."""
    model = llama()
    model.add_adapter("ref", model.peft_config["default"])
    return model


@contextmanager
def as_reference(model):
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter("ref")
    yield
    model.set_adapter("default")


def of_reference(model, *batches):
    with torch.no_grad(), as_reference(model):
        return [likelihoods(model, batch) for batch in batches]


def reward(model):
    chosen, rejected = (model(b["input_ids"], attention_mask=b["attention_mask"]).logits for b in pair())
    return -logsigmoid(chosen - rejected).mean()


def dpo(model):
    chosen, rejected = (likelihoods(model, batch) for batch in pair())
    better, worse = of_reference(model, *pair())
    return -logsigmoid((chosen - better) - (rejected - worse)).mean()


def kto(model):
    chosen, rejected = pair()
    (reference,) = of_reference(model, chosen)
    with torch.no_grad():
        divergence = likelihoods(model, rejected).mean()
    return (1 - torch.sigmoid(0.1 * (likelihoods(model, chosen) - reference - divergence))).mean()


def orpo(model):
    """Both in one batch, of which the first half is learned too."""
    chosen, rejected = pair()
    both = {name: torch.cat([chosen[name], rejected[name]]) for name in chosen}
    logits, n = model(both["input_ids"], attention_mask=both["attention_mask"]).logits, len(chosen["labels"])
    means = log_likelihoods(logits, both["labels"]) / (both["labels"][:, 1:] != -100).sum(-1).clamp(min=1)
    odds = means - torch.log1p(-means.exp().clamp(max=0.99))
    learned = cross_entropy(logits[:n, :-1].flatten(0, 1), chosen["labels"][:, 1:].flatten())
    return learned - 0.1 * logsigmoid(odds[:n] - odds[n:]).mean()


LOSSES = [(reward, reward_model), (dpo, llama), (dpo, beside_a_copy), (kto, llama), (orpo, llama)]


@pytest.mark.parametrize("loss, make", LOSSES)
def test_losses_of_preferences(loss, make):
    """As TRL's trainers call the model: several forwards a backward, of which the reference has no gradients."""
    model, found = make(), []
    for patched in (False, True):
        if patched:
            apply_hyclora(model, EXACT)
        model.zero_grad()
        loss(model).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert largest_error(found[1], found[0]) < 1e-5 and any(g.any() for g in found[0].values())


def test_a_reference_before_the_backward_of_a_replay():
    """Gradients are, bit for bit, those without it."""
    found = []
    for referred in (False, True):
        model = beside_a_copy()
        graphs = graphed(model, {})
        for batch in batches(CALIBRATION + 3):
            model.zero_grad()
            loss = model(**batch).loss
            if referred:
                of_reference(model, batch)
            loss.backward()
        assert len(graphs.recordings) == 1
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert equal(*found)


def trained(*between, makes=(llama,)):
    """Gradients of each of three batches, for each model, while something is done between them."""
    models = [make() for make in makes]
    for model in models:
        apply_hyclora(model, HycloraConfig(iteration_threshold=2))
    found = []
    for seed in range(3):
        found.append([gradients(model, padded_batch(seed=seed))[1] for model in models])
        for act in between:
            act(models[0])
    return found


def generate(model):
    model.eval().generate(IDS, max_new_tokens=4, do_sample=False)
    model.train()


def generate_in_training_mode(model):
    model.generate(IDS, max_new_tokens=4, do_sample=False)


def evaluate(model):
    with torch.no_grad():
        model.eval()(IDS, labels=IDS)
    model.train()


def average(model):
    AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).update_parameters(model)


@pytest.mark.parametrize("act", [generate, generate_in_training_mode, evaluate, average])
def test_what_a_callback_does_between_steps_changes_no_gradient(act):
    for (ours,), (theirs,) in zip(trained(act), trained(), strict=True):
        assert all(torch.equal(ours[name], g) for name, g in theirs.items())


def test_two_models_in_one_process():
    together = trained(makes=(llama, qwen3))
    for i, make in enumerate((llama, qwen3)):
        for of_both, (alone,) in zip(together, trained(makes=(make,)), strict=True):
            assert all(torch.equal(of_both[i][name], g) for name, g in alone.items())


def loraplus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


def bitsandbytes_adam(name, model):
    return getattr(bnb.optim, name)([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize(
    "make", [loraplus, partial(bitsandbytes_adam, "AdamW8bit"), partial(bitsandbytes_adam, "PagedAdamW8bit")]
)
def test_optimizers(make):
    model, batch, losses = llama(), padded_batch(), []
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    optimizer = make(model)
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_adapters_saved_by_a_patched_model_are_peft_s(tmp_path):
    model = llama()
    base = {name.replace(".base_layer", ""): p.clone() for name, p in model.get_base_model().named_parameters()}
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    model(**padded_batch()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        plain = llama(False)
        plain.load_state_dict({name: p for name, p in base.items() if "lora_" not in name}, strict=False)
        loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, wanted)
        assert torch.allclose(loaded.merge_and_unload()(IDS).logits, wanted, atol=1e-5)
        remove_hyclora(model)
        assert torch.allclose(model.merge_and_unload()(IDS).logits, wanted, atol=1e-5)
