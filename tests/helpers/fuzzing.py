"""Hostile input for the programs: options, files of data and model folders that are nearly right, drawn from a seed."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig

from hyclora import fidelity, plan
from hyclora.utils.args import Parser
from hyclora.utils.data.glue import GLUE
from tests.helpers.drivers import DEFAULTS, GROUPS

VALUES = [
    *(
        "",
        " ",
        "0",
        "-1",
        "1",
        "2",
        "3.5",
        "1e400",
        "-0.0",
        "nan",
        "inf",
        "1_0",
        "0x10",
        "9" * 18,
        "9" * 30,
        "True",
        "False",
        "auto",
    ),
    *("None", "null", "[]", "{}", "[1", '{"gate": "exact"}', '{"gate": 4}', '{"no": "quant4"}', '{"layer_in": null}'),
    *("24GiB", "0GiB", "1MB", "999999999TiB", ".GB", "4x512", "1x2", "0x9", "999999999x999999999", "q_proj,up_proj"),
    *("4", "8", "quant4", "8*slots,input4", "0*slots", ",", "*", "slots", "1*1*1", "2 of 3", "0 of 1", "3 of 2"),
    *(
        "demo",
        "json",
        "gsm8k",
        "text",
        "q_proj",
        "lm_head",
        "all-linear",
        "..",
        "/",
        "/dev/null",
        "/nowhere/x",
        "~",
        ".",
    ),
    *("\u2028", "ünïcödé", "\U0001f917", "a\nb", "%s%d", "$(false)", "-", "--", "x" * 5000, "/" + "x" * 300, "\ud800"),
]
JSON_VALUES = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2,
        3,
        7,
        65,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "4",
        "llama",
        "silu",
        "none",
        "\ud800",
    ),
    *(
        [],
        [[]],
        [None],
        ["x"],
        {},
        {"x": 1},
        {"rope_type": "linear"},
        {"role": "user"},
        [{"role": "assistant"}],
        10**30,
    ),
]
# what goes elsewhere than to a file of the test: other machines, processes, services, and the results' place
OUTSIDE = tuple(
    f"--{name}"
    for name in (
        *("output_dir", "report_to", "trackio", "local_rank", "ddp_", "deepspeed", "fsdp", "tpu"),
        *("num_gpus", "project", "parallelism", "logging_dir", "sweep", "log_level"),
    )
)

_PAIRS = [{"prompt": f"{n} + 1?", "response": str(n + 1)} for n in range(6)]
_CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hi {n}"}]} for n in range(4)
]
_PROBLEMS = [{"question": f"{n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(6)]
_ASKED = [{"instruction": f"Say {n}", "input": "", "output": f"It is {n}", "answer": f"{n}.0"} for n in range(20)]
_TEXT = "\n\n".join(f"The {n}th line of a text, which goes on for a while." for n in range(60))


def _tsv(name: str) -> str:
    task = GLUE[name]
    columns = task.columns or (*task.texts, task.label)
    label = task.labels[0] if task.labels else "2.5"
    rows = [["" if c not in (*task.texts, task.label) else label if c == task.label else f"{c} {n}" for c in columns]
            for n in range(6)]  # fmt: skip
    return "\n".join("\t".join(cells) for cells in [*([] if task.columns else [columns]), *rows]) + "\n"


def _lines(rows: list[dict]) -> str:
    return "\n".join(map(json.dumps, rows))


def _adapters() -> dict[str, bytes]:
    """Of the first layer's q_proj of the tests' tiny LLaMA, as save_pretrained writes them."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM").to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{place}.lora_A.weight": torch.ones(2, 64), f"{place}.lora_B.weight": torch.ones(64, 2)}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors.torch.save(weights),
    }


_TIMES = [{"device": "CPU x", "versions": {"torch": "2"}, "of": {"base": "bf16"}, "ms": {"exact": 2.5, "other": "no"}}]
SHORT = "--iteration_threshold 1 --device cpu"
# of each program: options that make it read files of a folder, and the files
READ = {
    "run_gsm8k": [
        ("--data_name json --data_dir {}", {"train.jsonl": _lines(_PAIRS), "test.jsonl": _lines(_PAIRS[:2])}),
        ("--data_name json --data_dir {}", {"train.json": json.dumps(_CHATS)}),
        ("--data_name gsm8k --data_dir {}", {"train.jsonl": _lines(_PROBLEMS), "test.jsonl": _lines(_PROBLEMS[:2])}),
    ],
    "run_alpaca": [("--data_name alpaca --data_dir {}/rows.json", {"rows.json": json.dumps(_ASKED)})],
    "run_glue": [
        (f"--data_name {name} --data_dir {{}}", {f"{GLUE[name].folder}/{s}.tsv": _tsv(name) for s in ("train", "dev")})
        for name in ("cola", "mrpc", "stsb")
    ],
    "run_longseq": [
        ("--data_name text --data_dir {} --seq_len 64 --eval_lengths 32", {"a.txt": _TEXT, "b.jsonl": '{"text": "b"}'}),
        ("--data_name text --data_dir {} --seq_len 64 --eval_lengths 32", {"a.bin": "\x05\x00" * 500}),
    ],
    "run_memory_throughput": [
        ("--seq_len 16 --per_device_train_batch_size 2", {}),
        ("--seq_len 16 --random_weights True --compare False", {}),
    ],
    "run_multitask": [
        (
            "--data_name arithmetic --data_dir {} --tests SVAMP",
            {"math_10k.json": json.dumps(_ASKED), "SVAMP/test.json": json.dumps(_ASKED[:3])},
        )
    ],
    "run_wikitext2": [
        ("--data_name text --data_dir {} --seq_len 64", {"train.txt": _TEXT, "test.txt": _TEXT}),
        ("--data_name text --data_dir {} --seq_len 64", {"train.bin": "\x05\x00" * 500, "test.bin": "\x05\x00" * 90}),
    ],
    "hyclora.fidelity": [
        (f"--batch_size 1 --exact_steps 1 {SHORT} --data {{}}/rows.jsonl", {"rows.jsonl": _lines(_PAIRS)}),
        (f"--batch_size 1 --exact_steps 1 {SHORT} --data {{}}", {"train.json": json.dumps(_CHATS)}),
        (f"--batch_size 1 --exact_steps 1 {SHORT} --seq_len 32 --data {{}}/a.txt", {"a.txt": _TEXT}),
        (f"--batch_size 1 {SHORT} --adapters {{}}", _adapters()),
    ],
    "hyclora.plan": [
        ("--gpu 24GiB --host 64GiB --tokens 2x64 --base bf16", {}),
        ("--gpu 24GiB --host 64GiB --tokens 2x64 --times {}/times.json", {"times.json": json.dumps(_TIMES)}),
    ],
}
_PARSERS = {"hyclora.fidelity": lambda: Parser(fidelity.GROUPS), "hyclora.plan": plan.parser}


