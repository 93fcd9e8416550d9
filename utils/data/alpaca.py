"""Alpaca's instructions (Taori et al., 2023), in its own prompt format with and without an input.

Rows {"instruction", "input", "output"} come from the hub, from a file or are generated; the output, which follows the
prompt as it is and ends with the eos token, is what is learned. Of one file the last rows are held out.
"""

from pathlib import Path
from typing import NamedTuple

from hyclora.utils.args import DataArguments
from hyclora.utils.data.files import read_each, refuse_unread, response_of, text_of
from hyclora.utils.data.hub import download
from hyclora.utils.data.tokens import Example
from hyclora.utils.data.word_problems import word_problems
from hyclora.utils.errors import UserError

HUB_ID = "tatsu-lab/alpaca"
BY_HAND = "name its file, a JSON list of rows with instruction, input and output, with --data_dir"
REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
WITHOUT_INPUT = f"Below is an instruction that describes a task. {REQUEST}### Response:"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{REQUEST}### Input:\n{{input}}\n\n### Response:"
)
# What LLaMA's example programs ask a base model to go on with.
TEST_PROMPTS = (
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that ",
    "A brief message congratulating the team on the launch:\n\nHi everyone,\n\nI just ",
    "Translate English to French:\n\nsea otter => loutre de mer\npeppermint => menthe poivrée\n"
    "plush girafe => girafe peluche\ncheese =>",
)
DEMO_ROWS, DEMO_SEED = 400, 0
DEMO_INSTRUCTION = "Solve the problem, and say the number at the end."
HELD_OUT_SHARE, MOST_HELD_OUT = 10, 100


def prompt_of(instruction: str, input: str = "") -> str:
    """What a model is asked, up to where its response begins."""
    return (WITH_INPUT if input else WITHOUT_INPUT).format(instruction=instruction, input=input)


class Rows(NamedTuple):
    """unanswered: rows of the hub without a response, which are in neither list."""

    train: list[Example]
    held_out: list[Example]
    unanswered: int


def load_examples(args: DataArguments) -> Rows:
    """The first max_train_samples examples, and the last max_eval_samples (a tenth, at most 100) of the same file.

    UserError names the first mistaken row of a file, and says if nothing is left to train on. Alpaca itself has rows
    without a response: those of the hub, which a user cannot correct, are left out.
    """
    examples, unanswered = _read(args)
    held_out = min(len(examples) // HELD_OUT_SHARE, MOST_HELD_OUT)
    held_out = held_out if args.max_eval_samples is None else args.max_eval_samples
    if held_out >= len(examples):
        raise UserError(
            f"max_eval_samples {held_out} would hold out all of the {len(examples)} rows: leave some to train on"
        )
    kept = len(examples) - held_out
    return Rows(examples[:kept][: args.max_train_samples], examples[kept:], unanswered)


def _read(args: DataArguments) -> tuple[list[Example], int]:
    """All examples, and how many rows of the hub are none."""
    if args.data_name == "demo":
        return [_example("demo", row) for row in demo_rows(DEMO_ROWS, DEMO_SEED)], 0
    if not args.data_dir:
        rows = list(enumerate(download(HUB_ID, None, "train", BY_HAND)))
        answered = [(i, row) for i, row in rows if row["output"].strip()]
        return [_example(f"{HUB_ID}: row {i}", row) for i, row in answered], len(rows) - len(answered)
    file = Path(args.data_dir)
    if not file.is_file():
        raise UserError(f"data_dir {file} is no file: {BY_HAND}")
    return read_each(file, _example), 0


def _example(place: str, row: dict) -> Example:
    refuse_unread(row, place)
    instruction = text_of(row, "instruction", place)
    input = text_of(row, "input", place) if row.get("input") is not None else ""
    if not (instruction + input).strip():
        raise UserError(f'{place}: neither "instruction" nor "input" asks anything: write or remove it')
    return Example([(prompt_of(instruction, input), response_of(row, "output", place))])


def demo_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Generated word problems as instructions, every other one as the input of an instruction."""
    return [
        {"instruction": DEMO_INSTRUCTION if i % 2 else row["question"], "input": row["question"] if i % 2 else ""}
        | {"output": row["answer"]}
        for i, row in enumerate(word_problems(n, seed))
    ]
