"""Bytes kept for backward by one decoder layer, by slot settings, against PEFT with SDPA.

    python -m benchmarks.buffered                       # Llama-2-7B's layer, 4 x 512 tokens, bf16 autocast, NF4 base
    python -m benchmarks.buffered --device cpu --hidden 256 --ffn 688 --heads 8 --kv_heads 4 --base bf16

Counted through saved-tensor hooks (unique storages, parameters excluded) as the difference between a model of two
layers and one of one layer, so that embedding, final norm and loss cancel. Plain LoRA with checkpointing keeps the
layer's input, and pays for it with a second forward. The frozen weights are random.
"""

import argparse
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import RESULTS, record
from benchmarks.rows import LSE_KEPT, name_of, whole
from hyclora import HycloraConfig, apply_hyclora
from hyclora.utils.args import LINEARS
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import entry_point
from hyclora.utils.loading import quantize_linears
from hyclora.utils.profiling import buffered_bytes, random_batch

PLAIN, CHECKPOINTING = "PEFT LoRA", "PEFT LoRA, checkpointing"
INTER = {"layer_type": "intra_inter"}
SETTINGS = [
    PLAIN,
    CHECKPOINTING,
    {"layer_type": "baseline"},
    *({"layer_type": "intra", "q_bit": bits} for bits in (8, 4, 2)),
    *(INTER | {"q_bit": bits} for bits in (8, 4, 3, 2)),
    *(INTER | {"q_bit": "auto", "average_bits": bits} for bits in (3.0, 2.5)),
    {"slot_savers": LSE_KEPT},
]


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Shape of the model and the batch; Llama-2-7B's by default."""
    shape = {"hidden": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32, "batch_size": 4, "seq_len": 512}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def build_model(args: argparse.Namespace, layers: int) -> torch.nn.Module:
    """A LLaMA of `layers` layers with LoRA r=16 on all linears, fp32 adapters, in training mode."""
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, use_cache=False,
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if args.base == "nf4":
        quantize_linears(model, torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS)).to(args.device).train()


def layer_bytes(args: argparse.Namespace, setting: dict | str) -> tuple[int, dict[str, int]]:
    """Bytes kept by one layer, and those of its slots; setting: arguments of HycloraConfig, or a way of plain LoRA."""
    batch = random_batch(args.vocab, args.batch_size, args.seq_len, args.device)
    totals, slots = [], {}
    for layers in (1, 2):
        model = build_model(args, layers)
        if setting == CHECKPOINTING:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        elif setting != PLAIN:
            report = apply_hyclora(model, HycloraConfig(**setting))
            slots = {
                slot: round(bits / layers * batch["input_ids"].numel() / 8) for slot, bits in report.slot_bits.items()
            }
        with torch.autocast(args.device, dtype=torch.bfloat16):
            totals.append(buffered_bytes(model, batch))
    return totals[1] - totals[0], slots


@entry_point
def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--settings", type=json.loads, default=SETTINGS, help="JSON list of what SETTINGS holds")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    check_output(args.output_dir, needed=2**20)
    shape = {name: value for name, value in vars(args).items() if name not in ("output_dir", "settings")}
    lines = []
    for setting in args.settings:
        size, slots = layer_bytes(args, setting)
        result = {"setting": whole(setting), "layer_bytes": size, "slots": slots}
        lines.append(record("buffered", {"arguments": shape, **result}, args.output_dir))
        print(f"{name_of(setting):<48}{size / 2**20:9.2f} MiB a layer")
    return lines


if __name__ == "__main__":
    main()
