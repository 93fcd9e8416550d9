"""Train a tokenizer and a small LLaMA from scratch within a budget of minutes.

Without `--text` the corpus is generated (`utils/data/pretrain_text.py`), and the model learns to reason about word
problems without ever meeting the format that fine-tuning teaches. With `--text` it is trained on the files given.

    python -m ckpt.make_tiny_llama --minutes 5
    python -m ckpt.make_tiny_llama --shape small --text train.jsonl wiki.txt.gz --minutes 2 --output ckpt/small-llama
"""

import hyclora.utils.interrupts

import argparse
import io
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm, trange
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hyclora.utils.data.files import read_each, text_of
from hyclora.utils.data.pretrain_text import CUES, LEADS, pretrain_documents
from hyclora.utils.data.text import read_text
from hyclora.utils.data.word_problems import word_problems
from hyclora.utils.disk import to_path
from hyclora.utils.errors import entry_point

SHAPES = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 688,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
    },
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
ROW_LENGTH = 256  # tokens in a packed training row
TOKENIZER_DOCUMENTS = 50_000  # more of the corpus would not change so small a vocabulary
HELD_OUT_ROWS = 64
LINES_PER_DOCUMENT = 64
GUTENBERG_MARKS = ("*** START OF", "*** END OF")
WARM_UP = 0.02  # share of the time budget
REPORT_EVERY = 50  # steps; reading the loss waits for the device


def generated_documents(n: int, seed: int, chunk: int = 10_000) -> list[str]:
    """`n` documents of the generated corpus, written by all CPU cores."""
    jobs = [(min(chunk, n - start), seed + start) for start in range(0, n, chunk)]
    with multiprocessing.Pool() as pool:
        return list(itertools.chain.from_iterable(pool.starmap(pretrain_documents, jobs)))


def read_documents(path: Path) -> list[str]:
    """The documents of a file, which may be .gz: problems of a GSM8K .jsonl or the "text" of another one; or runs of
    lines of a plain text, of a book of Project Gutenberg those between its marks. UserError names what is mistaken.
    """
    if ".jsonl" in path.suffixes:
        return read_each(path, _document)
    lines = io.StringIO(read_text(path)).readlines()
    marks = [number for number, line in enumerate(lines) if line.startswith(GUTENBERG_MARKS)]
    if len(marks) == 2:
        lines = lines[marks[0] + 1 : marks[1]]
    return ["".join(lines[start : start + LINES_PER_DOCUMENT]) for start in range(0, len(lines), LINES_PER_DOCUMENT)]


def _document(place: str, row: dict) -> str:
    keys = ("text",) if "text" in row else ("question", "answer")
    return "\n".join(text_of(row, key, place) for key in keys)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token and every text starts with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, chunk: int = 10_000) -> torch.Tensor:
    """Tokens of the documents, each between <s> and </s>, cut into rows: [rows, ROW_LENGTH], int32."""
    eos = (tokenizer.eos_token_id,)
    tokens = []
    for start in trange(0, len(documents), chunk, desc="tokenize"):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + chunk])
        ids = itertools.chain.from_iterable(itertools.chain(encoding.ids, eos) for encoding in encodings)
        tokens.append(np.fromiter(ids, dtype=np.int32))
    tokens = np.concatenate(tokens)
    rows = len(tokens) // ROW_LENGTH
    return torch.from_numpy(tokens[: rows * ROW_LENGTH].reshape(rows, ROW_LENGTH))


def build_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised LLaMA in float32, with the input embedding as its output layer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        **shape,
        **special,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special, do_sample=False)
    return model


def batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Batches of `size` rows, int64, without end, in a new order every epoch."""
    while True:
        for chosen in torch.randperm(len(rows), device=rows.device).split(size):
            yield rows[chosen].long()


def learning_rate_factor(progress: float, warm_up: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth, at `progress` in [0, 1] of the time budget."""
    if progress < warm_up:
        return progress / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def language_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy of a batch [rows, ROW_LENGTH], in bfloat16 where that is fast."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.is_cuda):
        return model(input_ids=batch, labels=batch, use_cache=False).loss


def train(
    model: PreTrainedModel,
    rows: torch.Tensor,
    minutes: float,
    batch_tokens: int,
    peak_lr: float,
    loss_of: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] = language_loss,
    warm_up: float = WARM_UP,
) -> int:
    """Train on the rows until the minutes are over; give the number of tokens seen. loss_of: of model and batch."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=True)
    model.train()
    seen, start = 0, time.monotonic()
    with tqdm(total=round(60 * minutes), unit="s", desc="train") as bar:
        for step, batch in enumerate(batches(rows, max(1, batch_tokens // rows.shape[1])), start=1):
            progress = (time.monotonic() - start) / (60 * minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * learning_rate_factor(progress, warm_up)
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen += batch.numel()
            if step % REPORT_EVERY == 0:
                bar.set_postfix(step=step, loss=f"{loss.item():.4f}", tokens=f"{seen / 1e6:.1f}M")
                bar.update(int(time.monotonic() - start) - bar.n)
    return seen


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: torch.Tensor, loss_of: Callable = language_loss) -> float:
    """Mean cross entropy in nats per token of rows kept out of training."""
    model.eval()
    return sum(loss_of(model, row).item() for row in rows.long().split(1)) / len(rows)


@torch.no_grad()
def reasoning_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, batch: int = 128) -> float:
    """Share of `n` held-out problems solved, greedily, when told and cued as in the generated corpus."""
    model.eval()
    problems = word_problems(n, seed=0, split="test")
    correct = 0
    for start in trange(0, n, batch, desc="solve"):
        chosen = problems[start : start + batch]
        prompts = [f"{LEADS[0]}{problem['question']}\n{CUES[0]}\n" for problem in chosen]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**inputs, max_new_tokens=128)
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        results = [problem["answer"].rsplit("#### ", 1)[1] for problem in chosen]
        correct += sum(re.findall(r"\d+", text)[-1:] == [result] for text, result in zip(texts, results, strict=True))
    return correct / n


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model in bfloat16, in files below 15 MB, and the tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="14MB")
    tokenizer.save_pretrained(folder)
    for file in sorted(folder.glob("*.safetensors")):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--text", type=to_path, nargs="+", help="GSM8K .jsonl or plain text, may be .gz")
    parser.add_argument("--documents", type=int, default=600_000, help="size of the generated corpus")
    parser.add_argument("--minutes", type=float, default=5.0, help="time to train for")
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1, help="0 would draw the training problems of the demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=to_path, default=Path("ckpt/tiny-llama"))
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    if args.text:
        documents = list(itertools.chain.from_iterable(map(read_documents, args.text)))
    else:
        documents = generated_documents(args.documents, args.seed)
    tokenizer = train_tokenizer(documents[:TOKENIZER_DOCUMENTS], SHAPES[args.shape]["vocab_size"])
    rows = pack(documents, tokenizer)
    rows = rows[torch.randperm(len(rows))].to(args.device)
    model = build_model(SHAPES[args.shape], tokenizer).to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {rows.numel() / 1e6:.1f} M tokens")
    seen = train(model, rows[HELD_OUT_ROWS:], args.minutes, args.batch_tokens, args.lr)
    print(f"{seen / 1e6:.1f} M tokens seen, held-out loss {held_out_loss(model, rows[:HELD_OUT_ROWS]):.4f}")
    save(model, tokenizer, args.output)
    if not args.text:
        print(f"held-out problems solved: {reasoning_accuracy(model, tokenizer, 512):.1%}")


if __name__ == "__main__":
    main()
