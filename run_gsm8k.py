"""Fine-tune on GSM8K, generated word problems or your own rows with HyC-LoRA; report what that changed, and its bytes.

    bash run_gsm8k.sh                                          # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh
    model_name=llama-2-7b-hf data_name=json data_dir=my_rows.jsonl bash run_gsm8k.sh

The settings are at the top of run_gsm8k.sh and in utils/settings.sh; `python run_gsm8k.py --help` lists all of them.
"""

import hyclora.utils.interrupts

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hyclora.utils.answers import extract_number, options_of
from hyclora.utils.args import DataArguments, GenerationArguments, option, require
from hyclora.utils.data.gsm8k import examples_of, load_rows, target_of
from hyclora.utils.data.instructions import load_examples
from hyclora.utils.data.tokens import tokenize_rows
from hyclora.utils.driver import Driver
from hyclora.utils.metrics import evaluate_generation, evaluate_loss
from hyclora.utils.tasks import Task


@dataclass
class Gsm8kArguments(DataArguments):
    data_name: Literal["demo", "gsm8k", "json"] = option(
        "demo", "demo: generated word problems; gsm8k: grade school math; json: your own rows from data_dir."
    )
    data_dir: str = option(
        "",
        "gsm8k: folder with train.jsonl and test.jsonl, '' downloads openai/gsm8k; json: a .json or .jsonl file, or a "
        "folder with train.jsonl and, to be evaluated, test.jsonl. Rows have prompt and response (or completion), "
        "instruction, input and output, messages, or question and answer.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_name == "json":
            require(
                bool(self.data_dir), "data_name json needs --data_dir: a .json or .jsonl file, or a folder with one"
            )


def word_problems(data: Gsm8kArguments, evaluation: GenerationArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    rows, test = load_rows(data, "train"), load_rows(data, "test")
    train = tokenize_rows(examples_of(rows), tokenizer, data.seq_len)
    if not test:
        return Task(train.rows, test, f"{train}\nno test rows", {}, lambda model: ({}, []))
    for number, row in enumerate(test if evaluation.max_new_tokens else (), 1):
        require(
            options_of(row["question"]) or extract_number(target_of(row["answer"])) is not None,
            f"the answer of test row {number} has no number, by which accuracy is judged: correct it, or have losses "
            "alone with --max_new_tokens 0",
        )
    answers = tokenize_rows(examples_of(test), tokenizer, data.seq_len, kind="test")

    def accuracy_and_loss(model):
        found, predictions = {}, []
        if evaluation.max_new_tokens:
            found["accuracy"], predictions = evaluate_generation(model, tokenizer, test, evaluation)
        found["test loss"] = evaluate_loss(model, answers.rows, tokenizer.pad_token_id, evaluation)
        return found, predictions

    forms = ({"accuracy": ".2%"} if evaluation.max_new_tokens else {}) | {"test loss": ".4f"}
    return Task(train.rows, test, f"{train}\n{answers}", forms, accuracy_and_loss)


def own_rows(data: Gsm8kArguments, evaluation: GenerationArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    examples, held_out = load_examples(data, "train"), load_examples(data, "test")
    train = tokenize_rows(examples, tokenizer, data.seq_len)
    test, summary = [], f"{train}\nno test rows"
    if held_out:
        tokenized = tokenize_rows(held_out, tokenizer, data.seq_len, kind="test")
        test, summary = tokenized.rows, f"{train}\n{tokenized}"

    def loss(model):
        return {"test loss": evaluate_loss(model, test, tokenizer.pad_token_id, evaluation)}, []

    return Task(train.rows, test, summary, {"test loss": ".4f"}, loss)


TASKS = {"demo": word_problems, "gsm8k": word_problems, "json": own_rows}
DRIVER = Driver("gsm8k", Gsm8kArguments, GenerationArguments, TASKS)
main = DRIVER.main

if __name__ == "__main__":
    main()
