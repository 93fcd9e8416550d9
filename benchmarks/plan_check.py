"""What the plan predicts beside what is measured, over shapes, rows, ranks and settings that it was not written for.

    python -m benchmarks.plan_check                          # some sixty cases on one GPU, several at a time
    python -m benchmarks.plan_check --match llama-3-8b --layers 8 --at_once 1

Each case is a process of its own: a few layers of full width with random weights, calibrated, then one micro-step. What
a process allocates does not depend on others on the same card, so some run at once; times are not measured. Bytes are
linear in the layers: each one more adds its weights, adapters and statistics, and what it keeps. So the full depth is
what was measured plus what is counted for the other layers (`full` of a line has the count for all of them).

On a GPU a line has static, dyn, held and host memory in MiB, predicted and measured; what a step of AdamW takes for a
time; what was reserved beside static memory before the step; and what the pool of graphs has reserved. With
`--at_once 1` also what the driver and CUDA's context take. On a CPU (to try it out) only what autograd keeps can be
measured. A case that this commit has measured on this device is not measured again.
"""

import argparse
import gc
import itertools
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from benchmarks.jobs import SHAPES, Job, number
from benchmarks.peers import alone, answer
from benchmarks.record import RESULTS, is_alike, read, record
from hyclora.models.config import PRESETS
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "plan_check"
MIB = 2**20
RESIDENT, OFFLOADED = {"cuda_graphs": True}, {"offload": True, "cuda_graphs": True}
LAYER_BY_LAYER, LONGEST = {"cuda_graphs": False}, {"offload": True, "cuda_graphs": False}
DOCUMENTS = 4  # of a packed row
# before this the gradients of attention of long rows had memory of their own, and those of all heads at once
IN_PIECES = "2026-11-30T03:50"
# and a forward layer by layer had the GEMM workspace of the backward before in lines before this (models/step_hook.py)
GIVEN_BACK = "2026-11-30T07:25"
# and of layers that are run again lines before this, in which the second run kept q and k before RoPE beside v, and its
# input beside the residual stream; o was there in pieces and joined
LATE = "2026-11-30T17:40"
# and where checkpointing keeps inputs exactly, which torch's did before this
OUR_CHECKPOINTING = "2026-11-30T22:12"
# and of offloaded slots where x A^T is LARGE, which stayed on the GPU before this
SENT = "2026-12-01T11:30"