@dataclass
class Case:
    """A run: a program's module, its options, and whether the model is what is wrong, so that it has to be loaded."""

    driver: str
    options: list[str]
    of_model: bool


class Fuzzer:
    """Cases by their number, each in a folder of its own."""

    def __init__(self, model: Path, seed: int):
        self.model, self.seed = model, seed
        self.names: dict[str, dict[str, bool]] = {}  # of each program's options: whether it takes a value
        for driver in READ:
            parser = _PARSERS[driver]() if driver in _PARSERS else Parser(GROUPS[driver], DEFAULTS[driver])
            self.names[driver] = {
                action.option_strings[0]: action.nargs != 0
                for action in parser._actions
                if action.option_strings and not action.option_strings[0].startswith(("-h", *OUTSIDE))
            }

    def case(self, number: int, folder: Path) -> Case:
        draw = random.Random(f"{self.seed}-{number}")
        driver = draw.choice(list(READ))
        options, files = draw.choice(READ[driver])
        kind = draw.choice(("options", "data", "model", "options and data"))
        data = folder / "data"
        data.mkdir(parents=True)
        for name, text in files.items():
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
        model = self.model
        if kind == "model":
            model = shutil.copytree(self.model, folder / "model")
            spoil(draw, draw.choice(sorted(file for file in model.iterdir() if file.name != "README.md")))
        if "data" in kind and files:
            spoil(draw, data / draw.choice(sorted(files)))
        given = [*_named(driver, model, folder / "results"), *options.format(data).split()]
        if "options" in kind:
            for _ in range(draw.randint(1, 3)):
                name, takes_value = draw.choice(list(self.names[driver].items()))
                given += [name, draw.choice(VALUES)] if takes_value and draw.random() > 0.05 else [name]
        return Case(driver, given, kind == "model")


def _named(driver: str, model: Path, results: Path) -> list[str]:
    """Options that name the model and where to write."""
    if driver == "hyclora.plan":
        return [str(model)]
    if driver == "hyclora.fidelity":
        return ["--model", str(model)]
    place = ["--model_dir", str(model.parent), "--model_name", model.name, "--output_dir", str(results)]
    return [*place, *(["--device", "cpu"] if driver == "run_memory_throughput" else ["--use_cpu", "True"])]


def spoil(draw: random.Random, file: Path) -> None:
    """Change a file in one way or another."""
    content = bytearray(file.read_bytes())
    way = draw.choice(("cut", "bytes", "insert", "json", "json", "json", "repeat", "empty", "gone", "folder", "nested"))
    at = draw.randrange(len(content) + 1)
    if way == "cut":
        del content[at:]
    elif way == "bytes":
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif way == "insert":
        content[at:at] = draw.choice(
            (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n\n", b"\t", b'"', b"}", b"\r", b"\xed\xa0\x80")
        )
    elif way == "json":
        content = bytearray(_spoiled_json(draw, bytes(content)))
    elif way == "repeat":
        content += content[at:]
    elif way == "empty":
        content.clear()
    elif way == "nested":
        content = bytearray(b"[" * 100_000 if draw.random() < 0.5 else b'{"a":' * 100_000)
    if way in ("gone", "folder"):
        file.unlink()
        if way == "folder":
            file.mkdir()
        return
    file.write_bytes(bytes(content))


def _spoiled_json(draw: random.Random, content: bytes) -> bytes:
    """One value of JSON, or of a line of it, is another one; what is no JSON stays."""
    try:
        return json.dumps(_other_value(draw, json.loads(content))).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # it was spoiled before
        lines = content.split(b"\n")
        at = draw.randrange(len(lines))
        try:
            lines[at] = json.dumps(_other_value(draw, json.loads(lines[at]))).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            return content
        return b"\n".join(lines)


def _other_value(draw: random.Random, value):
    if draw.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return draw.choice(JSON_VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    if draw.random() < 0.2:
        del value[key]
    else:
        value[key] = _other_value(draw, value[key])
    return value
