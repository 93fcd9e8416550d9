"""What the result files say: the last line of each setting, and a setting in words."""

import json

from benchmarks.record import RESULTS, read
from hyclora.models.config import KEPT, PRESETS, HycloraConfig
from hyclora.operators.attention.flash4 import PACKAGE

CELL = ("device", "shape", "base", "lora_rank", "batch_size", "seq_len")
LSE_KEPT = {"lse": "exact"}
# Lines written before settings were recorded whole hold what was given alone; these defaults have changed since.
DEFAULTS_THEN = {"layer_type": "intra_inter", "cuda_graphs": False}
SAID = {
    "published quantizer": {"scale_rule": "paper"},
    "offloaded": {"offload": True},
    "embeddings in host memory": {"offload_embeddings": True},
    "CUDA graphs": {"cuda_graphs": True},
    "as a stream": {"stream": True},
}


def load(name: str, *keys: str) -> list[dict]:
    """The last line of each setting, in the order of first appearance; none that ran flash-attn-4.

    keys: what else tells two measurements apart, names of a line's values or arguments.
    """
    latest = {}
    for line in read(RESULTS / f"{name}.jsonl"):
        if PACKAGE in line["versions"]:
            continue
        if isinstance(line["setting"], dict):
            line["setting"] = _as_measured(name, whole(DEFAULTS_THEN | line["setting"]))
        values = {**line["arguments"], **line}
        latest[json.dumps([name_of(line["setting"]), *(values.get(key) for key in keys)])] = line
    return list(latest.values())


def _as_measured(benchmark: str, setting: dict) -> dict:
    """A whole setting with the defaults of today for what the benchmark's numbers do not show.

    Padding, as its random rows are full; and but for time and GPU memory, CUDA graphs, which change neither bytes nor
    gradients.
    """
    if benchmark in ("real_rows", "packed_rows"):
        return on_a_gpu(setting) | {"stream": "auto" if setting["stream"] else False}
    default = whole({})
    graphs = on_a_gpu(setting) if benchmark == "memory_throughput" else default
    return setting | {"stream": default["stream"], "cuda_graphs": graphs["cuda_graphs"]}


def load_7b(name: str) -> list[dict]:
    """The lines of load(name) that are of Llama-2-7B's widths and 2048 tokens."""
    wanted = {"hidden": 4096, "ffn": 11008, "n_rows": 2048, "batch_size": 4, "seq_len": 512, "base": "nf4"}
    lines = load(name, *wanted)
    return [line for line in lines if all(line["arguments"].get(k, v) == v for k, v in wanted.items())]


def on_gpus(lines: list[dict]) -> list[dict]:
    """The lines that were measured on a GPU; those of the GPU measured last come first."""
    lines = [line for line in lines if line["arguments"]["device"] == "cuda"]
    latest: dict[str, str] = {}
    for line in lines:
        latest[line["device"]] = max(line["time"], latest.get(line["device"], ""))
    return sorted(lines, key=lambda line: latest[line["device"]], reverse=True)


def memory_cells() -> dict[tuple, list[dict]]:
    """Lines of memory_throughput that were measured on a GPU, by the values of CELL; the GPU measured last is first."""
    cells: dict[tuple, list[dict]] = {}
    lines = on_gpus(load("memory_throughput", *CELL))
    for line in lines:
        cells.setdefault(tuple((line["arguments"] | line)[key] for key in CELL), []).append(line)
    by_time = list(dict.fromkeys(line["device"] for line in lines))
    return dict(
        sorted(cells.items(), key=lambda cell: (by_time.index(cell[0][0]), cell[0][1:4], cell[0][-1], cell[0][-2]))
    )


def whole(setting: dict | str | None) -> dict | str | None:
    """A setting with all of its fields, as it is recorded: what it leaves out is HycloraConfig's default of today."""
    return HycloraConfig(**setting).to_dict() if isinstance(setting, dict) else setting


def on_a_gpu(setting: dict) -> dict:
    """A whole setting with what cuda_graphs="auto" is on one GPU."""
    return setting | {"cuda_graphs": bool(setting["cuda_graphs"])}


def presets_of(setting: dict | str | None) -> list[str]:
    """The names of the presets that a setting is, whole, on one GPU."""
    if not isinstance(setting, dict):
        return []
    found = on_a_gpu(whole(setting))
    return [name for name, preset in PRESETS.items() if on_a_gpu(whole(preset.settings)) == found]


def name_of(setting: dict | str | None) -> str:
    """A setting as a reader would say it, by the preset that it begins with; a peer's name says it already.

    Layer by layer is not said: all settings were measured so before there were CUDA graphs.
    """
    if not isinstance(setting, dict):
        return setting or "PEFT LoRA"
    default = whole({}) | {"cuda_graphs": False}

    def changed(setting: dict) -> dict:
        return {name: value for name, value in whole(setting).items() if value != default[name]}

    rest = changed(setting)
    bits, average, savers = (rest.pop(name, default[name]) for name in ("q_bit", "average_bits", "slot_savers"))
    inputs = KEPT.get(rest.get("layers"))
    preset = next((name for name, preset in PRESETS.items() if changed(preset.settings) == rest), None)
    words = [f"auto, {average:g} bits on average" if bits == "auto" else f"{bits} bit"]
    if inputs is not None:
        words = ["layer inputs", inputs if inputs == "exact" else f"{inputs.removeprefix('quant')} bit"]
        del rest["layers"]
    elif preset is not None:
        words, rest = [f"HyC-LoRA {preset}", *words], {}
    elif rest.get("layer_type") == "baseline":
        words = ["baseline (exact)"]
    else:
        words = [rest.get("layer_type", default["layer_type"]), *words]
    for said, found in SAID.items():
        if found.items() <= rest.items():
            words.append(said)
            rest = {name: value for name, value in rest.items() if name not in found}
    if savers == LSE_KEPT:
        words.append("lse kept")
    elif savers:
        rest["slot_savers"] = savers
    rest = {name: value for name, value in rest.items() if name != "layer_type" and value != "auto"}
    return ", ".join([*words, *(f"{name} {value}" for name, value in rest.items())])


def named(setting: dict | str | None) -> str:
    """name_of as a table has it beside peers: this project's settings stand out."""
    name = name_of(setting)
    return f"**{name}**" if isinstance(setting, dict) else name


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
