"""What a model can do: accuracy on word problems, or the loss on responses.

Accuracy: generate an answer, read out of it what it ends at, compare (utils/answers.py).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.answers import is_correct
from hyclora.utils.args import EvalArguments, GenerationArguments
from hyclora.utils.data.gsm8k import prompt_of
from hyclora.utils.data.tokens import IGNORED, Collator
from hyclora.utils.profiling import undisturbed
from hyclora.utils.runs.launch import is_first

HEAD_ROWS = 512


def evaluating(n: int) -> tqdm:
    """A bar of n rows, shown by the first process alone: where weights are shared, all evaluate the same ones."""
    return tqdm(total=n, desc="evaluating", disable=not is_first())


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    args: GenerationArguments,
    prompt_of: Callable[[str], str] = prompt_of,
) -> tuple[float, list[dict]]:
    """Accuracy over the rows, and for each row what it has (question, answer), the generated text and the verdict.

    prompt_of: how a question is asked.
    """
    decoding = {"do_sample": False}
    if not args.greedy:
        decoding = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
        **decoding,
    )
    prompts = [tokenizer(prompt_of(row["question"])).input_ids for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]), reverse=True)
    texts = {}
    with undisturbed(model, train=False), evaluating(len(rows)) as bar:
        torch.manual_seed(args.generation_seed)
        for start in range(0, len(rows), args.eval_batch_size):
            batch = by_length[start : start + args.eval_batch_size]
            padded = tokenizer.pad(
                {"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(**padded, generation_config=config)[:, padded["input_ids"].shape[1] :]
            texts |= zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
            bar.update(len(batch))
    predictions = [
        {**row, "prediction": texts[i], "correct": is_correct(texts[i], row["answer"], row["question"])}
        for i, row in enumerate(rows)
    ]
    return sum(p["correct"] for p in predictions) / max(len(rows), 1), predictions


def evaluate_loss(model: PreTrainedModel, rows: Sequence[dict], pad_token_id: int, args: EvalArguments) -> float:
    """Mean cross-entropy (in nats) of a learned token over the tokenized rows, each token with the same weight.

    The longest rows come first, and each row is made when its batch is. The head runs on HEAD_ROWS learned positions at
    a time: logits of a batch would take more memory than training.
    """
    collate = Collator(pad_token_id)
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    total, count = 0.0, 0
    with undisturbed(model, train=False), torch.no_grad(), evaluating(len(rows)) as bar:
        for start in range(0, len(rows), args.eval_batch_size):
            batch = collate([rows[i] for i in order[start : start + args.eval_batch_size]])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            states = decoder(**batch, use_cache=False).last_hidden_state
            # the state at a token predicts the next one
            for state, target in zip(states[:, :-1], labels[:, 1:], strict=True):
                learned = target != IGNORED
                count += int(learned.sum())
                for part, ids in zip(state[learned].split(HEAD_ROWS), target[learned].split(HEAD_ROWS), strict=True):
                    total += F.cross_entropy(head(part).float(), ids, reduction="sum").item()
            bar.update(len(labels))
    return total / count
