"""The evaluation by generation, and by loss."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.utils.args import EvalArguments, GenerationArguments
from hyclora.utils.data.tokens import IGNORED, Collator
from hyclora.utils.metrics import HEAD_ROWS, evaluate_generation, evaluate_loss


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tokenizer


ROWS = [{"question": "What is 1 + 1?" + " Think." * i, "answer": "#### 2"} for i in (0, 7, 3)]


def test_generation_leaves_everything_as_it_was(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    state = torch.get_rng_state()
    evaluate_generation(model, tokenizer, ROWS, GenerationArguments(max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and tokenizer.padding_side == "right"


def test_a_batch_gives_what_single_questions_give(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    single = GenerationArguments(greedy=True, max_new_tokens=6, eval_batch_size=1)
    batched = GenerationArguments(greedy=True, max_new_tokens=6, eval_batch_size=3)
    accuracy, one_by_one = evaluate_generation(model, tokenizer, ROWS, single)
    assert [p["question"] for p in one_by_one] == [row["question"] for row in ROWS]
    assert accuracy == sum(p["correct"] for p in one_by_one) / 3
    assert evaluate_generation(model, tokenizer, ROWS, batched)[1] == one_by_one


def test_the_first_process_alone_shows_how_far_it_is(model_and_tokenizer, monkeypatch, capsys):
    model, tokenizer = model_and_tokenizer
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    for rank, shown in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        evaluate_generation(model, tokenizer, ROWS, GenerationArguments(max_new_tokens=1))
        generated = capsys.readouterr().err
        evaluate_loss(model, rows, tokenizer.pad_token_id, EvalArguments())
        assert ["evaluating" in said for said in (generated, capsys.readouterr().err)] == [shown, shown]


def test_sampling_follows_its_seed(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer

    def texts(seed):
        arguments = GenerationArguments(temperature=5.0, max_new_tokens=8, generation_seed=seed)
        return [p["prediction"] for p in evaluate_generation(model, tokenizer, ROWS, arguments)[1]]

    assert texts(42) == texts(42) != texts(43)


def test_accuracy_counts_right_answers(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **_: ["The final answer is: 2"] * len(ids))
    rows = [*ROWS, {"question": "And 2 + 2?", "answer": "#### 4"}]
    assert evaluate_generation(model, tokenizer, rows, GenerationArguments(max_new_tokens=2))[0] == 0.75


def test_loss_weighs_every_learned_token_the_same(model_and_tokenizer, monkeypatch):
    model, _ = model_and_tokenizer
    torch.manual_seed(0)
    rows = []
    for length, learned in ((12, 9), (30, 2), (7, 1)):
        ids = torch.randint(2, 500, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length - learned) + ids[length - learned :]})
    model.train()
    monkeypatch.setattr(model.model.layers[0].self_attn, "attention_dropout", 0.5)
    found = [evaluate_loss(model, rows, 1, EvalArguments(eval_batch_size=size)) for size in (1, 2, 8)]
    assert model.training
    # transformers' own mean over the targets of one batch
    expected = model.eval()(**Collator(1)(rows)).loss.item()
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_loss_is_the_same_with_compressed_activations(model_and_tokenizer):
    """The head of a patched model gives no logits in training; judging it is none of that."""
    model = get_peft_model(copy.deepcopy(model_and_tokenizer[0]), LoraConfig(target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 500, (n,), generator=generator).tolist() for n in (HEAD_ROWS + 9, 20)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    expected = evaluate_loss(model, rows, 1, EvalArguments())
    apply_hyclora(model.train(), HycloraConfig(q_bit=2))
    assert evaluate_loss(model, rows, 1, EvalArguments()) == pytest.approx(expected, rel=1e-6)
    batch = Collator(1)(rows)
    remove_hyclora(model)
    assert model.eval()(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
