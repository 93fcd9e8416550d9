"""Generation written out, token by token: with a cache of keys and values, or with the whole text again each time.

    logits of position t depend on the tokens 0 .. t alone, so do keys and values of each layer; with use_cache they are
    kept, and a step computes one position instead of t + 1. The tokens are the same, for keys and values of
    2 x layers x heads of k and v x head size elements a position.

`transformers` has a `generate` that does much more (utils/metrics.py uses it); this one shows what a cache is worth.
"""

import inspect
import math
import time
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.args import EvalArguments, option, require
from hyclora.utils.profiling import MIB, undisturbed


@dataclass
class WritingArguments(EvalArguments):
    """Evaluation by a loss, and by what is written after the test prompts."""

    test_prompts: bool = option(True, "Write on after the four test prompts, before and after training.")
    max_new_tokens: int = option(64, "Tokens to write.")
    temperature: float = option(0.0, "Of sampling; 0: always the likeliest token.")
    top_p: float = option(0.9, "Sample among the likeliest tokens that hold this probability together.")
    generation_seed: int = option(42, "Seed of the sampling.")
    use_cache: bool = option(True, "Keep keys and values while writing; False computes the whole text for each token.")

    def __post_init__(self):
        super().__post_init__()
        require(self.max_new_tokens > 0, f"max_new_tokens must be positive, not {self.max_new_tokens}")
        require(0 <= self.temperature < math.inf, f"temperature must be 0 or a positive number, not {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")


@dataclass(frozen=True)
class Decoding:
    """How a next token is chosen: temperature 0 takes the likeliest; else it is drawn among the likeliest tokens that
    hold top_p of the probability together, from `seed`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


def next_token(logits: Tensor, decoding: Decoding, generator: torch.Generator | None = None) -> int:
    """A token for logits [vocabulary]."""
    if decoding.temperature == 0:
        return int(logits.argmax())
    # less the largest, in float64: the others are at worst infinitely far from it
    scaled = (logits.double() - logits.max()) / decoding.temperature
    probability, token = scaled.float().softmax(-1).sort(descending=True)
    before = probability.cumsum(-1) - probability  # of the likelier tokens: the first one is always kept
    probability[before >= decoding.top_p] = 0
    # drawn on the CPU, so that a seed means the same everywhere
    return int(token[torch.multinomial(probability.cpu(), 1, generator=generator).item()])


def next_tokens(logits: Tensor, decoding: Decoding, generators: list[torch.Generator]) -> list[int]:
    """A token for each row of logits [rows, vocabulary]."""
    if decoding.temperature == 0:
        return logits.argmax(-1).tolist()  # one wait for the GPU
    return [next_token(row, decoding, generator) for row, generator in zip(logits, generators, strict=True)]


@torch.no_grad()
def generate(
    model: PreTrainedModel, ids: list[int], decoding: Decoding, use_cache: bool = True, eos_token_id: int | None = None
) -> tuple[list[int], int]:
    """The new tokens after `ids`, up to the eos token (left out), and the bytes of the cache at the end."""
    (tokens,), size = generate_rows(model, [ids], decoding, use_cache, eos_token_id)
    return tokens, size


@torch.no_grad()
def generate_rows(
    model: PreTrainedModel,
    rows: list[list[int]],
    decoding: Decoding,
    use_cache: bool = True,
    eos_token_id: int | None = None,
) -> tuple[list[list[int]], int]:
    """`generate` for several rows at once: the new tokens of each, and the bytes of the cache at the end.

    Shorter rows are filled up on the left, masked, so that all end at the same place. A row that has ended is computed
    until all have.
    """
    generators = [torch.Generator().manual_seed(decoding.seed) for _ in rows]
    width, new = max(map(len, rows)), [[] for _ in rows]
    tokens = torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=model.device)
    cache, name, ended = None, _name_of_cache(model), [False] * len(rows)
    with undisturbed(model, train=False):
        for _ in range(decoding.max_new_tokens):
            unseen = slice(None) if cache is None else slice(-1, None)
            where = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(0)[:, unseen]}
            inputs = {"input_ids": tokens[:, unseen], **(where if len(rows) > 1 else {})}
            output = model(**inputs, use_cache=use_cache, logits_to_keep=1, **{name: cache})
            cache = getattr(output, name) if use_cache else None
            chosen = next_tokens(output.logits[:, -1], decoding, generators)
            ended = [end or token == eos_token_id for end, token in zip(ended, chosen, strict=True)]
            if all(ended):
                break
            for row, token, end in zip(new, chosen, ended, strict=True):
                row += [token] * (not end)
            tokens = torch.cat([tokens, torch.tensor(chosen, device=model.device)[:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return new, 0 if cache is None else cache_bytes(cache)


def _name_of_cache(model: PreTrainedModel) -> str:
    """What the model calls it: the name has changed in transformers 5.24."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def cache_bytes(cache) -> int:
    """Of the keys and values of all layers."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...], args: WritingArguments
) -> dict:
    """What the model writes after each prompt, as `texts`, and `cache`: what keeping keys and values is worth after the
    longest one.
    """
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.generation_seed)
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    written = [generate(model, ids, decoding, args.use_cache, tokenizer.eos_token_id)[0] for ids in encoded]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
    return {
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)],
        "cache": compare_cache(model, max(encoded, key=len), args.max_new_tokens),
    }


def compare_cache(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> dict:
    """`compare_rows` of one row."""
    return compare_rows(model, [prompt], max_new_tokens)


def compare_rows(model: PreTrainedModel, rows: list[list[int]], max_new_tokens: int) -> dict:
    """Greedy tokens with and without a cache: how many there are and are alike, seconds and memory of both.

    peak_mib: of the GPU over what was there before, held_mib: what the allocator had more; None on a CPU.
    """
    decoding, found, tokens = Decoding(max_new_tokens), {}, {}
    generate_rows(model, rows, Decoding(1))  # what a first forward takes is not to be timed
    for name, use_cache in (("with", True), ("without", False)):
        before = _reset_peaks(model)
        start = time.perf_counter()
        written, size = generate_rows(model, rows, decoding, use_cache)
        seconds = time.perf_counter() - start  # the last token was read, so the GPU has ended
        tokens[name] = [token for row in written for token in row]
        found[name] = {"seconds": round(seconds, 3), "cache_mib": round(size / MIB, 3), **_peaks(before)}
    alike = sum(a == b for a, b in zip(tokens["with"], tokens["without"], strict=True))
    return {"tokens": len(tokens["with"]), "alike": alike, **found}


def _reset_peaks(model: PreTrainedModel) -> tuple[int, int] | None:
    if model.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _peaks(before: tuple[int, int] | None) -> dict[str, float | None]:
    if before is None:
        return {"peak_mib": None, "held_mib": None}
    now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peak, held = (round((b - a) / MIB, 2) for a, b in zip(before, now, strict=True))
    return {"peak_mib": peak, "held_mib": held}
