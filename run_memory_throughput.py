"""Memory and throughput of a training micro-step (a forward and a backward) with random tokens.

    bash run_memory_throughput.sh                    # Llama-2-7B's shape on a GPU, the tiny LLaMA on a CPU
    q_bit=2 seq_len=8192 per_device_train_batch_size=1 bash run_memory_throughput.sh

Plain LoRA is measured beside it, without and with checkpointing. The settings are at the top of
run_memory_throughput.sh; `python run_memory_throughput.py --help` lists all of them. One JSON line a run is appended to
exp_results_memory_throughput/run_memory_throughput.jsonl.
"""

import hyclora.utils.interrupts

from pathlib import Path

import torch

from benchmarks.jobs import SHAPES, Job
from benchmarks.peers import run as run_alone
from benchmarks.record import record
from hyclora import apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.operators.savers.sparse import Sparse
from hyclora.utils import results
from hyclora.utils.args import HycloraArguments, LoraArguments, ModelArguments, ProfileArguments, parse_arguments
from hyclora.utils.checkpointing import checkpoint_layers
from hyclora.utils.disk import check_output
from hyclora.utils.errors import RunStopped, UserError, entry_point, is_out_of_memory
from hyclora.utils.heads import NEXT_TOKEN
from hyclora.utils.loading import check_embeddings, check_layers, check_model, find_base, load_model
from hyclora.utils.planning.fitting import Load
from hyclora.utils.profiling import random_micro_step
from hyclora.utils.within_budget import settle

PLAIN = ("PEFT LoRA", "PEFT LoRA, checkpointing")
PLAIN_TIMEOUT = 900  # seconds
MEMORY = (
    ("static: weights, adapters, gradients, optimizer", "static_mib", "{:.1f} MiB"),
    ("  of it trained: adapters, gradients, optimizer", "trained_mib", "{:.1f} MiB"),
    ("kept for backward after the forward", "buffered_mib", "{:.2f} MiB"),
    ("  beside it in host memory", "host_mib", "{:.2f} MiB"),
    ("peak, torch.cuda.max_memory_allocated", "peak_mib", "{:.1f} MiB"),
    ("dyn: peak over static", "dyn_mib", "{:.1f} MiB"),
    ("held: taken of the GPU over static", "held_mib", "{:.1f} MiB"),
)
THROUGHPUT = (
    ("a micro-step, median", "ms", "{:.1f} ms"),
    ("  from, to", "ms_range", "{0[0]:.1f}, {0[1]:.1f} ms"),
    ("micro-steps a second", "steps_per_second", "{:.3f}"),
    ("sequences a second", "sequences_per_second", "{:.2f}"),
    ("tokens a second", "tokens_per_second", "{}"),
)
GROUPS = (ModelArguments, LoraArguments, HycloraArguments, ProfileArguments)


@entry_point
def main(argv=None):
    groups = parse_arguments(argv, GROUPS)
    model_args, lora_args, hyclora_args, profile = groups
    if hyclora_args.verify:
        raise UserError("verify needs real rows, and this measures random tokens: set it for a run that trains")
    source = find_base(model_args, lora_args, tokenizer=False)
    check_model(source, NEXT_TOKEN, lora_args)
    check_layers(source, NEXT_TOKEN, hyclora_args.config())
    check_embeddings(source, NEXT_TOKEN, lora_args, hyclora_args.config())
    device = torch.device({"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(profile.device, profile.device))
    if device.type == "cpu" and Path(source).resolve().parent == SHAPES.resolve():
        raise UserError(f"{source} is the shape of a model for a GPU, and this would run on the CPU: drop model_name")
    if hyclora_args.has_budget:
        rows, tokens = profile.per_device_train_batch_size, profile.seq_len
        load = Load.full(rows, tokens, checkpointing=profile.gradient_checkpointing)
        settle(hyclora_args, model_args, lora_args, source, NEXT_TOKEN, load)
    check_output(Path(profile.output_dir), needed=2**20)
    results.print_settings(groups)
    report, arguments = None, arguments_of(model_args, lora_args, profile, device)
    alike = lora_args == LoraArguments(lora_args.lora_rank, lora_args.lora_alpha) and model_args.dtype == "auto"
    plain = measure_plain(source, arguments, alike) if profile.compare else {}
    try:
        model = load_model(model_args, lora_args, source, device, profile.seed)
        if hyclora_args.use_hyclora:
            report = apply_hyclora(model, hyclora_args.config())
            report.plan = hyclora_args.plan or None
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
        "plain": plain,
        "arguments": arguments,
        "settings": results.settings(*groups),
    }
    record("run_memory_throughput", line, Path(profile.output_dir))
    if "error" in found:
        raise RunStopped("out of memory: lower per_device_train_batch_size or seq_len, or try a smaller q_bit")
    columns = plain | {f"HyC-LoRA, {hyclora_args.preset}" if hyclora_args.use_hyclora else "this setting": line}
    print(closing_table(columns, profile))


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


def measure_plain(source: str, arguments: dict, alike: bool) -> dict[str, dict]:
    """What stock LoRA takes with the same arguments and random weights, each in a process of its own.

    alike: whether LoRA's other options and the dtype are the defaults, which these processes have.
    """
    if not alike or not Path(source).is_dir():
        return dict.fromkeys(PLAIN, {"error": "for defaults only" if not alike else "needs a folder"})
    found = {}
    for setting in PLAIN:
        print(f"measuring {setting} in a process of its own", flush=True)
        job = Job(setting=setting, checkpoints="", **arguments | {"shape": str(Path(source).resolve())})
        found[setting] = run_alone(job, PLAIN_TIMEOUT)
    return found


def closing_table(columns: dict[str, dict], profile: ProfileArguments) -> str:
    """A column a setting, a row a figure that one of them has."""
    asked = MEMORY * profile.evaluate_memory + THROUGHPUT * profile.evaluate_throughput
    rows = [("", *columns)]
    for label, key, form in asked:
        cells = [form.format(found[key]) if key in found else found.get("error", "") for found in columns.values()]
        if any(key in found for found in columns.values()):
            rows.append((label, *cells))
    if profile.evaluate_memory and not any("static_mib" in found for found in columns.values()):
        rows.append(("static, peak, dyn, held", *["need a GPU"] * len(columns)))
    *plain, ours = columns.values()
    for slot, size in ours["slot_mib"].items() if profile.evaluate_memory else ():
        rows.append((f"slot {slot}, a layer", *[""] * len(plain), f"{size:.3f} MiB"))
    return results.table(rows)


if __name__ == "__main__":
    main()
