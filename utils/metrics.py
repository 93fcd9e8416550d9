"""What a model can do: accuracy on word problems, or the loss on responses.

Accuracy: generate an answer, read the final number out of it, compare exactly.
"""

import re
from fractions import Fraction

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.args import EvalArguments, GenerationArguments
from hyclora.utils.data.gsm8k import FINAL_ANSWER, prompt_of, target_of
from hyclora.utils.data.tokens import IGNORED, Collator
from hyclora.utils.profiling import undisturbed

HEAD_ROWS = 512
_NUMBER = re.compile(
    r"""(?P<sign> (?<![\w.)]) - )?  # a minus that follows a number or a word is not a sign
        \$? (?P<value> (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
        (?: / (?P<over> [1-9]\d* ) (?!\.?\d) )?""",
    re.VERBOSE,
)


def extract_number(text: str) -> Fraction | None:
    """The number that follows "The final answer is:", otherwise the last one of the text; None without a number.

    Fractions compare exactly: 0.5, 1/2 and 50/100 are one number; 50% counts as 50, as in GSM8K.
    """
    text = text.replace("\u2212", "-")
    conclusion = text.partition(FINAL_ANSWER.strip())[2]
    found = _NUMBER.search(conclusion) or next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None:
        return None
    value = Fraction(found["value"].replace(",", "")) / int(found["over"] or 1)
    return -value if found["sign"] else value


def is_correct(prediction: str, answer: str) -> bool:
    """Whether a generated text ends at the same number as the answer of the data set."""
    number = extract_number(prediction)
    return number is not None and number == extract_number(target_of(answer))


def evaluate_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], args: GenerationArguments
) -> tuple[float, list[dict]]:
    """Accuracy over the rows, and for each row its question, answer, generated text and verdict."""
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
    with undisturbed(model, train=False), tqdm(total=len(rows), desc="evaluating") as bar:
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
        {**row, "prediction": texts[i], "correct": is_correct(texts[i], row["answer"])} for i, row in enumerate(rows)
    ]
    return sum(p["correct"] for p in predictions) / max(len(rows), 1), predictions


def evaluate_loss(model: PreTrainedModel, rows: list[dict], pad_token_id: int, args: EvalArguments) -> float:
    """Mean cross-entropy (in nats) of a learned token over the tokenized rows, each token with the same weight.

    The head runs on HEAD_ROWS learned positions at a time: logits of a batch would take more memory than training.
    """
    collate = Collator(pad_token_id)
    rows = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    total, count = 0.0, 0
    with undisturbed(model, train=False), torch.no_grad(), tqdm(total=len(rows), desc="evaluating") as bar:
        for start in range(0, len(rows), args.eval_batch_size):
            batch = collate(rows[start : start + args.eval_batch_size])
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
