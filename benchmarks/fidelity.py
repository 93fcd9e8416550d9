"""How close the LoRA gradients of compressed activations are to exact ones.

    python -m benchmarks.fidelity --model ckpt/tiny-llama --data demo
    python -m benchmarks.fidelity --model FOLDER --data FOLDER --settings '[{"q_bit": 2}]'
    python -m benchmarks.fidelity --first usual empty one_id short code --settings '[{"q_bit": 4}]'

For each setting: cosine of every LoRA gradient with exact LoRA's on the same batch, averaged over batches after
calibration; the mean and the smallest over adapters, and the average bits of what is kept, scales included. Adapters
are first trained exactly for some steps, so that LoRA B is not zero. The data folder has GSM8K's train.jsonl and
test.jsonl. One JSON line a setting.

--first: what is calibrated on instead of usual rows, a JSON line each, at once and again LATER usual forwards later.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.record import record
from benchmarks.rows import LSE_KEPT, whole
from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.verify import compare, gradients
from hyclora.utils.args import LINEARS, DataArguments
from hyclora.utils.data.gsm8k import examples_of, load_rows
from hyclora.utils.data.tokens import Collator, tokenize_rows
from hyclora.utils.errors import entry_point
from hyclora.utils.fidelity import train_exactly
from hyclora.utils.loading import load_tokenizer

SETTINGS = [
    *({"layer_type": "intra_inter", "q_bit": bits} for bits in (8, 4, 3, 2)),
    *({"layer_type": "intra_inter", "q_bit": "auto", "average_bits": bits} for bits in (4.0, 3.0, 2.5)),
    *({"layer_type": "intra_inter", "q_bit": bits, "scale_rule": "paper"} for bits in (8, 4, 2)),
    {"q_bit": 4, "layer_type": "intra"},
    *({"layer_type": "intra_inter", "q_bit": bits, "slot_savers": LSE_KEPT} for bits in (4, 2)),
    *({"layers": kept} for kept in ("input", "input8", "input4")),
]
# in place of the usual first rows: warm-ups, rows that are empty, data sorted by length or by kind
FIRST = {
    "empty": lambda tokenizer, i: [tokenizer.bos_token_id, tokenizer.eos_token_id],
    "one_id": lambda tokenizer, i: [tokenizer.eos_token_id] * 64,
    "short": lambda tokenizer, i: tokenizer(("Yes", "No", "Ok", "Fine")[i % 4]).input_ids,
    "code": lambda tokenizer, i: tokenizer(f"def f{i}(x):\n    return x * {i} + {i % 4}\n\nprint(f{i}(2))").input_ids,
}
LATER = 56
SLOT_GROUPS = {"norm_in": ["norm_in"], "attn_in + mlp_in": ["attn_in", "mlp_in"]} | {
    name: [name] for name in ("q", "k", "v", "gate", "up")
}


def load_model(folder: str, device: str, seed: int) -> torch.nn.Module:
    """The checkpoint in fp32 with LoRA r=16 on all linears, in training mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS)).to(device).train()


def load_batches(
    folder: str, data: str, batch_size: int, count: int, seq_len: int, device: str, split: str = "train"
) -> list[dict]:
    """count padded batches of a split."""
    tokenizer = load_tokenizer(folder)
    rows = batch_size * count
    where = {"data_name": "demo"} if data == "demo" else {"data_name": "gsm8k", "data_dir": data}
    rows = load_rows(DataArguments(**where, max_train_samples=rows, max_eval_samples=rows, seq_len=seq_len), split)
    rows = tokenize_rows(examples_of(rows), tokenizer, seq_len).rows
    collate = Collator(tokenizer.pad_token_id)
    batches = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches]


def first_batches(kind: str, folder: str, batch_size: int, count: int, device: str) -> list[dict]:
    """count batches of rows of a kind in FIRST."""
    tokenizer = load_tokenizer(folder)
    rows = [FIRST[kind](tokenizer, i) for i in range(batch_size * count)]
    rows = [{"input_ids": ids, "labels": ids} for ids in rows]
    collate = Collator(tokenizer.pad_token_id)
    batches = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches]


