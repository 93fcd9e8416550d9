"""Memory and throughput of a training micro-step (a forward and a backward) with random tokens.

    bash run_memory_throughput.sh                    # Llama-2-7B's shape on a GPU, the tiny LLaMA on a CPU
    q_bit=2 seq_len=8192 per_device_train_batch_size=1 bash run_memory_throughput.sh

The settings are at the top of run_memory_throughput.sh; `python run_memory_throughput.py --help` lists all of them. One
JSON line a run is appended to benchmarks/results/run_memory_throughput.jsonl.
"""

from pathlib import Path

import torch

from benchmarks.record import record
from hyclora import apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.operators.savers.sparse import Sparse
from hyclora.utils import results
from hyclora.utils.args import HycloraArguments, LoraArguments, ModelArguments, ProfileArguments, parse_arguments
from hyclora.utils.disk import check_output
from hyclora.utils.errors import RunStopped, entry_point, is_out_of_memory
from hyclora.utils.loading import checkpoint_layers, find_base, load_model
from hyclora.utils.profiling import random_micro_step

GROUPS = (ModelArguments, LoraArguments, HycloraArguments, ProfileArguments)


@entry_point
def main(argv=None):
    groups = parse_arguments(argv, GROUPS)
    model_args, lora_args, hyclora_args, profile = groups
    source = find_base(model_args, lora_args, tokenizer=False)
    check_output(Path(profile.output_dir), needed=2**20)
    device = torch.device({"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(profile.device, profile.device))
    results.print_settings(groups)
    report = None
    try:
        model = load_model(model_args, lora_args, source, device, profile.seed)
        if hyclora_args.use_hyclora:
            report = apply_hyclora(model, hyclora_args.config())
            print(report)
        if profile.gradient_checkpointing:
            checkpoint_layers(model)
            model.enable_input_require_grads()
        found = measure(model, profile, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = {"error": "out of memory"}
    line = {
        "setting": hyclora_args.config().to_dict() if hyclora_args.use_hyclora else None,
        **found,
        "slot_mib": slot_mib(report, model, profile) if report else {},
        "arguments": arguments_of(model_args, lora_args, profile, device),
        "settings": results.settings(*groups),
    }
    record("run_memory_throughput", line, Path(profile.output_dir))
    if "error" in found:
        raise RunStopped("out of memory: lower per_device_train_batch_size or seq_len, or try a smaller q_bit")
    print(closing_table(line, profile))


def measure(model, profile: ProfileArguments, device: torch.device) -> dict:
    """What was asked for, after warm-up."""
    step = random_micro_step(
        model, profile.per_device_train_batch_size, profile.seq_len, profile.warm_up_seq_len, device
    )
    memory = step.memory() if profile.evaluate_memory else {}
    return memory | (step.throughput(profile.steps) if profile.evaluate_throughput else {})


def slot_mib(report, model, profile: ProfileArguments) -> dict[str, float]:
    """MiB of each slot of one layer, on average over the layers."""
    batch, seq_len = profile.per_device_train_batch_size, profile.seq_len
    exact_bits = 16 if model.device.type == "cuda" else 8 * model.dtype.itemsize  # autocast is on a GPU only
    found = {}
    kept, savers = report.slot_bits, report.savers
    if profile.gradient_checkpointing:
        inputs = [block.savers["layer_in"] for block in find_patch(model).checkpoints]
        kept = {"layer_in": sum(saver.bits(model.config.hidden_size) for saver in inputs)}
        savers = {"layer_in": [str(saver) for saver in inputs]}
    for slot, bits in kept.items():
        bits *= exact_bits / 16 if slot != "lse" and set(savers[slot]) == {"exact"} else 1
        found[slot] = bits / report.n_layers * batch * seq_len
    if "prob" in savers:
        saver = next(block.savers["prob"] for block in find_patch(model).blocks if "prob" in block.savers)
        entries, columns = saver.row(seq_len) if isinstance(saver, Sparse) else (seq_len, None)
        entry_bits = exact_bits + (8 * columns.itemsize if columns else 0)
        found["prob"] = batch * model.config.num_attention_heads * seq_len * entries * entry_bits
    return {slot: round(bits / 2**23, 4) for slot, bits in found.items()}


def arguments_of(model_args, lora_args, profile, device) -> dict:
    """What `python -m benchmarks.memory_throughput` writes of its settings, under the same names."""
    return {
        "shape": Path(model_args.model_name).name,
        "base": "nf4" if model_args.load_in_4bit else "bf16" if device.type == "cuda" else "fp32",
        "lora_rank": lora_args.lora_rank,
        "batch_size": profile.per_device_train_batch_size,
        "seq_len": profile.seq_len,
        "steps": profile.steps,
        "warm_up_seq_len": profile.warm_up_seq_len,
        "device": device.type,
    }


def closing_table(line: dict, profile: ProfileArguments) -> str:
    rows = []
    if profile.evaluate_memory and "static_mib" in line:
        rows = [
            ("torch.cuda.memory_allocated (static)", f"{line['static_mib']:.2f} MiB"),
            ("  of it adapters, gradients, optimizer", f"{line['trained_mib']:.2f} MiB"),
            ("buffered after the forward, on the GPU", f"{line['buffered_mib']:.2f} MiB"),
            ("buffered after the forward, on the host", f"{line['host_mib']:.2f} MiB"),
            ("torch.cuda.max_memory_allocated (peak)", f"{line['peak_mib']:.2f} MiB"),
            ("dyn: peak - static", f"{line['dyn_mib']:.2f} MiB"),
        ]
    elif profile.evaluate_memory:
        rows = [
            ("kept by autograd after the forward", f"{line['buffered_mib']:.2f} MiB"),
            ("torch.cuda.memory_allocated, static and peak", "need a GPU"),
        ]
    if profile.evaluate_memory:
        rows += [(f"slot {slot}, a layer", f"{size:.3f} MiB") for slot, size in line["slot_mib"].items()]
    if profile.evaluate_throughput:
        low, high = line["ms_range"]
        rows += [
            ("micro-step, median and range", f"{line['ms']:.1f} ms ({low:.1f} to {high:.1f})"),
            ("iterations (micro-steps) a second", f"{line['steps_per_second']:.3f}"),
            ("sequences a second", f"{line['sequences_per_second']:.2f}"),
            ("tokens a second", f"{line['tokens_per_second']}"),
        ]
    return results.table(rows)


if __name__ == "__main__":
    main()
