"""Pre-train a RoBERTa from scratch by masked language modelling on text, within a budget of minutes.

The tokenizer is that of a folder with vocab.json and merges.txt (RoBERTa's, or any byte-level BPE with its special
tokens); without `--tokenizer` a small one is trained on the text (`--vocabulary`: the fewer tokens there are, the more
often each of them is met). Rows have 512 tokens, or fewer (`--row-tokens`: more of them a step, from which positions
are learned sooner), and every time that a row comes other tokens of it are masked.

    python -m ckpt.pretrain_roberta --text wiki.train.txt.gz books/*.txt --tokenizer roberta-base --minutes 20
    python -m ckpt.pretrain_roberta --shape tiny --text wiki.train.txt.gz --minutes 5 --output ckpt/tiny-roberta
"""

import hyclora.utils.interrupts

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from ckpt.make_tiny_llama import HELD_OUT_ROWS, held_out_loss, read_documents, save, train
from hyclora.utils.data.tokens import IGNORED
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.tokenizer import unspaced_mask

SHAPES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048},
    "medium": {"hidden_size": 640, "num_hidden_layers": 12, "num_attention_heads": 10, "intermediate_size": 2560},
}
ROW_LENGTH = 512
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # in the order of RoBERTa's ids; <mask> is the last of all
SMALL_VOCABULARY = 2048
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS) + 1
TOKENIZER_FILES = ("vocab.json", "merges.txt")
WARM_UP = 0.06  # share of the time budget; norms behind the residual need more of it than LLaMA's


def read_tokenizer(folder: Path) -> RobertaTokenizer:
    """The byte-level BPE of a folder; UserError if it has none, or not RoBERTa's special tokens."""
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} does not exist: --tokenizer is a folder with {' and '.join(TOKENIZER_FILES)}"
            )
    return _finished(RobertaTokenizer.from_pretrained(folder), folder)


def train_tokenizer(documents: list[str], vocab_size: int) -> RobertaTokenizer:
    """A byte-level BPE of the documents with RoBERTa's special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(documents, trainer)
    trained = json.loads(raw.to_str())["model"]
    vocabulary = {**trained["vocab"], "<mask>": len(trained["vocab"])}
    return _finished(RobertaTokenizer(vocab=vocabulary, merges=list(map(tuple, trained["merges"]))), "the tokenizer")


def _finished(tokenizer: RobertaTokenizer, source) -> RobertaTokenizer:
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    for name in (*SPECIAL_TOKENS, "<mask>"):
        if name not in vocabulary:
            raise UserError(f"{source} has no token {name}: a vocabulary of RoBERTa's kind is needed")
    unspaced_mask(tokenizer)
    tokenizer.model_max_length = ROW_LENGTH
    return tokenizer


def pack(
    documents: list[str], tokenizer: RobertaTokenizer, length: int = ROW_LENGTH, chunk: int = 10_000
) -> torch.Tensor:
    """Tokens of the documents with </s> between two of them, cut into rows <s> ... </s>: [rows, length], int32."""
    end, tokens = (tokenizer.eos_token_id,), []
    for start in range(0, len(documents), chunk):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            documents[start : start + chunk], add_special_tokens=False
        )
        ids = itertools.chain.from_iterable(itertools.chain(encoding.ids, end) for encoding in encoded)
        tokens.append(np.fromiter(ids, dtype=np.int32))
    tokens, inner = torch.from_numpy(np.concatenate(tokens)), length - 2
    rows = len(tokens) // inner
    if rows <= HELD_OUT_ROWS:
        raise UserError(f"the text has {len(tokens)} tokens, and at least {(HELD_OUT_ROWS + 1) * inner} are needed")
    return F.pad(
        F.pad(tokens[: rows * inner].view(rows, inner), (1, 0), value=tokenizer.bos_token_id), (0, 1), value=end[0]
    )


def build_model(shape: dict[str, int], tokenizer: RobertaTokenizer) -> RobertaForMaskedLM:
    """A freshly initialised RoBERTa in float32, with the epsilon and the positions of the published ones."""
    config = RobertaConfig(
        **shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=ROW_LENGTH + tokenizer.pad_token_id + 1,  # positions begin behind the padding's id
        layer_norm_eps=1e-5,
        type_vocab_size=1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return RobertaForMaskedLM(config)


class MaskedLoss:
    """Mean cross entropy of the masked tokens of a batch: 15 % of them, drawn anew for each batch.

    Of these 80 % are read as <mask>, 10 % as another token and 10 % as they are. The head runs on them alone.
    """

    def __init__(self, tokenizer: RobertaTokenizer):
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
        self.special = torch.tensor([tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id])

    def __call__(self, model: RobertaForMaskedLM, batch: torch.Tensor) -> torch.Tensor:
        inputs, labels = self.collator.torch_mask_tokens(batch.clone(), torch.isin(batch, self.special))
        # found on the host, as a GPU would be waited for
        masked = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        labels = labels.flatten()[masked].to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
            hidden = model.roberta(inputs.to(model.device)).last_hidden_state
            return F.cross_entropy(model.lm_head(hidden.flatten(0, 1)[masked.to(model.device)]).float(), labels)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="with RoBERTa's vocabulary 7, 51 or 92 M")
    parser.add_argument("--text", type=to_path, nargs="+", required=True, help=".jsonl or plain text, may be .gz")
    parser.add_argument("--tokenizer", type=to_path, help="folder with vocab.json and merges.txt")
    parser.add_argument("--vocabulary", type=int, help=f"tokens without --tokenizer, or {SMALL_VOCABULARY}")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to train for")
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--row-tokens", type=int, default=ROW_LENGTH, help=f"of a row, at most {ROW_LENGTH}")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=to_path, default=Path("ckpt/small-roberta"))
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for file in args.text:
        if not file.is_file():
            raise UserError(f"{file} does not exist: --text names files")
    if not 2 < args.row_tokens <= ROW_LENGTH:
        raise UserError(f"--row-tokens {args.row_tokens}: a row has 3 to {ROW_LENGTH} tokens")
    if args.batch_tokens < args.row_tokens:
        raise UserError(f"--batch-tokens {args.batch_tokens}: fewer than a row has, --row-tokens {args.row_tokens}")
    if args.tokenizer and args.vocabulary is not None:
        raise UserError(
            f"--vocabulary {args.vocabulary}: that of --tokenizer {args.tokenizer} is taken: drop one of them"
        )
    args.vocabulary = SMALL_VOCABULARY if args.vocabulary is None else args.vocabulary
    if args.vocabulary < LEAST_VOCABULARY:
        raise UserError(f"--vocabulary {args.vocabulary}: bytes and special tokens are {LEAST_VOCABULARY} already")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes}: it has to be positive")
    torch.manual_seed(args.seed)
    documents = list(itertools.chain.from_iterable(map(read_documents, args.text)))
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(documents, args.vocabulary)
    rows = pack(documents, tokenizer, args.row_tokens)
    check_output(args.output)
    rows = rows[torch.randperm(len(rows))]
    model, loss_of = build_model(SHAPES[args.shape], tokenizer).to(args.device), MaskedLoss(tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {rows.numel() / 1e6:.1f} M tokens")
    seen = train(model, rows[HELD_OUT_ROWS:], args.minutes, args.batch_tokens, args.lr, loss_of, WARM_UP)
    print(f"{seen / 1e6:.1f} M tokens seen, held-out loss {held_out_loss(model, rows[:HELD_OUT_ROWS], loss_of):.4f}")
    save(model, tokenizer, args.output)


if __name__ == "__main__":
    main()