@dataclass(frozen=True)
class Case:
    """One configuration. layers: of the model, 0 for all; rows: full, packed, or padded (of many lengths)."""

    shape: str
    batch_size: int = 4
    seq_len: int = 512
    setting: dict = field(default_factory=dict)
    rows: str = "full"
    base: str = "nf4"
    lora_rank: int = 16
    lora_dropout: float = 0.0
    checkpointing: bool = False
    layers: int = 4
    device: str = "cuda"

    def __str__(self) -> str:
        told = asdict(self) | {"setting": json.dumps(self.setting)}
        return " ".join(f"{value}" for name, value in told.items() if name not in ("layers", "device"))

    @property
    def lengths(self) -> list[int]:
        """Of the documents, one a row but in packed ones."""
        if self.rows == "packed":
            return [self.seq_len // DOCUMENTS] * DOCUMENTS * self.batch_size
        if self.rows == "padded":
            return [self.seq_len * (i + 1) // self.batch_size for i in range(self.batch_size)]
        return [self.seq_len] * self.batch_size

    @property
    def file(self) -> Path:
        """The shape's config.json: of one that is shipped, or in a folder."""
        shipped = SHAPES / self.shape
        return (shipped if shipped.is_dir() else Path(self.shape)) / "config.json"

    def config(self, layers: int) -> dict:
        """The content of config.json with so many layers, 0 for all."""
        config = json.loads(self.file.read_text(encoding="utf-8"))
        config["num_hidden_layers"] = layers or config["num_hidden_layers"]
        return config


def cases(layers: int, device: str) -> list[Case]:
    """All shapes at two batches in three modes; then, of one shape, what else a plan weighs."""
    shapes = sorted(folder.name for folder in SHAPES.iterdir())
    cells = [{"batch_size": rows, "seq_len": n} for rows, n in ((4, 512), (1, 4096))]
    modes = [{"setting": mode} for mode in (RESIDENT, OFFLOADED, LONGEST)]
    found = [{"shape": shape} | cell | mode for shape, cell, mode in itertools.product(shapes, cells, modes)]
    found += [{"setting": {"q_bit": bits} | mode} for bits in (2, 8) for mode in (RESIDENT, OFFLOADED)]
    inputs = itertools.product(("input", "input8", "input4", "2*slots,input8"), (OFFLOADED, LAYER_BY_LAYER))
    found += [{"setting": {"layers": kept} | mode} for kept, mode in inputs]
    found += [{"setting": mode, "checkpointing": True} for mode in (LAYER_BY_LAYER, LONGEST)]
    for mode in (OFFLOADED, LONGEST):
        found.append({"setting": mode, "rows": "padded"})
        found.append({"setting": mode, "rows": "packed", "batch_size": 1, "seq_len": 2048})
        found.append({"setting": mode, "lora_dropout": 0.05})
        found.append({"setting": mode, "batch_size": 1, "seq_len": 16384})
    found += [{"setting": LONGEST, "lora_rank": rank} for rank in (4, 64, 256)]
    found += [{"setting": {"attention": "eager"} | mode} for mode in (LAYER_BY_LAYER, LONGEST)]
    found += [{"setting": PRESETS["paper"].settings | LAYER_BY_LAYER}]
    found += [{"setting": LONGEST, "base": "bf16"}, {"setting": {"layer_type": "baseline"} | LAYER_BY_LAYER}]
    return [Case(**{"shape": "llama-2-7b", "layers": layers, "device": device} | one) for one in found]


@cache
def _shape(config: str, base: str, lora_rank: int, dropout: bool):
    """The Shape of a config.json's text: cases share few of them, and a large one takes a while."""
    from transformers import AutoConfig

    from hyclora.utils.planning import Shape

    values = json.loads(config)
    return Shape(AutoConfig.for_model(values.pop("model_type"), **values), base, lora_rank, dropout=dropout)


def predict(case: Case, layers: int) -> dict:
    """What the plan counts for a model of so many layers, 0 for all, in MiB."""
    from hyclora import HycloraConfig
    from hyclora.models.graphs.sizes import Sizes, filled_size
    from hyclora.utils.planning import Savers, count

    shape = _shape(json.dumps(case.config(layers)), case.base, case.lora_rank, case.lora_dropout > 0)
    savers = Savers(shape, HycloraConfig(**case.setting))
    options = {"checkpointing": case.checkpointing, "steps": False}
    if case.rows == "full":
        need = count(savers, case.batch_size, case.seq_len, **options)
    else:
        real, documents = sum(case.lengths), len(case.lengths)
        if savers.config.cuda_graphs and not case.checkpointing:
            sizes = Sizes()
            sizes.make_places(documents + 1)
            real, documents = filled_size(real), sizes.places
        need = count(savers, 1, real, documents=documents, **options)
    found = {"static": sum(need.static.values()), "dyn": need.dyn, "held": need.held}
    found["host"] = need.host + need.embeddings
    found |= {"optimizer": shape.trained // 4, "apart": need.apart}
    told = {f"{name}_mib": round(size / MIB, 1) for name, size in found.items()}
    return {"layers": shape.config.num_hidden_layers, "peak": need.peak, **told}


def kept_x_a(line: dict, setting: dict) -> bool:
    """Whether a line with this setting is of a build whose store had no x A^T, and one of today's has (LARGE)."""
    from hyclora.operators.reference import padded_rank
    from hyclora.operators.savers.base import LARGE

    a, slots = line["arguments"], setting.get("offload") and setting.get("layers", "slots") == "slots"
    if line["time"] >= SENT or not slots or a.get("checkpointing"):
        return False
    ranks = padded_rank(3 * a["lora_rank"]) + padded_rank(a["lora_rank"])  # attention's, an MLP's are fewer
    return 2 * a["batch_size"] * a["seq_len"] * ranks > LARGE


def is_of_earlier_build(line: dict) -> bool:
    """Whether a line's rows are so long, its layers run again by our code, or its peak in a forward layer by layer, so
    that it takes less than was measured."""
    from hyclora.operators.attention.flash import head_pieces

    case = Case(**line["arguments"])
    config = case.config(0)
    again = case.setting.get("layers", "slots") != "slots" or case.checkpointing and case.setting.get("offload", False)
    if again and line["time"] < LATE or case.checkpointing and line["time"] < OUR_CHECKPOINTING:
        return True
    forward = line["predicted"]["peak"].startswith("forward") and not case.setting.get("cuda_graphs", True)
    if forward and line["time"] < GIVEN_BACK:
        return True
    if kept_x_a(line, case.setting):
        return True
    heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    return line["time"] < IN_PIECES and head_pieces(case.batch_size * case.seq_len, 0, *heads) > 1


def batch_of(case: Case, vocab: int) -> dict:
    """Random tokens in rows as the case has them."""
    import torch

    from hyclora.utils.data.tokens import IGNORED
    from hyclora.utils.profiling import random_batch

    batch = random_batch(vocab, case.batch_size, case.seq_len, case.device)
    lengths = torch.tensor(case.lengths, device=case.device)
    if case.rows == "padded":
        batch["attention_mask"] = (torch.arange(case.seq_len, device=case.device) < lengths[:, None]).long()
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, IGNORED)
    if case.rows == "packed":
        del batch["attention_mask"]
        positions = torch.cat([torch.arange(n, device=case.device) for n in case.lengths])
        batch["position_ids"] = positions.view(case.batch_size, -1)
    return batch


def model_of(case: Case):
    """The case's model, of so many layers as it says."""
    from benchmarks.peers import build
    from hyclora.utils.checkpointing import checkpoint_layers

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config(case.layers)), encoding="utf-8")
        model = build(
            Job(
                case.setting, folder, case.base, case.lora_rank, case.batch_size, case.seq_len, 1, None, case.device,
                "", case.lora_dropout,
            )
        )  # fmt: skip
    if case.checkpointing:
        checkpoint_layers(model)
        model.enable_input_require_grads()
    return model


