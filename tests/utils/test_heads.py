"""Models with a head for classes: loaded, adapted, quantized, saved, and trained by a loss that is a mean."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hyclora.utils.args import LoraArguments, ModelArguments
from hyclora.utils.classification import collator
from hyclora.utils.errors import UserError
from hyclora.utils.heads import NEXT_TOKEN, classifier
from hyclora.utils.loading import keep_initial_adapters, load_model
from hyclora.utils.runs.card import save_trained
from hyclora.utils.trainer import HycloraTrainer
from hyclora.utils.training_arguments import TrainingArguments
from tests.helpers.small_roberta import write_roberta

CPU = torch.device("cpu")
PAD = 1
IDS = torch.arange(8, 40).view(2, 16)


def load(folder, n_labels=2, seed=0, lora=None, **settings):
    arguments = ModelArguments(model_name=folder.name, model_dir=str(folder.parent), **settings)
    lora = LoraArguments(lora_rank=4, target_modules=["all-linear"], **(lora or {}))
    return load_model(arguments, lora, str(folder), CPU, seed, classifier(n_labels, PAD))


@pytest.fixture(params=["roberta", "llama"])
def folder(request, tiny_llama_folder, tmp_path):
    return tiny_llama_folder if request.param == "llama" else write_roberta(tmp_path / "roberta")


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "bfloat16"}, {"load_in_4bit": True}, {"load_in_4bit": True, "random_weights": True}]
)
def test_the_whole_head_is_trained_in_float32_and_all_other_linears_are_adapted(folder, settings):
    model = load(folder, n_labels=3, **settings)
    parameters = trained(model)
    head = {name: p for name, p in parameters.items() if "lora_" not in name}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert head and all("modules_to_save" in name and p.is_floating_point() for name, p in head.items())
    assert len(head) == (4 if model.config.model_type == "roberta" else 1)
    adapted = {name.partition(".lora_")[0] for name in parameters if "lora_" in name}
    assert len(adapted) == 2 * (6 if model.config.model_type == "roberta" else 7)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("dtype") == "bfloat16"):
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3) and output.loss.isfinite()


def test_the_head_follows_the_seed(folder):
    def head(seed):
        return torch.cat([p.flatten() for n, p in trained(load(folder, seed=seed)).items() if "lora_" not in n])

    assert torch.equal(head(1), head(1)) and not torch.equal(head(1), head(2))


@pytest.mark.parametrize("init", ["qlora", "pissa"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_saved_adapters_bring_their_head(folder, tmp_path, init, four_bit):
    model = load(folder, lora={"lora_init_type": init}, load_in_4bit=four_bit).eval()
    initial = keep_initial_adapters(model, tmp_path / "initial")
    for p in trained(model).values():
        p.data += 0.02 * torch.randn_like(p)
    save_trained(model, tmp_path / "saved", initial)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, **classifier(2, PAD).config, dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "saved").eval()
    ours, theirs = (m(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits for m in (model, again))
    assert torch.allclose(ours, theirs, atol=0.1 if four_bit else 1e-4)
    fresh_head = torch.cat([p.flatten() for n, p in again.named_parameters() if "original_module" in n])
    saved_head = torch.cat([p.flatten() for n, p in again.named_parameters() if "modules_to_save" in n])
    assert not torch.allclose(fresh_head, saved_head, atol=1e-3)


@pytest.mark.parametrize("n_labels", [1, 3])
def test_a_step_of_several_micro_batches_takes_the_mean_of_their_losses(folder, tmp_path, n_labels):
    """Transformers' classifiers take any keyword and divide by nothing that they are told of the step."""
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    label = (lambda i: i / 3) if n_labels == 1 else (lambda i: i % n_labels)
    rows = [{"input_ids": list(range(8 + i, 16 + 2 * i)), "label": label(i)} for i in range(8)]
    norms = []
    for size, accumulated in ((8, 1), (1, 8)):
        model = load(folder, n_labels, lora={"lora_dropout": 0.0}).eval()
        model.train = lambda mode=True, model=model: model  # the encoder has dropout of its own
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        training = TrainingArguments(
            output_dir=str(tmp_path / str(size)), use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
            **options,
        )  # fmt: skip
        trainer = HycloraTrainer(
            model=model, args=training, train_dataset=rows, data_collator=collator(tokenizer), compressed=False
        )
        trainer.train()
        norms.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def stretched(folder, factor):
    return replace(NEXT_TOKEN, rope_scaling=factor).of(str(folder)).config


def write_rope(folder, rope):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 100, "rope_parameters": rope})
    )


def test_positions_are_stretched_by_a_factor_and_by_another_one(tmp_path):
    write_rope(tmp_path, {"rope_type": "default", "rope_theta": 5e5})
    assert stretched(tmp_path, 1.0) == stretched(tmp_path, None) == {}
    once = stretched(tmp_path, 4.0)
    assert once["max_position_embeddings"] == 400
    assert once["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    write_rope(tmp_path, once["rope_parameters"])
    assert stretched(tmp_path, 2.0)["rope_parameters"]["factor"] == 8.0


def test_other_positions_are_not_stretched(tmp_path):
    write_rope(
        tmp_path,
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 50,
        },
    )
    with pytest.raises(UserError, match="and .* has rotary positions of the kind llama3: drop it"):
        stretched(tmp_path, 2.0)
    with pytest.raises(UserError, match="has no rotary positions: drop it"):
        stretched(write_roberta(tmp_path / "roberta"), 2.0)
