"""Generation token by token: with and without a cache, greedy and drawn."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyclora import HycloraConfig, apply_hyclora
from hyclora.utils.data.alpaca import TEST_PROMPTS
from hyclora.utils.generate import Decoding, compare_cache, generate, generate_rows, next_token, sample
from run_alpaca import DRIVER

LOGITS = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
PROMPT = [0, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def model(tiny_llama_folder):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"]))


def draw(decoding: Decoding, n: int = 400) -> dict[int, int]:
    generator = torch.Generator().manual_seed(decoding.seed)
    found = [next_token(LOGITS, decoding, generator) for _ in range(n)]
    return {token: found.count(token) for token in sorted(set(found))}


def test_temperature_0_takes_the_likeliest():
    assert draw(Decoding(temperature=0, top_p=0.1)) == {1: 400}


def test_the_least_temperature_draws_the_likeliest():
    assert draw(Decoding(temperature=1e-320), n=5) == {1: 5}


@pytest.mark.parametrize(
    "top_p, kept", [(0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.84, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_draws_among_the_fewest_tokens_that_hold_it(top_p, kept):
    assert draw(Decoding(temperature=1.0, top_p=top_p)).keys() == kept


def test_temperature_is_the_power_of_a_probability():
    """At temperature 1/2 the odds of 0.5 to 0.35 are their squares'."""
    found = draw(Decoding(temperature=0.5, top_p=0.8), n=4000)
    assert found[1] / found[3] == pytest.approx((0.5 / 0.35) ** 2, rel=0.1)


def test_a_cache_changes_no_token_and_has_keys_and_values_of_all_positions(model):
    """The last token is written, but not read: 4 + 12 positions of 2 layers, 2 heads of 16, 4 bytes each, k and v."""
    with_cache, size = generate(model, PROMPT, Decoding(12), use_cache=True)
    without, none = generate(model, PROMPT, Decoding(12), use_cache=False)
    assert with_cache == without and len(with_cache) == 12
    assert (size, none) == ((len(PROMPT) + 11) * 2 * 2 * 2 * 16 * 4, 0)


def test_it_writes_what_transformers_generates(model):
    expected = model.generate(
        input_ids=torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=10, do_sample=False,
        eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    assert generate(model, PROMPT, Decoding(10))[0] == expected[0, len(PROMPT) :].tolist()


def test_with_a_cache_one_position_is_computed(model):
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    generate(model, PROMPT, Decoding(4), use_cache=True)
    generate(model, PROMPT, Decoding(4), use_cache=False)
    hook.remove()
    assert seen == [5, 1, 1, 1, 5, 6, 7, 8]


def test_it_ends_at_eos_and_draws_the_same_from_a_seed(model):
    tokens, _ = generate(model, PROMPT, Decoding(8))
    assert generate(model, PROMPT, Decoding(8), eos_token_id=tokens[3])[0] == tokens[: tokens.index(tokens[3])]
    drawn = [generate(model, PROMPT, Decoding(8, 2.0, 1.0, seed))[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_together_write_what_each_does_alone(model, use_cache):
    """Of other lengths, one of which ends before the others, drawn and greedy."""
    rows = [PROMPT, PROMPT[:2], [7, 8, 9]]
    eos = generate(model, rows[1], Decoding(9))[0][4]
    for decoding in (Decoding(9), Decoding(9, 2.0, 0.9)):
        alone = [generate(model, ids, decoding, use_cache, eos)[0] for ids in rows]
        assert generate_rows(model, rows, decoding, use_cache, eos)[0] == alone
    assert len({len(tokens) for tokens in [generate(model, ids, Decoding(9), use_cache, eos)[0] for ids in rows]}) > 1


def test_a_patched_model_writes_the_same_and_stays_in_training(tiny_llama_folder, model):
    expected, _ = generate(model, PROMPT, Decoding(6))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    patched = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    apply_hyclora(patched, HycloraConfig(iteration_threshold=1))
    patched.train()
    assert generate(patched, PROMPT, Decoding(6))[0] == generate(patched, PROMPT, Decoding(6), False)[0] == expected
    assert patched.training


def test_both_ways_are_measured(model):
    found = compare_cache(model, PROMPT, 6)
    assert (found["tokens"], found["alike"]) == (6, 6)
    assert found["with"]["cache_mib"] > 0 == found["without"]["cache_mib"]
    assert found["with"]["seconds"] > 0 and found["without"]["seconds"] > 0


def test_the_four_prompts_are_written_on(model, tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    args = DRIVER.parse(["--max_new_tokens", "3"])[4]
    found = sample(model, tokenizer, TEST_PROMPTS, args)
    assert [row["prompt"] for row in found["texts"]] == list(TEST_PROMPTS) and len(TEST_PROMPTS) == 4
    assert all(row["text"] for row in found["texts"])
