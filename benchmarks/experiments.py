"""The paper's experiments on a small model: each task, way of keeping activations and seed is a run of its driver.

    python -m benchmarks.experiments --model ckpt/smollm2-135m --data data --output_dir exp_results_small --jobs 12
    python -m benchmarks.experiments --model ckpt/small-roberta --data data --tasks sst2 rte mrpc cola stsb
    python -m benchmarks.experiments --model ckpt/smollm2-135m --data data --tasks alpaca --jobs 12
    python -m benchmarks.experiments --data data --jobs 2 -- --max_steps 3 --max_eval_samples 8   # tries it out

The data folder has gsm8k/{train,test}.jsonl, wikitext-2/{train.txt.gz,test.txt}, arithmetic/NAME/test.json, books and
proofs in longtext/, alpaca/alpaca_small.json and glue/TASK/{train,dev}.tsv; what is not used may be missing. Options
after -- go to the drivers.

Runs go side by side, the first of each task being those that tell most (FIRST). Each that ends appends a line to
OUTPUT_DIR/experiments.jsonl, one that fails with its error; those whose last line has none are not run again, so
that the same command goes on after an interruption. To be shown, lines belong into the file of this name in
benchmarks/results/.
"""

import argparse
import itertools
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.jobs import number
from benchmarks.record import read, record
from benchmarks.rows import whole
from benchmarks.workers import require_gpus, run_all, visible_gpus
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import Interrupted, RunStopped, UserError, entry_point

