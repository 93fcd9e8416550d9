"""Does fine-tuning notice? Test loss after the same steps with exact LoRA and with compressed activations.

    python -m benchmarks.finetune --model FOLDER --data FOLDER        # with GSM8K's train.jsonl and test.jsonl

Same seed, same batches, same optimizer for every setting, fp32; the loss is the mean over answer tokens of test rows.
One JSON line a setting.
"""

import argparse
import json
import time

import torch
from tqdm import tqdm

from benchmarks.fidelity import load_batches, load_model
from benchmarks.record import record
from benchmarks.rows import whole
from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.utils.errors import entry_point

SETTINGS = [None, *({"layer_type": "intra_inter", "q_bit": bits} for bits in (8, 4, 3, 2))]
SETTINGS += [{"layer_type": "intra_inter", "q_bit": "auto", "average_bits": bits} for bits in (3.0, 2.5)]
PAPER = [{"layer_type": "intra_inter", "q_bit": bits, "scale_rule": "paper"} for bits in (8, 4, 2)]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: list[dict]) -> float:
    """Mean cross entropy of all answer tokens, nats."""
    model.eval()
    total = tokens = 0
    for batch in batches:
        count = (batch["labels"][:, 1:] != -100).sum()
        total += model(**batch).loss * count
        tokens += count
    model.train()
    return (total / tokens).item()


def train(model: torch.nn.Module, batches: list[dict], learning_rate: float, label: str) -> list[float]:
    """One pass of AdamW with linear decay over batches; the training losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for i, batch in enumerate(tqdm(batches, desc=label, leave=False)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - i / len(batches))
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@entry_point
def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ckpt/tiny-llama", help="checkpoint folder")
    parser.add_argument("--data", default="demo", help="demo, or a folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--settings", type=json.loads, default=SETTINGS, help="JSON list; null is exact LoRA")
    parser.add_argument("--paper", action="store_true", help="add the published quantizer at 8, 4 and 2 bit")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--test_rows", type=int, default=512)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    shared = (args.model, args.data, args.batch_size)
    train_batches = load_batches(*shared, args.steps, args.seq_len, args.device, "train")
    test_batches = load_batches(*shared, args.test_rows // args.batch_size, args.seq_len, args.device, "test")
    exact, lines = None, []
    for setting in [*args.settings, *(PAPER if args.paper else [])]:
        model = load_model(args.model, args.device, args.seed)
        torch.manual_seed(args.seed)
        if setting is not None:
            apply_hyclora(model, HycloraConfig(**setting))
        started, label = time.perf_counter(), "exact LoRA" if setting is None else json.dumps(setting)
        losses = train(model, train_batches, args.learning_rate, label)
        seconds = time.perf_counter() - started
        if setting is not None:
            remove_hyclora(model)
        loss = mean_loss(model, test_batches)
        exact = loss if setting is None else exact
        gap = None if exact is None else loss - exact
        result = {"setting": whole(setting), "test_loss": loss, "gap": gap, "train_losses": losses, "seconds": seconds}
        lines.append(record("finetune", {"arguments": {**vars(args), "settings": None}, **result}))
        print(f"{label:<44} test loss {loss:.4f}" + ("" if gap is None else f"  {gap:+.4f} nats"), flush=True)
    return lines


if __name__ == "__main__":
    main()
