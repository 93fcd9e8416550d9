"""What the result files say: the last line of each setting, and a setting in words."""

import json

from benchmarks.record import RESULTS, read
from hyclora.models.config import HycloraConfig

CELL = ("device", "shape", "base", "lora_rank", "batch_size", "seq_len")
LSE_KEPT = {"lse": "exact"}


def load(name: str, *keys: str) -> list[dict]:
    """The last line of each setting, in the order of first appearance.

    keys: what else tells two measurements apart, names of a line's values or arguments.
    """
    latest = {}
    for line in read(RESULTS / f"{name}.jsonl"):
        values = {**line["arguments"], **line}
        latest[json.dumps([name_of(line["setting"]), *(values.get(key) for key in keys)])] = line
    return list(latest.values())


def load_7b(name: str) -> list[dict]:
    """The lines of load(name) that are of Llama-2-7B's widths and 2048 tokens."""
    wanted = {"hidden": 4096, "ffn": 11008, "n_rows": 2048, "batch_size": 4, "seq_len": 512, "base": "nf4"}
    lines = load(name, *wanted)
    return [line for line in lines if all(line["arguments"].get(k, v) == v for k, v in wanted.items())]


def memory_cells() -> dict[tuple, list[dict]]:
    """Lines of memory_throughput that were measured on a GPU, by the values of CELL; the GPU measured last is first."""
    cells: dict[tuple, list[dict]] = {}
    latest: dict[str, str] = {}
    for line in load("memory_throughput", *CELL):
        if line["arguments"]["device"] == "cuda":
            latest[line["device"]] = max(line["time"], latest.get(line["device"], ""))
            cells.setdefault(tuple((line["arguments"] | line)[key] for key in CELL), []).append(line)
    by_time = sorted(latest, key=latest.get, reverse=True)
    return dict(
        sorted(cells.items(), key=lambda cell: (by_time.index(cell[0][0]), cell[0][1:4], cell[0][-1], cell[0][-2]))
    )


def name_of(setting: dict | str | None) -> str:
    """A setting as a reader would say it; a peer's name says it already."""
    if not isinstance(setting, dict):
        return setting or "PEFT LoRA"
    # lines of before full_fuse became the default do not name the layer type that they had
    default = HycloraConfig(layer_type="intra_inter").to_dict()
    rest = {name: value for name, value in setting.items() if value != default.get(name)}
    kind, bits = rest.pop("layer_type", "intra_inter"), rest.pop("q_bit", 4)
    average, rule = rest.pop("average_bits", 3.0), rest.pop("scale_rule", "channel_group")
    words = [kind, f"auto, {average:g} bits on average" if bits == "auto" else f"{bits} bit"]
    if kind == "baseline":
        words = ["baseline (exact)"]
    if rule == "paper":
        words.append("published quantizer")
    if rest.pop("offload", False):
        words.append("offloaded")
    if rest.pop("cuda_graphs", False):
        words.append("CUDA graphs")
    if rest.get("slot_savers") == LSE_KEPT:
        rest.pop("slot_savers")
        words.append("lse kept")
    return ", ".join([*words, *(f"{name} {value}" for name, value in rest.items())])


def describe_model(cell: tuple) -> str:
    """The shape of a cell of `memory_cells`, with base and rank."""
    _, shape, base, rank = cell[:4]
    return f"{shape}, {base.upper()}{'' if rank == 16 else f', rank {rank}'}"


def describe_batch(cell: tuple) -> str:
    """The batch of a cell of `memory_cells`."""
    return f"{cell[4]} x {cell[5]} tokens"


def describe_device(cell: tuple) -> str:
    """The GPU of a cell of `memory_cells`, in short."""
    return cell[0].removeprefix("NVIDIA ").split()[0]