def measure(model: torch.nn.Module, config: HycloraConfig, calibration: list[dict], exact: list[tuple]) -> dict:
    """Cosines of the compressed gradients with the exact ones of the same batches."""
    report = apply_hyclora(model, config)
    try:
        for batch in calibration:
            model(**batch)
        total: dict[str, float] = {}
        for batch, reference in exact:
            _, found = gradients(model, batch)
            for name, (cosine, _) in compare(found, reference).items():
                total[name] = total.get(name, 0.0) + cosine / len(exact)
    finally:
        remove_hyclora(model)
    worst = min(total, key=total.get)
    mean = sum(total.values()) / len(total)
    return {
        "cosine": round(mean, 5), "smallest": round(total[worst], 4), "smallest_of": worst, "bits": report.average_bits,
    }  # fmt: skip


def after(first: str, folder: str, args: argparse.Namespace, calibration: list[dict], usual: list[dict]) -> list[tuple]:
    """What to call it, what to record, and the forwards before measuring: at once and LATER usual ones later."""
    rows = calibration
    if first != "usual":
        rows = first_batches(first, folder, args.batch_size, len(calibration), args.device)
    return [
        (f", {first} first, {later} usual later", {"first": first, "later": later}, rows + usual[:later])
        for later in (0, LATER)
    ]


def slot_settings(bits: int) -> dict[str, dict]:
    """One setting a slot: that slot alone at `bits`, everything else exact."""
    settings = {}
    for name, slots in SLOT_GROUPS.items():
        exact = {slot: "exact" for group in SLOT_GROUPS.values() for slot in group}
        settings[name] = {
            "layer_type": "intra_inter",
            "q_bit": bits,
            "slot_savers": exact | {slot: f"quant{bits}" for slot in slots},
        }
    return settings


@entry_point
def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["ckpt/tiny-llama"], help="checkpoint folders")
    parser.add_argument("--data", default="demo", help="demo, or a folder with GSM8K's train.jsonl")
    parser.add_argument("--settings", type=json.loads, default=SETTINGS, help="JSON list of HycloraConfig arguments")
    parser.add_argument("--slots", type=int, default=0, metavar="BITS", help="instead: every slot alone at BITS")
    parser.add_argument("--first", nargs="+", default=[], choices=["usual", *FIRST], help="rows to calibrate on")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--exact_steps", type=int, default=20, help="training steps before anything is measured")
    parser.add_argument("--batches", type=int, default=4, help="measured batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    settings = {json.dumps(s): s for s in args.settings}
    if args.slots:
        settings = {f"{name} at {args.slots} bit": s for name, s in slot_settings(args.slots).items()}
    lines = []
    for folder in args.model:
        model = load_model(folder, args.device, args.seed)
        calibration_steps = HycloraConfig().iteration_threshold
        count = args.exact_steps + calibration_steps + args.batches
        batches = load_batches(folder, args.data, args.batch_size, count, args.seq_len, args.device)
        train_exactly(model, batches[: args.exact_steps], nullcontext)
        calibration = batches[args.exact_steps : args.exact_steps + calibration_steps]
        exact = [(batch, gradients(model, batch)[1]) for batch in batches[args.exact_steps + calibration_steps :]]
        arguments = {"arguments": {**vars(args), "settings": None}}
        warm_ups = [("", {}, calibration)]
        if args.first:
            usual = batches[: args.exact_steps] * LATER
            warm_ups = [found for first in args.first for found in after(first, folder, args, calibration, usual)]
        for label, setting in settings.items():
            for said, values, forwards in warm_ups:
                result = measure(model, HycloraConfig(**setting), forwards, exact) | values
                whole_setting = {"setting": whole(setting), "label": label + said}
                line = record("fidelity", {"model": Path(folder).name, **whole_setting, **result, **arguments})
                found = f"{result['cosine']:.4f} ({result['smallest']:.3f}) {result['bits']:.2f} bits"
                print(f"{folder:<24}{label + said:<56}{found}")
                lines.append(line)
    return lines


if __name__ == "__main__":
    main()
