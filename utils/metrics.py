"""What a model can do: accuracy on word problems, or the loss on responses.

Accuracy: generate an answer, read out of it what it ends at, compare (utils/answers.py).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyclora.models.sharding import is_unit
from hyclora.utils.answers import is_correct
from hyclora.utils.args import EvalArguments, GenerationArguments
from hyclora.utils.data.gsm8k import prompt_of
from hyclora.utils.data.tokens import IGNORED, Collator
from hyclora.utils.profiling import undisturbed
from hyclora.utils.ranks import share_batches

HEAD_ROWS = 512


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    args: GenerationArguments,
    prompt_of: Callable[[str], str] = prompt_of,
) -> tuple[float, list[dict]]:
    """Accuracy over the rows, and for each row what it has (question, answer), the generated text and the verdict.

    prompt_of: how a question is asked. Processes share the rows; what is drawn is the same however many they are.
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

    def answer(batch: list[int]) -> list[str]:
        torch.manual_seed(args.generation_seed + batch[0])  # whoever computes it, and after which others
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        padded = padded.to(model.device)
        # processes that share weights go on until all have ended
        output = model.generate(**padded, generation_config=config, synced_gpus=is_unit(model))
        return tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)

    with undisturbed(model, train=False):
        found = share_batches(list(map(len, prompts)), args.eval_batch_size, answer)
    texts = {i: text for batch, answers in found for i, text in zip(batch, answers, strict=True)}
    predictions = [
        {**row, "prediction": texts[i], "correct": is_correct(texts[i], row["answer"], row["question"])}
        for i, row in enumerate(rows)
    ]
    return sum(p["correct"] for p in predictions) / max(len(rows), 1), predictions


def evaluate_loss(model: PreTrainedModel, rows: Sequence[dict], pad_token_id: int, args: EvalArguments) -> float:
    """Mean cross-entropy (in nats) of a learned token over the tokenized rows, each token with the same weight.

    Processes share the rows, each of which is made when its batch is. The head runs on HEAD_ROWS learned positions at a
    time: logits of a batch would take more memory than training.
    """
    collate, lengths = Collator(pad_token_id), [len(row["input_ids"]) for row in rows]
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def sum_and_count(places: list[int]) -> tuple[float, int]:
        batch = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in places]).items()}
        labels, total, count = batch.pop("labels"), 0.0, 0
        states = decoder(**batch, use_cache=False).last_hidden_state
        # the state at a token predicts the next one
        for state, target in zip(states[:, :-1], labels[:, 1:], strict=True):
            learned = target != IGNORED
            count += int(learned.sum())
            for part, ids in zip(state[learned].split(HEAD_ROWS), target[learned].split(HEAD_ROWS), strict=True):
                total += F.cross_entropy(head(part).float(), ids, reduction="sum").item()
        return total, count

    with undisturbed(model, train=False), torch.no_grad():
        found = share_batches(lengths, args.eval_batch_size, sum_and_count)
    return sum(total for _, (total, _) in found) / sum(count for _, (_, count) in found)
