"""Memory and time of one training micro-step (forward and backward) at a model shape with random NF4 weights.

    python -m benchmarks.step                 # Llama-2-7B's shape, 4 x 512 tokens, needs a GPU

static: allocated after an optimizer step (weights, adapters, gradients, Adam's moments). dyn: peak over a micro-step
minus static. ms: median over timed micro-steps after warm-up, which covers calibration. One JSON line a setting;
setting null is stock PEFT with SDPA, "checkpointing" the same with gradient checkpointing.
"""

import argparse
import json
import statistics
import time

import torch

from benchmarks.buffered import add_shape_arguments, build_model
from benchmarks.record import record
from models import HycloraConfig, apply_hyclora, remove_hyclora
from utils.errors import UserError, entry_point

SETTINGS = [
    None,
    "checkpointing",
    {"layer_type": "baseline"},
    *({"layer_type": "intra_inter", "q_bit": bits} for bits in (8, 4, 2)),
    *({"layer_type": "intra_inter_full_fuse", "q_bit": bits} for bits in (4, 2)),
    {"q_bit": "auto", "average_bits": 3.0},
]
WARM_UP = 7


def measure(model: torch.nn.Module, batch: dict, steps: int) -> dict:
    """static, peak and dyn in MiB, ms with its spread, and the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def micro_step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    for _ in range(WARM_UP):
        micro_step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = micro_step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated()
    optimizer.zero_grad()
    return {
        "static_mib": round(static / 2**20, 1),
        "dyn_mib": round((peak - static) / 2**20, 1),
        "ms": round(statistics.median(times), 1),
        "ms_range": [round(min(times), 1), round(max(times), 1)],
        "tokens_per_second": round(batch["input_ids"].numel() / statistics.median(times) * 1e3),
        "loss": round(loss.item(), 4),
    }


@entry_point
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--settings", type=json.loads, default=SETTINGS, help="JSON list of HycloraConfig arguments")
    parser.add_argument("--steps", type=int, default=10, help="timed micro-steps")
    args = parser.parse_args(argv)
    if args.device != "cuda":
        raise UserError("benchmarks.step measures GPU memory and time: it needs a GPU")
    model = build_model(args, args.layers)
    ids = torch.randint(0, args.vocab, (args.batch_size, args.seq_len), device=args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for setting in args.settings:
        if setting == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        elif setting is not None:
            apply_hyclora(model, HycloraConfig(**setting))
        try:
            result = measure(model, batch, args.steps)
        except torch.OutOfMemoryError:
            result = {"error": "out of memory"}
        if setting == "checkpointing":
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        elif setting is not None:
            remove_hyclora(model)
        torch.cuda.empty_cache()
        arguments = {"arguments": {**vars(args), "settings": None}}
        record("step", {"setting": setting, **result, **arguments})
        print(f"{json.dumps(setting):<56}" + "  ".join(f"{name} {value}" for name, value in result.items()), flush=True)


if __name__ == "__main__":
    main()