def beside_allocator() -> int:
    """Bytes of the GPU that torch's allocator in this process does not know of: others', the driver's, CUDA's."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure(case: Case) -> dict:
    """The case's micro-step, measured in this process."""
    import torch

    from hyclora.utils.profiling import MicroStep

    model = model_of(case)
    step = MicroStep(model, batch_of(case, model.config.vocab_size))
    if case.device != "cuda":
        return step.memory()
    gc.collect()
    torch.cuda.empty_cache()
    beside = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    found = step.memory()
    graphs = [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) != (0, 0)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.optimizer.step()
    torch.cuda.synchronize()
    sizes = {
        "optimizer": torch.cuda.max_memory_allocated() - before,
        "reserved_before": beside,
        "graphs_pool": sum(one["total_size"] for one in graphs),
        "card": beside_allocator(),
    }
    return found | {f"{name}_mib": round(size / MIB, 1) for name, size in sizes.items()}


def line_of(case: Case, measured: dict, alone_on_card: bool) -> dict:
    """A line of results; what else the card has is only the context where nobody else is on it."""
    measured = dict(measured)
    card = measured.pop("card_mib", None)
    told = {"context_mib": card} if alone_on_card and card is not None else {}
    kept = ("optimizer_mib", "static_mib", "dyn_mib", "held_mib", "host_mib", "buffered_mib")
    compared = {name: value for name, value in measured.items() if name in kept or "error" in name}
    rest = {name: value for name, value in measured.items() if name.endswith("_mib") and name not in kept}
    counts = {"predicted": predict(case, case.layers), "full": predict(case, 0)}
    return {"setting": case.setting, "measured": compared, **counts, **rest, **told, "arguments": asdict(case)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=number(0), default=4, help="of each model; 0: all")
    parser.add_argument("--at_once", type=number(1), default=4, help="processes on the card")
    parser.add_argument("--match", default="", help="only cases whose text has this in it")
    parser.add_argument("--limit", type=number(1), help="only the first N of them")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries it out")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own gets
    return parser.parse_args(argv)


def in_a_process(case: Case, timeout: float) -> dict:
    """`measure` in a process of its own; a failure is {"error": its cause}."""
    return alone([sys.executable, "-m", "benchmarks.plan_check", "--case", json.dumps(asdict(case))], timeout)


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.case:
        return answer(lambda: measure(Case(**json.loads(args.case))))
    import torch

    from hyclora.utils.results import environment

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this measures GPU memory: it needs a GPU (or --device cpu)")
    check_output(args.output_dir, needed=2**20)
    now, lines = environment(), read(args.output_dir / f"{NAME}.jsonl")
    known = [line["arguments"] for line in lines if is_alike(line, now)]
    chosen = [case for case in cases(args.layers, args.device) if args.match in str(case) and asdict(case) not in known]
    chosen = chosen[: args.limit]
    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = {pool.submit(in_a_process, case, args.timeout): case for case in chosen}
        try:
            for job in as_completed(jobs):
                line = line_of(jobs[job], job.result(), args.at_once == 1)
                record(NAME, line, args.output_dir)
                print(f"{jobs[job]}: measured {line['measured']}, predicted {line['predicted']}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