NAME = "experiments"
EXACT = "exact LoRA"
PUBLISHED = {"scale_rule": "paper"}
# the arguments of HycloraConfig of each; None is stock PEFT
VARIANTS: dict[str, dict | None] = {
    EXACT: None,
    "intra_inter, 4 bit": {"q_bit": 4},
    "intra_inter, auto 3.0": {"q_bit": "auto", "average_bits": 3.0},
    "intra_inter, auto 4.27": {"q_bit": "auto", "average_bits": 4.27},  # the bytes of 4 bit
    "intra_inter, 2 bit": {"q_bit": 2},
    "layer inputs, 4 bit": {"layers": "input4"},
    "intra_inter, 8 bit": {"q_bit": 8},
    **{f"intra, {bits} bit": {"layer_type": "intra", "q_bit": bits} for bits in (8, 4, 2)},
    **{f"published quantizer, {bits} bit": {"layer_type": "intra_inter", "q_bit": bits} | PUBLISHED for bits in (4, 2)},
    **{
        f"{name} without outliers, 2 bit": {"q_bit": 2, "layernorm_outlier_ratio": 0.0, **rule}
        for name, rule in (("intra_inter", {}), ("published quantizer", {"layer_type": "intra_inter"} | PUBLISHED))
    },
}
FIRST = [EXACT, "intra_inter, 4 bit", "intra_inter, auto 3.0", "intra_inter, 2 bit"]
# what outliers are worth is the paper's ablation on GLUE
ABLATED = [f"{name} without outliers, 2 bit" for name in ("intra_inter", "published quantizer")]
GLUE_VARIANTS = [
    EXACT,
    *(f"{name}, {b} bit" for name in ("intra_inter", "published quantizer") for b in (4, 2)),
    *ABLATED,
]
COMMON = {
    **{"learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 0, "gradient_accumulation_steps": 1},
    **{"save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 1},
}
LONG_VARIANTS = [EXACT, "intra_inter, 4 bit", "intra_inter, 2 bit", "layer inputs, 4 bit"]
LONG_EVALUATED = ("gutenberg/pg84.txt", "proof/hott-basics.tex")
# of run_alpaca.py, whose loop has a learning rate that is constant
PLAIN = {"learning_rate": 5e-4, "mixed_precision": "bf16", "num_train_epochs": 3, "save_steps": 0}
TESTED = 256  # rows of each arithmetic test, by generated answers
GENERATION = {"greedy": True, "max_new_tokens": 256, "eval_batch_size": 440}


@dataclass(frozen=True)
class Experiment:
    """A driver and its options. files: what it reads of the data folder, written {data} in options.

    by_loss: variants that are judged by their loss alone, as generating answers takes two thirds of such a run.
    common: what the driver's training shares with other tasks. later: options of all seeds but the first.
    """

    driver: str
    options: dict
    files: list[str]
    variants: list[str] = field(default_factory=lambda: [name for name in VARIANTS if name not in ABLATED])
    by_loss: tuple[str, ...] = ()
    common: dict = field(default_factory=lambda: COMMON)
    later: dict = field(default_factory=dict)


def _glue(name: str, folder: str) -> Experiment:
    options = {"data_name": name, "data_dir": "{data}/glue", "seq_len": 128, "eval_batch_size": 128}
    options |= {"max_steps": 500, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 30}
    files = [f"glue/{folder}/{split}.tsv" for split in ("train", "dev")]
    return Experiment("run_glue", options, files, GLUE_VARIANTS)


# 300 steps each but for GLUE's 500
TASKS = {
    "gsm8k": Experiment(
        "run_gsm8k",
        {"data_name": "gsm8k", "data_dir": "{data}/gsm8k", "per_device_train_batch_size": 16}
        | {"max_train_samples": 4800}
        | GENERATION,
        ["gsm8k/train.jsonl", "gsm8k/test.jsonl"],
        by_loss=tuple(name for name in VARIANTS if name not in (EXACT, "intra_inter, 4 bit")),
    ),
    # the test text with <unk> for rare words, as the training text has it
    "wikitext2": Experiment(
        "run_wikitext2",
        {"data_name": "wikitext2", "data_dir": "{data}/wikitext-2", "eval_file": "test.txt", "seq_len": 1024}
        | {"per_device_train_batch_size": 4, "max_train_samples": 1200, "eval_batch_size": 8},
        ["wikitext-2/train.txt.gz", "wikitext-2/test.txt"],
    ),
    # GSM8K's training questions are in none of the tests, unlike LLM-Adapters' training files
    "arithmetic": Experiment(
        "run_multitask",
        {"data_name": "arithmetic", "data_dir": "{data}/arithmetic", "train_file": "{data}/gsm8k/train.jsonl"}
        | {"per_device_train_batch_size": 16, "max_train_samples": 4800, "max_eval_samples": TESTED}
        | GENERATION,
        ["gsm8k/train.jsonl", *(f"arithmetic/{name}/test.json" for name in ("gsm8k", "SVAMP", "mawps", "AQuA"))],
    ),
    # a book and a chapter that are not trained on, by windows of a quarter of a row and of a whole one
    "longtext": Experiment(
        "run_longseq",
        {"data_name": "text", "data_dir": "{data}/longtext", "eval_files": " ".join(LONG_EVALUATED)}
        | {"seq_len": 8192, "eval_lengths": "2048 8192", "stride": 1024, "gradient_checkpointing": False}
        | {"max_steps": 300, "per_device_train_batch_size": 1},
        [f"longtext/{name}" for name in LONG_EVALUATED],
        LONG_VARIANTS,
    ),
    # with the script's adapters, on q and v; what is written after the test prompts is told of one seed
    "alpaca": Experiment(
        "run_alpaca",
        {"data_name": "alpaca", "data_dir": "{data}/alpaca/alpaca_small.json", "max_eval_samples": 200}
        | {"per_device_train_batch_size": 8, "gradient_accumulation": 2, "max_train_samples": 1800, "max_steps": 300},
        ["alpaca/alpaca_small.json"],
        FIRST,
        common=PLAIN,
        later={"test_prompts": False},
    ),
    "sst2": _glue("sst2", "SST-2"),
    "rte": _glue("rte", "RTE"),
    "mrpc": _glue("mrpc", "MRPC"),
    "cola": _glue("cola", "CoLA"),
    "stsb": _glue("stsb", "STS-B"),
}
LANGUAGE = ["gsm8k", "wikitext2", "arithmetic"]


@dataclass(frozen=True)
class Trial:
    """One run. more: options of this command for all of them."""

    task: str
    variant: str
    seed: int
    more: tuple[str, ...]

    @property
    def key(self) -> dict:
        return {"task": self.task, "variant": self.variant, "seed": self.seed, "more": list(self.more)}

    def argv(self, args: argparse.Namespace) -> list[str]:
        """The driver's options; those of `more` come last, and so count."""
        setting = VARIANTS[self.variant]
        name = f"{self.task}-{self.variant}-{self.seed}".replace(",", "").replace(" ", "_")
        task = TASKS[self.task]
        options = task.common | task.options | {"seed": self.seed, "run_name": name}
        options |= {
            "model_name": args.model.name,
            "model_dir": args.model.parent,
            "output_dir": args.output_dir / "runs",
        }
        options |= {"use_hyclora": False} if setting is None else setting
        if self.seed != args.seeds[0]:
            options |= task.later
        if self.variant in task.by_loss:
            options["max_new_tokens"] = 0
        # what a model can do untrained is the same for all
        options["evaluate_before"] = (self.variant, self.seed) == (EXACT, args.seeds[0])
        options = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}
        words = [str(word).replace("{data}", str(args.data)) for word in itertools.chain(*options.items())]
        return [*(f"--{word}" if i % 2 == 0 else word for i, word in enumerate(words)), *self.more]


def trials(args: argparse.Namespace) -> list[Trial]:
    """All runs that the command asks for, those that tell most first: task by task FIRST, then the others."""
    wanted = [
        Trial(task, variant, seed, tuple(args.more))
        for task in args.tasks
        for variant in TASKS[task].variants
        if not args.variants or variant in args.variants
        for seed in args.seeds
    ]
    return sorted(wanted, key=lambda trial: trial.variant not in FIRST)


def whole_line(trial: Trial, args: argparse.Namespace, found: dict) -> dict:
    """What is recorded of a run."""
    line = {**trial.key, "model": args.model.name, "setting": whole(VARIANTS[trial.variant])}
    task = TASKS[trial.task]
    line |= {"arguments": {"driver": task.driver, **task.common, **task.options}}
    if "error" in found:
        return line | {"error": found["error"]}
    kept = ("metrics", "final_loss", "kept_bits", "buffered_bytes", "train", "seconds")
    kept += ("texts",) * ("texts" in found)
    losses = [[entry["step"], entry["loss"]] for entry in found["log_history"] if "loss" in entry]
    return line | {name: found[name] for name in kept} | {"jobs": args.jobs, "losses": losses}


def told(line: dict) -> str:
    """The scores of a line, or its error."""
    return line.get("error") or "  ".join(f"{name} {found['after']:.4f}" for name, found in line["metrics"].items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=to_path, default=Path("ckpt/tiny-llama"), help="checkpoint folder")
    parser.add_argument("--data", type=to_path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--output_dir", type=to_path, default=Path("exp_results_small"), help="of lines and runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=LANGUAGE)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all of a task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=number(1), default=1, help="runs at a time")
    parser.add_argument(
        "--gpus", type=number(1), default=0, help="spread them over so many; default: those that are seen"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end what is at work after so long")
    words = list(sys.argv[1:] if argv is None else argv)
    ours, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser.parse_args(ours)
    args.more = more
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model} has no config.json: --model is a checkpoint folder")
    for name in dict.fromkeys(name for task in args.tasks for name in TASKS[task].files):
        if not (args.data / name).is_file():
            raise UserError(f"{args.data / name} does not exist: --data is a folder with {name}")
    if args.gpus:
        require_gpus("--gpus", args.gpus)
    return args


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    begun = time.monotonic()
    args.output_dir = args.output_dir.resolve()
    check_output(args.output_dir)
    lines = [line for line in read(args.output_dir / f"{NAME}.jsonl") if line["model"] == args.model.name]
    asked = trials(args)
    left = []
    for trial in asked:
        ran = [line for line in lines if {name: line[name] for name in trial.key} == trial.key]
        if not ran or "error" in ran[-1]:
            left.append(trial)
    print(f"{len(asked)} runs, {len(asked) - len(left)} done already", flush=True)
    # so that the workers end as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = [(trial, TASKS[trial.task].driver, trial.argv(args)) for trial in left]
    gpus = visible_gpus(args.gpus) if args.gpus else [None]
    failed, ended = 0, 0
    try:
        for (trial, *_), found in run_all(jobs, args.jobs, gpus, args.output_dir / "logs", begun + 60 * args.minutes):
            line = record(NAME, whole_line(trial, args, found), args.output_dir)
            passed = f"{time.monotonic() - begun:5.0f} s"
            print(f"{passed}  {trial.task:<11}{trial.variant:<30}seed {trial.seed}  {told(line)}", flush=True)
            failed, ended = failed + ("error" in found), ended + 1
    except KeyboardInterrupt:
        raise Interrupted("interrupted: the same command goes on where it stopped") from None
    if failed or ended < len(left):
        raise RunStopped(
            f"{failed} runs failed and {len(left) - ended} were left undone; lines and logs are in {args.output_dir}, "
            "the same command goes on"
        )


if __name__ == "__main__":
    main()
