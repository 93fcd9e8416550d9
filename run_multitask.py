"""Fine-tune on arithmetic word problems with HyC-LoRA, and be judged by several test sets at once.

    bash run_multitask.sh                                                    # demo, minutes on a CPU
    bash download_datasets.sh arithmetic
    model_name=llama-2-7b-hf data_name=arithmetic bash run_multitask.sh     # Math10K; GSM8K, SVAMP, mawps, AQuA

The settings are at the top of run_multitask.sh and in utils/settings.sh; `python run_multitask.py --help` lists all of
them. Test questions that are among the training rows are counted, and their accuracy is marked.
"""

import hyclora.utils.interrupts

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hyclora.utils.args import ROOT, DataArguments, GenerationArguments, option, require
from hyclora.utils.data import arithmetic
from hyclora.utils.data.tokens import tokenize_rows
from hyclora.utils.driver import Driver
from hyclora.utils.metrics import evaluate_generation
from hyclora.utils.tasks import Task

FILES = ROOT / "data" / "arithmetic"
DEMO_ROWS, DEMO_TESTED = 1600, 60
SETS = {"demo": ",".join(arithmetic.DEMO_SETS), "arithmetic": "gsm8k,SVAMP,mawps,AQuA"}


@dataclass
class MultitaskArguments(DataArguments):
    data_name: Literal["demo", "arithmetic"] = option(
        "demo", "demo: generated word problems; arithmetic: train_file, and the test sets of data_dir."
    )
    data_dir: str = option(
        "", f"Folder of the test sets, NAME/test.json (or test.jsonl); '': {FILES.relative_to(ROOT)}, as downloaded."
    )
    train_file: str = option(
        "",
        "Rows to train on, a .json or .jsonl file: instruction, input and output (LLM-Adapters), question and answer "
        "(GSM8K), or original_text, equation and ans (MAWPS); '': math_10k.json of data_dir.",
    )
    tests: str = option("", f"Test sets, with commas between; '': {SETS['arithmetic']}, or {SETS['demo']} of the demo.")
    drop_seen: bool = option(False, "Leave the training rows out whose question is in one of the test sets.")

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.data_name == "demo" and self.train_file),
            f"train_file {self.train_file!r} would be ignored with data_name demo: "
            "add --data_name arithmetic, or drop train_file",
        )
        require(bool(self.names), f"tests {self.tests!r} names no test set: write for example {SETS[self.data_name]}")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(re.findall(r"[^,\s]+", self.tests or SETS[self.data_name])))


def demo(data: MultitaskArguments) -> arithmetic.Problems:
    return arithmetic.demo(DEMO_ROWS, data.names, DEMO_TESTED)


def from_files(data: MultitaskArguments) -> arithmetic.Problems:
    folder = Path(data.data_dir or FILES)
    return arithmetic.read(Path(data.train_file or folder / "math_10k.json"), folder, data.names)


def load(read, data: MultitaskArguments, evaluation: GenerationArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    require(evaluation.max_new_tokens > 0, "max_new_tokens 0 leaves no answers, by which this task is judged: raise it")
    problems = read(data).prepared(data.drop_seen, data.max_train_samples, data.max_eval_samples)
    train = tokenize_rows(problems.examples(), tokenizer, data.seq_len)
    names = [test.name for test in problems.tests]
    rows = [{"set": test.name, **row} for test in problems.tests for row in test.rows]

    def accuracies(model):
        _, predictions = evaluate_generation(model, tokenizer, rows, evaluation, arithmetic.prompt_of)
        found = {name: fmean(row["correct"] for row in predictions if row["set"] == name) for name in names}
        return found | {"mean": fmean(found.values())}, predictions

    return Task(
        train.rows,
        rows,
        f"{train}\n{problems}",
        dict.fromkeys([*names, "mean"], ".2%"),
        accuracies,
        remarks=problems.remarks(),
        facts={
            "overlap": {test.name: test.seen for test in problems.tests},
            "left_out": {"without a response": problems.empty, "tested": problems.dropped},
        },
    )


TASKS = {"demo": partial(load, demo), "arithmetic": partial(load, from_files)}
DRIVER = Driver("multitask", MultitaskArguments, GenerationArguments, TASKS, {"greedy": True, "max_new_tokens": 512})
main = DRIVER.main

if __name__ == "__main__":
    main()
